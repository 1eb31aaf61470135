"""A data set that was decoded once: uint8 images of one shape, in files that are mapped into memory.

A packed folder holds `packed.json`, which is written last, and shards `00000.bin`, `00001.bin`, …: the labels of a
shard (int64 [n], if there are any), then its pixels (uint8 [n, c, h, w]), little-endian and nothing else. `pack.py`
makes it.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from undiffuse.config import parse, plain
from undiffuse.data.format.arrays import whole
from undiffuse.data.levels import Range, said
from undiffuse.data.listing import splits, walk
from undiffuse.data.made import Made
from undiffuse.data.passed import Passed, beside, frames, merged
from undiffuse.data.picture import Reading
from undiffuse.data.source import Format, Item, Shape, Source, Split
from undiffuse.errors import Corrupt, DataError, NoSplit, UsageError
from undiffuse.machine import disk

FORMAT = 1
MANIFEST, PLAN = "packed.json", "packing.json"  # the second is there until the first is
WHOLE = ((0, 255), (0, 65535))  # ranges that files have which say no other
OURS = re.compile(r"lock|packed\.json|packing\.json|\d{5}\.(bin|json)")  # the files of a packed folder
AGAIN = "remove the folder and pack the data again"


@dataclass(frozen=True)
class Shard:
    """One file: how many images it has, and the sha256 of all its bytes."""

    images: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a packed folder says of itself."""

    key: str  # sha256 of what was packed, and how
    source: str  # fingerprint of what was packed
    fingerprint: str  # of the images and labels here: that of the same examples in memory
    shape: Shape
    labelled: bool
    shards: tuple[Shard, ...]
    skipped: tuple[tuple[str, str], ...]  # (name, reason)
    classes: tuple[str, ...] | None = None
    made: Made = ()
    range: Range | None = None  # the values that became 0 and 255, where they were others
    passed: tuple[Passed, ...] = ()  # what was not packed, because it is no picture of the split
    frames: int = 0  # in its files after the first of each
    format: int = FORMAT


