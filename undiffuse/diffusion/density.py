"""How often each t is trained on. It weights the loss, as does a factor on it, but with less noise.

A process names the density that suits it (`Process.suits`); an objective may name another.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from undiffuse.config import Count, Fraction, Positive, Table
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import Process
from undiffuse.key import Keys

GOLDEN = (5**0.5 - 1) / 2


class Density(ABC):
    """A distribution of t over [t_min, 1].

    With one that is `unbiased` a loss times `weight` has the mean that it has at uniform t. Others are the point of it.
    """

    unbiased: ClassVar[bool] = False
    needs_table: ClassVar[bool] = False

    @abstractmethod
    def draw(self, process: Process, keys: Keys) -> Float[Tensor, "b"]:
        """A t for each key, float64 on the CPU, in [0, 1]."""

    def t(self, process: Process, keys: Keys) -> Float[Tensor, "b"]:
        """A t for each key, at which a network may be asked: a point n/T of a table, else at least t_min."""
        drawn = self.draw(process, keys.fold("t").to("cpu"))
        if process.steps is not None:
            drawn = (drawn * process.steps).round() / process.steps
        return drawn.clamp(process.t_min, 1)

    def weight(self, process: Process, t: Float[Tensor, "b"]) -> Float[Tensor, "b"] | None:
        """What makes up for how often t is taken, float64 on the CPU; None for 1 everywhere."""
        return None


@dataclass(frozen=True)
class Uniform(Density):
    """Uniform on the grid 1/T … 1 of a table (DDPM), or on [t_min, 1]."""

    unbiased: ClassVar[bool] = True

    def draw(self, process: Process, keys: Keys) -> Float[Tensor, "b"]:
        if process.steps is not None:
            return (keys.integers(process.steps) + 1).double() / process.steps
        return process.t_min + (1 - process.t_min) * keys.uniform()


@dataclass(frozen=True)
class LogNormal(Density):
    """ln(σ/alpha) is normal (Karras et al. 2022, Table 1)."""

    mean: float = -1.2
    std: Positive = 1.2

    def draw(self, process: Process, keys: Keys) -> Float[Tensor, "b"]:
        return process.time(-2 * (self.mean + self.std * keys.normal().double()))


@dataclass(frozen=True)
class LogitNormal(Density):
    """t is the logistic function of a normal (Esser et al. 2024, Eq. 19)."""

    mean: float = 0.0
    std: Positive = 1.0

    def draw(self, process: Process, keys: Keys) -> Float[Tensor, "b"]:
        return torch.sigmoid(self.mean + self.std * keys.normal().double())


@dataclass(frozen=True)
class Importance(Density):
    """p_t ∝ √E[L_t²] from the last losses at each t of a table (Nichol & Dhariwal 2021, Eq. 18); losses over T p_t.

    What is drawn is uniform until a run has `history` losses of each t, and it stays so for a share `uniform`. The
    losses are the run's (`importance.Seen`); without them, as on held-out images, this is `Uniform`.
    """

    history: Count = 10
    uniform: Fraction = 0.001
    unbiased: ClassVar[bool] = True
    needs_table: ClassVar[bool] = True

    def draw(self, process: Process, keys: Keys) -> Float[Tensor, "b"]:
        return Uniform().draw(process, keys)


@dataclass(frozen=True)
class AlphaSquared(Density):
    """ln sigma² is even (alpha² + sigma² = 1): γ = −logsnr has a density in proportion to alpha² (`ContinuousVlb`).

    With u from 0 to 1, γ(u) = −ln(e^(−Zu) (1 + e^(−γ_0)) − 1) between the ends γ_0 at t_min and γ_1 at 1. The u of a
    batch is a row of steps of the golden ratio by the row of the global batch, from a start that is the key's: it is
    evener than by chance, however the batch is divided (as the low-discrepancy sampler of Kingma et al. 2021).
    """

    def draw(self, process: Process, keys: Keys) -> Float[Tensor, "b"]:
        first, last = log_variances(process)
        u = (keys.key.uniform().cpu() + GOLDEN * keys.rows.double()) % 1
        return process.time(torch.log(torch.expm1(-torch.lerp(first, last, u))))  # SNR = 1/sigma² − 1


def log_variances(process: Process) -> Float[Tensor, "2"]:
    """ln sigma² at t_min and at 1 where alpha² + sigma² is 1: their difference is Z = ln((1 + e^−γ_0)/(1 + e^−γ_1))."""
    ends = torch.tensor([process.t_min, 1.0], dtype=F64, device="cpu")
    return logsigmoid(-process.logsnr(ends))


DENSITIES: Table[Density] = Table("density", Density, "undiffuse.diffusion.density")


def suited(process: Process) -> Density:
    """The density that a process names as its own."""
    return DENSITIES.build(process.suits.density)
