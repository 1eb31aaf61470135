"""What is minimised: a density over t and a weight on the squared error of the network's output.

`objective(denoiser, x_0, cond, keys)` is a pure function of its keys: same keys, same bits.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.config import Count, NonNegative, Positive, Table
from undiffuse.diffusion.denoiser import Denoiser, Moment
from undiffuse.diffusion.density import DENSITIES, AlphaSquared, Density, Uniform, log_variances, suited
from undiffuse.diffusion.gaussian import LN2
from undiffuse.diffusion.numbers import F64, per_image, ready
from undiffuse.diffusion.parameterisation import PARAMETERISATIONS
from undiffuse.diffusion.process import PROCESSES, Process
from undiffuse.diffusion.reverse import Step, bound_term
from undiffuse.errors import UsageError
from undiffuse.key import Keys
from undiffuse.network.base import Conditioning

ALPHA_SQUARED = AlphaSquared()
UNIFORM = Uniform()  # the bound is a sum over all steps, each as likely


class Loss(NamedTuple):
    """Each example's loss, the terms it is made of, and the t it was taken at."""

    per_example: Float[Tensor, "b"]
    terms: dict[str, Float[Tensor, "b"]]
    t: Float[Tensor, "b"]


def quartile_sums(
    loss: Float[Tensor, "b"], t: Float[Tensor, "b"], weight: Float[Tensor, "b"] | None = None
) -> Float[Tensor, "2 4"]:
    """Sums of the loss, and counts, for t in [0, ¼), [¼, ½), [½, ¾) and [¾, 1]; these add up over parts of a batch.

    `weight` is what the loss has been multiplied by, and what an example then counts for.
    """
    quarter = (4 * t).long().clamp(max=3).to(loss.device)
    inside = quarter == torch.arange(4, dtype=torch.int64, device=loss.device)[:, None]  # 4 b
    # Not a product with 0 and 1, so that a NaN stays in the quarter that it came from.
    counts = inside if weight is None else torch.where(inside, weight.to(loss), 0)
    return torch.stack([torch.where(inside, loss.detach(), 0).sum(1), counts.sum(1).to(loss)])


def by_quartile(sums: Float[Tensor, "2 4"]) -> dict[str, float]:
    """The mean of each quarter that had examples, as `loss_q1` … `loss_q4`."""
    return {f"loss_q{i}": total / count for i, (total, count) in enumerate(sums.T.tolist(), 1) if count}


class Objective(ABC):
    """What it asks of a model: a variance that is learned, or is not, or either (None); a table; an x̂_0 at every t."""

    needs_learned: ClassVar[bool | None] = None
    needs_table: ClassVar[bool] = False
    needs_x_0: ClassVar[bool] = True
    bounds: tuple[float, ...] | None = None  # sigma/alpha at which the steps of a distilled model begin, rising
    density: Density | None = None  # how often each t is taken; unless given, what suits the process or the objective
    evaluations: int = 1  # of the network for each image, with a gradient
    taught: int = 0  # and without one, of a teacher that is kept beside it

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
        if self.density is not None:
            self._check_density(name, DENSITIES.name_of(self.density), self.density, process)
        denoiser.parameterisation.check(process, self.needs_x_0)

    def _check_density(self, name: str, density: str, of_t: Density, process: Process) -> None:
        if of_t.needs_table and process.steps is None:
            raise UsageError(
                f"density {density} needs a β-table, and {PROCESSES.name_of(process)} has none; choose uniform"
            )
        if self.needs_table and not of_t.unbiased:
            raise UsageError(
                f"objective {name} is a sum over all steps, and density {density} does not make up for how often it "
                "takes each; choose uniform or importance"
            )


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


def made_up(loss: Float[Tensor, "b"], density: Density, process: Process, t: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    """The loss times what makes up for how often the density takes each t, if it does."""
    weight = density.weight(process, t)
    return loss if weight is None else per_image(weight, loss) * loss


def a_step(
    denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], density: Density, keys: Keys
) -> tuple[Float[Tensor, "b"], Moment, Step]:
    """A t for each example, and the step of the table from there, `ready`."""
    process = denoiser.process
    t = density.t(process, keys)
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
        density = self.density or suited(denoiser.process)
        t = density.t(denoiser.process, keys)
        error = noised(denoiser, ready(x_0, denoiser.at(t)), x_0, cond, keys).error
        return Loss(made_up(error, density, denoiser.process, t), {"simple": error}, t)


