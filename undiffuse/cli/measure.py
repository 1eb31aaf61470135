"""`undiffuse nll`: how well a model knows a data set."""

from pathlib import Path
from typing import Annotated

import typer

from undiffuse.cli.options import (
    BatchOpt,
    ClipOpt,
    DataArg,
    DeviceOpt,
    GridOpt,
    ModelArg,
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


def nll(
    model: ModelArg,
    data: DataArg,
    split: SplitOpt = "test",
    n: Annotated[int | None, typer.Option("-n", help="Measure the first n images; all unless given")] = None,
    draws: Annotated[
        int | None, typer.Option("--draws", help="Estimate: compute this many terms per image, at stratified times t")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Measure the bound of a chain with this many steps")
    ] = None,
    grid: GridOpt = None,
    rate_distortion: Annotated[bool, typer.Option("--rate-distortion", help="Print the rate-distortion table")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for all terms; a stopped measurement then continues")
    ] = None,
    clip: ClipOpt = True,
    variance: VarianceOpt = None,
    weights: WeightsOpt = None,
    label: Annotated[
        str | None,
        typer.Option("--label", help="Class of all images, by name or number, or none; those of the data unless given"),
    ] = None,
    settings: ReadOpt = None,
    skip_bad: SkipBadOpt = False,
    batch: BatchOpt = 50,
    seed: SeedOpt = 0,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Measure the variational bound in bits per dimension.

    Without `--draws` every step of the chain is computed, one network evaluation per step and image. With `--draws`
    the bound is estimated from a few steps per image, with a standard error, which suits whole data sets. A model with
    classes is told the class of each image.

    Examples:

    \b
    - `undiffuse nll fashion-mnist fashion-mnist -n 100 --rate-distortion --out nll`
    - `undiffuse nll fashion-mnist fashion-mnist --draws 8`
    """
    from undiffuse.machine import dist
    from undiffuse.measure import nll

    if rate_distortion and draws is not None:
        raise UsageError(f"--rate-distortion needs every term of the chain; leave out --draws {draws}")
    loaded = open_model(model, device, clip, variance, weights)
    source = open_like(loaded, data, split, skip_bad, settings)
    query = nll.Nll(n, draws, steps, seed, batch, label, grid)
    with dist.joined(dist.LONG), ticking(nll.evaluations(loaded, source, query), "bits/dim", as_json) as tick:
        terms = nll.terms_of(loaded, source, query, out, tick)
    if not dist.is_first():
        return
    table = nll.table(terms) if rate_distortion else []
    if table and not as_json:
        _show_table(table)
    measured = nll.summary(terms, loaded, source, query)
    show(measured | ({"rate_distortion": table} if table else {}) | ({"out": out} if out else {}), as_json)


def _show_table(table: list[dict[str, float | int]]) -> None:
    typer.echo("  reverse step   rate (bits/dim)   RMSE [0, 255]")
    for row in table:
        typer.echo(f"  {row['step']:>12}   {row['rate']:>15.5f}   {row['rmse']:>13.5f}")


def register(app: typer.Typer) -> None:
    """Adds this command to the application."""
    app.command()(nll)
