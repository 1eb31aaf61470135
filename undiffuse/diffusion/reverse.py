"""The reverse step p(x_s | x_t) of an estimate x̂_0: its mean, its variance, and its term of the bound."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from undiffuse.config import Table
from undiffuse.diffusion.gaussian import bits, decoder_nll, kl
from undiffuse.diffusion.lattice import level_nll
from undiffuse.diffusion.numbers import F64, combined
from undiffuse.diffusion.parameterisation import Time
from undiffuse.diffusion.process import Process
from undiffuse.errors import UsageError


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


VARIANCES: Table[Variance] = Table("variance", Variance, "undiffuse.diffusion.reverse")


def other_variance(own: Variance, asked: str | Variance | None) -> Variance:
    """The variance that is asked for of a network with its own. Raises UsageError where that must be learned."""
    new, name = own if asked is None else VARIANCES.build(asked, trusted=True), VARIANCES.name_of
    if new != own and own.learned:
        raise UsageError(f"variance {name(new)} is not possible: this model says its own ({name(own)}); leave it out")
    if new != own and new.learned:
        raise UsageError(
            f"variance {name(new)} needs a network that was trained to say it, and this one was trained with "
            f"{name(own)}; give fixed-large or fixed-small"
        )
    return new


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
