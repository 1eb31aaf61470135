"""What several commands share: their arguments and options, a progress bar, and the model that they name."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undiffuse.errors import UsageError

if TYPE_CHECKING:
    from undiffuse.data.format.packed import PackedSource
    from undiffuse.data.source import ArraySource
    from undiffuse.model.model import Model

ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run folder, a checkpoint in it, a file or a shipped name")
]
DataArg = Annotated[
    list[str],
    typer.Argument(metavar="DATA…", help="A folder, zip, npz, tar shards, lmdb, …, a quoted pattern, or a named set"),
]
OutOpt = Annotated[Path, typer.Option("--out", "-o", help="Where the results go")]
SeedOpt = Annotated[int, typer.Option("--seed", help="The same seed gives the same pictures")]
StepsOpt = Annotated[int | None, typer.Option("--steps", help="Steps of the chain; all of the table unless given")]
TimesOpt = Annotated[str | None, typer.Option("--times", help="The steps by their t instead, falling: 1,0.5,0.1")]
SolverOpt = Annotated[str, typer.Option("--solver", help="ancestral, ddim, …")]
EtaOpt = Annotated[float | None, typer.Option("--eta", help="Noise of --solver ddim, 0 (none) to 1 (ancestral)")]
ClipOpt = Annotated[bool, typer.Option("--clip/--no-clip", help="Limit x̂_0 to [-1, 1]; not in the bare Algorithm 2")]
VarianceOpt = Annotated[
    str | None, typer.Option("--variance", help="fixed-large or fixed-small; as in training unless given")
]
DeviceOpt = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps")]
WeightsOpt = Annotated[
    str | None, typer.Option("--weights", help="Of a run: average, raw, or best by the held-out loss")
]
SizeOpt = Annotated[str | None, typer.Option("--size", help="Crop and resize: a side, or HEIGHTxWIDTH")]
SplitOpt = Annotated[str, typer.Option("--split", help="train or test, where the data has both")]
BatchOpt = Annotated[int, typer.Option("--batch", help="Images at a time; the results hardly depend on it")]
SkipBadOpt = Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable pictures out and list them")]


@contextmanager
def ticking(total: int, what: str, as_json: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error."""
    from undiffuse.machine import dist, log

    with log.progress(total, what, not as_json and dist.is_first()) as bar:
        yield bar.advance


def open_model(
    source: str, device: str, clip: bool = True, variance: str | None = None, weights: str | None = None
) -> "Model":
    from undiffuse.model.load import load

    return load(source, device, weights=weights).variant(clip, variance)


def open_like(model: "Model", data: list[str], split: str, skip_bad: bool) -> "ArraySource | PackedSource":
    """A data set in the shape that the model was trained on; what is left out of it is told."""
    from undiffuse.data.format.several import join
    from undiffuse.machine import log

    source = model.source(join(data), split, skip_bad)
    if source.skipped:
        log.warn(f"{len(source.skipped)} unreadable pictures are left out: {', '.join(source.skipped)}")
    return source


def choose_steps(steps: int | None, times: str | None) -> int | list[float] | None:
    """What `Model.times` takes, of --steps and --times."""
    if times is None:
        return steps
    if steps is not None:
        raise UsageError(f"--steps {steps} and --times {times} say the same twice; give one of them")
    try:
        return [float(part) for part in times.split(",")]
    except ValueError as error:
        raise UsageError(f'--times "{times}" is not a list of numbers; give for example 1,0.75,0.5,0.25') from error


def parse_sides(option: str, text: str) -> tuple[int, ...]:
    """(side,) of `32`, (height, width) of `64x48`."""
    if not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})?", text):
        raise UsageError(f'{option} "{text}" is no size; give a side such as 32, or HEIGHTxWIDTH such as 64x48')
    return tuple(map(int, text.split("x")))
