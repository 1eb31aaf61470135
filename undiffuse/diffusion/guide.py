"""Guidance: what a model says is led away from what a worse one says of the same x_t.

    x̂_0 = weak + scale (strong − weak)

If the worse one is the network itself, told no class, this is classifier-free guidance (Ho & Salimans 2022, Eq. 6, with
w = scale − 1); if it is one of less training or fewer weights, autoguidance (Karras et al. 2024, Eq. 6). Either has the
score of p (p/p_weak)^(scale − 1) at one noise level, so that what the worse one finds likelier is drawn less often. A
scale of 1 is no guidance.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.diffusion.reverse import Prediction
from undiffuse.diffusion.sampler.base import Denoise


@dataclass(frozen=True, eq=False)
class Guided:
    """Of two that do not clip, one that does then, if it is to `clip`; the rest of the answer is the strong one's."""

    strong: Denoise
    weak: Denoise
    scale: float
    clip: bool

    def __call__(self, x_t: Float[Tensor, "b *x"], t: Float[Tensor, "b"]) -> Prediction:
        found, weak = self.strong(x_t, t), self.weak(x_t, t)
        x_0 = torch.lerp(weak.x_0, found.x_0, self.scale)
        return found._replace(x_0=x_0.clamp(-1, 1) if self.clip else x_0)