class WeightedBySnr(Objective):
    """A weight on the error of x̂_0, or 1/SNR times it on that of eps, written on the error of F."""

    needs_learned: ClassVar[bool | None] = False

    @abstractmethod
    def on_x_0(self, logsnr: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """The weight on the error of x̂_0, float64 on the CPU; logsnr is finite."""

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        density = self.density or suited(denoiser.process)
        t = density.t(denoiser.process, keys)
        moment = denoiser.at(t)
        # x̂_0 moves by `out` times as much as F.
        weight = Weight(self.on_x_0(denoiser.process.logsnr(t)) * moment.out.square())
        moment, weight = ready(x_0, moment, weight)
        error = noised(denoiser, moment, x_0, cond, keys).error
        weighted = weight.value.flatten() * error
        return Loss(made_up(weighted, density, denoiser.process, t), {"simple": error}, t)


@dataclass(frozen=True)
class MinSnr(WeightedBySnr):
    """min(SNR, gamma) on the error of x̂_0, written on that of F (Hang et al. 2023)."""

    gamma: Positive = 5.0
    density: Annotated[Density, DENSITIES] | None = None

    def on_x_0(self, logsnr: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        return logsnr.exp().clamp(max=self.gamma)


@dataclass(frozen=True)
class P2(WeightedBySnr):
    """1/(k + SNR)^gamma on the error of eps (Choi et al. 2022): less where there is little noise."""

    gamma: NonNegative = 1.0
    k: Positive = 1.0
    density: Annotated[Density, DENSITIES] | None = None

    def on_x_0(self, logsnr: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        snr = logsnr.exp()
        return snr / (self.k + snr) ** self.gamma


@dataclass(frozen=True)
class Sigmoid(WeightedBySnr):
    """w(logsnr) = sigmoid(bias − logsnr) on the error of eps (Kingma & Gao 2023; Hoogeboom et al. 2024).

    Theirs is an integral of w over logsnr, so at uniform t it has the factor −d logsnr/dt besides. Here the density of
    t stands in its place, as with every weight: at uniform t the loss is that integral times the density of logsnr.
    """

    bias: float = 2.0
    density: Annotated[Density, DENSITIES] | None = None

    def on_x_0(self, logsnr: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        return math.exp(self.bias) * torch.sigmoid(logsnr - self.bias)  # SNR · sigmoid(bias − logsnr), never ∞ · 0


@dataclass(frozen=True)
class Vlb(Objective):
    """One term of the true bound L, in bits/dim, at a uniform t; as in the authors' code, not multiplied by T.

    `density` may be one that makes up for how often it takes each t.
    """

    density: Annotated[Density, DENSITIES] | None = None
    needs_table: ClassVar[bool] = True

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        density = self.density or UNIFORM
        t, moment, step = a_step(denoiser, x_0, density, keys)
        x_t, output, raw_variance, error = noised(denoiser, moment, x_0, cond, keys)
        prediction = denoiser.read(x_t, moment, output, raw_variance)
        term = bound_term(denoiser.variance, prediction, x_0, x_t, step)
        return Loss(made_up(term, density, denoiser.process, t), {"simple": error, "vlb": term}, t)


@dataclass(frozen=True)
class Hybrid(Objective):
    """L_simple + weight · T · vlb, in which the bound moves the variance alone (Nichol & Dhariwal 2021, Eq. 16)."""

    weight: NonNegative = 0.001
    density: Annotated[Density, DENSITIES] | None = None
    needs_learned: ClassVar[bool | None] = True
    needs_table: ClassVar[bool] = True

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        density = self.density or UNIFORM
        t, moment, step = a_step(denoiser, x_0, density, keys)
        x_t, output, raw_variance, error = noised(denoiser, moment, x_0, cond, keys)
        frozen = denoiser.read(x_t, moment, output.detach(), raw_variance)
        term = bound_term(denoiser.variance, frozen, x_0, x_t, step)
        loss = error + self.weight / denoiser.process.t_min * term
        return Loss(made_up(loss, density, denoiser.process, t), {"simple": error, "vlb": term}, t)


@dataclass(frozen=True)
class ContinuousVlb(Objective):
    """½ ∫ SNR ‖x_0 − x̂_0‖² dγ from t_min to 1, the bound's rate in continuous time, in bits/dim (Kingma et al. 2021).

    dγ = Z/alpha² du by `AlphaSquared`, so it is ½ Z SNR/alpha² times the error of x̂_0: in the variance-preserving frame
    ½ Z ‖v − F‖², with no weight at all. Prior and reconstruction have nothing to learn.
    """

    needs_learned: ClassVar[bool | None] = False

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        process = denoiser.process
        t, (first, last) = ALPHA_SQUARED.t(process, keys), log_variances(process)
        moment, logsnr = denoiser.at(t), process.logsnr(t)
        weight = (last - first) / (2 * LN2) * moment.out.square() * (1 + logsnr.exp())  # SNR/alpha² is 1 + SNR
        moment, weight = ready(x_0, moment, Weight(weight))
        error = noised(denoiser, moment, x_0, cond, keys).error
        rate = weight.value.flatten() * error
        return Loss(rate, {"simple": error, "vlb": rate}, t)

    def check(self, denoiser: Denoiser) -> None:
        super().check(denoiser)
        if denoiser.process.steps is not None:
            name = PROCESSES.name_of(denoiser.process)
            raise UsageError(
                f"objective continuous-vlb is for processes without a β-table, and {name} is one; take vdm"
            )


@dataclass(frozen=True)
class Trajectory(Objective):
    """A model of as many steps as `bounds` has numbers, tuned from its own weights by `trajectory.Taught`.

    `bounds` are sigma/alpha at which its steps begin, rising; the teacher takes `substeps` for each.
    """

    bounds: tuple[Positive, ...] = (80.0,)
    substeps: Count = 4
    needs_learned: ClassVar[bool | None] = False

    def __post_init__(self) -> None:
        if not self.bounds or any(b <= a for a, b in zip(self.bounds, self.bounds[1:], strict=False)):
            raise UsageError(f"bounds {list(self.bounds)} do not rise; give one or more sigma/alpha, the least first")

    def check(self, denoiser: Denoiser) -> None:
        super().check(denoiser)
        low, high = spreads(denoiser.process)
        if not (low < self.bounds[0] and self.bounds[-1] <= high * (1 + 1e-6)):
            raise UsageError(
                f"bounds {self.bounds[0]:g} to {self.bounds[-1]:g} are not possible; sigma/alpha of this process goes "
                f"from {low:.4g} to {high:.4g}"
            )
        self.check_answer(denoiser)

    @property
    def evaluations(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.bounds)

    @property
    def taught(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.substeps * len(self.bounds)

    def check_answer(self, denoiser: Denoiser) -> None:
        """Refuses what a network predicts where an error of it grows without bound in x̂_0."""
        name = PARAMETERISATIONS.name_of(denoiser.parameterisation)
        inner = PARAMETERISATIONS.name_of(getattr(denoiser.parameterisation, "of", denoiser.parameterisation))
        if inner not in ("v", "edm", "x0"):
            raise UsageError(
                f"a model that predicts {name} cannot be distilled: its x̂_0 explodes where sigma/alpha is large; train "
                "one that predicts v, x0 or edm"
            )

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        raise UsageError(NO_TEACHER)


NO_TEACHER = (
    "a distillation goes on with its teacher alone: give `undiffuse distill MODEL DATA --steps N --out RUN` again"
)


def spreads(process: Process) -> tuple[float, float]:
    """sigma/alpha at t_min and at 1."""
    ends = torch.tensor([process.t_min, 1.0], dtype=F64, device="cpu")
    low, high = process.spread(ends).tolist()
    return low, high


OBJECTIVES: Table[Objective] = Table("objective", Objective, "undiffuse.diffusion.objective")
