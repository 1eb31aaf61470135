"""The authors' released networks, as pesser/pytorch_diffusion converted them: a bare state dict under our own names.

Such a file says nothing of itself, so its names and shapes must be those of one of the two networks of the paper.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse.config import plain
from undiffuse.errors import UsageError
from undiffuse.interop.torchfile import read_tensors
from undiffuse.network.unet import UNet

# Side of the images, network, and the variance that the paper's samples of it were drawn with.
RELEASED = (
    (32, UNet(128, (1, 2, 2, 2), attention=(1,), dropout=0.1), "fixed-large"),
    (256, UNet(128, (1, 1, 2, 2, 4, 4), attention=(4,)), "fixed-small"),
)


def read_file(path: Path, allow_pickle: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and meta of a `.safetensors` file, or of a `.ckpt` where `allow_pickle`.

    Raises UsageError for other networks, Corrupt for a damaged file and for a pickle without leave.
    """
    tensors = read_tensors(path, allow_pickle)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for side, network, variance in RELEASED:
        with torch.device("meta"):
            module = network.build(3, 3)
        if shapes == {name: parameter.shape for name, parameter in module.named_parameters()}:
            model = {
                "image": [3, side, side],
                "process": {"name": "linear"},
                "parameterisation": {"name": "eps"},
                "variance": {"name": variance},
                "network": {"name": "unet", **plain(network)},
            }
            assumed = f"the file has weights alone, so they are assumed to be the paper's for {side}×{side} images"
            assumed += f": the linear schedule of 1,000 steps, eps, {variance}"
            imported = {"from": "pytorch_diffusion", "schedule": "assumed", "assumed": [assumed]}
            return tensors, {"model": model, "imported": imported}
    raise UsageError(
        f"{path} holds {len(shapes)} tensors that are not those of the paper's networks for CIFAR-10 (328 tensors) "
        "or 256×256 images (450); give a diffusers folder, whose config describes the network"
    )
