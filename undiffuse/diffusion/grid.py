"""Where a chain looks: n steps from t = 1 down to 0. What is even in t suits tables; what suits σ/alpha is other.

A process names the grid that suits it (`Process.suits`); a user may name another.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.config import Positive, Table
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import Process
from undiffuse.errors import UsageError

FEW = 1000  # steps where neither a table nor the user says how many


class Grid(ABC):
    """A rule for the times of a chain."""

    @abstractmethod
    def spread(self, process: Process, steps: int) -> Float[Tensor, "steps"]:
        """The times before the last one, 0: not rising, from 1 on, in float64. They need not be points of a table."""

    def times(self, process: Process, steps: int | None = None) -> Float[Tensor, "times"]:
        """`steps` falling times and 0; all of a table unless said. On a table each is a point n/T of it."""
        total = process.steps or steps or FEW
        if steps is not None and not 1 <= steps <= total:
            most = f"1 to {process.steps}" if process.steps else "1 or more"
            raise UsageError(f"steps = {steps} is not possible; this model takes {most}")
        count = steps or total
        found = self.spread(process, count)
        if process.steps:
            found = _apart((found * process.steps).round(), process.steps) / process.steps
        return torch.cat([found, torch.zeros(1, dtype=F64, device="cpu")])


def _apart(n: Float[Tensor, "steps"], last: int) -> Float[Tensor, "steps"]:
    """Falling whole numbers within 1 … last: those that rounding made equal are moved to the nearest free ones."""
    place = torch.arange(len(n) - 1, -1, -1, dtype=F64, device="cpu")  # how many are to come
    lifted = (n - place).clamp(min=1).flip(0).cummax(0).values.flip(0) + place
    return torch.minimum(lifted, last - place.flip(0))


@dataclass(frozen=True)
class Even(Grid):
    """Even in t: on a table the ancestral chain of DDPM, or steps spread over it."""

    def spread(self, process: Process, steps: int) -> Float[Tensor, "steps"]:
        total = process.steps or steps
        return torch.linspace(total, 0, steps + 1, dtype=F64, device="cpu")[:-1].round() / total


@dataclass(frozen=True)
class Karras(Grid):
    """Even in (σ/alpha)^(1/rho), from the noise end, or `sigma_max`, to `sigma_min` (Karras et al. 2022, Eq. 5).

    Where alpha(1) = 0 the first time stands for `sigma_max` and is 1 all the same: both are noise.
    """

    rho: Positive = 7.0
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0

    def spread(self, process: Process, steps: int) -> Float[Tensor, "steps"]:
        ends = torch.tensor([1.0, process.t_min], dtype=F64, device="cpu")
        high, low = torch.exp(-process.logsnr(ends) / 2).tolist()
        high, low = min(high, self.sigma_max), max(low, self.sigma_min)
        share = torch.linspace(0, 1, steps, dtype=F64, device="cpu")
        sigma = (high ** (1 / self.rho) + share * (low ** (1 / self.rho) - high ** (1 / self.rho))) ** self.rho
        times = process.time(-2 * sigma.log()).clamp(process.t_min, 1)
        times[0] = 1
        return times


GRIDS: Table[Grid] = Table("grid", Grid, "undiffuse.diffusion.grid")


def suited(process: Process) -> Grid:
    """The grid that a process names as its own."""
    return GRIDS.build(process.suits.grid)
