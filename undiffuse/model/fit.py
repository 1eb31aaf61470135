"""Fitting the times of chains to a model."""

from collections.abc import Callable, Iterator
from math import prod
from typing import SupportsIndex

import torch

from undiffuse.diffusion.fit import Products, Watched
from undiffuse.diffusion.grid import LogSnr
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.sampler.dpmpp import Dpmpp
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.model.classes import drawn
from undiffuse.model.fitted import MOST, Fit, Fitted
from undiffuse.model.model import Model
from undiffuse.strict import whole

TRAJECTORIES, STAMPS = 128, 61
HELD = 1 << 28  # bytes of images of a batch, at all stamps


def stamps(model: Model) -> int:
    """At how many times a trajectory is seen."""
    return min(STAMPS, model.process.steps or STAMPS)


def batches(model: Model, n: int) -> Iterator[slice]:
    """Of trajectories: as many at a time as may be held."""
    each = max(1, min(64, HELD // (2 * STAMPS * prod(model.image_shape) * 8)))
    return (slice(i, i + each) for i in range(0, n, each))


def steps_of(model: Model, n: int = TRAJECTORIES) -> int:
    """How many steps of a batch `fit` takes."""
    return sum(stamps(model) for _ in batches(model, n))


def cost(model: Model, n: int = TRAJECTORIES) -> str:
    """What it takes, in words."""
    return f"{n} chains of {stamps(model)} evaluations"


def fit(
    model: Model,
    trajectories: SupportsIndex = TRAJECTORIES,
    seed: SupportsIndex = 0,
    progress: Callable[[int], None] | None = None,
) -> Fit:
    """Grids of 1 to 40 steps for a model, which more steps divide, from trajectories of its own flow.

    They begin at the mean of the data and are walked by DPM-Solver++(3M) in 61 steps, even in log-SNR; a model with
    classes is told each as often as in training. Costs 61 evaluations a trajectory. Raises UsageError, NotFiniteError.
    """
    model.refuse_distilled("a grid")
    model.refuse_guided("a grid")
    if model.config.parameterisation.needs_table:
        raise UsageError(
            "this model predicts mu, which it knows at the steps of its table alone, so that no grid is fitted to it; "
            "sample it in all steps, or in fewer with --solver ddim --steps N"
        )
    n = whole("trajectories", trajectories, 1)
    keys, told = Key(seed).fold("fit").rows(n), drawn(model.classes, n, seed).conditioning
    times, parts = LogSnr().times(model.process, stamps(model)), list[Products]()
    for some in batches(model, n):
        watched, mean = Watched(Dpmpp(order=3)), model.means(told.at(some))
        eps = keys[some].fold("x_T").normal(*model.image_shape)
        mean = mean.expand_as(eps)
        start = model.process.marginal(mean, eps, times[:1].expand(len(eps)))
        end = model.chain(keys[some], times, watched, told.at(some), start, progress=progress)
        # A grid may begin at any stamp, from mean and noise: a step from the first one, for which nobody is asked.
        watched.seen[0] = (watched.seen[0][0], mean.flatten(1).to(F64))
        found = Products.of(model.process, times, watched.seen, end)
        parts.append(found._replace(table=found.table * len(end) / n))
    products = parts[0]._replace(table=torch.stack([part.table for part in parts]).sum(0))
    paths = products.costs().grids(min(MOST, len(times) - 2))
    walks = tuple(tuple(times[path].tolist()) for path in paths)
    return Fit(model.digest(), n, Fitted(walks))
