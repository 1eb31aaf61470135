"""The candidates of `bench/choose.py`, as settings of `bench/small.toml`, and a network that is one of them."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.config import Count
from undiffuse.diffusion.density import DENSITIES, Density
from undiffuse.diffusion.objective import WeightedBySnr
from undiffuse.network.base import NOTHING, Conditioning, Network
from undiffuse.network.block import NEAR_ZERO, ResBlock, conv, sinusoid
from undiffuse.network.unet import UNet, UNetModule


class Block(nn.Module):
    """Attention and two layers on tokens, each shifted, scaled and gated by the time (Peebles & Xie 2023)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.own = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        b, n, c = x.shape
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = (told + self.own)[:, :, None].unbind(1)
        h = F.layer_norm(x, (c,)) * (1 + scale_1) + shift_1
        q, k, v = self.qkv(h).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + gate_1 * self.out(h)
        h = F.layer_norm(x, (c,)) * (1 + scale_2) + shift_2
        return x + gate_2 * self.down(F.gelu(self.up(h), approximate="tanh"))


class Tokens(nn.Module):
    """Patches become tokens, and these patches again; one layer tells all blocks the time."""

    def __init__(self, spec: "Transformer", inputs: int, outputs: int):
        super().__init__()
        self.patch, self.width, width = spec.patch, spec.width, spec.width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.told, self.first = nn.Linear(width, 8 * width), nn.Linear(inputs * spec.patch**2, width)
        self.place = nn.Parameter(0.02 * torch.randn((28 // spec.patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, spec.heads) for _ in range(spec.depth))
        self.last = nn.Linear(width, outputs * spec.patch**2)
        for layer in (self.last, self.told):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning = NOTHING) -> Tensor:
        b, _, height, width = x.shape
        h = self.first(F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)) + self.place
        told = self.told(self.time(sinusoid(time, self.width))).view(b, 8, self.width)
        for block in self.blocks:
            h = block(h, told[:, :6])
        scale, shift = told[:, 6:, None].unbind(1)
        h = self.last(F.layer_norm(h, (self.width,)) * (1 + scale) + shift)
        return F.pixel_shuffle(h.transpose(1, 2).reshape(b, -1, height // self.patch, width // self.patch), self.patch)


@dataclass(frozen=True)
class Transformer(Network):
    """For images of 28×28."""

    width: Count = 128
    depth: Count = 6
    heads: Count = 4
    patch: Count = 4
    time: Literal["index", "logsnr", "sigma"] = "index"

    def build(self, image_channels: int, output_channels: int, classes: int | None = None, hints: int = 0) -> nn.Module:
        return Tokens(self, image_channels + hints, output_channels)

    def stride(self) -> int:
        return self.patch


@dataclass(frozen=True)
class VLoss(WeightedBySnr):
    """The loss of v for a network that predicts x_0, where the noise is above a twentieth (Li & He 2025)."""

    density: Annotated[Density, DENSITIES] | None = None

    def on_x_0(self, logsnr: Tensor) -> Tensor:
        return (1 + logsnr.exp()).clamp(max=400.0)


def apart(like: nn.Conv2d, gain: float) -> nn.Sequential:
    """In place of a 3×3 convolution: each channel by itself, then each pixel by itself (Howard et al. 2017)."""
    alone = nn.Conv2d(like.in_channels, like.in_channels, 3, padding=1, groups=like.in_channels, bias=False)
    nn.init.dirac_(alone.weight, groups=like.in_channels)
    return nn.Sequential(alone, conv(like.in_channels, like.out_channels, 1, gain))


@dataclass(frozen=True)
class Cheaper(UNet):
    """Blocks with less to compute: both convolutions "apart", or the second of 1×1."""

    layers: Literal["apart", "second of 1×1"] = "apart"

    def build(self, *sizes: Any, **more: Any) -> UNetModule:
        module = super().build(*sizes, **more)
        for block in [part for part in module.modules() if isinstance(part, ResBlock)]:
            if self.layers == "apart":
                block.conv1, block.conv2 = apart(block.conv1, 1.0), apart(block.conv2, NEAR_ZERO)
            else:
                block.conv2 = conv(block.conv2.in_channels, block.conv2.out_channels, 1, NEAR_ZERO)
        return module


def unet(**fields: object) -> list[str]:
    """With Muon and channels_last, which the first rows compare with the preset."""
    return [*LAST, MUON, *(f"network.{name}={value}" for name, value in fields.items())]


def cheaper(channels: int, layers: str) -> list[str]:
    own = f'name="candidates:Cheaper",channels={channels},layers="{layers}"'
    return [*unet(), f"network={{{own},multipliers=[1,1],blocks=1,attention=[1],patch=2}}"]


LAST, MUON = ["train.channels_last=true"], "train.optimizer=muon"
PLAIN = {"attention": "[]", "middle": "plain"}
TOKENS = [MUON, 'network={name="candidates:Transformer"}']
CANDIDATES: dict[str, list[str]] = {
    "Adam, NCHW": [],
    "Adam": LAST,
    "Adam, rate 4e-3": [*LAST, "train.lr=4e-3"],
    "Adam, second moment over 100 steps": [*LAST, "train.betas=[0.9,0.99]"],
    "Adam, no attention": [*LAST, *(f"network.{name}={value}" for name, value in PLAIN.items())],
    "Muon": unet(),
    "rate 1e-3": [*unet(), "train.lr=1e-3"],
    "rate 4e-3": [*unet(), "train.lr=4e-3"],
    "batches of 32": [*unet(), "train.batch=32"],
    "batches of 128": [*unet(), "train.batch=128"],
    "no attention": unet(**PLAIN),
    "64 channels": unet(channels=64),
    "two blocks a level": unet(blocks=2),
    "twice as wide below": unet(multipliers="[1,2]"),
    "32 channels, twice as wide below": unet(channels=32, multipliers="[1,2]"),
    "half as wide again below, no attention": unet(multipliers="[1,1.5]", **PLAIN),
    "64 channels, no attention": unet(channels=64, **PLAIN),
    "44 channels": unet(channels=44),
    "56 channels": unet(channels=56),
    "convolutions of each channel and 1×1": cheaper(48, "apart"),
    "convolutions of each channel and 1×1, 96 channels": cheaper(96, "apart"),
    "second convolutions of 1×1": cheaper(48, "second of 1×1"),
    "second convolutions of 1×1, 64 channels": cheaper(64, "second of 1×1"),
    "compiled": [*unet(), "train.compile=true"],
    "a level of 16 channels at 28×28": unet(patch=1, multipliers="[0.3333,1,1]", attention="[2]"),
    "scale and shift by the time": unet(modulation="scale-shift"),
    "scale and shift, no attention": unet(modulation="scale-shift", **PLAIN),
    "scale and shift, no attention, 64 channels": unet(channels=64, modulation="scale-shift", **PLAIN),
    "scale and shift, no attention, half as wide again below": unet(
        multipliers="[1,1.5]", modulation="scale-shift", **PLAIN
    ),
    "patches of 4, one level of 96": unet(channels=96, multipliers="[1]", patch=4, attention="[0]"),
    "transformer, patches of 4": TOKENS,
    "transformer, x_0 predicted, loss of v": [*TOKENS, "parameterisation.name=x0", "objective.name=candidates:VLoss"],
    "min-SNR": [*unet(), "objective.name=min-snr"],
    "log-normal sigma": [*unet(), "objective.density.name=log-normal"],
    "straight paths": [*unet(time="logsnr"), "process.name=straight"],
}
