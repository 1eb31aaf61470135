"""Heun's second-order method, two network evaluations a step (Karras et al. 2022, Algorithm 1, without its noise)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from undiffuse.diffusion.process import Process, per_image
from undiffuse.diffusion.sampler.base import Denoise, Sampler
from undiffuse.key import Keys

NOISE = 1000  # sigma/alpha from which no data is left in x_t


@dataclass(frozen=True)
class Heun(Sampler):
    """The trapezium rule for d(x/alpha) = ε̂ d(sigma/alpha): DDIM's step, with the mean of ε̂ at its two ends.

    The step to s = 0 is DDIM's, and so is one from pure noise, where sigma/alpha is infinite or as good as that: the
    rule would weigh a rounding of ε̂ with it.
    """

    order: ClassVar[int] = 2

    def step(
        self,
        denoise: Denoise,
        process: Process,
        x: Float[Tensor, "b *x"],
        t: Float[Tensor, "b"],
        s: Float[Tensor, "b"],
        state: Any,
        keys: Keys,
    ) -> tuple[Float[Tensor, "b *x"], Any]:
        x_0, eps = _ends(denoise, process, x, t)
        euler = process.marginal(x_0, eps, s)
        if s[0] == 0 or process.sigma(t)[0] > NOISE * process.alpha(t)[0]:
            return euler, state
        _, eps_s = _ends(denoise, process, euler, s)
        length = process.sigma(s) - process.alpha(s) * process.sigma(t) / process.alpha(t)
        return euler + per_image(length / 2, x) * (eps_s - eps), state


def _ends(
    denoise: Denoise, process: Process, x: Float[Tensor, "b *x"], t: Float[Tensor, "b"]
) -> tuple[Float[Tensor, "b *x"], Float[Tensor, "b *x"]]:
    """The x̂_0 and ε̂ that x at t is thought to be made of."""
    x_0 = denoise(x, t).x_0
    return x_0, (x - per_image(process.alpha(t), x) * x_0) / per_image(process.sigma(t), x)
