"""Importance-sampled t: what a run remembers of its losses, and how often it takes each t therefore.

The table of losses is part of a run's state, as an optimiser's moments are. Given it, a loss is a function of its keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from undiffuse.diffusion.density import Density, Importance
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.objective import Objective
from undiffuse.diffusion.process import Process
from undiffuse.key import Keys


@dataclass(frozen=True)
class Drawn(Density):
    """t = n/T with probability p_n, all of them positive; a loss at t is over T p_n."""

    p: Float[Tensor, "T"]
    unbiased: ClassVar[bool] = True

    def draw(self, process: Process, keys: Keys) -> Float[Tensor, "b"]:
        edges = self.p.cumsum(0)
        below = torch.searchsorted(edges, keys.uniform() * edges[-1], right=True)
        return (below.clamp(max=len(edges) - 1) + 1).double() / len(edges)

    def weight(self, process: Process, t: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        return 1 / (len(self.p) * self.p[row_of(t, len(self.p))])


def row_of(t: Float[Tensor, "b"], steps: int) -> Int[Tensor, "b"]:
    """n − 1 of t = n/T."""
    return (t * steps).round().long() - 1


class Seen:
    """The last losses of a run at each t of its table, if its density asks for them (`on`)."""

    def __init__(self, objective: Objective, process: Process):
        self.options = objective.density if isinstance(objective.density, Importance) else None
        steps, history = (process.steps or 0, self.options.history) if self.options else (0, 0)
        self.losses = torch.zeros(steps, history, dtype=torch.float32, device="cpu")
        self.count = torch.zeros(steps, dtype=torch.int64, device="cpu")  # how many there have been of each t

    @property
    def on(self) -> bool:
        return self.options is not None

    def density(self) -> Density | None:
        """How often each t is taken from now on; None if that does not depend on losses."""
        if self.options is None or int(self.count.min()) < self.options.history:
            return self.options
        root = self.losses.to(F64).square().mean(1).sqrt()
        uniform = self.options.uniform
        return Drawn((1 - uniform) * root / root.sum() + uniform / len(root))

    def applied(self, objective: Objective) -> Objective:
        """The objective with that density."""
        return replace(objective, density=self.density()) if self.on else objective  # pyright: ignore[reportArgumentType]

    def observe(self, t: Float[Tensor, "b"], loss: Float[Tensor, "b"]) -> None:
        """Takes note of the losses of a batch, without the factor 1/(T p_t), in the order of its rows."""
        history = self.losses.shape[1]
        for n, each in zip(row_of(t, len(self.losses)).tolist(), loss.tolist(), strict=True):
            self.losses[n, int(self.count[n]) % history] = each  # over the oldest
            self.count[n] += 1

    def tensors(self) -> dict[str, Shaped[Tensor, "..."]]:
        """The state for a checkpoint."""
        return {"losses": self.losses, "count": self.count}

    def restore(self, tensors: Mapping[str, Shaped[Tensor, "..."]]) -> None:
        """Raises KeyError for a checkpoint that has nothing of it, which is none of such a run."""
        if self.on:
            self.losses.copy_(tensors["losses"])
            self.count.copy_(tensors["count"])
