"""FD-classifier: the features of small networks that were trained to tell the classes of one set of images.

What differs between two shirts of 28×28 pixels is small to a network that was trained on photographs. These were made
for images of one kind and say nothing about others. `bench/classifiers.py` trains, measures and writes them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from undiffuse.errors import Corrupt
from undiffuse.machine.tensorfile import read_weights
from undiffuse.quality.feature.base import NARROW, Extractor, FeatureExtractor, hash_of_file
from undiffuse.quality.metric.base import Features

STAGES = ((32,), (48, 64), (96, 128))  # widths of the convolutions; height and width are halved between stages
PLACES = 8  # channels of the last map that are features with their places


class Network(nn.Module):
    """Convolutions of 3×3 with ReLU; `norm` stands between the two in training, and is folded into the weights after.

    The pooled features are the means of the last map; the logits are linear in them.
    """

    def __init__(self, channels: int, classes: int, norm: Callable[[int], nn.Module] = lambda width: nn.Identity()):
        super().__init__()
        self.channels, widths = channels, [width for stage in STAGES for width in stage]
        self.starts = [sum(map(len, STAGES[:k])) for k in range(1, len(STAGES))]
        made = {"dtype": torch.float32, "device": "cpu"}
        pairs = zip([channels, *widths], widths, strict=False)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, **made) for a, b in pairs)
        self.norms = nn.ModuleList(norm(width) for width in widths)
        self.head = nn.Linear(widths[-1], classes, **made)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Features:
        x = images.to(torch.float32) / 127.5 - 1
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(nn.functional.max_pool2d(x, 2) if number in self.starts else x)).relu()
        pool = x.mean((2, 3))
        return Features(pool, self.head(pool), x[:, :PLACES].flatten(1))


def path_of(name: str) -> Path:
    """The shipped weights of that extractor."""
    return Path(str(resources.files("undiffuse") / "assets" / "features" / f"{name}.safetensors"))


def network_of(path: Path) -> tuple[Network, list[str]]:
    """A network of such a file, and what its logits are called. Raises Corrupt for another file."""
    tensors, meta = read_weights(path)
    try:
        classes = list(meta["classes"])
        network = Network(tensors["convs.0.weight"].shape[1], len(classes))
        network.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    except (LookupError, TypeError, RuntimeError) as error:
        raise Corrupt(f"{path} holds no classifier of undiffuse; restore it from a copy") from error
    return network.eval().requires_grad_(False), classes


def _open(name: str, title: str, sha256: str, size: int, device: torch.device) -> Extractor:
    path = path_of(name)
    if not path.exists():
        raise Corrupt(f"{path} is missing, which undiffuse brings; install undiffuse again")
    if (found := hash_of_file(path)) != sha256:
        raise Corrupt(
            f"{path} is not the file that undiffuse brings: its sha256 is {found}, expected {sha256}; "
            "install undiffuse again"
        )
    network, classes = network_of(path)
    width, place = network.head.in_features, size // 2 ** (len(STAGES) - 1)
    dimensions = {"pool": width, "logits": len(classes), "spatial": PLACES * place**2}
    return Extractor(
        name, title, sha256, "none", (size, size), network.channels, dimensions, network.to(device), device
    )


@dataclass(frozen=True)
class Classifier_28(FeatureExtractor):
    """Grey images of 28×28: the ten classes of Fashion-MNIST."""

    title: ClassVar[str] = "FD-classifier"
    sha256: ClassVar[str] = "2f223501ac915d24d95b89e89e5e179643716c3005b44387766266219d20a285"

    @staticmethod
    def suits(shape: tuple[int, int, int]) -> int:
        return NARROW if shape == (1, 28, 28) else 0

    def open(self, device: torch.device) -> Extractor:
        """Raises Corrupt for weights that are missing or others."""
        return _open("classifier-28", self.title, self.sha256, 28, device)


@dataclass(frozen=True)
class ClassifierEmoji(FeatureExtractor):
    """RGB images of 32×32: the emoji set of `undiffuse data build emoji --labels both`.

    A logit is a style together with a category, one distribution; that of the style alone is a sum of probabilities.
    """

    title: ClassVar[str] = "FD-classifier"
    sha256: ClassVar[str] = "631a6670a37c1709d45b355eec6c3357c316bdad76fdd8ccc01b58525a5276ef"

    @staticmethod
    def suits(shape: tuple[int, int, int]) -> int:
        return NARROW if shape == (3, 32, 32) else 0

    def open(self, device: torch.device) -> Extractor:
        """Raises Corrupt for weights that are missing or others."""
        return _open("classifier-emoji", self.title, self.sha256, 32, device)
