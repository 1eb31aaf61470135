"""What a network predicts, how sure the reverse step is, and the one callable that all the rest sees.

A parameterisation is a row of coefficients: `x̂_0 = c_skip x_t + c_out F(c_in x_t, time)`, and the target of F is
`(x_0 − c_skip x_t)/c_out`, written here as `on_x_0 x_0 + on_eps eps` so that nothing is divided by something small.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.config import Positive, Table
from undiffuse.diffusion.gaussian import bits, decoder_nll, kl
from undiffuse.diffusion.process import F64, PROCESSES, Process, per_image
from undiffuse.errors import UsageError
from undiffuse.key import moved
from undiffuse.network.base import NOTHING, Conditioning

Time = Float[Tensor, "b"]


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
        alpha, sigma = process.alpha(t), process.sigma(t)
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
        alpha, sigma = process.alpha(t), process.sigma(t)
        norm = (alpha.square() + sigma.square()).sqrt()
        return Coefficients(alpha / norm**2, -sigma / norm, torch.ones_like(norm), -sigma / norm, alpha / norm)


@dataclass(frozen=True)
class Mu(Parameterisation):
    """F is μ̃, the mean of q(x_{t−1/T} | x_t, x_0): exists on its own table only."""

    needs_table: ClassVar[bool] = True

    def coefficients(self, process: Process, t: Time) -> Coefficients:
        b, c = process.posterior_coefficients(t, (t.to(F64) - process.t_min).clamp(min=0))
        alpha, sigma = process.alpha(t), process.sigma(t)
        return Coefficients(-b / c, 1 / c, torch.ones_like(b), b * alpha + c, b * sigma)


@dataclass(frozen=True)
class Edm(Parameterisation):
    """The preconditioning of Karras et al. 2022, Table 1, written for any frame."""

    sigma_data: Positive = 0.5

    def coefficients(self, process: Process, t: Time) -> Coefficients:
        alpha, sigma = process.alpha(t), process.sigma(t)
        norm = (sigma.square() + (alpha * self.sigma_data).square()).sqrt()
        skip, out = alpha * self.sigma_data**2 / norm**2, sigma * self.sigma_data / norm
        return Coefficients(skip, out, 1 / norm, sigma / (norm * self.sigma_data), -alpha * self.sigma_data / norm)


PARAMETERISATIONS: Table[Parameterisation] = Table("parameterisation", Parameterisation, "undiffuse.diffusion.denoiser")


class Prediction(NamedTuple):
    """What a denoiser says at (x_t, t). `mean` is set only where the network gives the reverse mean itself (mu)."""

    x_0: Float[Tensor, "b *x"]
    output: Float[Tensor, "b *x"]
    raw_variance: Float[Tensor, "b *x"] | None = None
    mean: Float[Tensor, "b *x"] | None = None


class Variance(ABC):
    """The variance of the reverse step p(x_s | x_t)."""

    learned = False

    @abstractmethod
    def log_variance(self, process: Process, prediction: Prediction, t: Time, s: Time) -> Float[Tensor, "b *x"]:
        """log σ² of each value, or of each image with ones for sides; at s = 0 the decoder's."""


def _step_log_variances(process: Process, t: Time, s: Time) -> tuple[Time, Time]:
    """log β̃ and log β of the step; at s = 0, where β̃ = 0, both are the decoder's."""
    floor = process.variance_floor().log()
    small, large = process.small_variance(t, s).log(), process.large_variance(t, s).log()
    end = s <= 0
    return torch.where(end, floor, small), torch.where(end, floor, large)


@dataclass(frozen=True)
class FixedSmall(Variance):
    """β̃: what the authors used for LSUN and CelebA-HQ."""

    def log_variance(self, process: Process, prediction: Prediction, t: Time, s: Time) -> Float[Tensor, "b *x"]:
        return per_image(_step_log_variances(process, t, s)[0], prediction.x_0)


@dataclass(frozen=True)
class FixedLarge(Variance):
    """β: what the authors used for CIFAR-10."""

    def log_variance(self, process: Process, prediction: Prediction, t: Time, s: Time) -> Float[Tensor, "b *x"]:
        return per_image(_step_log_variances(process, t, s)[1], prediction.x_0)


@dataclass(frozen=True)
class Learned(Variance):
    """The network gives log σ² of each value (DDPM's ablation); it holds for the step that it was trained on only."""

    learned = True

    def log_variance(self, process: Process, prediction: Prediction, t: Time, s: Time) -> Float[Tensor, "b *x"]:
        if not _is_table_step(process, t, s):
            raise UsageError(
                "the learned log-variance belongs to steps of 1/T; sample with all steps, or train learned-range"
            )
        return _raw(prediction)


@dataclass(frozen=True)
class LearnedRange(Variance):
    """Between β̃ and β, by v in [−1, 1] of each value, for any step (Nichol & Dhariwal 2021, Eq. 15)."""

    learned = True

    def log_variance(self, process: Process, prediction: Prediction, t: Time, s: Time) -> Float[Tensor, "b *x"]:
        raw = _raw(prediction)
        small, large = _step_log_variances(process, t, s)
        share = (raw + 1) / 2
        # At s = 0 the range is that of the first step: from the decoder's σ² to β.
        large = torch.where(s <= 0, process.large_variance(t, s).log(), large)
        return share * per_image(large, raw) + (1 - share) * per_image(small, raw)


