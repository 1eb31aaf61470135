"""What is known of images because their values are levels, k/127.5 − 1 for k = 0 … 255: closed forms, near the data.

z = x_t/alpha is a level and `spread` = sigma/alpha times a normal number, so that p(k | z) ∝ exp(−½ (z − k)²/spread²)
for levels that are equally likely before.
"""

import torch
from jaxtyping import Float
from torch import Tensor

LEVELS, GAP = 256, 1 / 127.5
NEAR = 8  # levels on each side: at FINE what lies beyond moves E[eps | z] by less than 1e-5
FINE = 1.5 * GAP  # the spread beyond which, between black and white, E[eps | z] is below 1e-18: nothing is known


def nearest(z: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
    """The k of the nearest level."""
    return ((z + 1) / GAP).round().clamp(0, LEVELS - 1)


def level_nll(x_0: Float[Tensor, "*x"], z: Float[Tensor, "*x"], spread: Float[Tensor, "*#x"]) -> Float[Tensor, "*x"]:
    """−log p(x_0 | z) in nats, by all the levels: the reconstruction term of Kingma et al. 2021 (§3.3)."""
    eps, own = (z - x_0) / spread, nearest(x_0)
    total = torch.full_like(z, -torch.inf)
    for k in range(LEVELS):
        apart = (k - own) * GAP / spread  # a whole number of levels, so that the own one adds exactly 1
        total = torch.logaddexp(total, apart * (eps - apart / 2))
    return total


def level_noise(z: Float[Tensor, "*x"], spread: Float[Tensor, "*#x"]) -> Float[Tensor, "*x"]:
    """E[eps | z], by the nearest levels; good for a spread of at most FINE."""
    middle, closest = nearest(z).clamp(NEAR, LEVELS - 1 - NEAR), nearest(z)
    offset, least = z - (middle * GAP - 1), ((z - (closest * GAP - 1)) / spread).square()
    mean, total = torch.zeros_like(z), torch.zeros_like(z)
    for k in range(-NEAR, NEAR + 1):
        eps = (offset - k * GAP) / spread
        weight = torch.exp(0.5 * (least - eps.square()))
        mean, total = mean + weight * eps, total + weight
    return mean / total
