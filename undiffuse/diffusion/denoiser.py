"""What a network predicts, how sure the reverse step is, and the one callable that all the rest sees.

A parameterisation is a row of coefficients: `x̂_0 = c_skip x_t + c_out F(c_in x_t, time)`, and the target of F is
`(x_0 − c_skip x_t)/c_out`, written here as `on_x_0 x_0 + on_eps eps` so that nothing is divided by something small.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from undiffuse.config import Positive, Table
from undiffuse.diffusion.gaussian import bits, decoder_nll, kl
from undiffuse.diffusion.numbers import F64, combined, ready, row
from undiffuse.diffusion.process import PROCESSES, Process
from undiffuse.errors import UsageError
from undiffuse.network.base import NOTHING, Conditioning

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


PARAMETERISATIONS: Table[Parameterisation] = Table("parameterisation", Parameterisation, "undiffuse.diffusion.denoiser")


class Prediction(NamedTuple):
    """What a denoiser says at (x_t, t). `mean` is set only where the network gives the reverse mean itself (mu)."""

    x_0: Float[Tensor, "b *x"]
    output: Float[Tensor, "b *x"]
    raw_variance: Float[Tensor, "b *x"] | None = None
    mean: Float[Tensor, "b *x"] | None = None


class Step(NamedTuple):
    """What is known of the steps t → s before a network is asked: float64 [b], or `ready` to multiply images.

    The posterior's mean is on_x_t x_t + on_x_0 x_0. At s = 0, where β̃ = 0, `log_small` and `log_large` are the
    decoder's, and `log_beta` is log β there too.
    """

    on_x_t: Time
    on_x_0: Time
    log_small: Time
    log_large: Time
    log_beta: Time
    decodes: Time  # 1 where s = 0, else 0
    last: Bool[Tensor, "*b"]  # the same, for decisions
    of_table: Bool[Tensor, "*b"]  # whether it is a table's own, of 1/T

    @classmethod
    def between(cls, process: Process, t: Time, s: Time) -> "Step":
        floor, last = process.variance_floor().log(), s <= 0
        small, large = process.small_variance(t, s).log(), process.large_variance(t, s).log()
        logs = torch.where(last, floor, small), torch.where(last, floor, large), large
        steps = process.steps or 0
        of_table = ((t - s) * steps - 1).abs() < 1e-6
        return cls(*process.posterior_coefficients(t, s), *logs, last.to(F64), last, of_table)


class Variance(ABC):
    """The variance of the reverse step p(x_s | x_t)."""

    learned = False

    @abstractmethod
    def log_variance(self, step: Step, prediction: Prediction) -> Float[Tensor, "#b *#x"]:
        """log σ² of each value, or of each image, or of all, with ones for sides; at s = 0 the decoder's."""


@dataclass(frozen=True)
class FixedSmall(Variance):
    """β̃: what the authors used for LSUN and CelebA-HQ."""

    def log_variance(self, step: Step, prediction: Prediction) -> Float[Tensor, "#b *#x"]:
        return step.log_small


@dataclass(frozen=True)
class FixedLarge(Variance):
    """β: what the authors used for CIFAR-10."""

    def log_variance(self, step: Step, prediction: Prediction) -> Float[Tensor, "#b *#x"]:
        return step.log_large


@dataclass(frozen=True)
class Learned(Variance):
    """The network gives log σ² of each value (DDPM's ablation); it holds for the step that it was trained on only."""

    learned = True

    def log_variance(self, step: Step, prediction: Prediction) -> Float[Tensor, "#b *#x"]:
        if not step.of_table.all():
            raise UsageError(
                "the learned log-variance belongs to steps of 1/T; sample with all steps, or train learned-range"
            )
        return _raw(prediction)


@dataclass(frozen=True)
class LearnedRange(Variance):
    """Between β̃ and β, by v in [−1, 1] of each value, for any step (Nichol & Dhariwal 2021, Eq. 15)."""

    learned = True

    def log_variance(self, step: Step, prediction: Prediction) -> Float[Tensor, "#b *#x"]:
        share = (_raw(prediction) + 1) / 2
        # At s = 0 the range is that of the first step: from the decoder's σ² to β.
        return share * step.log_beta + (1 - share) * step.log_small


VARIANCES: Table[Variance] = Table("variance", Variance, "undiffuse.diffusion.denoiser")


def _raw(prediction: Prediction) -> Float[Tensor, "b *x"]:
    if prediction.raw_variance is None:
        raise UsageError("a learned variance needs a network with twice as many output channels as the image has")
    return prediction.raw_variance


def reverse(
    step: Step, variance: Variance, prediction: Prediction, x_t: Float[Tensor, "b *x"]
) -> tuple[Float[Tensor, "b *x"], Float[Tensor, "#b *#x"]]:
    """Mean and log-variance of p(x_s | x_t): the posterior at x̂_0, or the network's own mean. `step` is `ready`."""
    log_variance = variance.log_variance(step, prediction)
    if prediction.mean is None:
        return combined(step.on_x_t, x_t, step.on_x_0, prediction.x_0), log_variance
    if not step.of_table.all():
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


