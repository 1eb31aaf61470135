"""Which chain is walked where nobody names a solver: few evaluations of the one that bench/solvers.py found best."""

from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.diffusion import trajectory
from undiffuse.diffusion.grid import GRIDS, Even, Grid, Karras, KarrasFew, suited
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.sampler.ancestral import Ancestral
from undiffuse.diffusion.sampler.base import Sampler, named
from undiffuse.errors import UsageError, counted, unknown
from undiffuse.model import distilled, fitted
from undiffuse.model.fitted import Fit
from undiffuse.model.recipe import ModelConfig

SOLVER, EVALUATIONS = "unipc-2", 10
NOISY = "dpmpp-sde"  # where chains from one latent are to differ
MU = "this model predicts mu, which holds for steps of 1/T only: all steps of Algorithm 2"

Steps = SupportsIndex | Sequence[float | int] | Tensor | None  # as in `Model.times`


class Walk(NamedTuple):
    """The times and the solver of a chain. `said` tells of both where nobody named them."""

    times: Float[Tensor, "times"]
    sampler: Sampler
    said: str = ""


def best(process: Process, fit: Fit | None, steps: int | None) -> tuple[Grid, int]:
    """A grid, and so many steps or as many as are enough: the fitted one where there is one."""
    steps = min(EVALUATIONS, process.steps or EVALUATIONS) if steps is None else steps
    if fit is not None and fit.grid.reaches(steps):
        return fit.grid, steps
    own = suited(process)  # what suits a table, or all steps of Heun's method, suits no solver of few steps
    return KarrasFew() if isinstance(own, (Even, Karras)) else own, steps


def grid(fit: Fit | None, asked: str | Grid) -> Grid:
    """See `Model.grid`."""
    head, comma, _ = asked.partition(",") if isinstance(asked, str) else ("", "", "")
    if head == fitted.NAME:
        if comma:
            raise UsageError(f"grid {asked}: the fitted grid has no fields; give {fitted.NAME} alone")
        if fit is None:
            raise UsageError("no grid is fitted to this model; make one with `undiffuse fit`, or choose karras-few")
        return fit.grid
    if head and ":" not in head and head not in GRIDS.classes:
        raise unknown("grid", head, (*GRIDS.classes, fitted.NAME))
    return GRIDS.build(asked, trusted=True)


def words(process: Process, grid: Grid, steps: int, solver: str, unfitted: bool = False, led: bool = False) -> str:
    """`10 evaluations of unipc-2 on the fitted grid; --solver ancestral for all 1,000 steps of Algorithm 2`."""
    hint = " (`undiffuse fit` finds a better one)" if unfitted else ""
    name = fitted.NAME if isinstance(grid, fitted.Fitted) else GRIDS.name_of(grid)
    whole = f"all {process.steps:,} steps of " if process.steps else ""
    count, beside = counted(steps, "evaluation"), ", each with one of the guide" * led
    return f"{count} of {solver} on the {name} grid{hint}{beside}; --solver ancestral for {whole}Algorithm 2"


def sampler(config: ModelConfig, solver: str | Sampler | None, eta: SupportsFloat | None = None) -> Sampler:
    """See `Model.sampler`."""
    if config.bounds is not None:
        asked = named(solver, eta) if isinstance(solver, str) else solver or trajectory.SOLVER
        if asked == trajectory.SOLVER and not eta:
            return asked
        name = solver if isinstance(solver, str) else type(solver).__name__
        distilled.refuse(config.bounds, f"eta = {eta}" if solver is None else f"solver {name}")
    if solver is None and eta is not None:
        raise UsageError(f"eta = {eta:g} belongs to the sampler ddim; name it too, or leave eta out")
    solver = "ancestral" if solver is None else solver
    if isinstance(solver, Sampler):
        return solver
    if not isinstance(solver, str):
        raise UsageError(f"solver = {solver!r} is not possible; give its name, such as unipc-2, or a sampler")
    if solver == "ancestral" and eta is None:
        return Ancestral(config.variance)
    return named(solver, eta)


def are_times(steps: Steps) -> bool:
    """Whether the times themselves are given, and not their number."""
    return (isinstance(steps, Sequence) and not isinstance(steps, str)) or getattr(steps, "ndim", 0) > 0


def whole_table(process: Process, times: Float[Tensor, "times"]) -> Float[Tensor, "times"]:
    """The times, if they are all of the table, as mu needs them. Raises UsageError."""
    if len(times) - 1 != process.steps:
        raise UsageError(
            f"this model predicts mu, and Algorithm 2 holds for all {process.steps} steps of its table then; leave the "
            "steps out, or name another solver, such as ddim"
        )
    return times


def fitting(config: ModelConfig, walk: Walk, solver: str | Sampler | None) -> Walk:
    """The walk, if the solver suits the model, and is, if it was named, of no higher order than there are steps.

    Raises UsageError.
    """
    if config.parameterisation.needs_table and walk.sampler.strays:
        raise UsageError(
            f"solver {solver} asks at times beside those of its steps, and this model predicts mu, which it knows at "
            "the times of its table alone; give ancestral, ddim, or heun without a churn"
        )
    steps, order = len(walk.times) - 1, walk.sampler.order
    if isinstance(solver, str) and config.bounds is None and 0 < steps < order:
        few = f"{counted(steps, 'step')} of a chain {'is' if steps == 1 else 'are'}"
        raise UsageError(
            f"solver {solver} has order {order}, for which {few} too few; give {order} or more, or a solver of a lower "
            "order"
        )
    return walk


def on_table(config: ModelConfig, process: Process, times: Float[Tensor, "times"]) -> Float[Tensor, "times"]:
    """The times; at the nearest of the table for a model that predicts mu, which it has there only."""
    if process.steps is None or not config.parameterisation.needs_table:
        return times
    near = (times * process.steps).round() / process.steps
    if not bool((near.diff() < 0).all()):
        raise UsageError(
            f"this model predicts mu, which it knows at the {process.steps} steps of its table alone, and of these "
            f"{len(times) - 1} steps some lie at the same; give fewer, or --grid even"
        )
    return near


def listed(process: Process, steps: Any) -> Float[Tensor, "times"]:
    """Times as a user lists them, and 0. Raises UsageError for those that a chain cannot walk."""
    try:
        steps = [float(t) for t in steps]  # pyright: ignore[reportGeneralTypeIssues]
    except (TypeError, ValueError) as error:
        raise UsageError(f"times {steps!r} are not possible; give numbers") from error
    given = list(steps[:-1] if len(steps) > 1 and steps[-1] == 0 else steps)
    if not given or not all(process.t_min <= t <= 1 for t in given):
        raise UsageError(
            f"times {', '.join(f'{t:g}' for t in steps) or 'none'} are not possible; give one or more from 1, "
            f"which is noise, down to {process.t_min:g}"
        )
    if any(s >= t for t, s in zip(given, given[1:], strict=False)):
        raise UsageError(f"times {', '.join(f'{t:g}' for t in steps)} do not fall strictly; sort or thin them")
    return torch.tensor([*given, 0.0], dtype=F64, device="cpu")
