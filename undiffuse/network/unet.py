"""The U-Net of DDPM, to the weight: 35,746,307 parameters for CIFAR-10 and 113,673,219 for 256².

Module names are those of the authors' variables (`down.0.block.1.conv1`), so that their checkpoints need no table.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.config import Count, Fraction, Number, Positive
from undiffuse.errors import UsageError
from undiffuse.network.attention import Attention
from undiffuse.network.base import NOTHING, Conditioning, Network
from undiffuse.network.block import EPS, GROUPS, NEAR_ZERO, ResBlock, Style, conv, linear, norm, sinusoid
from undiffuse.network.resample import Downsample, Upsample


@dataclass(frozen=True)
class UNet(Network):
    """`attention` lists the levels that have it, 0 being the first; `attention_up` those on the way up, if others.

    `groups` are those of the norms: 32, or a quarter of `channels` where that is less, because a group of one channel
    would take away what the time embedding adds. `patch` folds squares of that side into channels first, which makes
    every level cheaper (the authors' `block_size`, but in torch's order of channels). For each of `fourier` the network
    is also given sin and cos of πf times the image before that, in float32 as the first convolution then is, because
    near ±1 bf16 is coarser than the levels (Kingma et al. 2021, §3.4; levels are 1/127.5 apart: 127.5 and 255 fit).

    The rest is for networks of other projects; its defaults are the paper's network. The middle has attention unless
    `middle` says otherwise, with norms of `middle_groups` (0: none), and its sums are divided by `middle_scale`. `head`
    is the width of a head of attention, of which there is one by default. `eps` is that of all norms. With `modulation`
    "scale-shift" the time scales too. The levels of `residual_down` and `residual_up` are left through a residual block
    instead of a convolution; `centred` pads that convolution on all sides. `embedding` is the width of the time
    embedding, by default 4 `channels`; `block.sinusoid` explains `frequency_shift` and `cosine_first`. With
    `centre_input` the network takes 2x − 1. `label` tells classes by a table, or as numbers through a sinusoid.
    """

    channels: Count = 128
    multipliers: tuple[Count | Positive, ...] = (1, 2, 2, 2)
    blocks: Count = 2
    attention: tuple[int, ...] = (1,)
    dropout: Fraction = 0.0
    patch: Count = 1
    groups: Count | None = None
    time: Literal["index", "logsnr", "sigma"] = "index"
    attention_up: tuple[int, ...] | None = None
    middle: Literal["attention", "plain", "none"] = "attention"
    middle_groups: Number | None = None
    middle_scale: Positive | Count = 1.0
    head: Count | None = None
    eps: Positive = EPS
    activation: Literal["silu", "gelu", "relu", "mish"] = "silu"
    modulation: Literal["shift", "scale-shift"] = "shift"
    residual_down: tuple[int, ...] = ()
    residual_up: tuple[int, ...] = ()
    centred: bool = False
    embedding: Count | None = None
    frequency_shift: Number = 1
    cosine_first: bool = False
    centre_input: bool = False
    label: Literal["table", "sinusoid"] = "table"
    fourier: tuple[Count | Positive, ...] = ()
    recomputed: ClassVar[tuple[type[nn.Module], ...]] = (ResBlock, Attention)

    def __post_init__(self) -> None:
        if not self.multipliers:
            raise UsageError("network unet: multipliers is empty; give one a level, for example [1, 2, 2]")
        if not all(self.widths()):
            raise UsageError(
                f"network unet: multipliers {list(self.multipliers)} leave a level no channel of {self.channels}"
            )
        levels = range(len(self.multipliers))
        for name in ("attention", "attention_up", "residual_down", "residual_up"):
            named = getattr(self, name) or ()
            if not set(named) <= set(levels):
                raise UsageError(
                    f"network unet: {name} {list(named)} names a level that is not there; "
                    f"{len(self.multipliers)} multipliers make levels {list(levels)}"
                )
        narrow = [width for width in self.attended() if self.head is not None and width < self.head]
        if narrow:
            raise UsageError(f"network unet: head is {self.head}, and attention has only {narrow[0]} channels")

    def build(
        self, image_channels: int, output_channels: int, classes: int | None = None, hints: int = 0
    ) -> "UNetModule":
        return UNetModule(self, image_channels, output_channels, classes, hints)

    def widths(self) -> list[int]:
        """Channels of each level."""
        return [round(self.channels * multiplier) for multiplier in self.multipliers]

    def attended(self) -> list[int]:
        """The widths that have attention, the middle last."""
        widths = self.widths()
        levels = sorted({*self.attention, *(self.attention_up or ())})
        return [widths[level] for level in levels] + ([widths[-1]] if self.middle == "attention" else [])

    def norm_groups(self) -> int:
        return self.groups or min(GROUPS, max(1, self.channels // 4))

    def stride(self) -> int:
        return self.patch * 2 ** (len(self.multipliers) - 1)

    def levels(self, module: nn.Module) -> list[list[nn.Module]]:
        assert isinstance(module, UNetModule)
        found = [list(parts) for parts in zip(module.down, module.up, strict=True)]
        found[-1].append(module.mid)
        return found

    def meaning(self) -> dict[str, Any]:
        fields = {**super().meaning(), "multipliers": tuple(width / self.channels for width in self.widths())}
        up = self.attention if self.attention_up is None else self.attention_up
        fields |= {"groups": self.norm_groups(), "attention_up": up, "embedding": self.embedding or 4 * self.channels}
        fields["middle_groups"] = fields["groups"] if self.middle_groups is None else self.middle_groups
        levels = ("attention", "attention_up", "residual_down", "residual_up")
        return fields | {name: tuple(sorted(set(fields[name]))) for name in levels}


class Embedding(nn.Module):
    """A number's sinusoid through two layers; each residual block applies the next activation itself."""

    def __init__(self, spec: UNet):
        super().__init__()
        width = spec.embedding or 4 * spec.channels
        self.channels, self.shift, self.cosine_first = spec.channels, spec.frequency_shift, spec.cosine_first
        self.dense = nn.ModuleList([linear(spec.channels, width), linear(width, width)])

    def forward(self, number: Float[Tensor, "b"]) -> Float[Tensor, "b e"]:
        first, second = self.dense
        return second(F.silu(first(sinusoid(number, self.channels, self.shift, self.cosine_first))))


