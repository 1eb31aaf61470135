"""What every feature extractor shares: from uint8 images to the features that metrics compare.

An extractor is a *spec*, a frozen dataclass whose fields are its options, which opens into an `Extractor` that has its
weights. What two statistics must have in common to be compared is the extractor's `identity`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from undiffuse.config import Table, plain
from undiffuse.errors import UsageError
from undiffuse.machine import dist, log
from undiffuse.machine.device import full_precision
from undiffuse.quality.metric.base import Features

NARROW = 1  # of `FeatureExtractor.suits`


class FeatureExtractor(ABC):
    """One file each. `title` is what a Fréchet distance on its features is called."""

    title: ClassVar[str]

    @abstractmethod
    def open(self, device: torch.device) -> "Extractor":
        """Reads the weights. Raises UsageError where they are missing, Corrupt where they are others."""

    @staticmethod
    def suits(shape: tuple[int, int, int]) -> int:
        """Of those that `auto` finds, the one with the highest number is taken for images [c, h, w]; 0 is no.

        `NARROW` is for features of one set of images, which are said to be so.
        """
        return 0


FEATURES = Table("features", FeatureExtractor, "undiffuse.quality.feature")


@dataclass(frozen=True, eq=False)
class Extractor:
    """Ready to be called with uint8 images [b, c, h, w] of any size that its resize takes.

    `channels` is what its network sees, 1 or 3; `size` what images are resized to. `dimensions` are those of each part
    of the features.
    """

    name: str
    title: str
    sha256: str  # of the weights
    resize: str
    size: tuple[int, int] | None
    channels: int
    dimensions: dict[str, int]
    network: Callable[[UInt8[Tensor, "b c h w"]], Features]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Features:
        """The features in float32, on the device. Grey images are repeated for a network of three channels."""
        self.check(tuple(images.shape[1:]))
        images = images.to(self.device)
        with full_precision():  # TF32 moves features by 3 in a thousand
            return self.network(images.repeat(1, self.channels, 1, 1) if images.shape[1] < self.channels else images)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises UsageError for images of a shape (channels, height, width) that it cannot see."""
        channels, side = shape[0], shape[1:]
        if channels not in (1, self.channels):
            raise UsageError(
                f"images of {channels} channels cannot be seen by {self.name}, which takes "
                f"{'grey' if self.channels == 1 else 'grey and RGB'} images; give --set data.channels={self.channels}, "
                "or other --features"
            )
        if self.resize == "none" and self.size is not None and self.size != side:
            height, width = self.size
            wanted = height if height == width else f"{height}x{width}"
            raise UsageError(
                f"images of {'×'.join(map(str, side))} cannot be seen by {self.name}, which takes {height}×{width} and "
                f"resizes none; give --size {wanted} for pictures, or other --features"
            )

    def note(self, channels: int) -> str | None:
        """What is done to images of so many channels, where that has to be said."""
        return f"grey repeated to {self.channels} channels" if channels < self.channels else None

    @property
    def identity(self) -> dict[str, str]:
        """What statistics must share to be compared."""
        return {"extractor": self.name, "sha256": self.sha256, "resize": self.resize}

    def named(self, label: str) -> str:
        """A label of a metric with the names that belong to these features; only FID's network has the short ones."""
        own = self.title.removeprefix("FD-")
        names = {"fd": self.title, "kd": "KID" if self.title == "FID" else f"KD-{own}"}
        names |= {"sfd": "sFID" if self.title == "FID" else f"sFD-{own}"}
        names |= {"is": "IS" if self.title == "FID" else f"{own} score"}
        return label.format(**names)


def open_features(
    name: str,
    device: str | torch.device = "cpu",
    weights: Path | None = None,
    resize: str | None = None,
    shape: tuple[int, int, int] | None = None,
) -> Extractor:
    """The extractor of that name, with its fields, `efflite0,size=64`, or `my_module:MyExtractor`.

    `weights` and `resize` where it has such options. `auto` is the best that is there for images of that shape
    (channels, height, width).
    """
    return several_features([name], device, weights, resize, shape)[0]


def several_features(
    names: Sequence[str],
    device: str | torch.device = "cpu",
    weights: Path | None = None,
    resize: str | None = None,
    shape: tuple[int, int, int] | None = None,
) -> list[Extractor]:
    """Of each name; `weights` and `resize` are for those that have such options, of which there must be one."""
    best = [auto_features((3, 1, 1) if shape is None else shape) if name == "auto" else name for name in names]
    built = [FEATURES.build(name, trusted=True) for name in dict.fromkeys(best)]
    for option, value in {"weights": None if weights is None else str(weights), "resize": resize}.items():
        takes = [option in getattr(type(each), "__dataclass_fields__", {}) for each in built]
        if value is not None and not any(takes):
            raise UsageError(f"features {', '.join(best)} have no option {option}; leave it out")
        if value is not None:
            built = [_with(each, option, value) if has else each for each, has in zip(built, takes, strict=True)]
    return [each.open(torch.device(device)) for each in built]


def _with(extractor: FeatureExtractor, option: str, value: str) -> FeatureExtractor:
    """The same with another field, which is validated as any is."""
    return FEATURES.build({"name": FEATURES.name_of(extractor), **plain(extractor), option: value}, trusted=True)


def auto_features(shape: tuple[int, int, int]) -> str:
    """The name of the best extractor whose weights are at hand for images [c, h, w]. Raises UsageError for none."""
    names = sorted(FEATURES.classes, key=lambda name: FEATURES.classes[name].suits(shape))
    if not FEATURES.classes[names[-1]].suits(shape):
        colours = f"images of {shape[0]} channels" if shape[0] not in (1, 3) else "these images"
        raise UsageError(
            f"no features are at hand for {colours}; for grey and RGB images install the extra: "
            'pip install "undiffuse[eval]", or give --features my_module:MyExtractor'
        )
    if FEATURES.classes[names[-1]].suits(shape) == NARROW and dist.is_first():
        log.warn(
            f"features {names[-1]} were learnt on one set of images and say little of others; for any images: "
            'pip install "undiffuse[eval]"'
        )
    return names[-1]


def hash_of_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(network: nn.Module) -> str:
    """sha256 of the weights of a network, for extractors that come from no pinned file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
