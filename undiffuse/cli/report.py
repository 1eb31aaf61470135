"""`undiffuse report` and `undiffuse compare`: a run on one page, or several beside each other."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from undiffuse.cli.chain import SOLVERS
from undiffuse.cli.options import (
    DeviceOpt,
    ModelArg,
    OverwriteOpt,
    SeedOpt,
    SkipBadOpt,
    WeightsOpt,
    open_model,
    pair,
    ticking,
    writable_page,
)
from undiffuse.cli.tools import JsonOpt, show
from undiffuse.errors import UsageError

OptionalData = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[DATA]",
        help="Real images to stand beside the samples, as for train; bits/dim are then estimated, and the nearest "
        "training images are shown",
    ),
]
PageOpt = Annotated[Path, typer.Option("--out", "-o", help="The page to write: .html")]
CountOpt = Annotated[
    int | None, typer.Option("-n", help="Samples; unless given 64, or 16 of images with more than 64×64 pixels")
]
PairSeedOpt = Annotated[int | None, typer.Option("--seed", help="Random seed of what models draw; 0 unless given")]
PairOpt = Annotated[int, typer.Option("-n", help="Samples of each, in the same cells")]
DrawnOpt = Annotated[
    str | None, typer.Option("--solver", help=f"Sampler, ddim unless given: ancestral (the paper's), {SOLVERS}")
]
ChainOpt = Annotated[int | None, typer.Option("--steps", help="Number of sampling steps; 50 unless given")]
EvalOpt = Annotated[
    list[Path] | None,
    typer.Option("--eval", help="The --out folder of `undiffuse eval`; may be repeated. RUN/eval* unless given"),
]
EvalsOpt = Annotated[
    list[str] | None,
    typer.Option("--eval", help="The --out folder of `undiffuse eval`, once for each of A B … in order, or - for none"),
]
SidesOpt = Annotated[
    str | None, typer.Option("--size", help="Crop and resize pictures to this many pixels: a side, or HEIGHTxWIDTH")
]
NllOpt = Annotated[Path | None, typer.Option("--nll", help="The --out folder of `undiffuse nll`; RUN/nll unless given")]
NllsOpt = Annotated[
    list[str] | None,
    typer.Option("--nll", help="The --out folder of `undiffuse nll`, once for each of A B … in order, or - for none"),
]


def report(
    model: ModelArg,
    data: OptionalData = None,
    out: PageOpt = Path("report.html"),
    n: CountOpt = None,
    steps: ChainOpt = None,
    solver: DrawnOpt = None,
    evaluations: EvalOpt = None,
    bound: NllOpt = None,
    weights: WeightsOpt = None,
    skip_bad: SkipBadOpt = False,
    overwrite: OverwriteOpt = False,
    seed: SeedOpt = 0,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Write one HTML page of a run: samples, figures, scores, bits/dim, training, cost and settings.

    The page is one file without scripts or requests. It shows the finished measurements of `undiffuse eval` and
    `undiffuse nll`; where there is none, it says which command makes it. Nothing but the samples and the figures is
    computed, in 50 steps of DDIM; with DATA also bits/dim of 64 images.

    Examples:

    \b
    - `undiffuse report runs/photos photos/ --out photos.html`
    - `undiffuse report fashion-mnist fashion-mnist-sample`
    """
    from undiffuse.data.format.several import join
    from undiffuse.view import report_run
    from undiffuse.view.subject import Data, Drawing, subject

    writable_page(out, overwrite)
    how = Drawing(n, steps, solver, seed)
    loaded = open_model(model, device, weights=weights)
    about = subject(model, loaded, evaluations or None, bound)
    real = Data.open(join(data), loaded, skip_bad) if data else None
    page = report_run.Page(about, real, how, _command())
    with ticking(page.work(), "evaluations", as_json) as tick:
        report_run.write(page, out, tick)
    show({"report": out}, as_json)


def compare(
    what: Annotated[
        list[str],
        typer.Argument(metavar="A B …", help="Models as for sample, or folders, zips or npz of pictures, however made"),
    ],
    out: PageOpt = Path("compare.html"),
    n: PairOpt = 16,
    steps: ChainOpt = None,
    solver: DrawnOpt = None,
    evaluations: EvalsOpt = None,
    bounds: NllsOpt = None,
    size: SidesOpt = None,
    overwrite: OverwriteOpt = False,
    seed: PairSeedOpt = None,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Write one HTML page that lays models or sets of samples beside each other.

    Models draw from the same seeds, and the picture of a seed is in the same cell of each. The page also shows the
    settings that differ, the losses in one plot, and the scores in one table. Scores of differing protocols, such as of
    another number of samples or of other features, are in rows of their own, and are not ranked.

    Examples:

    \b
    - `undiffuse compare runs/a runs/b --out compare.html`
    - `undiffuse compare runs/a samples.zip --eval runs/a/eval --eval scores`
    """
    from undiffuse.view import compare_runs
    from undiffuse.view.subject import Drawing

    writable_page(out, overwrite)
    if len(what) < 2:
        raise UsageError(f"{what[0]} alone cannot be compared; give two or more, or take `undiffuse report`")
    how = Drawing(n, steps, solver, 0 if seed is None else seed)
    named = _each("--eval", evaluations, len(what))
    scores = [None if evaluations is None else [] if each is None else [each] for each in named]
    every = [
        compare_runs.opened(spec, device, found, bound, n, looks=bounds is None, size=pair(size))
        for spec, found, bound in zip(what, scores, _each("--nll", bounds, len(what)), strict=True)
    ]
    drawn = [each.model is not None for each in every]
    _refuse_unused({"--steps": steps, "--solver": solver, "--seed": seed}, any(drawn), "models", "sets of samples")
    _refuse_unused({"--size": size}, not all(drawn), "sets of samples", "models")
    page = compare_runs.Comparison(tuple(every), how, _command())
    with ticking(page.work(), "evaluations", as_json) as tick:
        compare_runs.write(page, out, tick)
    show({"report": out}, as_json)


def _refuse_unused(given: dict[str, object], is_used: bool, what: str, others: str) -> None:
    """UsageError for what is said of models where none is compared, or of sets."""
    named = next((f"{name} {value}" for name, value in given.items() if value is not None), None)
    if named is not None and not is_used:
        raise UsageError(f"{named} is for {what}, and all of these are {others}; leave it out, or give one of {what}")


def _each(option: str, given: list[str] | None, count: int) -> list[Path | None]:
    """The folder for each, None where there is none."""
    if given is None:
        return [None] * count
    if len(given) != count:
        raise UsageError(f"{option} is given {len(given)} times for {count}; give it once for each, - for none")
    return [None if text == "-" else Path(text) for text in given]


def _command() -> str:
    return shlex.join(["undiffuse", *sys.argv[1:]])


def register(app: typer.Typer) -> None:
    """Adds these commands to the application."""
    app.command()(report)
    app.command()(compare)
