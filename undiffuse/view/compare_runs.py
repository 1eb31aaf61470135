"""`undiffuse compare`: models, runs and sets of samples beside each other on one page."""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from undiffuse.config import plain
from undiffuse.data.made import channels
from undiffuse.errors import DataError, NotFiniteError, UsageError
from undiffuse.figure import enlarged, grid
from undiffuse.machine import log
from undiffuse.machine.device import name_of
from undiffuse.measure import sets
from undiffuse.model.facts import images_seen
from undiffuse.model.load import holds_model, load
from undiffuse.model.model import Model
from undiffuse.view import pieces, ranking, results
from undiffuse.view.report import Figure, Listing, Section, Table, write_report
from undiffuse.view.results import Evaluation
from undiffuse.view.subject import Drawing, Subject, subject

UNCOMPARED = {"step", "images", "lr", "grad_norm", "images_per_second", "skipped", "loss_scale"} | pieces.QUARTERS
COLUMNS = 8  # pictures of a row that is compared
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Pictures = UInt8[Tensor, "_ _ _ _"]  # the sides need not be alike


@dataclass(frozen=True, eq=False)
class Entry:
    """One side: a model with what is known of it, or images that are there already."""

    spec: str
    subject: Subject | None = None
    images: Pictures | None = None
    own: tuple[Evaluation, ...] = ()  # of images

    @property
    def model(self) -> Model | None:
        return None if self.subject is None else self.subject.model

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        return self.model.image_shape if self.model is not None else tuple(self.images.shape[1:])  # pyright: ignore

    @property
    def evaluations(self) -> list[Evaluation]:
        return list(self.own) if self.subject is None else self.subject.evaluations

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The log of its training."""
        return [] if self.subject is None else self.subject.log


def opened(
    spec: str,
    device: str,
    evaluations: Sequence[Path] | None,
    bound: Path | None,
    n: int,
    looks: bool = True,
    size: sets.Size = None,
) -> Entry:
    """A model, or the first n pictures of a folder, zip or npz, in that size or their own; the rest as in `subject`.

    Raises UsageError and DataError.
    """
    if holds_model(spec):
        return Entry(spec, subject(spec, load(spec, device), evaluations, bound, looks))
    if bound is not None:
        raise UsageError(f"--nll {bound} is of a model, and {spec} is none; give - in its place")
    if (Path(spec) / "config.toml").exists():
        load(spec, device)  # says what the run lacks
    if not Path(spec).exists():
        raise UsageError(f"{spec} is not there; give a model, or a folder, zip or npz of pictures")
    try:
        source = sets.open_samples(spec, size)
    except DataError as error:
        raise DataError(f"{spec} is no model and holds no set of pictures: {error}") from error
    count = torch.arange(min(n, len(source)), dtype=torch.int64, device="cpu")
    own = tuple(map(Evaluation.read, evaluations or ()))
    return Entry(spec, images=source.gather(count)[0], own=own)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A page in the making."""

    entries: tuple[Entry, ...]
    how: Drawing
    command: str
    tick: Callable[[int], None] = lambda count: None

    def __post_init__(self) -> None:
        for entry in self.entries:
            if entry.model is not None:
                self.how.check(entry.model)
        if len(self.entries) > len(LETTERS):
            raise UsageError(f"{len(self.entries)} are too many for one page; give at most {len(LETTERS)}")

    @property
    def count(self) -> int:
        return 16 if self.how.n is None else self.how.n

    @property
    def subjects(self) -> list[Subject | None]:
        return [entry.subject for entry in self.entries]

    def work(self) -> int:
        """Evaluations of the networks, all together."""
        models = [entry.model for entry in self.entries if entry.model is not None]
        return sum(self.count * self.how.length(model) for model in models)

    def names(self) -> list[str]:
        """`A: cosine`: the last part of a path, or all of it where two end alike."""
        short = [Path(entry.spec).name or entry.spec for entry in self.entries]
        long = [entry.spec if short.count(name) > 1 else name for entry, name in zip(self.entries, short, strict=True)]
        return [f"{letter}: {name}" for letter, name in zip(LETTERS, long, strict=False)]


