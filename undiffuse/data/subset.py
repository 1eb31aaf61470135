"""Some images of a source, in a given order: what is trained on and what is held out."""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from undiffuse.data.made import Made
from undiffuse.data.passed import Passed
from undiffuse.data.source import Item, Shape, Source
from undiffuse.errors import DataError

PART = 256  # images that are looked at together


@dataclass(frozen=True, eq=False)
class Subset(Source):
    """Images `index` of another source. Nothing is copied."""

    whole: Source
    index: Int[Tensor, "n"]

    @property
    def classes(self) -> tuple[str, ...] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.whole.classes

    @property
    def skipped(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.whole.skipped

    @property
    def made(self) -> Made:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.whole.made

    @property
    def passed(self) -> tuple[Passed, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.whole.passed

    @property
    def image_shape(self) -> Shape:
        """(channels, height, width)."""
        c, h, w = self[0].image.shape
        return c, h, w

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Item:
        return self.whole[int(self.index[index])]

    def gather(self, index: Int[Tensor, "b"]) -> tuple[UInt8[Tensor, "b c h w"], Int[Tensor, "b"] | None]:
        return self.whole.gather(self.index[index])

    def every_label(self) -> Int[Tensor, "n"] | None:
        labels = self.whole.every_label()
        return None if labels is None else labels[self.index]

    def name(self, index: int) -> str:
        return self.whole.name(int(self.index[index]))

    def fingerprint(self) -> str:
        text = f"{self.whole.fingerprint()} {self.index.tolist()}"
        return hashlib.sha256(text.encode()).hexdigest()


def divide(source: Source, share: float) -> tuple[Subset, Subset]:
    """(the rest, about `share` of the images), at least one in each. Raises DataError.

    What is held out follows from the pixels of an image alone: more images do not change the part of those before, and
    copies of one are in one part.
    """
    total = len(source)
    if total < 2:
        raise DataError(f"{total} image cannot be divided into what is trained on and what is held out; give 2 or more")
    index = torch.arange(total, dtype=torch.int64, device="cpu")
    places = [_place(image) for part in index.split(PART) for image in source.gather(part)[0]]
    place = torch.tensor(places, dtype=torch.float64, device="cpu")
    held, order = place < share, place.argsort(stable=True)
    held[order[0]], held[order[-1]] = True, False
    return Subset(source, index[~held]), Subset(source, index[held])


def _place(image: UInt8[Tensor, "c h w"]) -> float:
    """A number in [0, 1) that looks random."""
    return int.from_bytes(hashlib.blake2b(image.numpy().tobytes(), digest_size=6).digest()) / 2**48