@dataclass(frozen=True, eq=False)
class PackedSource(Source):
    """The images of a packed folder. Nothing is read from the disk before it is asked for, and no file is held open."""

    path: Path
    manifest: Manifest
    images: tuple[UInt8[Tensor, "_ c h w"], ...]  # of each shard
    labels: Int[Tensor, "n"] | None
    ends: Int[Tensor, "shards"]  # how many images there are up to the end of each shard
    classes: tuple[str, ...] | None
    skipped: tuple[str, ...]
    passed: tuple[Passed, ...] = ()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Item:
        images, labels = self.gather(torch.tensor([index], dtype=torch.int64, device="cpu"))
        return Item(images[0], None if labels is None else int(labels[0]))

    def gather(self, index: Int[Tensor, "b"]) -> tuple[UInt8[Tensor, "b c h w"], Int[Tensor, "b"] | None]:
        shard = torch.bucketize(index, self.ends, right=True)
        before_end = index - self.ends[shard]  # negative, as Python counts from the end
        # Views of single images: for a batch from many shards, stacking them is the fastest that torch can do.
        views = [self.images[k][i] for k, i in zip(shard.tolist(), before_end.tolist(), strict=True)]
        return torch.stack(views), None if self.labels is None else self.labels[index]

    def every_label(self) -> Int[Tensor, "n"] | None:
        return self.labels

    @property
    def image_shape(self) -> Shape:
        """(channels, height, width)."""
        return self.manifest.shape

    @property
    def made(self) -> Made:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.manifest.made

    @property
    def reasons(self) -> tuple[tuple[str, str], ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.manifest.skipped

    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def verify(self) -> None:
        """Reads every byte and compares it with the manifest. Raises Corrupt, naming the file."""
        for k, shard in enumerate(self.manifest.shards):
            with disk.reading(path := shard_path(self.path, k)) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                raise Corrupt(f"{path} is damaged: its sha256 is not what {MANIFEST} says; {AGAIN}")


class Packed(Format):
    """A packed folder, or a folder with `train` and `test` that are packed folders."""

    @staticmethod
    def match(spec: str) -> int:
        path = Path(spec)
        if not path.is_dir():
            return 0
        return 2 if any(map(_is_begun, (path, *map(path.joinpath, _splits(path).values())))) else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        root = path = Path(spec)
        parts = _splits(root)
        if _is_begun(root):
            whole(split, spec)
        else:
            path = root / parts.get(split, split)
        if not (path / MANIFEST).is_file():
            if (path / PLAN).is_file():
                raise DataError(f"{path} is not packed to its end; run the same `undiffuse data pack` again")
            raise NoSplit(f"{path} is missing; {spec} has no {split} split")
        source = open_packed(path)
        _refuse_range(path, source.manifest.range, reading.range)
        folders = {"."} if path == root else set(parts.values())
        ours = [name for name in walk(root) if str(Path(name).parent) in folders and OURS.fullmatch(Path(name).name)]
        return replace(source, passed=merged(source.passed, beside(root, ours, split == "train")))


def _refuse_range(path: Path, packed: Range | None, asked: Range | None) -> None:
    """DataError for a range that is not the one with which the data was packed."""
    if asked is not None and asked not in ((packed,) if packed else WHOLE):
        was = f"data.range={said(packed)}" if packed else "no data.range"
        raise DataError(f"{path} was packed with {was}; pack the data again with {said(asked)}")


def _is_begun(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (MANIFEST, PLAN))


def _splits(path: Path) -> dict[str, str]:
    """The folders of the two splits that are there; one of them may be alone."""
    names = [each.name for each in path.iterdir() if _is_begun(each)] if path.is_dir() else []
    return splits(names) or {word: name for word in ("train", "test") for name in names if name.lower() == word}


def shard_path(folder: Path, k: int) -> Path:
    return folder / f"{k:05d}.bin"


def open_packed(folder: Path) -> PackedSource:
    """Checks the manifest and the length of every shard; their bytes are checked by `verify`.

    Raises Corrupt, naming the file; UsageError for another format version.
    """
    path = folder / MANIFEST
    fields = disk.read_json(path)
    if not isinstance(fields, dict) or fields.pop("sha256", None) != _digest(fields):
        raise Corrupt(f"{path} is damaged: its sha256 is not the one that it carries; {AGAIN}")
    if fields.get("format") != FORMAT:
        raise UsageError(f"{path} has format {fields.get('format')}, and this undiffuse reads {FORMAT}; {AGAIN}")
    return mapped(folder, parse(Manifest, fields, str(path)))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Makes a packed folder of shards. Raises StorageError."""
    fields = plain(manifest)
    disk.write_json(folder / MANIFEST, fields | {"sha256": _digest(fields)})


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def mapped(folder: Path, manifest: Manifest) -> PackedSource:
    """A source over shards of the manifest's lengths. Raises Corrupt, naming the file that is not."""
    parts = [_map(shard_path(folder, k), shard, manifest) for k, shard in enumerate(manifest.shards)]
    labels = torch.cat([labels for labels, _ in parts]) if manifest.labelled else None
    ends = torch.tensor([shard.images for shard in manifest.shards], dtype=torch.int64, device="cpu").cumsum(0)
    skipped = tuple(name for name, _ in manifest.skipped)
    images = tuple(images for _, images in parts)
    over = merged(manifest.passed, frames(manifest.frames))
    return PackedSource(folder, manifest, images, labels, ends, manifest.classes, skipped, over)


def _map(path: Path, shard: Shard, manifest: Manifest) -> tuple[Int[Tensor, "m"], UInt8[Tensor, "n c h w"]]:
    """Labels, if there are any, and images of one file."""
    head = 8 * shard.images if manifest.labelled else 0
    size = head + shard.images * math.prod(manifest.shape)
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise Corrupt(f"{path} is damaged: {'missing' if found is None else f'{found} bytes'}, not {size}; {AGAIN}")
    # A private mapping: its pages are the system's cache of the file, and the file itself is closed again.
    empty = torch.empty(0, dtype=torch.uint8, device="cpu")
    data = torch.from_file(str(path), False, size, dtype=torch.uint8) if size else empty
    return data[:head].view(torch.int64), data[head:].reshape(shard.images, *manifest.shape)
