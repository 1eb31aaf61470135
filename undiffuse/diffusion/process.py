"""The forward process: one coordinate t = n/T, one function logsnr(t), and a frame that turns it into alpha and sigma.

x_t = alpha(t) x_0 + sigma(t) eps, with t = 0 the data and t = 1 the noise. Everything is float64 on the CPU until it
meets an image. Ho, Jain & Abbeel 2020 ("DDPM") count n = 1 … T; their code counts i = n − 1.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from undiffuse.config import Count, Fraction, Positive, Table
from undiffuse.diffusion.numbers import F64, combined, per_image
from undiffuse.errors import UsageError


class Suits(NamedTuple):
    """The names, in their tables, of what suits a process where a user names no other."""

    grid: str = "even"
    density: str = "uniform"


class Process(ABC):
    """`logsnr(t)`, strictly decreasing from +∞, and a frame."""

    suits: ClassVar[Suits] = Suits()
    frame: ClassVar[Literal["variance preserving", "variance exploding", "straight"]] = "variance preserving"
    steps: int | None = None
    prior_std: float = 1.0
    ends: ClassVar[bool] = False  # at t_min, where an image is read off x_t without a network (`lattice.level_nll`)

    @abstractmethod
    def logsnr(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """log(alpha²/sigma²) at t in [0, 1]; +∞ at 0."""

    @abstractmethod
    def time(self, logsnr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The inverse of `logsnr`."""

    @property
    def t_min(self) -> float:
        """The least t at which a network is called."""
        return 1 / self.steps if self.steps else 1e-5

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return self.alpha_sigma(t)[0]

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return self.alpha_sigma(t)[1]

    def alpha_sigma(self, t: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
        """Both, for the cost of one."""
        return self._frame(self.logsnr(t))

    def _frame(self, logsnr: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
        if self.frame == "variance preserving":
            return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
        if self.frame == "variance exploding":
            return torch.ones_like(logsnr), torch.exp(-logsnr / 2)
        return torch.sigmoid(logsnr / 2), torch.sigmoid(-logsnr / 2)

    def spread(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """sigma/alpha, in which the flow of every frame is the same."""
        return torch.exp(-self.logsnr(t) / 2)

    def time_of_spread(self, spread: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return self.time(-2 * spread.log())

    def marginal(
        self, x_0: Float[Tensor, "b *x"], eps: Float[Tensor, "b *x"], t: Float[Tensor, "b"]
    ) -> Float[Tensor, "b *x"]:
        """A draw of q(x_t | x_0) from the noise given (Eq. 4)."""
        alpha, sigma = self.alpha_sigma(t)
        return combined(per_image(alpha, x_0), x_0, per_image(sigma, x_0), eps)

    def posterior(
        self, x_t: Float[Tensor, "b *x"], x_0: Float[Tensor, "b *x"], t: Float[Tensor, "b"], s: Float[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b *x"], Float[Tensor, "b"]]:
        """Mean and variance of q(x_s | x_t, x_0) for any s < t (Eqs. 6 and 7)."""
        b, c = self.posterior_coefficients(t, s)
        return combined(per_image(b, x_t), x_t, per_image(c, x_t), x_0), self.small_variance(t, s)

    def posterior_coefficients(
        self, t: Float[Tensor, "*b"], s: Float[Tensor, "*b"]
    ) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
        """(b, c) of the mean b x_t + c x_0; finite for logsnr_s = +∞ and for logsnr_t = −∞."""
        logsnr_t, logsnr_s = self.logsnr(t), self.logsnr(s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self._frame(logsnr_t), self._frame(logsnr_s)
        b = (alpha_t / alpha_s) * (sigma_s / sigma_t).square()
        return b, -alpha_s * torch.expm1(logsnr_t - logsnr_s)

    def small_variance(self, t: Float[Tensor, "*b"], s: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """β̃, the variance of the posterior: the best fixed choice when the data are one point."""
        logsnr_s = self.logsnr(s)
        return self._frame(logsnr_s)[1].square() * -torch.expm1(self.logsnr(t) - logsnr_s)

    def large_variance(self, t: Float[Tensor, "*b"], s: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """β of the step taken, 1 − ᾱ_t/ᾱ_s in the variance-preserving frame: best when the data are N(0, I)."""
        logsnr_t, logsnr_s = self.logsnr(t), self.logsnr(s)
        scale = self._frame(logsnr_s)[0].square() / torch.sigmoid(logsnr_s)
        return scale * -torch.expm1(logsigmoid(logsnr_t) - logsigmoid(logsnr_s))

    def variance_floor(self) -> Float[Tensor, ""]:
        """The decoder's σ²: β̃ of the step 2/T → 1/T of the training table, whatever the chain."""
        first = torch.tensor(self.t_min, dtype=F64, device="cpu")
        return self.small_variance(2 * first, first)


class TableProcess(Process):
    """A β-table: log ᾱ at n/T, linear in between (β constant within a step), so the grid is exact."""

    steps: int

    @abstractmethod
    def betas(self) -> Float[Tensor, "T"]:
        """β_1 … β_T in float64."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UsageError(f"process {PROCESSES.name_of(self)} has steps = {self.steps}; give 2 or more")
        betas = self.betas()
        if betas.min() <= 0 or betas[:-1].max() >= 1:
            raise UsageError(
                f"process {PROCESSES.name_of(self)} has β from {betas.min():g} to {betas.max():g}; "
                "each must be above 0 and below 1, but for the last, which may be 1"
            )

    @cached_property
    def log_alpha_bar(self) -> Float[Tensor, "grid"]:
        log_alpha_bar = torch.zeros(self.steps + 1, dtype=F64, device="cpu")
        log_alpha_bar[1:] = torch.cumsum(torch.log1p(-self.betas()), 0)
        return log_alpha_bar

    @cached_property
    def _ends_at_zero(self) -> bool:
        return bool(torch.isinf(self.log_alpha_bar[-1]))

    def _interpolate(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """log ᾱ(t). A last step with β = 1 is linear in ᾱ, which its logarithm cannot be."""
        n = t.to(F64) * self.steps
        # Rounding of n/T·T must not push a grid point into the neighbouring step.
        n = torch.where(torch.isclose(n, n.round(), rtol=1e-14, atol=0), n.round(), n)
        right = n.ceil().clamp(1, self.steps).long()
        table = self.log_alpha_bar
        rise = table[right] - table[right - 1]
        value = table[right - 1] + (n - (right - 1)) * rise
        value = torch.where(n == right, table[right], value)
        if self._ends_at_zero:
            value = torch.where(right == self.steps, table[-2] + torch.log(self.steps - n), value)
        return value

    def logsnr(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        log_alpha_bar = self._interpolate(t)
        return log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))

    def time(self, logsnr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        log_alpha_bar = logsigmoid(logsnr.to(F64))
        table = self.log_alpha_bar
        right = torch.searchsorted(-table, -log_alpha_bar).clamp(1, self.steps)
        n = (right - 1) + (log_alpha_bar - table[right - 1]) / (table[right] - table[right - 1])
        if self._ends_at_zero:
            n = torch.where(right == self.steps, self.steps - torch.exp(log_alpha_bar - table[-2]), n)
        return n / self.steps


@dataclass(frozen=True)
class Linear(TableProcess):
    """β evenly spaced: the schedule of DDPM."""

    steps: Count = 1000
    beta_start: Fraction = 1e-4
    beta_end: Fraction = 0.02

    def betas(self) -> Float[Tensor, "T"]:
        return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=F64, device="cpu")


@dataclass(frozen=True)
class Quad(TableProcess):
    """√β evenly spaced."""

    steps: Count = 1000
    beta_start: Fraction = 1e-4
    beta_end: Fraction = 0.02

    def betas(self) -> Float[Tensor, "T"]:
        return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=F64, device="cpu").square()


@dataclass(frozen=True)
class Const(TableProcess):
    """One β throughout."""

    steps: Count = 1000
    beta_end: Fraction = 0.02

    def betas(self) -> Float[Tensor, "T"]:
        return torch.full((self.steps,), self.beta_end, dtype=F64, device="cpu")


def _warmup(steps: int, start: float, end: float, fraction: float) -> Float[Tensor, "T"]:
    betas = torch.full((steps,), end, dtype=F64, device="cpu")
    first = int(steps * fraction)
    betas[:first] = torch.linspace(start, end, first, dtype=F64, device="cpu")
    return betas


@dataclass(frozen=True)
class Warmup10(TableProcess):
    """β rises linearly over the first tenth, then stays (in the authors' code only)."""

    steps: Count = 1000
    beta_start: Fraction = 1e-4
    beta_end: Fraction = 0.02

    def betas(self) -> Float[Tensor, "T"]:
        return _warmup(self.steps, self.beta_start, self.beta_end, 0.1)


@dataclass(frozen=True)
class Warmup50(TableProcess):
    """β rises linearly over the first half, then stays (in the authors' code only)."""

    steps: Count = 1000
    beta_start: Fraction = 1e-4
    beta_end: Fraction = 0.02

    def betas(self) -> Float[Tensor, "T"]:
        return _warmup(self.steps, self.beta_start, self.beta_end, 0.5)


@dataclass(frozen=True)
class Jsd(TableProcess):
    """β = 1/T, 1/(T−1), …, 1 (Sohl-Dickstein et al. 2015): ᾱ falls linearly to exactly 0."""

    steps: Count = 1000

    def betas(self) -> Float[Tensor, "T"]:
        return 1 / torch.arange(self.steps, 0, -1, dtype=F64, device="cpu")


@dataclass(frozen=True)
class Cosine(TableProcess):
    """Improved DDPM's table (Nichol & Dhariwal 2021, Eq. 17)."""

    steps: Count = 1000
    offset: Fraction = 0.008
    beta_max: Fraction = 0.999

    def betas(self) -> Float[Tensor, "T"]:
        quarter = math.pi / 2 / (1 + self.offset)
        angle = quarter * (torch.linspace(0, 1, self.steps + 1, dtype=F64, device="cpu") + self.offset)
        # 1 − cos²b/cos²a without its cancellation: cos²a − cos²b = sin(b − a) sin(a + b).
        difference = math.sin(quarter / self.steps) * torch.sin(angle[:-1] + angle[1:])
        return (difference / torch.cos(angle[:-1]).square()).clamp(max=self.beta_max)


@dataclass(frozen=True)
class Straight(Process):
    """x_t = (1 − t) x_0 + t eps: the path of rectified flow (Liu et al. 2022)."""

    suits: ClassVar[Suits] = Suits(density="logit-normal")
    frame: ClassVar[str] = "straight"

    def logsnr(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        t = t.to(F64)
        return 2 * (torch.log1p(-t) - torch.log(t))

    def time(self, logsnr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.sigmoid(-logsnr.to(F64) / 2)


@dataclass(frozen=True)
class Edm(Process):
    """x_t = x_0 + sigma eps with sigma = t sigma_max (Karras et al. 2022); where to look along it is the grid's."""

    suits: ClassVar[Suits] = Suits("karras", "log-normal")
    frame: ClassVar[str] = "variance exploding"
    sigma_max: Positive = 80.0

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def logsnr(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return -2 * torch.log(t.to(F64) * self.sigma_max)

    def time(self, logsnr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.exp(-logsnr.to(F64) / 2) / self.sigma_max


@dataclass(frozen=True)
class ContinuousCosine(Process):
    """logsnr = −2 log tan(πt/2), the limit of the cosine table (Kingma & Gao 2023)."""

    def logsnr(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        t = t.to(F64)
        # sin(π(1−t)/2) and not cos(πt/2): exact zeros at both ends.
        return 2 * (torch.log(torch.sin((1 - t) * math.pi / 2)) - torch.log(torch.sin(t * math.pi / 2)))

    def time(self, logsnr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.atan(torch.exp(-logsnr.to(F64) / 2)) * 2 / math.pi


@dataclass(frozen=True)
class Sigmoid(Process):
    """ᾱ is a logistic curve between start and end, stretched to run from 1 to 0 (Jabri et al. 2022)."""

    start: float = -3.0
    end: float = 3.0
    tau: Positive = 1.0

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise UsageError(f"process sigmoid runs from {self.start:g} to {self.end:g}; start must be below end")

    @property
    def _width(self) -> float:
        return (self.end - self.start) / self.tau

    @property
    def _log_ratio(self) -> float:
        low, high = (1 / (1 + math.exp(-x / self.tau)) for x in (self.start, self.end))
        return math.log(high / low)

    def logsnr(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        # Differences of logistic curves written as products, which are exact at both ends.
        done, left = self._width * t.to(F64), self._width * (1 - t.to(F64))
        return self._log_ratio - done + torch.log(-torch.expm1(-left)) - torch.log(-torch.expm1(-done))

    def time(self, logsnr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        ratio, last = torch.exp(logsnr.to(F64) - self._log_ratio), math.exp(-self._width)
        return torch.log1p((1 - last) / (ratio + last)) / self._width


@dataclass(frozen=True)
class Vdm(Process):
    """γ = −logsnr is even in t, from γ_0 at t_min to γ_1 at 1 (Kingma et al. 2021); below it sigma/alpha falls as t."""

    suits: ClassVar[Suits] = Suits(density="alpha-squared")
    ends: ClassVar[bool] = True
    gamma_0: float = -13.3
    gamma_1: float = 5.0

    def __post_init__(self) -> None:
        if self.gamma_0 >= self.gamma_1:
            ends = f"{self.gamma_0:g} to {self.gamma_1:g}"
            raise UsageError(f"process vdm runs from γ = {ends}; gamma_0 must be below gamma_1")

    @property
    def _rise(self) -> float:
        return (self.gamma_1 - self.gamma_0) / (1 - self.t_min)

    def logsnr(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        t = t.to(F64)
        risen = torch.where(t < self.t_min, 2 * torch.log(t / self.t_min), self._rise * (t - self.t_min))
        return -self.gamma_0 - risen

    def time(self, logsnr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        above = logsnr.to(F64) + self.gamma_0  # γ_0 − γ
        return torch.where(above > 0, self.t_min * torch.exp(-above / 2), self.t_min - above / self._rise)


PROCESSES: Table[Process] = Table("process", Process, "undiffuse.diffusion.process")
