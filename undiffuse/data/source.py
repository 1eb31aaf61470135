"""What the rest of the project sees of data: a source, an indexed collection of uint8 images with labels.

A *format* is one way that images are kept; it recognises what the user names and reads it. Formats are found, not
registered: a subclass of `Format` in a module of `undiffuse.data` is tried by `open_source`. What a format reads may
have images of many sizes; `unify` decodes it once into one tensor of one shape.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from undiffuse.config import Table
from undiffuse.data import picture
from undiffuse.errors import DataError, MemoryExhausted, UsageError, nearest

Split = Literal["train", "test"]
LISTED = 20


@dataclass(frozen=True, eq=False)
class Item:
    """One image and its class, if it has one."""

    image: UInt8[Tensor, "c h w"]
    label: int | None = None


class Source(ABC):
    """Images by number. Names of classes and of items are for messages and reports."""

    classes: tuple[str, ...] | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Item:
        """Raises DataError, with the name of the item, if it cannot be decoded."""

    @abstractmethod
    def fingerprint(self) -> str:
        """64 hexadecimal digits (sha256) that change when the examples or their order do."""

    def name(self, index: int) -> str:
        return f"image {index}"


@dataclass(frozen=True, eq=False)
class ArraySource(Source):
    """Images of one shape, held in memory."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, "n"] | None = None
    classes: tuple[str, ...] | None = None
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        return Item(self.images[index], None if self.labels is None else int(self.labels[index]))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        _, c, h, w = self.images.shape
        return c, h, w

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.labels is not None)).encode())
        digest.update(self.images.contiguous().numpy().data)
        if self.labels is not None:
            digest.update(self.labels.to(torch.int64).contiguous().numpy().astype("<i8").data)
        return digest.hexdigest()

    def subset(self, index: slice | Int[Tensor, "m"]) -> "ArraySource":
        """The examples chosen, in that order."""
        labels = None if self.labels is None else self.labels[index]
        return ArraySource(self.images[index], labels, self.classes, self.skipped)


class Format(ABC):
    """One way that images are kept."""

    names: ClassVar[tuple[str, ...]] = ()  # what a user may write instead of a path

    @staticmethod
    @abstractmethod
    def match(spec: str) -> int:
        """0 if `spec` is something else, 1 if it may be read so, 2 if it is surely meant so."""

    @staticmethod
    @abstractmethod
    def read(spec: str, split: Split, background: str) -> Source:
        """The images as they are. Raises DataError, or Corrupt for a pickle with anything but arrays in it."""


FORMATS = Table("data format", Format, "undiffuse.data")


def open_raw(spec: str | Path, split: str = "train", background: str = "white") -> Source:
    """The images of a path or of a named set, each as it is: sizes and channel counts may differ."""
    text = str(spec)
    if split not in ("train", "test"):
        raise UsageError(f'split "{split}" is not known; expected train or test')
    picture.colour(background)
    try:
        source = _format(text).read(text, split, background)
    except OSError as error:
        raise DataError(f"{text} cannot be read: {error.strerror or error}") from error
    if len(source) == 0:
        raise DataError(f"{text} has no images in its {split} split; expected at least one")
    return source


def _format(spec: str) -> type[Format]:
    best = max(FORMATS.classes.values(), key=lambda kind: kind.match(spec))
    if best.match(spec) > 0:
        return best
    if Path(spec).exists():
        raise DataError(f"{spec} is not in a known format; give a folder or .zip of pictures, .npz, .npy or IDX")
    names = [name for kind in FORMATS.classes.values() for name in kind.names]
    raise DataError(f'data "{spec}" is neither a path nor a named set.{nearest(spec, names)}')


def open_source(
    spec: str | Path,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    background: str = "white",
    split: str = "train",
    skip_bad: bool = False,
) -> ArraySource:
    """The images of a path or of a named set, all of one shape, in memory.

    `size` is a side or (height, width), None to keep the images' own; `channels` is 1, 3 or None likewise. Alpha is
    flattened on `background`. With `skip_bad` unreadable files are left out and listed in `.skipped`.
    """
    return unify(open_raw(spec, split, background), size, channels, skip_bad)


