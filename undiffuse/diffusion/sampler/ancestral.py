"""Algorithm 2 of DDPM: x_s ~ N(mean, σ²), on the whole grid or a part of it."""

from dataclasses import dataclass
from typing import Annotated, Any

from jaxtyping import Float
from torch import Tensor

from undiffuse.diffusion.denoiser import VARIANCES, FixedLarge, Step, Variance, reverse
from undiffuse.diffusion.numbers import added
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.sampler.base import Denoise, Sampler
from undiffuse.key import Keys


@dataclass(frozen=True)
class Ancestral(Sampler):
    """At s = 0 no noise is added: the last step returns x̂_0."""

    variance: Annotated[Variance, VARIANCES] = FixedLarge()

    def coefficients(self, process: Process, t: Float[Tensor, "*n"], s: Float[Tensor, "*n"]) -> Step:
        return Step.between(process, t, s)

    def step(
        self,
        denoise: Denoise,
        process: Process,
        c: Step,
        x: Float[Tensor, "b *x"],
        t: Float[Tensor, "b"],
        s: Float[Tensor, "b"],
        state: Any,
        keys: Keys,
    ) -> tuple[Float[Tensor, "b *x"], Any]:
        mean, log_variance = reverse(c, self.variance, denoise(x, t), x)
        if c.last.all():
            return mean, state
        return added(mean, (0.5 * log_variance).exp(), keys.normal(*x.shape[1:])), state
