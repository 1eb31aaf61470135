"""Algorithm 2 of DDPM: x_s ~ N(mean, σ²), on the whole grid or a part of it."""

from dataclasses import dataclass
from typing import Annotated, Any

from jaxtyping import Float
from torch import Tensor

from undiffuse.diffusion.numbers import added
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.reverse import VARIANCES, FixedLarge, Step, Variance, reverse
from undiffuse.diffusion.sampler.base import Sampler, Turn


@dataclass(frozen=True)
class Ancestral(Sampler):
    """At s = 0 no noise is added: the last step returns x̂_0."""

    variance: Annotated[Variance, VARIANCES] = FixedLarge()

    @property
    def noisy(self) -> bool:
        return True

    def coefficients(self, process: Process, t: Float[Tensor, "*n"], s: Float[Tensor, "*n"]) -> Step:
        return Step.between(process, t, s)

    def step(self, x: Float[Tensor, "b *x"], at: Turn) -> tuple[Float[Tensor, "b *x"], Any]:
        mean, log_variance = reverse(at.c, self.variance, at.denoise(x, at.t), x)
        if at.c.last.all():
            return mean, None
        return added(mean, (0.5 * log_variance).exp(), at.keys.normal(*x.shape[1:])), None
