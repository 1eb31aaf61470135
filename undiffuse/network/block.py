"""The parts of the paper's U-Net, initialised as the authors' TF code does.

Every weight is Glorot-uniform over fan_avg; the last layer of each residual branch has scale 1e-10 ("zero"), which is
a gain of 1e-5. GroupNorm has eps 1e-6 and 32 groups, which is not torch's default.
"""

import math
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS, EPS = 32, 1e-6
NEAR_ZERO = 1e-5

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def norm(channels: int, groups: int = GROUPS) -> nn.GroupNorm:
    """That many groups, or as many as divide both it and the channels."""
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=EPS)


def initialised(layer: Layer, gain: float = 1.0) -> Layer:
    nn.init.xavier_uniform_(layer.weight, gain)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def conv(inputs: int, outputs: int, size: int = 3, gain: float = 1.0) -> nn.Conv2d:
    return initialised(nn.Conv2d(inputs, outputs, size, padding=size // 2), gain)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return initialised(nn.Linear(inputs, outputs))


def sinusoid(time: Float[Tensor, "b"], channels: int) -> Float[Tensor, "b c"]:
    """All sines, then all cosines, of frequencies from exactly 1 down to exactly 1e-4; an odd channel is zero."""
    half = channels // 2
    frequency = torch.exp(torch.arange(half, device=time.device) * (-math.log(10000) / max(1, half - 1)))
    angle = time.float()[:, None] * frequency  # (b, half)
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, channels % 2))


class Dropout(nn.Dropout):
    """Dropout whose mask on a CPU costs 16 random bits a value, where torch draws a whole number for each."""

    def forward(self, input: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
        if not self.training or self.p in (0, 1) or input.device.type != "cpu":
            return super().forward(input)
        count, below = input.numel(), min(round(self.p * 2**16), 2**16 - 1)
        words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits of each
        dropped = (words.view(torch.int16)[:count] < below - 2**15).view(input.shape)
        return input.masked_fill(dropped, 0) * (1 / (1 - below / 2**16))


class ResBlock(nn.Module):
    """norm, swish, conv, + time, norm, swish, dropout, conv; the shortcut is 1×1 where the width changes."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float, groups: int = GROUPS):
        super().__init__()
        self.norm1 = norm(inputs, groups)
        self.conv1 = conv(inputs, outputs)
        self.temb_proj = linear(embedding, outputs)
        self.norm2 = norm(outputs, groups)
        self.dropout = Dropout(dropout)
        self.conv2 = conv(outputs, outputs, gain=NEAR_ZERO)
        self.nin_shortcut = conv(inputs, outputs, size=1) if inputs != outputs else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b d h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


def attend(q: Float[Tensor, "b n c"], k: Float[Tensor, "b n c"], v: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
    """softmax(q kᵀ c^(−1/2)) v. On a CPU two products beat torch's kernel as long as the scores fit its cache."""
    if q.device.type == "cpu" and q.shape[1] <= 1024:
        scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[2] ** -0.5)  # (b, n, n)
        return torch.bmm(scores.softmax(-1), v)
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


class Attention(nn.Module):
    """One head over all positions, with a residual connection."""

    def __init__(self, channels: int, groups: int = GROUPS):
        super().__init__()
        self.norm = norm(channels, groups)
        self.q, self.k, self.v = (conv(channels, channels, size=1) for _ in range(3))
        self.proj_out = conv(channels, channels, size=1, gain=NEAR_ZERO)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (b, hw, c)
        return x + self.proj_out(attend(q, k, v).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Stride 2 with TF's SAME padding: one row at the bottom, one column at the right."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = initialised(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Each pixel repeated 2×2, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
