"""An untrained model in a file."""

from pathlib import Path

import torch

from undiffuse.diffusion.denoiser import Eps, FixedLarge
from undiffuse.diffusion.process import Linear
from undiffuse.model import load, recipe
from undiffuse.model.model import Model
from undiffuse.network.unet import UNet

LARGE = FixedLarge()


def save(path: Path, variance=LARGE, meta=None) -> Path:
    config = recipe.ModelConfig((1, 8, 8), Linear(12, 1e-3, 0.5), Eps(), variance, UNet(8, (1, 1), 1, ()))
    torch.manual_seed(0)
    denoiser = config.build(clip=True).eval().requires_grad_(False)
    for weight in denoiser.network.parameters():
        weight.copy_(weight + 0.1 * torch.randn_like(weight))
    load.save(Model(config, denoiser, meta or {}), path)
    return path
