"""The command that fits to a model what belongs to its weights."""

from typing import Annotated

import typer

from undiffuse.cli.options import DeviceOpt, ModelArg, SeedOpt, WeightsOpt, open_model, ticking
from undiffuse.cli.tools import JsonOpt, show
from undiffuse.errors import UsageError
from undiffuse.strict import whole


def fit(
    model: ModelArg,
    trajectories: Annotated[
        int | None,
        typer.Option(
            "--trajectories", help="How many chains of the model to look at, of 61 evaluations each; 128 unless given"
        ),
    ] = None,
    weights: WeightsOpt = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make it anew where there is one")] = False,
    seed: SeedOpt = 0,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Fit the times of short chains to a model, for --grid fitted.

    Chains of the model itself show where few steps can be long; one pass finds the times for any number of steps: from
    1 to 40 each by itself, and more by dividing those of 40. They are kept beside a run, else in the cache, by the hash
    of the weights, and go with `undiffuse export` to a file.

    Examples:

    \b
    - `undiffuse fit runs/photos`
    - `undiffuse fit fashion-mnist --trajectories 256 --overwrite`
    """
    from undiffuse.machine import log
    from undiffuse.model import fit as fitting
    from undiffuse.model import fitted

    loaded = open_model(model, device, weights=weights)
    asked = whole("trajectories", fitting.TRAJECTORIES if trajectories is None else trajectories, 1)
    if not overwrite and loaded.fit is not None:
        if trajectories not in (None, loaded.fit.trajectories):
            raise UsageError(
                f"a grid of {loaded.fit.trajectories} trajectories is fitted to this model already; give --overwrite "
                f"for one of {trajectories}, or leave --trajectories out"
            )
        place = fitted.found(loaded.run, loaded.digest()) or model
        show({"grid": place, "steps": len(loaded.fit.grid.walks), "made": "before"}, as_json)
        return
    loaded.refuse_distilled("a grid")
    if not as_json:
        log.say(fitting.cost(loaded, asked))
    with ticking(fitting.steps_of(loaded, asked), "fitting", as_json) as tick:
        found = fitting.fit(loaded, asked, seed, tick)
    show({"grid": fitted.keep(found, loaded.run), "steps": len(found.grid.walks), "made": "now"}, as_json)


def register(app: typer.Typer) -> None:
    """Adds this command to the application."""
    app.command()(fit)
