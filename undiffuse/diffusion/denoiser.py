"""What a network predicts, how sure the reverse step is, and the one callable that all the rest sees.

A parameterisation is a row of coefficients: `x̂_0 = c_skip x_t + c_out F(c_in x_t, time)`, and the target of F is
`(x_0 − c_skip x_t)/c_out`, written here as `on_x_0 x_0 + on_eps eps` so that nothing is divided by something small.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from undiffuse.config import Positive, Table
from undiffuse.diffusion.gaussian import bits, decoder_nll, kl
from undiffuse.diffusion.lattice import FINE, level_nll, level_noise
from undiffuse.diffusion.numbers import F64, added, combined, ready
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


PARAMETERISATIONS: Table[Parameterisation] = Table("parameterisation", Parameterisation, "undiffuse.diffusion.denoiser")


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
    alpha: Time | None = None  # at t, where the process ends before 0 (`Process.ends`)
    spread: Time | None = None  # sigma/alpha at t, there

    @classmethod
    def between(cls, process: Process, t: Time, s: Time) -> "Step":
        floor, last = process.variance_floor().log(), s <= 0
        small, large = process.small_variance(t, s).log(), process.large_variance(t, s).log()
        logs = torch.where(last, floor, small), torch.where(last, floor, large), large
        steps = process.steps or 0
        of_table = ((t - s) * steps - 1).abs() < 1e-6
        alpha = process.alpha(t) if process.ends else None
        spread = process.spread(t) if process.ends else None
        return cls(*process.posterior_coefficients(t, s), *logs, last.to(F64), last, of_table, alpha, spread)


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
    spread: Time | None = None  # for `Lattice`: sigma/alpha, at most FINE
    on_noise: Time | None = None  # what eps_g counts in F; 0 where sigma/alpha is above FINE
    fine: Bool[Tensor, "*b"] | None = None  # whether it is not

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
        moment = Moment(*self.process.alpha_sigma(t), skip, out, told, on_x_0, on_eps, time)
        if not self.parameterisation.lattice:
            return moment
        # x̂_0 = (x_t − sigma eps)/alpha falls by sigma/alpha with each unit of eps, and F changes it by `out`.
        spread = self.process.spread(t)
        fine = spread <= FINE
        return moment._replace(spread=spread.clamp(max=FINE), on_noise=torch.where(fine, -spread / out, 0), fine=fine)

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
        noise = self.known_noise(x_t, moment)
        with self.computing():
            output = self.network(asked if noise is None else torch.cat([asked, noise], 1), time, cond).to(x_t.dtype)
        output, raw_variance = output.chunk(2, dim=1) if self.variance.learned else (output, None)
        if noise is not None and moment.on_noise is not None:
            output = added(output, moment.on_noise, noise)
        return output, raw_variance

    def known_noise(self, x_t: Float[Tensor, "b c h w"], moment: Moment) -> Float[Tensor, "b c h w"] | None:
        """eps_g where sigma/alpha is at most FINE, elsewhere 0; None unless the parameterisation is a `Lattice`."""
        if moment.spread is None or moment.fine is None:
            return None
        if not moment.fine.any():
            return torch.zeros_like(x_t)
        return torch.where(moment.on_noise != 0, level_noise(x_t / moment.alpha, moment.spread), 0)

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


def bound_term(
    variance: Variance,
    prediction: Prediction,
    x_0: Float[Tensor, "b *x"],
    x_t: Float[Tensor, "b *x"],
    step: Step,
) -> Float[Tensor, "b"]:
    """The term of the variational bound that belongs to the step t → s, in bits/dim (Eq. 5). `step` is `ready`.

    KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) for s > 0; for s = 0 −log p(x_0 | x_t) by the discretised decoder or, where the
    process ends before, by the likelihood of each level.
    """
    mean, log_variance = reverse(step, variance, prediction, x_t)

    def decoded() -> Float[Tensor, "b"]:
        if step.alpha is None or step.spread is None:
            return bits(decoder_nll(x_0, mean, log_variance))
        return bits(level_nll(x_0, x_t / step.alpha, step.spread))

    if step.last.all():
        return decoded()
    divergence = bits(kl(combined(step.on_x_t, x_t, step.on_x_0, x_0), step.log_small, mean, log_variance))
    return torch.where(step.decodes.flatten() > 0, decoded(), divergence) if step.last.any() else divergence
