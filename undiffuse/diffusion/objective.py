"""What is minimised: a density over t and a weight on the squared error of the network's output.

`objective(denoiser, x_0, cond, keys)` is a pure function of its keys: same keys, same bits.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.config import NonNegative, Positive, Table
from undiffuse.diffusion.denoiser import Denoiser, Moment, Step, bound_term
from undiffuse.diffusion.density import DENSITIES, Density, Uniform, suited
from undiffuse.diffusion.numbers import ready
from undiffuse.diffusion.process import PROCESSES
from undiffuse.errors import UsageError
from undiffuse.key import Keys
from undiffuse.network.base import Conditioning

UNIFORM = Uniform()  # the bound is a sum over all steps, each as likely


class Loss(NamedTuple):
    """Each example's loss, the terms it is made of, and the t it was taken at."""

    per_example: Float[Tensor, "b"]
    terms: dict[str, Float[Tensor, "b"]]
    t: Float[Tensor, "b"]


def quartile_sums(loss: Float[Tensor, "b"], t: Float[Tensor, "b"]) -> Float[Tensor, "2 4"]:
    """Sums of the loss, and counts, for t in [0, ¼), [¼, ½), [½, ¾) and [¾, 1]; these add up over parts of a batch."""
    quarter = (4 * t).long().clamp(max=3).to(loss.device)
    inside = quarter == torch.arange(4, dtype=torch.int64, device=loss.device)[:, None]  # 4 b
    # Not a product with 0 and 1, so that a NaN stays in the quarter that it came from.
    return torch.stack([torch.where(inside, loss.detach(), 0).sum(1), inside.sum(1).to(loss)])


def by_quartile(sums: Float[Tensor, "2 4"]) -> dict[str, float]:
    """The mean of each quarter that had examples, as `loss_q1` … `loss_q4`."""
    return {f"loss_q{i}": total / count for i, (total, count) in enumerate(sums.T.tolist(), 1) if count}


class Objective(ABC):
    """What it asks of a model: a variance that is learned, or is not, or either (None); a table; an x̂_0 at every t."""

    needs_learned: ClassVar[bool | None] = None
    needs_table: ClassVar[bool] = False
    needs_x_0: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss: ...

    def check(self, denoiser: Denoiser) -> None:
        """Refuses a model that the objective cannot train, or would leave in part untrained."""
        name, process = OBJECTIVES.name_of(self), denoiser.process
        if self.needs_learned is False and denoiser.variance.learned:
            raise UsageError(f"objective {name} cannot train a learned variance; choose vlb or hybrid, or a fixed one")
        if self.needs_learned and not denoiser.variance.learned:
            raise UsageError(f"objective {name} is for a learned variance; choose learned-range, or simple or vlb")
        if self.needs_table and process.steps is None:
            raise UsageError(
                f"objective {name} needs a β-table, and {PROCESSES.name_of(process)} has none; choose simple"
            )
        denoiser.parameterisation.check(process, self.needs_x_0)


class Weight(NamedTuple):
    """A factor on each example's loss."""

    value: Float[Tensor, "b"]


class Noised(NamedTuple):
    """The examples as the network saw them, its answer F and what it says of the variance, and F's squared error."""

    x_t: Float[Tensor, "b c h w"]
    output: Float[Tensor, "b c h w"]
    raw_variance: Float[Tensor, "b c h w"] | None
    error: Float[Tensor, "b"]


def noised(denoiser: Denoiser, moment: Moment, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Noised:
    """One draw of x_t for each example, at a moment that is `ready`, and the network's answer to it."""
    eps = keys.fold("eps").normal(*x_0.shape[1:])
    x_t = moment.noised(x_0, eps)
    output, raw_variance = denoiser.output(x_t, moment, cond)
    return Noised(x_t, output, raw_variance, (moment.target(x_0, eps) - output).square().flatten(1).mean(1))


def a_step(denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], keys: Keys) -> tuple[Float[Tensor, "b"], Moment, Step]:
    """A uniform t for each example, and the step of the table from there, `ready`."""
    process = denoiser.process
    t = UNIFORM.t(process, keys)
    return t, *ready(x_0, denoiser.at(t), Step.between(process, t, (t - process.t_min).clamp(min=0)))


@dataclass(frozen=True)
class Simple(Objective):
    """mean (target − F)²: L_simple (Eq. 14) for eps and t uniform, and its like for the other parameterisations.

    `density` is how often each t is trained on; unless given, what suits the process.
    """

    density: Annotated[Density, DENSITIES] | None = None
    needs_learned: ClassVar[bool | None] = False
    needs_x_0: ClassVar[bool] = False

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        t = (self.density or suited(denoiser.process)).t(denoiser.process, keys)
        error = noised(denoiser, ready(x_0, denoiser.at(t)), x_0, cond, keys).error
        return Loss(error, {"simple": error}, t)


@dataclass(frozen=True)
class MinSnr(Objective):
    """min(SNR, gamma) on the error of x̂_0, written on that of F (Hang et al. 2023)."""

    gamma: Positive = 5.0
    density: Annotated[Density, DENSITIES] | None = None
    needs_learned: ClassVar[bool | None] = False

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        t = (self.density or suited(denoiser.process)).t(denoiser.process, keys)
        moment, snr = denoiser.at(t), denoiser.process.logsnr(t).exp()
        moment, weight = ready(x_0, moment, Weight(snr.clamp(max=self.gamma) * moment.out.square()))
        error = noised(denoiser, moment, x_0, cond, keys).error
        return Loss(weight.value.flatten() * error, {"simple": error}, t)


@dataclass(frozen=True)
class Vlb(Objective):
    """One term of the true bound L, in bits/dim, at a uniform t; as in the authors' code, not multiplied by T."""

    needs_table: ClassVar[bool] = True

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        t, moment, step = a_step(denoiser, x_0, keys)
        x_t, output, raw_variance, error = noised(denoiser, moment, x_0, cond, keys)
        prediction = denoiser.read(x_t, moment, output, raw_variance)
        term = bound_term(denoiser.variance, prediction, x_0, x_t, step)
        return Loss(term, {"simple": error, "vlb": term}, t)


@dataclass(frozen=True)
class Hybrid(Objective):
    """L_simple + weight · T · vlb, in which the bound moves the variance alone (Nichol & Dhariwal 2021, Eq. 16)."""

    weight: NonNegative = 0.001
    needs_learned: ClassVar[bool | None] = True
    needs_table: ClassVar[bool] = True

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        t, moment, step = a_step(denoiser, x_0, keys)
        x_t, output, raw_variance, error = noised(denoiser, moment, x_0, cond, keys)
        frozen = denoiser.read(x_t, moment, output.detach(), raw_variance)
        term = bound_term(denoiser.variance, frozen, x_0, x_t, step)
        return Loss(error + self.weight / denoiser.process.t_min * term, {"simple": error, "vlb": term}, t)


OBJECTIVES: Table[Objective] = Table("objective", Objective, "undiffuse.diffusion.objective")
