"""Inception of 2015-12-05, the network of FID and the Inception score, from a weight file that the user brings.

Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision", in the form that TensorFlow published:
averages leave out the padding, the last block takes a maximum, and the classes are 1,008.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from undiffuse.errors import UsageError
from undiffuse.quality.feature.base import Extractor, FeatureExtractor
from undiffuse.quality.feature.resize import RESIZES, Resize, text
from undiffuse.quality.feature.weights import Unit, fold, in_cache, read_pinned, ready, weights_folder
from undiffuse.quality.metric.base import Features

# Both are the same file, torch-fidelity's and pytorch-fid's.
FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIZE = (299, 299)
EPS = 1e-3  # of the batch-norms
SPATIAL = "Mixed_6d"  # its first branch is `mixed_6/conv:0` of the published graph, of which ADM takes [..., :7]

AVERAGE, MAXIMUM, HALF = "average", "maximum", "half"
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    AVERAGE: partial(avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
    MAXIMUM: partial(max_pool2d, kernel_size=3, stride=1, padding=1),
    HALF: partial(max_pool2d, kernel_size=3, stride=2),
}
Step = Any  # a pool by name; (unit of the file, channels, kernel, stride); or a list of units, whose outputs are joined


def _a(pool: int) -> tuple[list[Step], ...]:
    """35×35."""
    return (
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        [AVERAGE, ("branch_pool", pool, 1)],
    )


def _b() -> tuple[list[Step], ...]:
    """35×35 to 17×17."""
    return (
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
        [HALF],
    )


def _c(middle: int) -> tuple[list[Step], ...]:
    """17×17."""
    wide, high = (1, 7), (7, 1)
    return (
        [("branch1x1", 192, 1)],
        [("branch7x7_1", middle, 1), ("branch7x7_2", middle, wide), ("branch7x7_3", 192, high)],
        [
            ("branch7x7dbl_1", middle, 1),
            ("branch7x7dbl_2", middle, high),
            ("branch7x7dbl_3", middle, wide),
            ("branch7x7dbl_4", middle, high),
            ("branch7x7dbl_5", 192, wide),
        ],
        [AVERAGE, ("branch_pool", 192, 1)],
    )


def _d() -> tuple[list[Step], ...]:
    """17×17 to 8×8."""
    return (
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2),
        ],
        [HALF],
    )


def _e(pool: str) -> tuple[list[Step], ...]:
    """8×8."""
    wide, high = (1, 3), (3, 1)
    return (
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, wide), ("branch3x3_2b", 384, high)]],
        [
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            [("branch3x3dbl_3a", 384, wide), ("branch3x3dbl_3b", 384, high)],
        ],
        [pool, ("branch_pool", 192, 1)],
    )


BLOCKS = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _b(),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _d(),
    "Mixed_7b": _e(AVERAGE),
    "Mixed_7c": _e(MAXIMUM),
}


def _unit(inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True) -> Unit:
    """Padded to keep the size, unless it halves it."""
    high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (high // 2, wide // 2) if pad and stride == 1 else (0, 0)
    conv = nn.Conv2d(inputs, outputs, (high, wide), stride, padding, dtype=torch.float32, device="cpu")
    return Unit(conv, nn.ReLU(inplace=True))


class Block(nn.Module):
    """Branches side by side; `outputs` are the channels of all of them."""

    def __init__(self, inputs: int, branches: tuple[list[Step], ...]):
        super().__init__()
        self.branches, self.units = branches, nn.ModuleDict()
        self.outputs = sum(self._add(branch, inputs) for branch in branches)

    def _add(self, steps: list[Step], channels: int) -> int:
        for step in steps:
            if isinstance(step, list):
                channels = sum(self._add([each], channels) for each in step)
            elif isinstance(step, tuple):
                self.units[step[0]] = _unit(channels, *step[1:])
                channels = step[1]
        return channels

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """The output of each branch, to be joined."""
        return [self._run(branch, x) for branch in self.branches]

    def _run(self, steps: list[Step], x: Tensor) -> Tensor:
        for step in steps:
            if isinstance(step, list):
                x = torch.cat([self._run([each], x) for each in step], 1)
            else:
                x = POOLS[step](x) if isinstance(step, str) else self.units[step[0]](x)
        return x


class InceptionNetwork(nn.Module):
    """From images in [−1, 1] to pool [2048], logits [1008] without their bias, and spatial [2023]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict(
            {
                "Conv2d_1a_3x3": _unit(3, 32, 3, 2),
                "Conv2d_2a_3x3": _unit(32, 32, 3, pad=False),
                "Conv2d_2b_3x3": _unit(32, 64, 3),
                "Conv2d_3b_1x1": _unit(64, 80, 1),
                "Conv2d_4a_3x3": _unit(80, 192, 3, pad=False),
            }
        )
        self.blocks, channels = nn.ModuleDict(), 192
        for name, branches in BLOCKS.items():
            self.blocks[name] = block = Block(channels, branches)
            channels = block.outputs
        self.fc = nn.Linear(channels, 1008, bias=False, dtype=torch.float32, device="cpu")

    def units(self) -> dict[str, Unit]:
        """The convolutions, by their names in the weight file."""
        named = dict(self.named_modules())
        return {
            name.removeprefix("stem.").removeprefix("blocks.").replace(".units.", "."): module
            for name, module in named.items()
            if isinstance(module, Unit)
        }

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """The weights as torch-fidelity and pytorch-fid name them. KeyError and RuntimeError for others."""
        for name, unit in self.units().items():
            fold(unit, tensors, f"{name}.conv", f"{name}.bn", EPS)
        with torch.no_grad():
            self.fc.weight.copy_(tensors["fc.weight"])

    def forward(self, x: Float[Tensor, "b 3 299 299"]) -> Features:
        for name, unit in self.stem.items():
            x = unit(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = POOLS[HALF](x)
        spatial = x
        for name, block in self.blocks.items():
            outputs = block(x)
            if name == SPATIAL:
                spatial = outputs[0][:, :7]
            x = torch.cat(outputs, 1)
        pool = x.mean((2, 3))
        # Height, width, channel, as ADM's files of reference statistics have them.
        return Features(pool, self.fc(pool), spatial.permute(0, 2, 3, 1).flatten(1))


@dataclass(frozen=True)
class Inception(FeatureExtractor):
    """FID's own network; `weights` is the file, looked for in the cache folder where none is given."""

    weights: str | None = None
    resize: Resize = "tf1"

    title: ClassVar[str] = "FID"

    @staticmethod
    def suits(shape: tuple[int, int, int]) -> int:
        return 3 if shape[0] in (1, 3) and in_cache(FILES) is not None else 0

    def open(self, device: torch.device) -> Extractor:
        path = Path(self.weights) if self.weights is not None else in_cache(FILES)
        if path is None:
            raise UsageError(
                f"the weights of FID's Inception are missing: put {FILES[0]} or {FILES[1]}, sha256 {SHA256}, into "
                f"{weights_folder()}, or give the file with --feature-weights"
            )
        network = InceptionNetwork()
        network.take(read_pinned(path, SHA256, "FID's Inception"))
        ready(network, device)

        def features(images: UInt8[Tensor, "b 3 h w"]) -> Features:
            pictures = (RESIZES[self.resize](images, SIZE) - 128) / 128
            return network(pictures.contiguous(memory_format=torch.channels_last))

        dimensions = {"pool": 2048, "logits": 1008, "spatial": 2023}
        return Extractor(
            "inception", self.title, SHA256, text(self.resize, SIZE), SIZE, 3, dimensions, features, device
        )
