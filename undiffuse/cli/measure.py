"""`undiffuse nll`: how well a model knows a data set."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.options import (
    BatchOpt,
    ClipOpt,
    DataArg,
    DeviceOpt,
    ModelArg,
    PrecisionOpt,
    ReadOpt,
    SeedOpt,
    SkipBadOpt,
    SplitOpt,
    VarianceOpt,
    WeightsOpt,
    open_like,
    open_model,
    ticking,
)
from undiffuse.cli.tools import JsonOpt, show
from undiffuse.errors import UsageError

if TYPE_CHECKING:
    from undiffuse.data.source import Source
    from undiffuse.measure.flow import Ode
    from undiffuse.measure.nll import Nll
    from undiffuse.model.model import Model


CountOpt = Annotated[int | None, typer.Option("-n", help="Measure the first n images; all unless given")]
DrawsOpt = Annotated[
    int | None, typer.Option("--draws", help="Estimate: compute this many terms per image, at stratified times t")
]
ChainOpt = Annotated[int | None, typer.Option("--steps", help="Measure the bound of a chain with this many steps")]
RateOpt = Annotated[bool, typer.Option("--rate-distortion", help="Print the rate-distortion table")]
OdeOpt = Annotated[
    bool, typer.Option("--ode", help="Measure the probability-flow ODE instead, a second opinion; never clipped")
]
ToleranceOpt = Annotated[
    float | None, typer.Option("--tolerance", help="Of --ode: how exactly each step is solved; 1e-5 unless given")
]
ProbesOpt = Annotated[
    int | None, typer.Option("--probes", help="Of --ode: how many random probes estimate the trace; 1 unless given")
]
TermsOpt = Annotated[
    Path | None, typer.Option("--out", "-o", help="A folder for all terms; a stopped measurement then continues")
]
ToldOpt = Annotated[
    str | None,
    typer.Option("--label", help="Class of all images, by name or number, or none; those of the data unless given"),
]

GridOpt = Annotated[
    str | None,
    typer.Option(
        help="How --steps are spread: even (in t), quadratic, log-snr or karras; unless given, as suits the process"
    ),
]


def nll(
    model: ModelArg,
    data: DataArg,
    split: SplitOpt = "test",
    n: CountOpt = None,
    draws: DrawsOpt = None,
    steps: ChainOpt = None,
    grid: GridOpt = None,
    rate_distortion: RateOpt = False,
    ode: OdeOpt = False,
    tolerance: ToleranceOpt = None,
    probes: ProbesOpt = None,
    out: TermsOpt = None,
    clip: ClipOpt = None,
    variance: VarianceOpt = None,
    weights: WeightsOpt = None,
    precision: PrecisionOpt = None,
    label: ToldOpt = None,
    settings: ReadOpt = None,
    skip_bad: SkipBadOpt = False,
    batch: BatchOpt = 50,
    seed: SeedOpt = 0,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Measure the variational bound in bits per dimension.

    Without `--draws` every step of the chain is computed, one network evaluation per step and image. With `--draws`
    the bound is estimated from a few steps per image, with a standard error, which suits whole data sets. With `--ode`
    the likelihood of the probability-flow ODE is measured instead, with truncated normal noise for the 256 levels;
    images of a batch share its steps. A model with classes is told the class of each image.

    Examples:

    \b
    - `undiffuse nll fashion-mnist fashion-mnist -n 100 --rate-distortion --out nll`
    - `undiffuse nll fashion-mnist fashion-mnist --draws 8`
    - `undiffuse nll fashion-mnist fashion-mnist --ode -n 64`
    """
    from undiffuse.diffusion.flow import Solver
    from undiffuse.measure import flow, nll

    if ode:
        bound = {"--draws": draws, "--steps": steps, "--grid": grid, "--rate-distortion": rate_distortion or None}
        bound |= {"--variance": variance, "--clip": clip or None}
        _refuse(bound, "belongs to the bound, which --ode is not; leave out one of them")
    else:
        _refuse({"--tolerance": tolerance, "--probes": probes}, "belongs to --ode; give that too, or leave it out")
    if rate_distortion and draws is not None:
        raise UsageError(f"--rate-distortion needs every term of the chain; leave out --draws {draws}")
    solver = Solver(1e-5 if tolerance is None else tolerance, 1 if probes is None else probes)
    loaded = open_model(model, device, clip, variance, weights, precision)
    source = open_like(loaded, data, split, skip_bad, settings)
    if ode:
        found = _by_ode(loaded, source, flow.Ode(n, solver, seed, batch, label), out, as_json)
    else:
        query = nll.Nll(n, draws, steps, seed, batch, label, grid)
        found = _by_terms(loaded, source, query, out, as_json, rate_distortion)
    if found is not None:
        show(found | ({"out": out} if out else {}), as_json)


def _refuse(options: dict[str, Any], why: str) -> None:
    """Raises UsageError for the first option that is given."""
    for option, value in options.items():
        if value is not None:
            raise UsageError(f"{option}{'' if value is True else f' {value}'} {why}")


def _by_terms(
    model: "Model", source: "Source", query: "Nll", out: Path | None, as_json: bool, rate_distortion: bool
) -> dict[str, Any] | None:
    """The bound, measured and summed up; None in processes that do not speak."""
    from undiffuse.machine import dist
    from undiffuse.measure import nll

    with dist.joined(dist.LONG), ticking(nll.evaluations(model, source, query), "bits/dim", as_json) as tick:
        terms = nll.terms_of(model, source, query, out, tick)
    if not dist.is_first():
        return None
    table = nll.table(terms) if rate_distortion else []
    if table and not as_json:
        _show_table(table)
    return nll.summary(terms, model, source, query) | ({"rate_distortion": table} if table else {})


def _by_ode(model: "Model", source: "Source", query: "Ode", out: Path | None, as_json: bool) -> dict[str, Any] | None:
    """The ODE's likelihood. Its evaluations are not known before, so the progress is in images."""
    from undiffuse.machine import dist
    from undiffuse.measure import flow
    from undiffuse.measure.parts import divided

    with dist.joined(dist.LONG):
        with ticking(divided(query.count(source), query.batch), "images", as_json) as tick:
            terms = flow.terms_of(model, source, query, out, tick)
    return flow.summary(terms, model, source, query) if dist.is_first() else None


def _show_table(table: list[dict[str, float | int]]) -> None:
    typer.echo("  reverse step   rate (bits/dim)   RMSE [0, 255]")
    for row in table:
        typer.echo(f"  {row['step']:>12}   {row['rate']:>15.5f}   {row['rmse']:>13.5f}")


def register(app: typer.Typer) -> None:
    """Adds this command to the application."""
    app.command()(nll)