VARIANCES: Table[Variance] = Table("variance", Variance, "undiffuse.diffusion.denoiser")


def _is_table_step(process: Process, t: Time, s: Time) -> bool:
    """Whether every step is the table's own, of 1/T."""
    return process.steps is not None and bool(((t - s) * process.steps - 1).abs().max() < 1e-6)


def _raw(prediction: Prediction) -> Float[Tensor, "b *x"]:
    if prediction.raw_variance is None:
        raise UsageError("a learned variance needs a network with twice as many output channels as the image has")
    return prediction.raw_variance


def reverse(
    process: Process, variance: Variance, prediction: Prediction, x_t: Float[Tensor, "b *x"], t: Time, s: Time
) -> tuple[Float[Tensor, "b *x"], Float[Tensor, "b *#x"]]:
    """Mean and log-variance of p(x_s | x_t): the posterior at x̂_0, or the network's own mean."""
    log_variance = variance.log_variance(process, prediction, t, s)
    if prediction.mean is None:
        return process.posterior(x_t, prediction.x_0, t, s)[0], log_variance
    if not _is_table_step(process, t, s):
        raise UsageError("mu prediction holds for steps of 1/T only; sample with all steps, or train eps, x0 or v")
    return prediction.mean, log_variance


def network_time(kind: Literal["index", "logsnr", "sigma"], process: Process, t: Time) -> Time:
    """What a network is told about t, in float64: `index` = T t − 1, `logsnr`, or `sigma` = ln(sigma/alpha)/4.

    logsnr is held within ±20, which a network cannot tell from the infinite one that some processes end at.
    """
    if kind == "index":
        if process.steps is None:
            where = PROCESSES.name_of(process)
            raise UsageError(f'time = "index" needs a β-table, and {where} has none; give --set network.time=logsnr')
        return t * process.steps - 1
    logsnr = process.logsnr(t).clamp(-20, 20)
    return logsnr if kind == "logsnr" else -logsnr / 8


class Denoiser(nn.Module):
    """Network + process + parameterisation: `denoiser(x_t, t) -> Prediction`.

    `clip` limits x̂_0 to [−1, 1], as the authors' code does when it samples and measures; never in training.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        parameterisation: Parameterisation,
        variance: Variance,
        time: Literal["index", "logsnr", "sigma"] = "index",
        clip: bool = True,
    ):
        super().__init__()
        self.network, self.process, self.parameterisation, self.variance = network, process, parameterisation, variance
        self.time: Literal["index", "logsnr", "sigma"] = time
        self.clip = clip

    def forward(self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning = NOTHING) -> Prediction:
        """x_t in float32, t in float64 within [t_min, 1]; the two may be on different devices."""
        t = t.cpu()
        coefficients = self.parameterisation.coefficients(self.process, t)
        time = network_time(self.time, self.process, t).to(torch.float32)
        output = self.network(per_image(coefficients.input, x_t) * x_t, moved(time, x_t.device), cond).to(x_t.dtype)
        raw_variance = None
        if self.variance.learned:
            output, raw_variance = output.chunk(2, dim=1)
        x_0 = per_image(coefficients.skip, x_t) * x_t + per_image(coefficients.out, x_t) * output
        mean = output if isinstance(self.parameterisation, Mu) else None
        return Prediction(x_0.clamp(-1, 1) if self.clip else x_0, output, raw_variance, mean)

    def target(
        self, x_0: Float[Tensor, "b *x"], eps: Float[Tensor, "b *x"], t: Float[Tensor, "b"]
    ) -> Float[Tensor, "b *x"]:
        """What the network should have said."""
        t = t.cpu()
        coefficients = self.parameterisation.coefficients(self.process, t)
        return per_image(coefficients.on_x_0, x_0) * x_0 + per_image(coefficients.on_eps, x_0) * eps

    def score(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning = NOTHING
    ) -> Float[Tensor, "b c h w"]:
        """∇ log q(x_t) = (alpha x̂_0 − x_t)/sigma², the link to score matching and Langevin dynamics (DDPM, §3.2)."""
        t = t.cpu()
        x_0 = self(x_t, t, cond).x_0
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return (per_image(alpha, x_t) * x_0 - x_t) / per_image(sigma, x_t).square()


def bound_term(
    denoiser: Denoiser,
    prediction: Prediction,
    x_0: Float[Tensor, "b *x"],
    x_t: Float[Tensor, "b *x"],
    t: Float[Tensor, "b"],
    s: Float[Tensor, "b"],
) -> Float[Tensor, "b"]:
    """The term of the variational bound that belongs to the step t → s, in bits/dim (Eq. 5).

    KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) for s > 0, the discretised decoder's −log p(x_0 | x_t) for s = 0.
    """
    process = denoiser.process
    mean, log_variance = reverse(process, denoiser.variance, prediction, x_t, t, s)
    posterior_mean, _ = process.posterior(x_t, x_0, t, s)
    posterior_log_variance = per_image(_step_log_variances(process, t, s)[0], x_t)
    divergence = bits(kl(posterior_mean, posterior_log_variance, mean, log_variance))
    decoder = bits(decoder_nll(x_0, mean, log_variance))
    return torch.where(moved(s <= 0, x_0.device), decoder, divergence)