def unify(
    source: Source, size: int | tuple[int, int] | None = None, channels: int | None = None, skip_bad: bool = False
) -> ArraySource:
    """Every image cropped, resized and converted to one shape; DataError if they differ and no shape was asked for."""
    pair = (size, size) if isinstance(size, int) else size
    if pair is not None and (min(pair) < 1 or math.prod(pair) > picture.MAX_PIXELS):
        raise UsageError(f"size {pair[0]}x{pair[1]} is not possible; give 1 to {picture.MAX_PIXELS} pixels")
    if channels not in (None, 1, 3):
        raise UsageError(f"channels {channels} is not possible; give 1 (grey) or 3 (RGB)")
    if isinstance(source, ArraySource) and _has_shape(source, pair, channels):
        return source
    images, kept, bad = _decode(source, pair, channels)
    if bad and (not skip_bad or not kept):
        raise _unreadable([f"{name} ({reason})" for name, reason in bad], len(source))
    labels = torch.tensor([label for _, label in kept]) if kept[0][1] is not None else None
    return ArraySource(torch.from_numpy(images[: len(kept)]), labels, source.classes, tuple(name for name, _ in bad))


def _unreadable(bad: list[str], total: int) -> DataError:
    more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
    return DataError(
        f"{len(bad)} of {total} images cannot be read: {', '.join(bad[:LISTED])}{more}. Remove or repair them, "
        "or leave them out with --skip-bad"
    )


def _has_shape(source: ArraySource, pair: tuple[int, int] | None, channels: int | None) -> bool:
    c, h, w = source.image_shape
    return pair in (None, (h, w)) and channels in (None, c)


def _decode(
    source: Source, pair: tuple[int, int] | None, channels: int | None
) -> tuple[UInt8[np.ndarray, "n c h w"], list[tuple[int, int | None]], list[tuple[str, str]]]:
    """One array with the good images in front, (index, label) of those, and (name, reason) of the bad."""
    images = np.empty((0, 0, 0, 0), np.uint8)
    kept: list[tuple[int, int | None]] = []
    bad: list[tuple[str, str]] = []
    for index in range(len(source)):
        try:
            item = source[index]
        except DataError as error:
            bad.append((source.name(index), str(error).removeprefix(f"{source.name(index)}: ")))
            continue
        image = picture.fit(item.image.permute(1, 2, 0).numpy(), pair, channels).transpose(2, 0, 1)
        if not kept:
            images = _room(len(source), image.shape)
        elif image.shape != images.shape[1:]:
            raise _mixed(source.name(kept[0][0]), images.shape[1:], source.name(index), image.shape)
        images[len(kept)] = image
        kept.append((index, item.label))
    return images, kept, bad


def _room(count: int, shape: tuple[int, ...]) -> UInt8[np.ndarray, "n c h w"]:
    try:
        return np.empty((count, *shape), np.uint8)
    except (MemoryError, ValueError) as error:
        gigabytes = count * math.prod(shape) / 1e9
        raise MemoryExhausted(
            f"{count} images of {shape[2]}x{shape[1]} need {gigabytes:.1f} GB of memory; give a smaller --size"
        ) from error


def _mixed(first: str, one: tuple[int, ...], second: str, two: tuple[int, ...]) -> DataError:
    if one[1:] != two[1:]:
        sizes = f"{first} is {one[2]}x{one[1]}, {second} is {two[2]}x{two[1]}"
        return DataError(
            f"images differ in size: {sizes} (width x height). Give one, for example --size {min(one[1:])}"
        )
    return DataError(
        f"images differ in channels: {first} has {one[0]}, {second} has {two[0]}. Give "
        "--set data.channels=1 for grey or --set data.channels=3 for RGB"
    )
