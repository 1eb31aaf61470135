"""Heun's second-order method, two network evaluations a step (Karras et al. 2022, Algorithm 1, without its noise)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from undiffuse.diffusion.numbers import added, combined
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.sampler.base import Sampler, Turn

NOISE = 1000  # sigma/alpha from which no data is left in x_t


class Coefficients(NamedTuple):
    """−alpha and sigma at t, ±alpha and sigma at s, half the length of the step, and whether the rule is used."""

    less_t: Float[Tensor, "*n"]
    sigma_t: Float[Tensor, "*n"]
    alpha_s: Float[Tensor, "*n"]
    less_s: Float[Tensor, "*n"]
    sigma_s: Float[Tensor, "*n"]
    half: Float[Tensor, "*n"]
    corrects: Bool[Tensor, "*n"]


@dataclass(frozen=True)
class Heun(Sampler):
    """The trapezium rule for d(x/alpha) = ε̂ d(sigma/alpha): DDIM's step, with the mean of ε̂ at its two ends.

    The step to s = 0 is DDIM's, and so is one from pure noise, where sigma/alpha is infinite or as good as that: the
    rule would weigh a rounding of ε̂ with it.
    """

    order = 2

    def coefficients(self, process: Process, t: Float[Tensor, "*n"], s: Float[Tensor, "*n"]) -> Coefficients:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(t), process.alpha_sigma(s)
        length = sigma_s - alpha_s * sigma_t / alpha_t
        return Coefficients(
            -alpha_t, sigma_t, alpha_s, -alpha_s, sigma_s, length / 2, (s > 0) & (sigma_t <= NOISE * alpha_t)
        )

    def step(self, x: Float[Tensor, "b *x"], at: Turn) -> tuple[Float[Tensor, "b *x"], Any]:
        c, x_0 = at.c, at.denoise(x, at.t).x_0
        eps = added(x, c.less_t, x_0) / c.sigma_t
        euler = combined(c.alpha_s, x_0, c.sigma_s, eps)
        if not c.corrects.all():
            return euler, None
        eps_s = added(euler, c.less_s, at.denoise(euler, at.s).x_0) / c.sigma_s
        return added(euler, c.half, eps_s - eps), None
