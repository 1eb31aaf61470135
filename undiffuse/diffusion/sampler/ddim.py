"""DDIM (Song, Meng & Ermon 2021, Eq. 12): eta = 0 is deterministic, eta = 1 is the ancestral step with β̃."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.config import Fraction
from undiffuse.diffusion.process import Process, per_image
from undiffuse.diffusion.sampler.base import Denoise, Sampler
from undiffuse.key import Keys


@dataclass(frozen=True)
class DDIM(Sampler):
    """x_s = alpha_s x̂_0 + √(sigma_s² − σ²) ε̂ + σ z with σ² = eta² β̃; ε̂ is read off x_t and x̂_0."""

    eta: Fraction = 0.0

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
        x_0 = denoise(x, t).x_0
        # The share of sigma_s² that is left for ε̂; as a product it cannot fall below 0 by rounding.
        kept = 1 + self.eta**2 * torch.expm1(process.logsnr(t) - process.logsnr(s))
        on_x = kept.sqrt() * process.sigma(s) / process.sigma(t)
        on_x_0 = process.alpha(s) - on_x * process.alpha(t)
        mean = per_image(on_x, x) * x + per_image(on_x_0, x) * x_0
        if self.eta == 0 or s[0] == 0:
            return mean, state
        std = self.eta * process.small_variance(t, s).sqrt()
        return mean + per_image(std, x) * keys.normal(*x.shape[1:]), state
