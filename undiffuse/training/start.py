"""From what a user names, a folder and a preset, to what the loop takes: images of one shape, a recipe, a device."""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, SupportsIndex

import torch

from undiffuse.config import plain
from undiffuse.data import made, remark
from undiffuse.data.format.several import spec_of
from undiffuse.data.listing import MARK, refuse_inside
from undiffuse.data.pack import WORKERS, open_data
from undiffuse.data.passed import line
from undiffuse.data.source import LISTED, Source, Wanted, open_raw, unify
from undiffuse.data.subset import divide
from undiffuse.errors import UsageError, counted
from undiffuse.machine import device as machine
from undiffuse.machine import dist, log, store
from undiffuse.machine.log import Say
from undiffuse.model.load import load
from undiffuse.model.model import Model
from undiffuse.model.recipe import Recipe, load_recipe, with_settings
from undiffuse.strict import whole
from undiffuse.training import loop
from undiffuse.training.auto import choose, look_at, recipe_of, to_look_at
from undiffuse.training.look import held_out_split
from undiffuse.training.plan import Budget
from undiffuse.training.resume import refuse_other_init, saved_recipe

Data = str | Path | Source | Sequence[str | Path]


def train(
    data: Data,
    out: str | Path,
    preset: str | Path | Recipe = "auto",
    *,
    steps: SupportsIndex | None = None,
    images: SupportsIndex | None = None,
    minutes: float | int | None = None,
    settings: Sequence[str] = (),
    init: str | Path | Model | None = None,
    device: str = "auto",
    skip_bad: bool = False,
    accept_data: bool = False,
    use_cache: bool | None = None,
    logs: Sequence[str] = (),
    profile: bool = False,
    say: Say = log.say,
    show_progress: bool = True,
) -> Model:
    """Trains a model on images in the run folder `out`, or goes on with the run that is there; returns the model.

    `data` is a path, several, a named set, or a source. `preset` is a shipped preset, a TOML file, a recipe, or "auto",
    which chooses from the data and the device and says what. `steps`, `images` and `minutes` end the run, whichever
    comes first; `settings` are `a.b=c` as in `--set`. `init` fine-tunes another model. Raises UsageError and DataError
    for what cannot be trained, NotFiniteError for a loss that is lost, and as the disk does.
    """
    used = torch.cuda.is_initialized()  # before this run uses it
    run, budget, named = asked(data, out, steps, images, minutes, settings, init)
    chosen, say = machine.choose(device), say if dist.is_first() else log.silent
    auto = not isinstance(preset, Recipe) and str(preset) == "auto"
    with dist.joined() if auto else nullcontext():
        saved = _saved(run) if auto else saved_recipe(run)
        begin = load(init, chosen) if isinstance(init, (str, Path)) else init
        if saved is not None and begin is not None:
            with dist.alike():
                refuse_other_init(run, begin, "the model that is given" if isinstance(init, Model) else str(init))
        if isinstance(preset, Recipe):
            recipe = with_settings(plain(preset), settings, "the recipe")
        elif str(preset) != "auto":
            recipe = load_recipe(preset, settings)
        elif saved:
            recipe = recipe_of(saved, settings)
        else:
            recipe = _chosen(named, settings, chosen, budget, begin, say)
        about = f"preset {preset}" if saved is None and not isinstance(preset, Recipe) else recipe.about
        source, held = _images(named, recipe, about, skip_bad, use_cache, show_progress and dist.is_first(), say)
        show = show_progress and dist.is_first()
        return loop.train(
            recipe, source, run.path, held, begin, budget, chosen, say, show, accept_data, logs, profile, used
        )


def asked(
    data: Data, out: str | Path, steps: Any, images: Any, minutes: Any, settings: Any, init: Any = None
) -> tuple[store.Run, Budget, str | Source]:
    """The run, when it ends, and what it is trained on. What can be refused without reading data is: UsageError."""
    if not isinstance(out, (str, Path)):
        raise UsageError(f"out = {out!r} is not possible; give the path of a run folder")
    run, budget = store.Run(Path(out)), _budget(steps, images, minutes, settings)
    named: str | Source = data if isinstance(data, Source) else spec_of(data)
    if isinstance(named, str):
        refuse_inside(run.path, named, "--out")
    _refuse(run.path, init)
    if not dist.together():  # so that a second writer need not read all data to be told so; the first looks again
        run.refuse_second()
    return run, budget, named


