"""The parts of the paper's U-Net, initialised as the authors' TF code does.

Every weight is Glorot-uniform over fan_avg; the last layer of each residual branch has scale 1e-10 ("zero"), which is
a gain of 1e-5. GroupNorm has eps 1e-6 and 32 groups, which is not torch's default.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS, EPS = 32, 1e-6
NEAR_ZERO = 1e-5
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "mish": F.mish}

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def norm(channels: int, groups: int = GROUPS, eps: float | int = EPS) -> nn.GroupNorm:
    """That many groups, or as many as divide both it and the channels."""
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=eps)


def initialised(layer: Layer, gain: float = 1.0) -> Layer:
    nn.init.xavier_uniform_(layer.weight, gain)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def conv(inputs: int, outputs: int, size: int = 3, gain: float = 1.0) -> nn.Conv2d:
    return initialised(nn.Conv2d(inputs, outputs, size, padding=size // 2), gain)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return initialised(nn.Linear(inputs, outputs))


def sinusoid(
    time: Float[Tensor, "b"], channels: int, shift: int = 1, cosine_first: bool = False
) -> Float[Tensor, "b c"]:
    """All sines, then all cosines, of frequencies from exactly 1 down to exactly 1e-4; an odd channel is zero.

    Frequency i of n is 10000^(−i/(n − shift)): with shift 0 the last one is not 1e-4, but one before it.
    """
    half = channels // 2
    rank = torch.arange(half, dtype=torch.float32, device=time.device)
    frequency = torch.exp(rank * (-math.log(10000) / max(1, half - shift)))
    angle = time.float()[:, None] * frequency  # (b, half)
    parts = [angle.cos(), angle.sin()] if cosine_first else [angle.sin(), angle.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, channels % 2))


class Dropout(nn.Dropout):
    """Dropout whose mask on a CPU costs 16 random bits a value, where torch draws a whole number for each."""

    def forward(self, input: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
        if not self.training or self.p in (0, 1) or input.device.type != "cpu":
            return super().forward(input)
        count, below = input.numel(), min(round(self.p * 2**16), 2**16 - 1)
        words = torch.empty(-(-count // 4), dtype=torch.int64, device="cpu")
        words.random_(-(2**63), None)  # all 64 bits of each
        dropped = (words.view(torch.int16)[:count] < below - 2**15).view(input.shape)
        return input.masked_fill(dropped, 0) * (1 / (1 - below / 2**16))


@dataclass(frozen=True)
class Style:
    """What all blocks of a network have in common; `embedding` is the width of what they are told."""

    embedding: int
    dropout: float | int = 0.0
    groups: int = GROUPS
    eps: float | int = EPS
    activation: str = "silu"
    modulation: Literal["shift", "scale-shift"] = "shift"


class ResBlock(nn.Module):
    """norm, swish, conv, + time, norm, swish, dropout, conv; the shortcut is 1×1 where the width changes.

    With "scale-shift" the time gives a scale and a shift behind the second norm. `resample` halves or doubles the sides
    before the first convolution and in the shortcut; the sum is divided by `scale`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        style: Style,
        resample: Literal["down", "up"] | None = None,
        scale: float | int = 1.0,
    ):
        super().__init__()
        self.style, self.resample, self.scale = style, resample, scale
        self.norm1 = norm(inputs, style.groups, style.eps)
        self.conv1 = conv(inputs, outputs)
        self.temb_proj = linear(style.embedding, outputs * (1 if style.modulation == "shift" else 2))
        self.norm2 = norm(outputs, style.groups, style.eps)
        self.dropout = Dropout(style.dropout)
        self.conv2 = conv(outputs, outputs, gain=NEAR_ZERO)
        self.nin_shortcut = conv(inputs, outputs, size=1) if inputs != outputs else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b d h2 w2"]:
        activate = ACTIVATIONS[self.style.activation]
        h = self.conv1(self._resampled(activate(self.norm1(x))))
        told = self.temb_proj(activate(embedding))[:, :, None, None]
        if self.style.modulation == "shift":
            h = self.norm2(h + told)
        else:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(activate(h)))
        h = self.nin_shortcut(self._resampled(x)) + h
        return h if self.scale == 1 else h / self.scale

    def _resampled(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        if self.resample is None:
            return x
        return F.avg_pool2d(x, 2) if self.resample == "down" else doubled(x)


def doubled(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
    """Each pixel repeated 2×2."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
