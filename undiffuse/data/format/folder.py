"""Pictures as files: a folder, a zip of one, or a single picture.

Everything below with the ending of a picture is read, sorted by name, but hidden files. What else is there is counted.
`arrange.py` says which folders are splits and classes, `labelfile.py` which files say the classes instead.
"""

import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BufferedIOBase, BytesIO
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from undiffuse.data import labelfile, picture
from undiffuse.data.arrange import arrange
from undiffuse.data.format import webdataset
from undiffuse.data.format.arrays import whole
from undiffuse.data.listing import (
    GRID,
    MARK,
    ending,
    inner,
    is_hidden,
    is_picture,
    is_run,
    own_folders,
    printable,
    tree,
)
from undiffuse.data.passed import Passed, kinds, line, linked, split_own
from undiffuse.data.picture import Reading
from undiffuse.data.source import Format, Item, Source, Split
from undiffuse.errors import DataError

try:
    from lzma import LZMAError
except ImportError:  # Python can be built without it, and zipfile then says so
    LZMAError = RuntimeError

# What a file and zipfile raise for bytes that are not as they should be; RuntimeError for what zipfile does not know.
UNREADABLE = (OSError, EOFError, RuntimeError, UnicodeError, zipfile.BadZipFile, zlib.error, struct.error, LZMAError)


@dataclass(frozen=True, eq=False)
class Pictures(Source):
    """Encoded pictures by name, decoded when asked for; sizes and channels may differ."""

    names: tuple[str, ...]
    load: Callable[[str], bytes]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None
    reading: Reading
    passed: tuple[Passed, ...] = ()
    root: Path | None = None  # of files on their own, below which the names are

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        try:
            data = self._bytes(index)
            found = picture.read(data, self.reading)
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error}") from error
        label = None if self.labels is None else self.labels[index]
        pixels = torch.tensor(found.pixels, dtype=torch.uint8, device="cpu").permute(2, 0, 1)
        return Item(pixels, label, picture.frames(data), found.made, found.own)

    def every_label(self) -> Int[Tensor, "n"] | None:
        return None if self.labels is None else torch.tensor(self.labels, dtype=torch.int64, device="cpu")

    def name(self, index: int) -> str:
        return printable(self.names[index])

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for index, name in enumerate(self.names):
            digest.update(hashlib.sha256(os.fsencode(name)).digest())
            digest.update(self._digest(index))
        return digest.hexdigest()

    def stamp(self) -> list[tuple[int, int, int]] | None:
        if self.root is None:
            return None
        try:
            found = [os.stat(self.root / name) for name in self.names]
        except OSError:
            return None
        return [(file.st_size, file.st_mtime_ns, file.st_ctime_ns) for file in found]

    def _digest(self, index: int) -> bytes:
        try:
            return hashlib.sha256(self._bytes(index)).digest()
        except DataError:  # what cannot be read is listed by whoever decodes it, all of it at once
            return b"unreadable"

    def _bytes(self, index: int) -> bytes:
        try:
            return self.load(self.names[index])
        except UNREADABLE as error:
            raise DataError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


class Folder(Format):
    """A folder of pictures, at any depth, or one picture."""

    @staticmethod
    def match(spec: str) -> int:
        path = Path(spec)
        return 1 if path.is_dir() or (path.is_file() and is_picture(path.name)) else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        path = Path(spec)
        if path.is_file():
            whole(split, spec)
            return Pictures((path.name,), lambda name: path.read_bytes(), None, None, reading)
        names, again = tree(path)
        files = Files(names, lambda name: (path / name).read_bytes(), lambda name: (path / name).open("rb"))
        found = pictures(spec, files, split, reading)
        told = linked(again) if split == "train" else ()
        return replace(found, root=path, passed=(*found.passed, *told))


class Zip(Format):
    """A zip of a folder of pictures."""

    @staticmethod
    def match(spec: str) -> int:
        return 2 if ending(spec) == ".zip" and Path(spec).is_file() else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        try:
            archive, length = zipfile.ZipFile(spec), Path(spec).stat().st_size
        except (*UNREADABLE, MemoryError) as error:  # for a directory that is only said to be of gigabytes
            raise DataError(f"{spec} cannot be read as a zip: {str(error) or 'its directory is too long'}") from error

        def load(name: str) -> bytes:
            info = archive.getinfo(own[name])
            if info.file_size > picture.MAX_BYTES:
                raise DataError(f"unpacks to more than {picture.MAX_BYTES} bytes")
            if info.compress_size > length:  # zipfile takes room for all of it at once
                raise DataError(f"is said to have {info.compress_size} bytes in a zip of {length}")
            try:
                return archive.read(info)
            except MemoryError as error:
                if info.compress_type != zipfile.ZIP_LZMA:  # which takes at once what its header asks for
                    raise
                raise DataError("its compression asks for more memory than there is") from error

        def begin(name: str) -> BytesIO:
            with archive.open(own[name]) as file:
                return BytesIO(file.read(picture.HEAD))

        own = {inner(name): name for name in archive.namelist() if not name.endswith(("/", "\\"))}
        return pictures(spec, Files(list(own), load, begin), split, reading)


@dataclass(frozen=True)
class Files:
    """The files of a folder or an archive: their names, and how they are read."""

    names: Sequence[str]  # hidden ones too
    load: Callable[[str], bytes]
    open: Callable[[str], BufferedIOBase]
    are_named: bool = False  # each by the user, so none is hidden


def pictures(spec: str, files: Files, split: Split, reading: Reading) -> Pictures:
    """Those of the split, sorted by name. DataError where there are none."""
    visible = [name for name in files.names if files.are_named or not is_hidden(name)]
    own, visible = split_own(visible, set() if files.are_named else own_folders(files.names))
    if not files.are_named and is_run(visible):
        raise DataError(f"{spec} is a run of undiffuse, and no data; give the pictures that it was trained on")
    found = sorted(name for name in visible if is_picture(name))
    if MARK in files.names and GRID in found:  # samples that the user names as data
        found.remove(GRID)
        own = (*own, Passed(1, f"{GRID} (all samples in one)", "picture"))
    others = [name for name in visible if not is_picture(name)]
    if not found:
        raise DataError(f"{spec} has no images: {_none(len(visible), (*own, *kinds(others, files.open)))}")
    try:
        given = labelfile.find(others, files.load)
    except UNREADABLE as error:
        raise DataError(f"{spec} has a file of labels that cannot be read: {error}") from error
    picked = webdataset.one_each(spec, found, reading.picture)
    found = picked.names
    arranged = arrange(spec, found, split, by_folder=given is None)
    if given is not None:
        arranged = labelfile.relabelled(spec, found, arranged, given)
        others = [name for name in others if name not in given.files]
    passed = (*own, *kinds(others, files.open), *picked.passed, *arranged.passed)
    chosen = tuple(found[i] for i in arranged.chosen)
    return Pictures(chosen, files.load, arranged.labels, arranged.classes, reading, passed)


def _none(count: int, passed: Sequence[Passed]) -> str:
    what = f": {line(passed)}" if passed else ""
    return (
        f"{count} files, none with the ending of a picture (.png, .jpg, .webp …){what}. Give the folder that holds them"
    )