def write(page: Comparison, out: Path, tick: Callable[[int], None]) -> None:
    """Makes the page and writes it, whole or not at all; `tick(n)` is told of every n of its `work`.

    Raises UsageError, DataError and StorageError.
    """
    page, started = replace(page, tick=tick), time.monotonic()
    names = page.names()
    drawn = [_pictures(page, entry) for entry in page.entries]
    sections = [
        _glance(page, names),
        *_samples(page, names, drawn),
        *_scores(page, names),
        *_bits(page, names),
        *_losses(page, names),
        _settings(page, names),
        _made(page, names, log.duration(time.monotonic() - started)),
    ]
    short = [name.partition(": ")[2] for name in names]
    write_report(out, sections, " · ".join(short), "Beside each other: " + ", ".join(names) + ".")


def _pictures(page: Comparison, entry: Entry) -> Pictures | str:
    """n samples, or why there are none."""
    if entry.images is not None:
        return entry.images
    model = entry.model
    assert model is not None
    label = None if model.classes is None else "random"
    batch = min(64, page.count)
    try:
        return model.sample(
            page.count, page.how.length(model), page.how.named(model), page.how.seed, batch, label,
            lambda steps: page.tick(steps * batch),
        )  # fmt: skip
    except (UsageError, NotFiniteError) as error:
        return str(error)


# What each is


def _glance(page: Comparison, names: Sequence[str]) -> Section:
    """A column for each: what is known of it in numbers."""
    columns = [_facts(entry) for entry in page.entries]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = tuple((key, *(column.get(key, "–") for column in columns)) for key in keys)
    return Section("At a glance", tables=(Table(("", *names), rows),))


def _facts(entry: Entry) -> dict[str, str]:
    c, h, w = entry.shape
    found = {"images": f"{w}×{h}, {channels(c)}"}
    if entry.subject is None:
        return found | {"pictures shown": f"{len(entry.images):,}"}  # pyright: ignore[reportArgumentType]
    model, rows = entry.subject.model, entry.rows
    found |= {"weights": f"{model.parameters():,}"}
    if "step" in model.meta:
        found["training steps"] = f"{model.meta['step']:,}"
    if "images" in model.meta:
        found["images seen"] = images_seen(model.meta)
    if rows:
        found["training time"] = log.duration(pieces.seconds(rows))
    if speeds := [row["images_per_second"] for row in rows if "images_per_second" in row]:
        found["images/s (median)"] = f"{median(speeds):,.0f}"
    if isinstance(environment := model.meta.get("environment"), dict):
        found["trained on"] = f"{environment.get('device', '–')}, threads: {environment.get('threads', '–')}"
    if held := [row["held_out"] for row in rows if "held_out" in row]:
        found["held-out loss at the end"] = f"{held[-1]:.5f}"
    return found


# What they draw


