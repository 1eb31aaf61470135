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
from undiffuse.diffusion.denoiser import Denoiser, Prediction, bound_term
from undiffuse.diffusion.density import DENSITIES, Density, Uniform, suited
from undiffuse.diffusion.process import PROCESSES, Process, per_image
from undiffuse.errors import UsageError
from undiffuse.key import Keys, moved
from undiffuse.network.base import Conditioning

UNIFORM = Uniform()  # the bound is a sum over all steps, each as likely


class Loss(NamedTuple):
    """Each example's loss, the terms it is made of, and the t it was taken at."""

    per_example: Float[Tensor, "b"]
    terms: dict[str, Float[Tensor, "b"]]
    t: Float[Tensor, "b"]


def quartile_sums(loss: Float[Tensor, "b"], t: Float[Tensor, "b"]) -> Float[Tensor, "2 4"]:
    """Sums of the loss, and counts, for t in [0, ¼), [¼, ½), [½, ¾) and [¾, 1]; these add up over parts of a batch."""
    quarter = moved((4 * t).long().clamp(max=3), loss.device)
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


class Noised(NamedTuple):
    """Where the examples were noised to, what the denoiser says there, and the mean squared error of its output."""

    t: Float[Tensor, "b"]
    x_t: Float[Tensor, "b c h w"]
    prediction: Prediction
    error: Float[Tensor, "b"]


def noised(
    denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys, density: Density | None = None
) -> Noised:
    """One draw of t and of x_t for each example, and the network's answer to it."""
    t, eps = (density or suited(denoiser.process)).t(denoiser.process, keys), keys.fold("eps").normal(*x_0.shape[1:])
    x_t = denoiser.process.marginal(x_0, eps, t)
    prediction = denoiser(x_t, t, cond)
    error = (denoiser.target(x_0, eps, t) - prediction.output).square().flatten(1).mean(1)
    return Noised(t, x_t, prediction, error)


def previous(process: Process, t: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    """One step of the table nearer to the data."""
    return (t - process.t_min).clamp(min=0)


@dataclass(frozen=True)
class Simple(Objective):
    """mean (target − F)²: L_simple (Eq. 14) for eps and t uniform, and its like for the other parameterisations.

    `density` is how often each t is trained on; unless given, what suits the process.
    """

    density: Annotated[Density, DENSITIES] | None = None
    needs_learned: ClassVar[bool | None] = False
    needs_x_0: ClassVar[bool] = False

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        t, _, _, error = noised(denoiser, x_0, cond, keys, self.density)
        return Loss(error, {"simple": error}, t)


@dataclass(frozen=True)
class MinSnr(Objective):
    """min(SNR, gamma) on the error of x̂_0, written on that of F (Hang et al. 2023)."""

    gamma: Positive = 5.0
    density: Annotated[Density, DENSITIES] | None = None
    needs_learned: ClassVar[bool | None] = False

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        t, _, _, error = noised(denoiser, x_0, cond, keys, self.density)
        snr = denoiser.process.logsnr(t).exp()
        c_out = denoiser.parameterisation.coefficients(denoiser.process, t).out
        weight = snr.clamp(max=self.gamma) * c_out.square()
        return Loss(per_image(weight, error) * error, {"simple": error}, t)


@dataclass(frozen=True)
class Vlb(Objective):
    """One term of the true bound L, in bits/dim, at a uniform t; as in the authors' code, not multiplied by T."""

    needs_table: ClassVar[bool] = True

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        t, x_t, prediction, error = noised(denoiser, x_0, cond, keys, UNIFORM)
        term = bound_term(denoiser, prediction, x_0, x_t, t, previous(denoiser.process, t))
        return Loss(term, {"simple": error, "vlb": term}, t)


@dataclass(frozen=True)
class Hybrid(Objective):
    """L_simple + weight · T · vlb, in which the bound moves the variance alone (Nichol & Dhariwal 2021, Eq. 16)."""

    weight: NonNegative = 0.001
    needs_learned: ClassVar[bool | None] = True
    needs_table: ClassVar[bool] = True

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        process = denoiser.process
        t, x_t, prediction, error = noised(denoiser, x_0, cond, keys, UNIFORM)
        mean = None if prediction.mean is None else prediction.mean.detach()
        frozen = prediction._replace(x_0=prediction.x_0.detach(), mean=mean)
        term = bound_term(denoiser, frozen, x_0, x_t, t, previous(process, t))
        return Loss(error + self.weight / process.t_min * term, {"simple": error, "vlb": term}, t)


OBJECTIVES: Table[Objective] = Table("objective", Objective, "undiffuse.diffusion.objective")
