"""Pictures as files: a folder, a zip of one, or a single picture.

Everything below is read, sorted by name; hidden files and files without the ending of a picture are passed over. The
folders below the common one are the classes, or `train` and `test` (also `val`, `valid`, `validation`) with the classes
inside them.
"""

import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch
from jaxtyping import Int
from torch import Tensor

from undiffuse.data import picture
from undiffuse.data.format.arrays import whole
from undiffuse.data.picture import Reading
from undiffuse.data.source import HELD_OUT, Format, Item, Source, Split, split_name
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
    root: Path | None = None  # of files on their own, below which the names are

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        try:
            image = picture.decode(self._bytes(index), self.reading)
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error}") from error
        label = None if self.labels is None else self.labels[index]
        return Item(torch.tensor(image).permute(2, 0, 1), label)

    def every_label(self) -> Int[Tensor, "n"] | None:
        return None if self.labels is None else torch.tensor(self.labels, dtype=torch.int64)

    def name(self, index: int) -> str:
        # A file name need not be UTF-8, but what is printed must be.
        return os.fsencode(self.names[index]).decode("utf-8", "backslashreplace")

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
        return 1 if path.is_dir() or (path.is_file() and path.suffix.lower() in picture.suffixes()) else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        path = Path(spec)
        if path.is_file():
            whole(split, spec)
            return Pictures((path.name,), lambda name: path.read_bytes(), None, None, reading)
        found = pictures(spec, walk(path), lambda name: (path / name).read_bytes(), split, reading)
        return replace(found, root=path)


class Zip(Format):
    """A zip of a folder of pictures."""

    @staticmethod
    def match(spec: str) -> int:
        return 2 if Path(spec).suffix.lower() == ".zip" and Path(spec).is_file() else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        try:
            archive, length = zipfile.ZipFile(spec), Path(spec).stat().st_size
        except (*UNREADABLE, MemoryError) as error:  # for a directory that is only said to be of gigabytes
            raise DataError(f"{spec} cannot be read as a zip: {str(error) or 'its directory is too long'}") from error

        def load(name: str) -> bytes:
            info = archive.getinfo(name)
            if info.file_size > picture.MAX_BYTES:
                raise DataError(f"unpacks to more than {picture.MAX_BYTES} bytes")
            if info.compress_size > length:  # zipfile takes room for all of it at once
                raise DataError(f"is said to have {info.compress_size} bytes in a zip of {length}")
            try:
                return archive.read(name)
            except MemoryError as error:
                if info.compress_type != zipfile.ZIP_LZMA:  # which takes at once what its header asks for
                    raise
                raise DataError("its compression asks for more memory than there is") from error

        names = [name for name in archive.namelist() if not name.endswith("/")]
        return pictures(spec, names, load, split, reading)


def walk(root: Path) -> list[str]:
    """Every file below, links followed; each real folder once, so a loop of links ends."""
    seen: set[str] = set()
    names = []
    for folder, below, files in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        below[:] = sorted(name for name in below if os.path.realpath(os.path.join(folder, name)) not in seen)
        names += [PurePosixPath(Path(folder, name).relative_to(root)).as_posix() for name in files]
    return names


def pictures(spec: str, names: list[str], load: Callable[[str], bytes], split: Split, reading: Reading) -> Pictures:
    known = picture.suffixes()
    visible = [n for n in names if not any(part.startswith((".", "__MACOSX")) for part in n.split("/"))]
    found = sorted(name for name in visible if PurePosixPath(name).suffix.lower() in known)
    if not found:
        raise DataError(
            f"{spec} has no images: {len(names)} files, none with the ending of a picture (.png, .jpg, .webp …). "
            "Give the folder that holds them"
        )
    parts = _below_common([tuple(name.split("/")[:-1]) for name in found])
    if named := split_name({folders[0] for folders in parts if folders}, split):
        classes = _classes([folders[1:] for folders in parts if folders and folders[0] in ("train", *HELD_OUT)])
        chosen = [i for i, folders in enumerate(parts) if folders[:1] == (named,)]
        found, parts = [found[i] for i in chosen], [parts[i][1:] for i in chosen]
    else:
        whole(split, spec)
        classes = _classes(parts)
    numbers = {name: number for number, name in enumerate(classes or ())}
    labels = None if classes is None else tuple(numbers[folders[0]] for folders in parts)
    return Pictures(tuple(found), load, labels, classes, reading)


def _below_common(folders: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    depth = 0
    while len({path[: depth + 1] for path in folders}) == 1 and len(folders[0]) > depth:
        depth += 1
    return [path[depth:] for path in folders]


def _classes(folders: list[tuple[str, ...]]) -> tuple[str, ...] | None:
    """The first folder of each picture, if every picture is in one and there are two or more."""
    names = {path[:1] for path in folders}
    return tuple(sorted(name for (name,) in names)) if () not in names and len(names) > 1 else None
