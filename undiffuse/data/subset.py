"""Some images of a source, in a given order: what is trained on and what is held out."""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from undiffuse.data.order import order
from undiffuse.data.source import Item, Shape, Source
from undiffuse.errors import DataError


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

    def name(self, index: int) -> str:
        return self.whole.name(int(self.index[index]))

    def fingerprint(self) -> str:
        text = f"{self.whole.fingerprint()} {self.index.tolist()}"
        return hashlib.sha256(text.encode()).hexdigest()


def divide(source: Source, share: float) -> tuple[Subset, Subset]:
    """(the rest, `share` of the images), chosen by a fixed shuffle; at least one in each. Raises DataError."""
    total = len(source)
    if total < 2:
        raise DataError(f"{total} image cannot be divided into what is trained on and what is held out; give 2 or more")
    held = min(max(1, round(share * total)), total - 1)
    shuffled = order(0, total, torch.arange(total))
    return Subset(source, shuffled[held:].sort().values), Subset(source, shuffled[:held].sort().values)