def _samples(page: Comparison, names: Sequence[str], drawn: Sequence[Pictures | str]) -> list[Section]:
    """The pictures of one seed below each other, and all of them as grids."""
    shown = [(name, images) for name, images in zip(names, drawn, strict=True) if not isinstance(images, str)]
    text = [f"{name} draws none: {why}." for name, why in zip(names, drawn, strict=True) if isinstance(why, str)]
    if not shown:
        return [Section("Samples", "\n\n".join(text))]
    figures = []
    for first in range(0, min(page.count, 2 * COLUMNS), COLUMNS):
        parts = [(name, images[first : first + COLUMNS]) for name, images in shown]
        kept = [(name, images) for name, images in parts if len(images)]
        columns = max((len(images) for _, images in kept), default=0)
        if kept:
            letters = tuple(name.partition(":")[0] for name, _ in kept)
            numbers = tuple(f"{first + i}" for i in range(columns))
            alt = f"Samples {numbers[0]} to {numbers[-1]}, a row for each of {', '.join(letters)}"
            figures.append(Figure(pieces.strip([images for _, images in kept]), "", numbers, letters, alt=alt))
    last = replace(figures[-1], caption="A column for each sample number, a row for each side: "
                   + ", ".join(name for name, _ in shown) + ".")  # fmt: skip
    found = [Section("Samples", "\n\n".join([*_alike(page), *text]), figures=(*figures[:-1], last))]
    if page.count > 2 * COLUMNS:
        gallery = tuple(
            Figure(grid(images, None, enlarged(images.shape[-1])), f"{name}, {len(images)} samples.")
            for name, images in shown
        )
        found.append(Section("All samples", gallery=gallery, least="10rem"))
    return found


def _alike(page: Comparison) -> list[str]:
    """What pictures of one column have in common."""
    models = [entry for entry in page.entries if entry.model is not None]
    shapes = dict.fromkeys(entry.shape for entry in page.entries)
    said = []
    if models:
        lengths = dict.fromkeys(page.how.said(entry.model) for entry in models if entry.model is not None)
        said.append(f"Not selected. Models draw in {' and '.join(lengths)}.")
    if len({entry.shape for entry in models}) == 1 and len(models) > 1:
        said[-1] += " Pictures of one column begin with the same noise."
    if len(models) < len(page.entries):
        said.append("Sets of samples are shown in their own order, so that a column has no seed in common with them.")
    if len(shapes) > 1:
        sizes = " and ".join(f"{w}×{h} {channels(c)}" for c, h, w in shapes)
        said.append(f"The images differ in size ({sizes}); they are enlarged to cells of one size, and begin with "
                    "other noise.")  # fmt: skip
    return said


# What was measured


def _scores(page: Comparison, names: Sequence[str]) -> list[Section]:
    every = [entry.evaluations for entry in page.entries]
    found = ranking.section(every, names)
    lacking = [(entry, name) for entry, name in zip(page.entries, names, strict=True) if not entry.evaluations]
    commands = tuple(_eval_command(entry) for entry, _ in lacking)
    text = f"Not measured: {', '.join(name for _, name in lacking)}. These commands measure it." if lacking else ""
    if found is None:
        return [Section("Scores", text, commands=commands)]
    known = [(name, it) for name, it in zip(names, page.subjects, strict=True) if it is not None]
    stale = [f"{name}: {text}" for name, it in known for text in it.stale(of_scores=True)]
    whole = replace(found, text="\n\n".join(filter(None, [found.text, *stale, text])), commands=commands)
    return [whole, *_memorised(page, names), ranking.protocols(every, names)]


def _eval_command(entry: Entry) -> str:
    drawing = ["-n", "2000"] if entry.model is not None else []
    if entry.model is not None and entry.model.config.bounds is None:
        drawing += ["--steps", "50", "--solver", "ddim"]
    is_run = entry.model is not None and Path(entry.spec).is_dir()
    out = str(Path(entry.spec) / "eval") if is_run else f"eval-{Path(entry.spec).stem}"
    return shlex.join(["undiffuse", "eval", entry.spec, "DATA", *drawing, "--out", out])


def _memorised(page: Comparison, names: Sequence[str]) -> list[Section]:
    """What evaluations say of copies, and the scores along the chain, one after the other."""
    return [
        replace(section, title=f"{section.title}: {name}")
        for entry, name in zip(page.entries, names, strict=True)
        for found in entry.evaluations
        for section in (results.memorisation(found), results.along(found))
        if section is not None
    ]


def _bits(page: Comparison, names: Sequence[str]) -> list[Section]:
    known = [(name, it) for name, it in zip(names, page.subjects, strict=True) if it is not None]
    return ranking.bits([(name, it.bound, it.model, it.stale()) for name, it in known if it.bound is not None])


