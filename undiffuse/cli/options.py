"""What several commands share: their arguments and options, a progress bar, and the model that they name."""

import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undiffuse.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from undiffuse.data.format.packed import PackedSource
    from undiffuse.data.picture import Reading
    from undiffuse.data.source import ArraySource
    from undiffuse.model.classes import Told
    from undiffuse.model.model import Model
    from undiffuse.model.recipe import DataConfig

ModelArg = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A run folder, a checkpoint in it, an exported folder or file, or a shipped model's name"
    ),
]
DataArg = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA",
        help="Folders of pictures, zip, npz, tar shards, LMDB, …, a quoted pattern, or a named data set",
    ),
]
OutOpt = Annotated[Path, typer.Option("--out", "-o", help="The picture to write: .png, .jpg, .webp …")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace the file (never a folder) if it is there")]
SeedOpt = Annotated[int, typer.Option("--seed", help="Random seed: the same seed gives the same images")]
SeedsOpt = Annotated[
    str | None,
    typer.Option("--seeds", help="A seed for each image instead of -n and --seed, such as 5,17,40-99"),
]
MOST_SEEDS = 10**6
ClipOpt = Annotated[
    bool | None,
    typer.Option(
        "--clip/--no-clip",
        help="Clip the predicted x_0 to [-1, 1]; done unless given, but for distilled models; --no-clip is Algorithm 2",
    ),
]
VarianceOpt = Annotated[
    str | None,
    typer.Option(
        "--variance",
        help="Reverse variance: fixed-large or fixed-small; as in training unless given. To sample with it, give "
        "--solver ancestral too",
    ),
]
DeviceOpt = Annotated[str, typer.Option("--device", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1 or mps")]
PrecisionOpt = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="What the network computes in: float32 unless given, bf16, float16 or tf32 (both on cards), or auto: "
        "bf16 where the processor is faster with it, float16 on cards without, else float32",
    ),
]
FeatureWeightsOpt = Annotated[
    Path | None,
    typer.Option("--feature-weights", help="The file (inception) or folder (dinov2) of the extractor's weights"),
]
WeightsOpt = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="Weights of a run: average (EMA), raw, or best (the average at the lowest held-out loss); unless given, "
        "best where the held-out loss ends the run, else average",
    ),
]
SizeOpt = Annotated[
    str | None, typer.Option("--size", help="Crop and resize to this many pixels: a side, or HEIGHTxWIDTH")
]
ReadOpt = Annotated[
    list[str] | None,
    typer.Option("--set", help="How DATA is read, such as data.range=[0,4095] or data.axes=nchw; may be repeated"),
]
SplitOpt = Annotated[str, typer.Option("--split", help="train or test, if the data has both")]
TestSplitOpt = Annotated[
    str | None, typer.Option("--split", help="train or test, if the data has both; unless given, test if there is one")
]
BatchOpt = Annotated[int, typer.Option("--batch", help="Images computed at a time; the results hardly depend on it")]
SkipBadOpt = Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable pictures out and list them")]


def refuse_below_file(path: Path) -> None:
    """UsageError for a path whose folder is a file."""
    above = next((each for each in path.parents if os.path.exists(each)), None)
    if above is not None and not above.is_dir():
        raise UsageError(f"{above} is a file, so {path} cannot be in it; give another place")


def writable(path: Path | None, overwrite: bool, picture: bool = True) -> None:
    """Refuses, before any work is done, the name of a file that could not be written or should not be replaced."""
    if path is None:
        return
    _refuse_folder(path)
    if not picture and path.suffix.lower() != ".npz":
        raise UsageError(f"{path} has not the ending of an array; give the name of a .npz")
    if picture:
        from undiffuse.figure import kind_of

        kind_of(path)
    _refuse_there(path, overwrite)


def writable_page(path: Path, overwrite: bool) -> None:
    """The same for a page."""
    _refuse_folder(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path} has not the ending of a page; give the name of a .html")
    _refuse_there(path, overwrite)


def writable_file(path: Path, overwrite: bool) -> None:
    """The same for a file of any name."""
    _refuse_folder(path)
    _refuse_there(path, overwrite)


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")
    refuse_below_file(path)