class Moment(NamedTuple):
    """What a denoiser knows of t before it is asked: float64 [b], or `ready` to multiply images."""

    alpha: Time
    sigma: Time
    skip: Time
    out: Time
    input: Time | None  # None for 1
    on_x_0: Time
    on_eps: Time
    time: Time  # as the network is told it

    def noised(self, x_0: Float[Tensor, "b *x"], eps: Float[Tensor, "b *x"]) -> Float[Tensor, "b *x"]:
        """A draw of q(x_t | x_0) from the noise given (Eq. 4)."""
        return combined(self.alpha, x_0, self.sigma, eps)

    def target(self, x_0: Float[Tensor, "b *x"], eps: Float[Tensor, "b *x"]) -> Float[Tensor, "b *x"]:
        """What the network should say."""
        return combined(self.on_x_0, x_0, self.on_eps, eps)


class Denoiser(nn.Module):
    """Network + process + parameterisation: `denoiser(x_t, t) -> Prediction`.

    `clip` limits x̂_0 to [−1, 1], as the authors' code does when it samples and measures; never in training. The network
    is called inside a `computing()`, which says in what precision; what is made of its answer is in that of x_t.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        parameterisation: Parameterisation,
        variance: Variance,
        time: Literal["index", "logsnr", "sigma"] = "index",
        clip: bool = True,
        computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        super().__init__()
        self.network, self.process, self.parameterisation, self.variance = network, process, parameterisation, variance
        self.time: Literal["index", "logsnr", "sigma"] = time
        self.clip, self.computing = clip, computing

    def at(self, t: Float[Tensor, "*b"]) -> Moment:
        """All that the network, the process and the parameterisation say of t alone, float64 on the CPU."""
        t = t.cpu()
        skip, out, scale, on_x_0, on_eps = self.parameterisation.coefficients(self.process, t)
        time = network_time(self.time, self.process, t)
        told = None if bool((scale == 1).all()) else scale
        return Moment(*self.process.alpha_sigma(t), skip, out, told, on_x_0, on_eps, time)

    def forward(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, "b"] | Moment, cond: Conditioning = NOTHING
    ) -> Prediction:
        """x_t in float32, t in float64 within [t_min, 1], on any device each; or what is `ready` of t."""
        moment: Moment = t if isinstance(t, Moment) else ready(x_t, self.at(t))
        output, raw_variance = self.output(x_t, moment, cond)
        return self.read(x_t, moment, output, raw_variance)

    def output(
        self, x_t: Float[Tensor, "b c h w"], moment: Moment, cond: Conditioning = NOTHING
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"] | None]:
        """F, and what it says of the variance where that is learned."""
        time = moment.time.to(torch.float32).reshape(-1).expand(len(x_t))
        asked = x_t if moment.input is None else moment.input * x_t
        with self.computing():
            output = self.network(asked, time, cond).to(x_t.dtype)
        return tuple(output.chunk(2, dim=1)) if self.variance.learned else (output, None)

    def read(
        self,
        x_t: Float[Tensor, "b c h w"],
        moment: Moment,
        output: Float[Tensor, "b c h w"],
        raw_variance: Float[Tensor, "b c h w"] | None,
    ) -> Prediction:
        """What F means."""
        x_0 = combined(moment.skip, x_t, moment.out, output)
        mean = output if isinstance(self.parameterisation, Mu) else None
        return Prediction(x_0.clamp(-1, 1) if self.clip else x_0, output, raw_variance, mean)

    def target(
        self, x_0: Float[Tensor, "b *x"], eps: Float[Tensor, "b *x"], t: Float[Tensor, "b"]
    ) -> Float[Tensor, "b *x"]:
        """What the network should have said."""
        return ready(x_0, self.at(t)).target(x_0, eps)

    def score(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning = NOTHING
    ) -> Float[Tensor, "b c h w"]:
        """∇ log q(x_t) = (alpha x̂_0 − x_t)/sigma², the link to score matching and Langevin dynamics (DDPM, §3.2)."""
        moment = ready(x_t, self.at(t))
        return (moment.alpha * self(x_t, moment, cond).x_0 - x_t) / moment.sigma.square()


class Along:
    """`denoise(x_t, t)` for the times of a chain, of which all that can be known is computed and moved at once.

    `like` says the type and the device of x_t. Other times may be asked too; they cost what they cost a denoiser.
    """

    def __init__(
        self, denoiser: Denoiser, times: Float[Tensor, "times"], like: Float[Tensor, "b *x"], cond: Conditioning
    ):
        self.denoiser, self.cond = denoiser, cond
        asked = times[times > 0]
        self._place = {t: i for i, t in enumerate(asked.tolist())}
        self._moments: Moment = ready(like, denoiser.at(asked[:, None]))

    def __call__(self, x_t: Float[Tensor, "b *x"], t: Float[Tensor, "b"]) -> Prediction:
        place = self._place.get(float(t[0])) if t.stride(0) == 0 or len(t) == 1 else None  # one t for all images
        return self.denoiser(x_t, t if place is None else row(self._moments, place), self.cond)


def bound_term(
    variance: Variance,
    prediction: Prediction,
    x_0: Float[Tensor, "b *x"],
    x_t: Float[Tensor, "b *x"],
    step: Step,
) -> Float[Tensor, "b"]:
    """The term of the variational bound that belongs to the step t → s, in bits/dim (Eq. 5). `step` is `ready`.

    KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) for s > 0, the discretised decoder's −log p(x_0 | x_t) for s = 0.
    """
    mean, log_variance = reverse(step, variance, prediction, x_t)
    if step.last.all():
        return bits(decoder_nll(x_0, mean, log_variance))
    divergence = bits(kl(combined(step.on_x_t, x_t, step.on_x_0, x_0), step.log_small, mean, log_variance))
    if not step.last.any():
        return divergence
    return torch.where(step.decodes.flatten() > 0, bits(decoder_nll(x_0, mean, log_variance)), divergence)
