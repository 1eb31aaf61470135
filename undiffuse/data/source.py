"""What the rest of the project sees of data: a source, an indexed collection of uint8 images with labels.

A *format* is one way that images are kept; it recognises what the user names and reads it. Formats are found, not
registered: a subclass of `Format` in a module of `undiffuse.data` is tried by `open_source`. What a format reads may
have images of many sizes; `unify` decodes it once into one tensor of one shape.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from undiffuse.config import Table
from undiffuse.data import passed, picture
from undiffuse.data.levels import Note, Own
from undiffuse.data.listing import Split
from undiffuse.data.made import Made, summed, tally
from undiffuse.data.passed import Passed
from undiffuse.data.picture import PLAIN, Reading
from undiffuse.errors import DataError, MemoryExhausted, Mixed, NoSplit, UsageError, nearest
from undiffuse.machine import log
from undiffuse.machine.disk import SMALL
from undiffuse.strict import whole

LISTED = 20  # bad images, in an error; and the least that `skip_bad` leaves out
LEAST_GOOD = 1000  # to one that is bad: where there are fewer, something is wrong with the whole
SKIPPED = SMALL // 4  # bytes of the list of images left out, which a run and a pack keep in files of at most SMALL

Shape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True, eq=False)
class Item:
    """One image and its class, if it has one; what reading made of it, and its values if they were not of 8 bits."""

    image: UInt8[Tensor, "c h w"]
    label: int | None = None
    frames: int = 1  # how many pictures its file holds, of which this is the first
    made: tuple[Note, ...] = ()
    own: Own | None = None


class Source(ABC):
    """Images by number. Names of classes and of items are for messages and reports."""

    classes: tuple[str, ...] | None
    skipped: tuple[str, ...] = ()  # what was left out because it could not be read
    reasons: tuple[tuple[str, str], ...] = ()  # (name, reason) of these, as far as they are known
    made: Made = ()  # what was made of the images to bring them into one shape
    own: Own | None = None  # the values of an array that was not of uint8
    passed: tuple[Passed, ...] = ()  # what is there and was not taken for an image
    parts: "tuple[Source, ...]" = ()  # where several were joined
    specs: tuple[str, ...] = ()  # what they were named by

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Item:
        """Raises DataError, with the name of the item, if it cannot be decoded."""

    @abstractmethod
    def fingerprint(self) -> str:
        """64 hexadecimal digits (sha256) that change when the examples or their order do."""

    def stamp(self) -> list[tuple[int, int, int]] | None:
        """(bytes, mtime, ctime in ns) of each file: what changes when the fingerprint does, unread. None if unknown."""
        return None

    def gather(self, index: Int[Tensor, "b"]) -> tuple[UInt8[Tensor, "b c h w"], Int[Tensor, "b"] | None]:
        """Images of one shape, and their labels; here one at a time."""
        items = [self[i] for i in index.tolist()]
        images, known = torch.stack([item.image for item in items]), [item.label for item in items]
        return images, None if known[0] is None else torch.tensor(known, dtype=torch.int64, device="cpu")

    def every_label(self) -> Int[Tensor, "n"] | None:
        """The class of each image, None if they have none; here by looking at them all."""
        labels = [self[i].label for i in range(len(self))]
        known = [label for label in labels if label is not None]
        if known and len(known) < len(labels):
            raise DataError(f"{len(known)} of {len(labels)} images have a label; give all or none")
        return torch.tensor(known, dtype=torch.int64, device="cpu") if known else None

    def name(self, index: int) -> str:
        return f"image {index}"


def fingerprint(shape: tuple[int, ...], parts: Iterable[UInt8[Tensor, "_ _ _ _"]], labels: Tensor | None) -> str:
    """sha256 of images of one shape [n, c, h, w], given in parts, and of their labels."""
    digest = hashlib.sha256(repr((tuple(shape), labels is not None)).encode())
    for part in parts:
        digest.update(part.contiguous().numpy().data)
    if labels is not None:
        digest.update(labels.to(torch.int64).contiguous().numpy().astype("<i8").data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ArraySource(Source):
    """Images of one shape, held in memory."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, "n"] | None = None
    classes: tuple[str, ...] | None = None
    skipped: tuple[str, ...] = ()
    passed: tuple[Passed, ...] = ()
    made: Made = ()
    own: Own | None = None
    reasons: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        return Item(self.images[index], None if self.labels is None else int(self.labels[index]))

    def gather(self, index: Int[Tensor, "b"]) -> tuple[UInt8[Tensor, "b c h w"], Int[Tensor, "b"] | None]:
        # Of bytes, an eighth of the time that `images[index]` takes.
        return self.images.index_select(0, index), None if self.labels is None else self.labels[index]

    def every_label(self) -> Int[Tensor, "n"] | None:
        return self.labels

    @property
    def image_shape(self) -> Shape:
        """(channels, height, width)."""
        _, c, h, w = self.images.shape
        return c, h, w

    def fingerprint(self) -> str:
        return fingerprint(tuple(self.images.shape), [self.images], self.labels)

    def subset(self, index: slice | Int[Tensor, "m"]) -> "ArraySource":
        """The examples chosen, in that order."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, images=self.images[index], labels=labels)


class Format(ABC):
    """One way that images are kept."""

    names: ClassVar[tuple[str, ...]] = ()  # what a user may write instead of a path

    @staticmethod
    @abstractmethod
    def match(spec: str) -> int:
        """0 if `spec` is something else, 1 if it may be read so, 2 if it is surely meant so."""

    @staticmethod
    @abstractmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        """The images as they are. Raises DataError, or Corrupt for a pickle with anything but arrays in it."""


FORMATS = Table("data format", Format, "undiffuse.data.format")


def open_raw(spec: str | Path, split: str = "train", reading: Reading = PLAIN) -> Source:
    """The images of a path or of a named set, each as it is: sizes and channel counts may differ."""
    text = str(spec)
    if split not in ("train", "test"):
        raise UsageError(f'split "{split}" is not known; expected train or test')
    try:
        source = _format(text).read(text, split, reading)
    except OSError as error:
        raise DataError(f"{text} cannot be read: {error.strerror or error}") from error
    if len(source) == 0:
        raise NoSplit(f"{text} has no images in its {split} split; expected at least one")
    return source


def is_readable(spec: str) -> bool:
    """Whether some format takes it for its own."""
    return _best(spec) is not None


@cache
def _tell_hidden(spec: str) -> None:
    """Once, that a path hides a set of the same name."""
    log.warn(f'"{spec}" is the path here, which comes before the named set; to use that, go to another folder')


def _best(spec: str) -> type[Format] | None:
    exists = Path(spec).exists()  # a path that is there is meant before a name
    hidden = [kind for kind in FORMATS.classes.values() if exists and spec in kind.names]
    if hidden:
        _tell_hidden(spec)
    kinds = [kind for kind in FORMATS.classes.values() if kind not in hidden]
    best = max(kinds, key=lambda kind: kind.match(spec))
    return best if best.match(spec) > 0 else None


def _format(spec: str) -> type[Format]:
    if "\n" in spec:  # a list of names, which may be longer than any path
        return FORMATS.classes["several"]
    if best := _best(spec):
        return best
    if Path(spec).exists():
        what = passed.line(passed.kinds([Path(spec).name], lambda name: open(spec, "rb")))
        raise DataError(
            f"{spec} is not in a known format; give a folder or .zip of pictures, .npz, .npy or IDX ({what})"
        )
    names = [name for kind in FORMATS.classes.values() for name in kind.names]
    raise DataError(f'data "{spec}" is neither a path nor a named set.{nearest(spec, names)}')


def open_source(
    spec: str | Path,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    reading: Reading = PLAIN,
    split: str = "train",
    skip_bad: bool = False,
) -> ArraySource:
    """The images of a path or of a named set, all of one shape, in memory.

    `size`: a side or (height, width), None for the images' own; `channels` alike. `skip_bad` lists in `.skipped`.
    """
    return unify(open_raw(spec, split, Wanted.of(size, channels).reading(reading)), size, channels, skip_bad)


def unify(
    source: Source,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    skip_bad: bool = False,
    count: int | None = None,
    stride: int = 8,
) -> ArraySource:
    """Every image cropped, resized and converted to one shape; DataError if they differ and no shape was asked for.

    With `count` only that many are read, spread evenly over the source. The error proposes a multiple of `stride`.
    """
    wanted, chosen = Wanted.of(size, channels, stride), spread(len(source), count)
    if isinstance(source, ArraySource) and wanted.accepts(source.image_shape):
        every = len(chosen) == len(source)
        return source if every else source.subset(torch.tensor(chosen, dtype=torch.int64, device="cpu"))
    first = first_of(source, wanted)
    good = decode(source, chosen, wanted, first)
    refuse_bad(good.bad, len(chosen), skip_bad)
    labels = torch.tensor(good.labels, dtype=torch.int64, device="cpu") if first.labelled else None
    skipped = (*source.skipped, *(name for name, _ in good.bad))
    over = passed.merged(source.passed, passed.frames(good.frames))
    made = summed(source.made, good.made)
    images, why = torch.from_numpy(good.images), (*source.reasons, *good.bad)
    return ArraySource(images, labels, source.classes, skipped, over, made, source.own, why)


def spread(total: int, count: int | None) -> Sequence[int]:
    """`count` numbers below `total`, evenly: data in the order of their classes give some of each. None for all."""
    return range(total) if count is None or count >= total else [i * total // count for i in range(count)]


@dataclass(frozen=True)
class Wanted:
    """The shape that images are turned into: (height, width) and channels, None to keep their own."""

    pair: tuple[int, int] | None
    channels: int | None
    stride: int = 8  # what a size must be a multiple of, where one is proposed

    @staticmethod
    def of(size: Any, channels: Any, stride: int = 8) -> "Wanted":
        """`size` may be the side of a square, or (height, width). Raises UsageError."""
        sides = None if size is None else tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        if sides is not None and len(sides) != 2:
            raise UsageError(f"size {size!r} is not possible; give a side, or (height, width)")
        pair = None if sides is None else (whole("size", sides[0]), whole("size", sides[1]))
        channels = None if channels is None else whole("channels", channels)
        if pair is not None and (min(pair) < 1 or math.prod(pair) > picture.MAX_PIXELS):
            raise UsageError(f"size {pair[0]}x{pair[1]} is not possible; give 1 to {picture.MAX_PIXELS} pixels")
        if channels is not None and channels < 1:
            raise UsageError(f"channels {channels} is not possible; give 1 (grey), 3 (RGB) or another count")
        return Wanted(pair, channels, stride)

    def reading(self, reading: Reading) -> Reading:
        """The same for pictures that will be given this shape."""
        return replace(reading, least=self.pair or reading.least, channels=self.channels or reading.channels)

    def accepts(self, shape: Shape) -> bool:
        return self.pair in (None, shape[1:]) and self.channels in (None, shape[0])

    def fit(self, image: UInt8[Tensor, "c h w"]) -> UInt8[np.ndarray, "c2 h2 w2"]:
        return picture.fit(image.permute(1, 2, 0).numpy(), self.pair, self.channels).transpose(2, 0, 1)

    def made(self, item: Item) -> tuple[Note, ...]:
        """What reading and `fit` do to an image."""
        c, h, w = item.image.shape
        return (*item.made, *picture.changes((h, w, c), self.pair, self.channels))


@dataclass(frozen=True)
class First:
    """The first image that can be read: the others must be of its shape, and have labels if it has one."""

    name: str
    shape: Shape
    labelled: bool


@dataclass(frozen=True, eq=False)
class Decoded:
    """The images that can be read, their labels, (name, reason) of those that cannot, and what was done with the rest.

    `frames` are those after the first of each file.
    """

    images: UInt8[np.ndarray, "n c h w"]
    labels: tuple[int | None, ...]
    bad: tuple[tuple[str, str], ...]
    frames: int = 0
    made: Made = ()


def first_of(source: Source, wanted: Wanted) -> First:
    """DataError if none can be read."""
    bad = []
    for index in range(len(source)):
        try:
            item = source[index]
        except DataError as error:
            bad.append(_bad(source, index, error))
        else:
            c, h, w = wanted.fit(item.image).shape
            return First(source.name(index), (c, h, w), item.label is not None)
    raise _unreadable(bad, len(source), "")


def decode(source: Source, indices: Sequence[int], wanted: Wanted, first: First) -> Decoded:
    """Some images of a source as one array. DataError for one of another shape than the first."""
    images = _room(len(indices), first.shape)
    labels, bad, notes, frames = [], [], list[Note](), 0
    for index in indices:
        try:
            item = source[index]
        except DataError as error:
            bad.append(_bad(source, index, error))
            continue
        image = wanted.fit(item.image)
        if image.shape != first.shape:
            raise _mixed(first.name, first.shape, source.name(index), image.shape, wanted.stride)
        images[len(labels)] = image
        labels.append(item.label)
        notes += wanted.made(item)
        frames += item.frames - 1
    return Decoded(images[: len(labels)], tuple(labels), tuple(bad), frames, tally(notes))


def _bad(source: Source, index: int, error: DataError) -> tuple[str, str]:
    return source.name(index), str(error).removeprefix(f"{source.name(index)}: ")


def refuse_bad(bad: Sequence[tuple[str, str]], total: int, skip_bad: bool) -> None:
    """DataError if something bad, given as (name, reason), may not be left out, or is too much to be listed."""
    most = max(LISTED, total // LEAST_GOOD)
    if len(bad) > most:
        raise _unreadable(bad, total, f"; --skip-bad leaves out {most} at most. `undiffuse data check` lists them all")
    if bad and not skip_bad:
        raise _unreadable(bad, total)
    if len(json.dumps(bad)) > SKIPPED:
        raise _unreadable(bad, total, f"; --skip-bad can list no more than {SKIPPED} bytes of them")


def _unreadable(
    bad: Sequence[tuple[str, str]], total: int, why: str = ", or leave them out with --skip-bad"
) -> DataError:
    more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
    listed = ", ".join(f"{name} ({reason})" for name, reason in bad[:LISTED])
    return DataError(f"{len(bad)} of {total} images cannot be read: {listed}{more}. Remove or repair them{why}")


def _room(count: int, shape: tuple[int, ...]) -> UInt8[np.ndarray, "n c h w"]:
    try:
        return np.empty((count, *shape), np.uint8)
    except (MemoryError, ValueError) as error:
        gigabytes = count * math.prod(shape) / 1e9
        raise MemoryExhausted(
            f"{count} images of {shape[2]}x{shape[1]} need {gigabytes:.1f} GB of memory; give a smaller --size"
        ) from error


def _mixed(first: str, one: tuple[int, ...], second: str, two: tuple[int, ...], stride: int) -> DataError:
    if one[1:] != two[1:]:
        sizes = f"{first} is {one[2]}x{one[1]}, {second} is {two[2]}x{two[1]}"
        side = max(stride, min(*one[1:], *two[1:]) // stride * stride)
        return Mixed(f"images differ in size: {sizes} (width x height). Give one, for example --size {side}")
    found = f"images differ in channels: {first} has {one[0]}, {second} has {two[0]}"
    if {one[0], two[0]} != {1, 3}:
        return DataError(f"{found}. Only grey and RGB are made one; give data of one kind")
    return DataError(f"{found}. Give --set data.channels=1 for grey or --set data.channels=3 for RGB")