class Level(nn.Module):
    """The blocks of one resolution, on the way down or up, and what leads from it to the next."""

    def __init__(self, spec: UNet, style: Style, widths: list[tuple[int, int]], attention: bool):
        super().__init__()
        self.block = nn.ModuleList([ResBlock(inputs, outputs, style) for inputs, outputs in widths])
        self.attn = nn.ModuleList(
            [Attention(outputs, style.groups, style.eps, spec.head) for _, outputs in widths] if attention else []
        )
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def run(self, i: int, h: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b d h w"]:
        h = self.block[i](h, embedding)
        return self.attn[i](h) if len(self.attn) else h


class UNetModule(nn.Module):
    """(x, time, cond) -> output."""

    def __init__(self, spec: UNet, image_channels: int, output_channels: int, classes: int | None, hints: int):
        super().__init__()
        self.blocks, self.patch, self.centre_input = spec.blocks, spec.patch, spec.centre_input
        self.fourier, self.image_channels = spec.fourier, image_channels
        self.classes = classes or 0
        style = Style(
            spec.embedding or 4 * spec.channels,
            spec.dropout,
            spec.norm_groups(),
            spec.eps,
            spec.activation,
            spec.modulation,
        )
        width, last = spec.widths(), len(spec.multipliers) - 1
        self.temb = Embedding(spec)
        self.label: nn.Module | None = None
        if classes:  # the last row of the table is "no class"
            self.label = nn.Embedding(classes + 1, style.embedding) if spec.label == "table" else Embedding(spec)
        given = image_channels * (1 + 2 * len(spec.fourier)) + hints
        self.conv_in = conv(given * spec.patch**2, spec.channels)

        self.down, self.up, self.mid = nn.ModuleList(), nn.ModuleList(), nn.ModuleDict()
        skips, current = [spec.channels], spec.channels
        for level in range(last + 1):
            widths = [(current if i == 0 else width[level], width[level]) for i in range(spec.blocks)]
            current, blocks = width[level], Level(spec, style, widths, level in spec.attention)
            if level < last:
                residual = level in spec.residual_down
                blocks.downsample = (
                    ResBlock(current, current, style, "down") if residual else Downsample(current, spec.centred)
                )
            self.down.append(blocks)
            skips += [current] * (spec.blocks + (level < last))

        self._build_middle(spec, style, current)

        up_attention = spec.attention if spec.attention_up is None else spec.attention_up
        for level in range(last, -1, -1):
            widths = []
            for _ in range(spec.blocks + 1):
                widths.append((current + skips.pop(), width[level]))
                current = width[level]
            blocks = Level(spec, style, widths, level in up_attention)
            if level > 0:
                residual = level in spec.residual_up
                blocks.upsample = ResBlock(current, current, style, "up") if residual else Upsample(current)
            self.up.insert(0, blocks)

        self.norm_out = norm(current, style.groups, style.eps)
        self.conv_out = conv(current, output_channels * spec.patch**2, gain=NEAR_ZERO)

    def _build_middle(self, spec: UNet, style: Style, width: int) -> None:
        if spec.middle == "none":
            return
        self.mid["block_1"] = ResBlock(width, width, style, scale=spec.middle_scale)
        if spec.middle == "attention":
            groups = style.groups if spec.middle_groups is None else spec.middle_groups
            self.mid["attn_1"] = Attention(width, groups, style.eps, spec.head, spec.middle_scale)
        self.mid["block_2"] = ResBlock(width, width, style, scale=spec.middle_scale)

    def forward(
        self, x: Float[Tensor, "b c h w"], time: Float[Tensor, "b"], cond: Conditioning = NOTHING
    ) -> Float[Tensor, "b out h w"]:
        embedding = self._embedding(time, cond)
        if self.centre_input:
            x = 2 * x - 1
        skips = [self._begun(x)]
        for level in self.down:
            assert isinstance(level, Level)
            for i in range(self.blocks):
                skips.append(level.run(i, skips[-1], embedding))
            if level.downsample is not None:
                skips.append(resampled(level.downsample, skips[-1], embedding))

        h = skips[-1]
        for part in self.mid.values():
            h = part(h) if isinstance(part, Attention) else part(h, embedding)

        for level in reversed(self.up):
            assert isinstance(level, Level)
            for i in range(self.blocks + 1):
                h = level.run(i, torch.cat([h, skips.pop()], dim=1), embedding)
            if level.upsample is not None:
                h = resampled(level.upsample, h, embedding)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)

    def _begun(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """The first convolution; with Fourier features in float32, whatever the precision of the rest."""
        kind = x.device.type
        if not self.fourier or kind == "meta":  # no autocast has an opinion on the latter
            return self.conv_in(F.pixel_unshuffle(self._with_waves(x), self.patch))
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            return self.conv_in(F.pixel_unshuffle(self._with_waves(x.float()), self.patch)).to(dtype)

    def _with_waves(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        image = x[:, : self.image_channels]
        angles = [math.pi * frequency * image for frequency in self.fourier]
        return torch.cat([x, *(wave for angle in angles for wave in (angle.sin(), angle.cos()))], 1) if angles else x

    def _embedding(self, time: Float[Tensor, "b"], cond: Conditioning) -> Float[Tensor, "b e"]:
        """What every residual block is told; without a label, or with the number of classes for one, "no class"."""
        embedding = self.temb(time)
        if self.label is None:
            return embedding
        label = torch.full_like(time, self.classes, dtype=torch.int64) if cond.label is None else cond.label
        if isinstance(self.label, nn.Embedding):
            return embedding + self.label(label)
        told = self.label(label.to(time.dtype))
        return embedding + torch.where((label == self.classes)[:, None], 0, told)  # no class adds nothing


def resampled(
    layer: nn.Module, h: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]
) -> Float[Tensor, "b c h2 w2"]:
    return layer(h, embedding) if isinstance(layer, ResBlock) else layer(h)