def _losses(page: Comparison, names: Sequence[str]) -> list[Section]:
    """The curves of the logs over each other; over the images seen where the batches differ."""
    logged = [(name, entry) for entry, name in zip(page.entries, names, strict=True) if entry.rows]
    if not logged:
        return []
    recipes = [_recipe(entry) for _, entry in logged]
    batches = [recipe.get("train: batch") for recipe in recipes]
    by_images = len(set(batches)) > 1 and all(isinstance(batch, int) for batch in batches)
    axis = "images seen" if by_images else "step"
    figures = []
    keys = dict.fromkeys(key for _, entry in logged for row in entry.rows for key in row)
    for key in (key for key in keys if key not in UNCOMPARED):
        lines = {
            name: pieces.line(entry.rows, key, batch if by_images else None)
            for (name, entry), batch in zip(logged, batches, strict=True)
        }
        title = {"loss": "Loss on training batches", "held_out": "Held-out loss of the averaged weights"}.get(key)
        is_loss = title is not None
        title = title or key.replace("_", " ").capitalize()
        figures.append(pieces.plot(lines, axis, "loss" if is_loss else key, title, "", log_y=is_loss))
    decides = ("objective", "parameterisation", "process", "variance", "data")
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key.partition(":")[0] in decides)
    other = [key.replace(": ", ".") for key in keys if len({results.words(each.get(key)) for each in recipes}) > 1]
    text = "" if not other else (
        f"The heights of these losses are not to be compared, because they are of other objectives: {', '.join(other)} "
        "differ."
    )  # fmt: skip
    return [Section("Training", text, gallery=pieces.present(figures), least=pieces.HALF)]


# How they differ


def _recipe(entry: Entry) -> Mapping[str, Any]:
    """Every setting by its full name, `train: lr`; those of the model where the recipe is not known."""
    if entry.model is None:
        return {}
    recipe = entry.model.meta.get("recipe")
    said = {name: value for name, value in recipe.items() if name not in ("about", "expected")} if isinstance(
        recipe, dict) else plain(entry.model.config)  # fmt: skip
    return dict(_settings_of(said))


def _settings_of(said: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in said.items():
        found += _settings_of(value, f"{above}{name}: ") if isinstance(value, dict) else [(f"{above}{name}", value)]
    return found


def _settings(page: Comparison, names: Sequence[str]) -> Section:
    """What is not the same in all models."""
    models = [
        (name, _recipe(entry)) for name, entry in zip(names, page.entries, strict=True) if entry.model is not None
    ]
    if len(models) < 2:
        return Section("Settings that differ", "There are no two models.")
    keys = dict.fromkeys(key for _, recipe in models for key in recipe)
    rows = []
    for key in keys:
        cells = tuple(results.words(recipe[key]) if key in recipe else "–" for _, recipe in models)
        if len(set(cells)) > 1:
            rows.append((key.replace(": ", "."), *cells))
    if not rows:
        return Section("Settings that differ", "None: the recipes are the same.")
    caption = f"The other {len(keys) - len(rows)} are the same."
    table = Table(("setting", *(name for name, _ in models)), tuple(rows), caption, words=True)
    return Section("Settings that differ", tables=(table,))


def _made(page: Comparison, names: Sequence[str], took: str) -> Section:
    cards = []
    for name, entry in zip(names, page.entries, strict=True):
        rows = [("given as", entry.spec)]
        if entry.model is not None:
            rows += [("weights", str(entry.model.meta.get("weights", "as they are in the file"))),
                     ("sha256", entry.model.digest()), ("drawn with", page.how.said(entry.model)),
                     ("device", name_of(entry.model.device))]  # fmt: skip
        cards.append(Listing(tuple(rows), name))
    return Section("How this page was made", f"In {took}.", commands=(page.command,), listings=tuple(cards))
