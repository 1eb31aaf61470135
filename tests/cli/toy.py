"""An untrained model in a file, a short run, and an evaluation as `undiffuse eval` leaves it."""

import json
from pathlib import Path

import torch

from undiffuse.diffusion.parameterisation import Eps
from undiffuse.diffusion.process import Linear
from undiffuse.diffusion.reverse import FixedLarge
from undiffuse.machine.log import silent
from undiffuse.model import load, recipe
from undiffuse.model.model import Model
from undiffuse.network.unet import UNet
from undiffuse.training.start import train

LARGE = FixedLarge()


def save(path: Path, variance=LARGE, meta=None) -> Path:
    config = recipe.ModelConfig((1, 8, 8), Linear(12, 1e-3, 0.5), Eps(), variance, UNet(8, (1, 1), 1, ()))
    torch.manual_seed(0)
    denoiser = config.build(clip=True).eval().requires_grad_(False)
    for weight in denoiser.network.parameters():
        weight.copy_(weight + 0.1 * torch.randn_like(weight))
    load.save(Model(config, denoiser, meta or {}), path)
    return path


SMALL = ["train.batch=8", "network.channels=8", "process.steps=8", "train.held_out=8", "train.log_every=1",
         "train.held_out_every=2", "train.sample_every=0", "network.attention=[]"]  # fmt: skip


def run_of_digits(path: Path, steps: int, *settings: str) -> Path:
    """A run of a tiny network."""
    train("digits", path, "digits", steps=steps, settings=[*SMALL, *settings], device="cpu", say=silent,
          show_progress=False)  # fmt: skip
    return path


def evaluation(folder: Path, weights: str, n: int = 100, value: float = 12.5) -> Path:
    """One score of samples that were drawn with weights of that sha256."""
    row = {"features": "efflite0", "score": "FD-EffLite0", "key": "fd", "value": value, "better": "lower", "real": 4.5,
           "real_n": 90}  # fmt: skip
    features = [{"extractor": "efflite0", "sha256": "5" * 64, "metrics": {"frechet": {}}}]
    said = {"n": n, "features": features, "reference": {"fingerprint": "ab"}, "model": {"sha256": weights}}
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"format": 1, "scores": [row], "notes": ["few"], "protocol": said}))
    return folder
