"""DDIM (Song, Meng & Ermon 2021, Eq. 12): eta = 0 is deterministic, eta = 1 is the ancestral step with β̃."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from undiffuse.config import Fraction
from undiffuse.diffusion.numbers import added, combined
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.sampler.base import Sampler, Turn


class Coefficients(NamedTuple):
    """x_s = on_x x + on_x_0 x̂_0 + std z; `noisy` where std is above 0."""

    on_x: Float[Tensor, "*n"]
    on_x_0: Float[Tensor, "*n"]
    std: Float[Tensor, "*n"]
    noisy: Bool[Tensor, "*n"]


@dataclass(frozen=True)
class DDIM(Sampler):
    """x_s = alpha_s x̂_0 + √(sigma_s² − σ²) ε̂ + σ z with σ² = eta² β̃; ε̂ is read off x_t and x̂_0."""

    eta: Fraction = 0.0

    @property
    def noisy(self) -> bool:
        return self.eta > 0

    def coefficients(self, process: Process, t: Float[Tensor, "*n"], s: Float[Tensor, "*n"]) -> Coefficients:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(t), process.alpha_sigma(s)
        # The share of sigma_s² that is left for ε̂; as a product it cannot fall below 0 by rounding.
        kept = 1 + self.eta**2 * torch.expm1(process.logsnr(t) - process.logsnr(s))
        on_x = kept.sqrt() * sigma_s / sigma_t
        std = self.eta * process.small_variance(t, s).sqrt()
        return Coefficients(on_x, alpha_s - on_x * alpha_t, std, std > 0)

    def step(self, x: Float[Tensor, "b *x"], at: Turn) -> tuple[Float[Tensor, "b *x"], Any]:
        mean = combined(at.c.on_x, x, at.c.on_x_0, at.denoise(x, at.t).x_0)
        return added(mean, at.c.std, at.keys.normal(*x.shape[1:])) if at.c.noisy.all() else mean, None