def _refuse_there(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UsageError(f"{path} is there already; give another name, or --overwrite to replace it")


@contextmanager
def ticking(total: int, what: str, as_json: bool, told: list[str] | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error. What is in `told` is said at its first tick, so not if all is refused."""
    from undiffuse.machine import dist, log

    with log.progress(total, what, not as_json and dist.is_first()) as bar:

        def advance(done: int) -> None:
            while told:
                text = told.pop()
                if text and dist.is_first():
                    log.say(text)
            bar.advance(done)

        yield advance


def open_model(
    source: str,
    device: str,
    clip: bool | None = None,
    variance: str | None = None,
    weights: str | None = None,
    precision: str | None = None,
) -> "Model":
    from undiffuse.model.load import load

    return load(source, device, weights=weights).variant(clip, variance, precision)


def reading_of(settings: list[str] | None, base: "DataConfig | None" = None, fixed: tuple[str, ...] = ()) -> "Reading":
    """How DATA is read, as --set says; `base` where it does not. Raises UsageError for any other setting."""
    from dataclasses import fields

    from undiffuse.config import override, parse, plain
    from undiffuse.data.picture import Reading
    from undiffuse.model.recipe import DataConfig

    known = {f"data.{each.name}" for each in fields(Reading)} & {f"data.{each.name}" for each in fields(DataConfig)}
    known -= {f"data.{name}" for name in fixed}
    for setting in settings or ():
        if setting.partition("=")[0].strip() not in known:
            raise UsageError(f"--set {setting} is not possible here; give one of {', '.join(sorted(known))}")
    found = override({"data": plain(base or DataConfig())}, settings or ())
    return parse(DataConfig, found["data"], "--set").reading


def open_like(
    model: "Model",
    data: list[str],
    split: str | None,
    skip_bad: bool,
    settings: list[str] | None = None,
    own_size: bool = False,
    count: int | None = None,
) -> "ArraySource | PackedSource":
    """A data set as the model was trained on; what is left out of it and made of it is told.

    Without a split these are the test images, or all of what has no such split, as pictures have none. `own_size` keeps
    the size of the images, which must be one; `count` takes the first ones alone.
    """
    from undiffuse.data import made, remark
    from undiffuse.data.format.several import join
    from undiffuse.errors import NoSplit
    from undiffuse.machine import dist, log

    if split is None:
        try:
            return open_like(model, data, "test", skip_bad, settings, own_size, count)
        except NoSplit:
            split = "train"
    reading = reading_of(settings, model.data, fixed=("channels",))
    source = model.source(join(data), split, skip_bad, reading, own_size, count)
    is_meant = any(setting.partition("=")[0].strip() == "data.range" for setting in settings or ())
    remark.refuse(source, join(data), split, reading, is_meant)
    if not is_meant:
        remark.refuse_clipped(source, reading)
    if dist.is_first() and (told := made.line(source.made, len(source), source.image_shape)):
        log.say(told)
    if left_out := remark.left_out(source):
        log.warn(left_out)
    return source


def said(told: "Told", model: "Model") -> dict[str, str]:
    """What the images were told to be, for models that were trained with labels."""
    return {} if model.classes is None else {"labels": told.words}


def open_pair(model: "Model", first: Path, second: Path, settings: list[str] | None) -> "tuple[Tensor, Tensor]":
    """Two picture files in the shape that the model was trained on; what is made of them is told."""
    from undiffuse.data import made
    from undiffuse.machine import log

    reading = reading_of(settings, model.data, fixed=("channels",))
    (one, notes), (other, more) = model.read_picture(first, reading), model.read_picture(second, reading)
    if told := made.line(made.summed(notes, more), 2, model.image_shape):
        log.say(told)
    return one, other


def parse_seeds(text: str) -> list[int]:
    """`5,17,40-99`: each image has its own."""
    seeds = list[int]()
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise UsageError(f'--seeds "{text}" is not a list of seeds; give numbers and ranges, such as 5,17,40-99')
        if len(seeds) + last - first >= MOST_SEEDS:
            raise UsageError(f"--seeds {text} are more than {MOST_SEEDS:,}; give fewer at a time")
        seeds += range(first, last + 1)
    ordered = sorted(seeds)
    twice = next((a for a, b in itertools.pairwise(ordered) if a == b), None)
    if twice is not None:
        raise UsageError(f"--seeds {text} has {twice} twice, which is the same image; give it once")
    return seeds


def parse_sides(option: str, text: str) -> tuple[int, ...]:
    """(side,) of `32`, (height, width) of `64x48`."""
    if not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})?", text):
        raise UsageError(f'{option} "{text}" is no size; give a side such as 32, or HEIGHTxWIDTH such as 64x48')
    return tuple(map(int, text.split("x")))


def pair(size: str | None) -> tuple[int, int] | None:
    """(height, width) of --size."""
    sides = None if size is None else parse_sides("--size", size)
    return None if sides is None else (sides[0], sides[-1])