def _budget(steps: Any, images: Any, minutes: Any, settings: Any) -> Budget:
    """When to stop. Raises UsageError for arguments that are nearly right."""
    if isinstance(settings, str):
        raise UsageError(f"settings = {settings!r} is not possible; give a list, such as [{settings!r}]")
    counts = {"steps": steps, "images": images}
    return Budget(
        **{name: None if value is None else whole(name, value) for name, value in counts.items()}, minutes=minutes
    )


def _refuse(out: Path, init: Any) -> None:
    if os.path.isfile(out):
        raise UsageError(f"{out} is a file; give the name of a folder")
    if os.path.exists(out / MARK):
        raise UsageError(f"{out} holds samples; give a new folder for a run")
    if init is not None and not isinstance(init, (str, Path, Model)):
        raise UsageError(f"init = {init!r} is not possible; give a model, or the path or name of one")


def _saved(run: store.Run) -> dict[str, Any] | None:
    """The recipe of the run that is there, as process 0 sees it: the others need not see its disk."""
    text = json.dumps(saved_recipe(run)) if dist.rank() == 0 else ""
    return json.loads(dist.tell(text))


def _chosen(
    named: str | Source, settings: Sequence[str], device: torch.device, budget: Budget, init: Model | None, say: Say
) -> Recipe:
    reading = to_look_at(settings)
    raw = named if isinstance(named, Source) else open_raw(named, "train", reading)
    facts = look_at(raw, None if isinstance(named, Source) else named, device, reading)
    choice = choose(facts, settings, budget, None if init is None else init.config)
    for why in choice.why:
        say(why)
    return choice.recipe


def _images(
    named: str | Source,
    recipe: Recipe,
    about: str,
    skip_bad: bool,
    use_cache: bool | None,
    show: bool,
    say: Say,
) -> tuple[Source, Source | None]:
    """What is trained on and what is held out, in the shape that the recipe says."""
    size, channels, stride = recipe.data.size, recipe.data.channels, recipe.network.stride()
    spec, reading = None if isinstance(named, Source) else named, recipe.data.reading
    if isinstance(named, Source):
        accepted = Wanted.of(size, channels).accepts(shape_of(named))
        source = named if accepted else unify(named, size, channels, skip_bad, stride=stride)
    else:
        source = open_data(named, size, channels, reading, skip_bad, use_cache, WORKERS, show, stride=stride)
        remark.refuse(source, named, "train", reading, is_meant=reading.range is not None)
    c, h, w = shape_of(source)
    say(f"{counted(len(source), 'image')} of {c}×{h}×{w} from {_named(spec)}; {about}")
    if left_out := remark.left_out(source):
        say(left_out)
    if told := made.line(source.made, len(source), (c, h, w)):
        say(told)
    if source.passed:
        say(line(source.passed))
    if recipe.data.hold_out > 0:
        rest, held = divide(source, recipe.data.hold_out)
        say(f"held out: {len(held):,} of them; trained on: {len(rest):,}")
        return rest, held
    held = None if spec is None else held_out_split(spec, recipe, (c, h, w), skip_bad)
    if held is not None and held.passed:
        say(f"held out: {line(held.passed)}")
    if held is not None and recipe.data.labels and (missing := _without(source, held)):
        say(f"held out: no pictures of {missing}")
    return source, held


def _without(source: Source, held: Source) -> str:
    """The classes that only the training split has."""
    labels = held.every_label()
    there = set() if labels is None else set(labels.tolist())
    names = [name for number, name in enumerate(source.classes or ()) if number not in there] if there else []
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def shape_of(source: Source) -> tuple[int, int, int]:
    """(channels, height, width) of the first image."""
    c, h, w = source[0].image.shape
    return c, h, w


def _named(spec: str | None) -> str:
    names = ["a source"] if spec is None else spec.split("\n")
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
