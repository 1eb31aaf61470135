"""Fitting the times of chains to a model."""

from collections.abc import Callable, Iterator
from math import prod
from typing import SupportsIndex

import torch

from undiffuse.diffusion.fit import Products, Watched, shortest
from undiffuse.diffusion.grid import LogSnr
from undiffuse.diffusion.sampler.dpmpp import Dpmpp
from undiffuse.key import Key
from undiffuse.model.classes import drawn
from undiffuse.model.fitted import Fit, Fitted
from undiffuse.model.model import Model
from undiffuse.strict import whole

TRAJECTORIES, STAMPS, MOST = 128, 61, 40
HELD = 1 << 28  # bytes of images of a batch, at all stamps


def batches(model: Model, n: int) -> Iterator[slice]:
    """Of trajectories: as many at a time as may be held."""
    each = max(1, min(64, HELD // (2 * STAMPS * prod(model.image_shape) * 8)))
    return (slice(i, i + each) for i in range(0, n, each))


def steps(model: Model, n: int = TRAJECTORIES) -> int:
    """How many steps of a batch `fit` takes."""
    return sum(STAMPS for _ in batches(model, n))


def fit(
    model: Model,
    trajectories: SupportsIndex = TRAJECTORIES,
    seed: SupportsIndex = 0,
    progress: Callable[[int], None] | None = None,
) -> Fit:
    """Grids of 1 to 40 steps for a model, from trajectories of its own flow: what `undiffuse fit` keeps.

    They are walked by DPM-Solver++(3M) in 61 steps, even in log-SNR; a model with classes is told each as often as in
    training. Costs 61 evaluations a trajectory. Raises UsageError and NotFiniteError.
    """
    model.refuse_distilled("a grid")
    n = whole("trajectories", trajectories, 1)
    keys, told = Key(seed).fold("fit").rows(n), drawn(model.classes, n, seed).conditioning
    times, parts = LogSnr().times(model.process, min(STAMPS, model.process.steps or STAMPS)), list[Products]()
    for some in batches(model, n):
        watched = Watched(Dpmpp(order=3))
        end = model.chain(keys[some], times, watched, told.at(some), progress=progress)
        found = Products.of(model.process, times, watched.seen, end)
        parts.append(found._replace(table=found.table * len(end) / n))
    whole_table = torch.stack([part.table for part in parts]).sum(0)
    paths = shortest(parts[0]._replace(table=whole_table).errors(), min(MOST, len(times) - 1))
    walks = tuple(tuple(torch.stack([times[i] for i in path]).tolist()) for path in paths)
    return Fit(model.digest(), n, Fitted(walks))
