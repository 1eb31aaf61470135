"""Tables of a codec for tests, and a model whose every number is known: of Gaussian data, with the exact x̂_0."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.cli import toy
from undiffuse.codec import tailfit
from undiffuse.codec.plan import KNOTS, SCALES, Plan
from undiffuse.codec.tail import Tail
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.parameterisation import X0
from undiffuse.diffusion.process import ContinuousCosine, Linear
from undiffuse.diffusion.reverse import FixedSmall
from undiffuse.model import load
from undiffuse.model.model import Model
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.unet import UNet

STD = 0.2  # of the Gaussian data, 25.5 grey levels
EVERY = range(-SCALES, SCALES + 1)


def pictures(n: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8))


@cache
def ending(steps: int) -> Tail:
    """Of a lossless file, after all steps."""
    return tailfit.guess(steps, 1e-4, (1.0,) * KNOTS)


def plan(
    values: int = 16,
    layers: tuple[int, ...] = (2, 1, 1),
    bits: tuple[int, ...] = (9, 14, 20, 31),
    memory: int = 10,
    **changes: Any,
) -> Plan:
    """Any tables: `bits` are those of an image of `values` values at scale 0."""
    steps = len(bits)
    times = np.linspace(0.9, 0.1, steps + 1).tolist()
    made = Plan(
        weights="0" * 64,
        images=7,
        values=values,
        memory=memory,
        times=tuple(times),
        square=tuple(0.5 / (1 + k) for k in range(steps + 1)),
        shape=((1.0,) * KNOTS,) * (steps + 1),
        bits=tuple(tuple(round(n * 2 ** (k / 16)) for k in EVERY) for n in bits),
        layers=layers,
        kl=tuple(0.9 * n for n in bits),
        usual=sum(bits),
        tail=ending(steps),
    )
    return replace(made, **changes)


class Exact(nn.Module):
    """E[x_0 | x_t] of data N(0, STD²), each value for itself."""

    def __init__(self):
        super().__init__()
        self.std = nn.Parameter(torch.tensor(STD, dtype=torch.float32), requires_grad=False)

    def forward(self, x, time, cond):
        alpha, noise = torch.sigmoid(time[:, None, None, None]).sqrt(), torch.sigmoid(-time[:, None, None, None])
        return x * alpha * self.std**2 / (alpha**2 * self.std**2 + noise)


def gaussian(shape: tuple[int, int, int] = (1, 12, 12)) -> Model:
    process = ContinuousCosine()
    config = ModelConfig(shape, process, X0(), FixedSmall(), UNet(time="logsnr"))
    return Model(config, Denoiser(Exact(), process, X0(), FixedSmall(), "logsnr").eval(), {})


def square(snr: float) -> float:
    """The mean square of x_0 − x̂_0 of that model: 1/(1/STD² + SNR)."""
    return 1 / (STD**-2 + snr)


def gaussian_plan(model: Model, steps: int = 8, memory: int = 10, layers: tuple[int, ...] = (4, 3, 1)) -> Plan:
    """Its tables by formula: steps that cost the same each, down to 2 grey levels, and 12 % of bits on top."""
    values, last = math.prod(model.image_shape), (2 / 127.5) ** 2
    squares = (STD**2 * (last / STD**2) ** (np.arange(steps + 1) / steps)).tolist()
    snr = [max(1e-5, 1 / v - STD**-2) for v in squares]
    times = model.process.time(torch.tensor(snr, dtype=F64).log()).tolist()
    kl = [[values / 2 * math.log2(1 + (b - a) * square(a) * 2 ** (k / 4)) for k in EVERY] for a, b in pairs(snr)]
    return replace(
        plan(values, layers, tuple(range(1, steps + 1)), memory),
        weights=model.digest(),
        times=tuple(times),
        square=tuple(map(square, snr)),
        bits=tuple(tuple(round(1.12 * each) for each in row) for row in kl),
        kl=tuple(row[SCALES] for row in kl),
    )


def pairs(numbers: list[float]) -> list[tuple[float, float]]:
    return list(zip(numbers, numbers[1:], strict=False))


def gaussian_images(n: int, shape: tuple[int, int, int] = (1, 12, 12), seed: int = 0) -> torch.Tensor:
    """Draws of what the model knows, as uint8."""
    x = STD * np.random.default_rng(seed).standard_normal((n, *shape))
    return torch.from_numpy(((x + 1) * 127.5).round().clip(0, 255).astype(np.uint8))


def untrained(path: Path) -> Path:
    """A model of 8×8 and 100 steps in a file."""
    small = load.load(toy.save(path), "cpu")
    load.save(replace(small, config=replace(small.config, process=Linear(100, 1e-3, 0.2))), path)
    return path
