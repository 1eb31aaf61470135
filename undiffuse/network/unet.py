"""The U-Net of DDPM, to the weight: 35,746,307 parameters for CIFAR-10 and 113,673,219 for 256².

Module names are those of the authors' variables (`down.0.block.1.conv1`), so that their checkpoints need no table.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.config import Count, Fraction
from undiffuse.errors import UsageError
from undiffuse.network.base import NOTHING, Conditioning, Network
from undiffuse.network.block import (
    GROUPS,
    NEAR_ZERO,
    Attention,
    Downsample,
    ResBlock,
    Upsample,
    conv,
    linear,
    norm,
    sinusoid,
)


@dataclass(frozen=True)
class UNet(Network):
    """`attention` lists the levels that have it, 0 being the first; the middle always does.

    `groups` are those of the norms: 32, or a quarter of `channels` where that is less, because a group of one channel
    would take away what the time embedding adds. `patch` folds squares of that side into channels first, which makes
    every level cheaper (the authors' `block_size`, but in torch's order of channels).
    """

    channels: Count = 128
    multipliers: tuple[Count, ...] = (1, 2, 2, 2)
    blocks: Count = 2
    attention: tuple[int, ...] = (1,)
    dropout: Fraction = 0.0
    patch: Count = 1
    groups: Count | None = None
    time: Literal["index", "logsnr", "sigma"] = "index"
    recomputed: ClassVar[tuple[type[nn.Module], ...]] = (ResBlock, Attention)

    def __post_init__(self) -> None:
        if not self.multipliers:
            raise UsageError("network unet: multipliers is empty; give one a level, for example [1, 2, 2]")
        levels = range(len(self.multipliers))
        if not set(self.attention) <= set(levels):
            raise UsageError(
                f"network unet: attention {list(self.attention)} names a level that is not there; "
                f"{len(self.multipliers)} multipliers make levels {list(levels)}"
            )

    def build(self, image_channels: int, output_channels: int, classes: int | None = None) -> "UNetModule":
        return UNetModule(self, image_channels, output_channels, classes)

    def norm_groups(self) -> int:
        return self.groups or min(GROUPS, max(1, self.channels // 4))

    def stride(self) -> int:
        return self.patch * 2 ** (len(self.multipliers) - 1)


class TimeEmbedding(nn.Module):
    """The sinusoid through two layers; each residual block applies the next swish itself."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.dense = nn.ModuleList([linear(channels, 4 * channels), linear(4 * channels, 4 * channels)])

    def forward(self, time: Float[Tensor, "b"]) -> Float[Tensor, "b e"]:
        first, second = self.dense
        return second(F.silu(first(sinusoid(time, self.channels))))


class Level(nn.Module):
    """The blocks of one resolution, on the way down or up, and what leads from it to the next."""

    def __init__(
        self,
        widths: list[tuple[int, int]],
        embedding: int,
        dropout: float,
        attention: bool,
        groups: int,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        self.block = nn.ModuleList(
            [ResBlock(inputs, outputs, embedding, dropout, groups) for inputs, outputs in widths]
        )
        self.attn = nn.ModuleList([Attention(outputs, groups) for _, outputs in widths] if attention else [])
        self.downsample = Downsample(widths[-1][1]) if downsample else None
        self.upsample = Upsample(widths[-1][1]) if upsample else None

    def run(self, i: int, h: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b d h w"]:
        h = self.block[i](h, embedding)
        return self.attn[i](h) if len(self.attn) else h


class UNetModule(nn.Module):
    """(x, time, cond) -> output."""

    def __init__(self, spec: UNet, image_channels: int, output_channels: int, classes: int | None):
        super().__init__()
        self.blocks, self.patch = spec.blocks, spec.patch
        embedding, last, groups = 4 * spec.channels, len(spec.multipliers) - 1, spec.norm_groups()
        width = [spec.channels * multiplier for multiplier in spec.multipliers]

        self.temb = TimeEmbedding(spec.channels)
        self.label = nn.Embedding(classes + 1, embedding) if classes else None  # the last row is "no class"
        self.conv_in = conv(image_channels * spec.patch**2, spec.channels)

        self.down, self.up, self.mid = nn.ModuleList(), nn.ModuleList(), nn.ModuleDict()
        skips, current = [spec.channels], spec.channels
        for level in range(last + 1):
            widths = [(current if i == 0 else width[level], width[level]) for i in range(spec.blocks)]
            current = width[level]
            attention = level in spec.attention
            self.down.append(Level(widths, embedding, spec.dropout, attention, groups, downsample=level < last))
            skips += [current] * (spec.blocks + (level < last))

        self.mid["block_1"] = ResBlock(current, current, embedding, spec.dropout, groups)
        self.mid["attn_1"] = Attention(current, groups)
        self.mid["block_2"] = ResBlock(current, current, embedding, spec.dropout, groups)

        for level in range(last, -1, -1):
            widths = []
            for _ in range(spec.blocks + 1):
                widths.append((current + skips.pop(), width[level]))
                current = width[level]
            attention = level in spec.attention
            self.up.insert(0, Level(widths, embedding, spec.dropout, attention, groups, upsample=level > 0))

        self.norm_out = norm(current, groups)
        self.conv_out = conv(current, output_channels * spec.patch**2, gain=NEAR_ZERO)

    def forward(
        self, x: Float[Tensor, "b c h w"], time: Float[Tensor, "b"], cond: Conditioning = NOTHING
    ) -> Float[Tensor, "b out h w"]:
        embedding = self.temb(time)  # (b, 4 channels)
        if self.label is not None:
            none = torch.full_like(time, self.label.num_embeddings - 1, dtype=torch.int64)
            embedding = embedding + self.label(none if cond.label is None else cond.label)

        skips = [self.conv_in(F.pixel_unshuffle(x, self.patch))]
        for level in self.down:
            assert isinstance(level, Level)
            for i in range(self.blocks):
                skips.append(level.run(i, skips[-1], embedding))
            if level.downsample is not None:
                skips.append(level.downsample(skips[-1]))

        h = self.mid["block_1"](skips[-1], embedding)
        h = self.mid["block_2"](self.mid["attn_1"](h), embedding)

        for level in reversed(self.up):
            assert isinstance(level, Level)
            for i in range(self.blocks + 1):
                h = level.run(i, torch.cat([h, skips.pop()], dim=1), embedding)
            if level.upsample is not None:
                h = level.upsample(h)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)
