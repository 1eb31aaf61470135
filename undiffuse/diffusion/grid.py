"""Where a chain looks: n steps down to t = 0, from 1 or a little below it. What is even in t suits tables; what suits
σ/alpha is other.

A process names the grid that suits it (`Process.suits`); a user may name another.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.config import Exponent, Positive, Table
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import Process
from undiffuse.errors import UsageError

FEW = 1000  # steps where neither a table nor the user says how many


class Grid(ABC):
    """A rule for the times of a chain."""

    @abstractmethod
    def spread(self, process: Process, steps: int) -> Float[Tensor, "steps"]:
        """The times before the last one, 0: falling, at most 1, in float64. They need not be points of a table."""

    def times(self, process: Process, steps: int | None = None) -> Float[Tensor, "times"]:
        """`steps` falling times and 0; as many as a table has unless said."""
        total = process.steps or steps or FEW
        if steps is not None and not 1 <= steps <= total:
            most = f"1 to {process.steps}" if process.steps else "1 or more"
            raise UsageError(f"steps = {steps} is not possible; this model takes {most}")
        return torch.cat([self.spread(process, steps or total), torch.zeros(1, dtype=F64, device="cpu")])


@dataclass(frozen=True)
class Even(Grid):
    """Even in t: on a table the ancestral chain of DDPM, or steps spread over it."""

    def spread(self, process: Process, steps: int) -> Float[Tensor, "steps"]:
        total = process.steps or steps
        return torch.linspace(total, 0, steps + 1, dtype=F64, device="cpu")[:-1].round() / total


@dataclass(frozen=True)
class Quadratic(Grid):
    """Even in √t, from 1 to t_min: more steps near the data (Song, Meng & Ermon 2021, App. D.2)."""

    def spread(self, process: Process, steps: int) -> Float[Tensor, "steps"]:
        root = torch.linspace(1, process.t_min**0.5, steps, dtype=F64, device="cpu")
        return root.square().clamp(min=process.t_min)


@dataclass(frozen=True)
class InSigma(Grid):
    """Rules for σ/alpha, from that of t = 1 or `sigma_max` to that of t_min or `sigma_min`.

    Between σ/alpha = 80 and infinity, where many tables end, there is nothing to see but the mean of the data: a chain
    begins below t = 1 and at that mean (`Model.chain`).
    """

    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0

    @abstractmethod
    def between(self, high: float, low: float, share: Float[Tensor, "steps"]) -> Float[Tensor, "steps"]:
        """σ/alpha, from high where the share is 0 to low where it is 1."""

    def spread(self, process: Process, steps: int) -> Float[Tensor, "steps"]:
        ends = torch.tensor([1.0, process.t_min], dtype=F64, device="cpu")
        high, low = process.spread(ends).tolist()
        first, last = min(high, self.sigma_max), max(low, self.sigma_min)
        if last >= first:
            raise UsageError(
                f"grid {GRIDS.name_of(self)}: sigma/alpha from {first:g} to {last:g} does not fall; give sigma_min and "
                f"sigma_max between {low:.3g} and {high:.3g}, where this process is"
            )
        share = torch.linspace(0, 1, steps, dtype=F64, device="cpu")
        times = process.time_of_spread(self.between(first, last, share)).clamp(process.t_min, 1)
        # The ends as they are, and not the next number to them, with which a step would begin and end at once.
        if last == low and steps > 1:
            times[-1] = process.t_min
        if first == high:
            times[0] = 1
        return times


@dataclass(frozen=True)
class LogSnr(InSigma):
    """Even in log-SNR (Lu et al. 2022)."""

    def between(self, high: float, low: float, share: Float[Tensor, "steps"]) -> Float[Tensor, "steps"]:
        return high * (low / high) ** share


@dataclass(frozen=True)
class Karras(InSigma):
    """Even in (σ/alpha)^(1/rho) (Karras et al. 2022, Eq. 5)."""

    rho: Exponent = 7.0

    def between(self, high: float, low: float, share: Float[Tensor, "steps"]) -> Float[Tensor, "steps"]:
        return (high ** (1 / self.rho) + share * (low ** (1 / self.rho) - high ** (1 / self.rho))) ** self.rho


@dataclass(frozen=True)
class KarrasFew(Karras):
    """Karras's for few steps: the last begins at σ/alpha = 0.05, as in grids that are fitted to 10 to 30 steps.

    Below, a step of a fast solver changes next to nothing, and it is missed where the picture takes its form.
    """

    sigma_min: Positive = 0.05


GRIDS: Table[Grid] = Table("grid", Grid, "undiffuse.diffusion.grid")


def suited(process: Process) -> Grid:
    """The grid that a process names as its own."""
    return GRIDS.build(process.suits.grid)
