"""What a network predicts: x̂_0 = c_skip x_t + c_out F(c_in x_t, time).

The target of F is (x_0 − c_skip x_t)/c_out, written here as on_x_0 x_0 + on_eps eps, so that nothing is divided by
something small.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.config import Positive, Table
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import PROCESSES, Process
from undiffuse.errors import UsageError

Time = Float[Tensor, "*b"]


class Coefficients(NamedTuple):
    """Float64, one an image."""

    skip: Time
    out: Time
    input: Time
    on_x_0: Time
    on_eps: Time


class Parameterisation(ABC):
    """What F is asked to predict."""

    needs_table: ClassVar[bool] = False
    lattice: ClassVar[bool] = False  # whether the network is told what follows from the levels of images

    @abstractmethod
    def coefficients(self, process: Process, t: Time) -> Coefficients: ...

    def check(self, process: Process, needs_x_0: bool = True) -> None:
        """Refuses a process on which it has no meaning; L_simple alone does without an x̂_0 at every t."""
        name, where = PARAMETERISATIONS.name_of(self), PROCESSES.name_of(process)
        if self.needs_table and process.steps is None:
            raise UsageError(f"{name} needs a β-table, and {where} has none; choose x0 or v")
        if needs_x_0 and not self.coefficients(process, torch.ones(1, dtype=F64, device="cpu")).out.isfinite():
            raise UsageError(
                f"{name} says nothing about x_0 at t = 1, where the process {where} has alpha = 0; "
                "sampling and bits/dim need a network trained to predict x0 or v"
            )


@dataclass(frozen=True)
class Eps(Parameterisation):
    """F is the noise (DDPM, Eq. 11)."""

    def coefficients(self, process: Process, t: Time) -> Coefficients:
        alpha, sigma = process.alpha_sigma(t)
        one = torch.ones_like(alpha)
        return Coefficients(1 / alpha, -sigma / alpha, one, torch.zeros_like(one), one)


@dataclass(frozen=True)
class X0(Parameterisation):
    """F is the image."""

    def coefficients(self, process: Process, t: Time) -> Coefficients:
        one = torch.ones_like(process.alpha(t))
        zero = torch.zeros_like(one)
        return Coefficients(zero, one, one, one, zero)


@dataclass(frozen=True)
class V(Parameterisation):
    """F is alpha eps − sigma x_0, scaled to unit norm where the frame is not (Salimans & Ho 2022)."""

    def coefficients(self, process: Process, t: Time) -> Coefficients:
        alpha, sigma = process.alpha_sigma(t)
        norm = (alpha.square() + sigma.square()).sqrt()
        return Coefficients(alpha / norm**2, -sigma / norm, torch.ones_like(norm), -sigma / norm, alpha / norm)


@dataclass(frozen=True)
class Mu(Parameterisation):
    """F is μ̃, the mean of q(x_{t−1/T} | x_t, x_0): exists on its own table only."""

    needs_table: ClassVar[bool] = True

    def coefficients(self, process: Process, t: Time) -> Coefficients:
        b, c = process.posterior_coefficients(t, (t.to(F64) - process.t_min).clamp(min=0))
        alpha, sigma = process.alpha_sigma(t)
        return Coefficients(-b / c, 1 / c, torch.ones_like(b), b * alpha + c, b * sigma)


@dataclass(frozen=True)
class Edm(Parameterisation):
    """The preconditioning of Karras et al. 2022, Table 1, written for any frame."""

    sigma_data: Positive = 0.5

    def coefficients(self, process: Process, t: Time) -> Coefficients:
        alpha, sigma = process.alpha_sigma(t)
        norm = (sigma.square() + (alpha * self.sigma_data).square()).sqrt()
        skip, out = alpha * self.sigma_data**2 / norm**2, sigma * self.sigma_data / norm
        return Coefficients(skip, out, 1 / norm, sigma / (norm * self.sigma_data), -alpha * self.sigma_data / norm)


PARAMETERISATIONS: Table[Parameterisation] = Table(
    "parameterisation", Parameterisation, "undiffuse.diffusion.parameterisation"
)


@dataclass(frozen=True)
class Lattice(Parameterisation):
    """Another one, whose F is the network's answer and what eps_g = E[eps | x_t] of equally likely levels adds (ours).

    The network is told eps_g too. So near the data, where sigma/alpha is a level or less, it need not learn the levels.
    """

    lattice: ClassVar[bool] = True
    of: Annotated[Parameterisation, PARAMETERISATIONS] = V()

    def __post_init__(self) -> None:
        if self.of.lattice or self.of.needs_table:
            name = PARAMETERISATIONS.name_of(self.of)
            raise UsageError(f"parameterisation lattice cannot be of {name}; choose eps, x0, v or edm")

    def coefficients(self, process: Process, t: Time) -> Coefficients:
        return self.of.coefficients(process, t)
