"""From what a user names, a folder and a preset, to what the loop takes: images of one shape, a recipe, a device."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from undiffuse.data.format.several import join
from undiffuse.data.pack import WORKERS, open_data
from undiffuse.data.source import Source, open_raw
from undiffuse.data.subset import divide
from undiffuse.machine import device as machine
from undiffuse.machine import dist, log, store
from undiffuse.model.load import load
from undiffuse.model.model import Model
from undiffuse.model.recipe import Recipe, load_recipe
from undiffuse.training import loop
from undiffuse.training.auto import choose, look_at, recipe_of
from undiffuse.training.look import held_out_split
from undiffuse.training.resume import saved_recipe

Data = str | Path | Source | Sequence[str | Path]
Say = Callable[[str], None]


def train(
    data: Data,
    out: str | Path,
    preset: str | Path = "auto",
    *,
    steps: int | None = None,
    images: int | None = None,
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

    `data` is a path, several, a named set, or a source. `preset` is a shipped preset, a TOML file, or "auto", which
    chooses from the data and the device and says what. `steps`, `images` and `minutes` end the run, whichever comes
    first; `settings` are `a.b=c` as in `--set`. `init` fine-tunes another model. Raises UsageError and DataError for
    what cannot be trained, NotFiniteError for a loss that is lost, and as the disk does.
    """
    run = store.Run(Path(out))
    named: str | Source = data if isinstance(data, Source) else _spec(data)
    spec = None if isinstance(named, Source) else named
    if not dist.together():  # so that a second writer need not read all data to be told so; the first looks again
        run.refuse_second()
    chosen, say = machine.choose(device), say if dist.is_first() else _silent
    recipe = _recipe(preset, run, named, list(settings), chosen, steps, minutes is not None, say)
    source = named if isinstance(named, Source) else _open(named, recipe, skip_bad, use_cache, show_progress)
    c, h, w = source[0].image.shape
    left_out = f", {len(source.skipped)} left out" if source.skipped else ""
    say(f"{len(source):,} images of {c}×{h}×{w} from {_named(spec)}{left_out}; preset {preset}")
    held: Source | None = None
    if recipe.data.hold_out > 0:
        source, held = divide(source, recipe.data.hold_out)
        say(f"{len(held):,} of them are held out, {len(source):,} are trained on")
    elif spec is not None:
        held = held_out_split(spec, recipe, (c, h, w), skip_bad)
    begin = init if init is None or isinstance(init, Model) else load(init, chosen)
    budget = loop.Budget(steps, images, minutes)
    show = show_progress and dist.is_first()
    return loop.train(recipe, source, run.path, held, begin, budget, chosen, say, show, accept_data, logs, profile)


def _spec(data: str | Path | Sequence[str | Path]) -> str:
    return str(data) if isinstance(data, (str, Path)) else join([str(each) for each in data])


def _named(spec: str | None) -> str:
    names = ["a source"] if spec is None else spec.split("\n")
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _silent(text: str) -> None: ...


def _recipe(
    preset: str | Path,
    run: store.Run,
    data: str | Source,
    settings: list[str],
    device: torch.device,
    steps: int | None,
    timed: bool,
    say: Say,
) -> Recipe:
    """A preset's; for "auto" that of the run which is there, so that the same command goes on, else a choice."""
    if str(preset) != "auto":
        return load_recipe(preset, settings)
    saved = saved_recipe(run)
    if saved:
        return recipe_of(saved, settings)
    raw = data if isinstance(data, Source) else open_raw(data)
    choice = choose(look_at(raw, None if isinstance(data, Source) else data, device), settings, steps, timed)
    for line in choice.why:
        say(line)
    return choice.recipe


def _open(spec: str, recipe: Recipe, skip_bad: bool, use_cache: bool | None, show_progress: bool) -> Source:
    shape = {"size": recipe.data.size, "channels": recipe.data.channels, "background": recipe.data.background}
    show = show_progress and dist.is_first()
    return open_data(spec, **shape, skip_bad=skip_bad, use_cache=use_cache, workers=WORKERS, show_progress=show)
