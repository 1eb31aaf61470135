"""Bytes to disk so that no name ever stands for half of them: write beside, sync, rename, sync the folder."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any

from undiffuse import strict
from undiffuse.errors import Corrupt, StorageError, UsageError

Data = bytes | bytearray | Iterable[bytes]  # whole, or in pieces
CHUNK = 2**24  # bytes in one write
CACHE = "UNDIFFUSE_CACHE"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors that less to write, or more room, would mend
SMALL = 2**20  # bytes of JSON that are read; a longer text could take seconds, and much memory, to refuse


def hook(change: str, path: Path, detail: Path | memoryview | None = None) -> None:
    """Called before each change to the disk; `detail` is the target of a rename or the bytes of a write.

    Does nothing: this is where a test puts its fault. All changes are made by the next functions, but for the two of
    the lock file.
    """


def make_folder(path: Path) -> None:
    """With its parents, each of them durable."""
    if not path.is_dir():
        make_folder(path.parent)
        hook("mkdir", path)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def create(path: Path, data: Data) -> None:
    """A new file, durable but for its name; FileExistsError if there is one."""
    hook("create", path)
    with open(path, "xb", buffering=0) as file:
        _write(path, file, data)


def append(path: Path, at: int, data: bytes) -> None:
    """Bytes at that place of a file, behind which it ends; durable. Raises StorageError."""
    with writing(path, len(data)), open(path, "r+b", buffering=0) as file:
        hook("truncate", path)
        file.truncate(at)
        file.seek(at)
        _write(path, file, data)


def _write(path: Path, file: RawIOBase, data: Data) -> None:
    for piece in (data,) if isinstance(data, (bytes, bytearray)) else data:
        rest = memoryview(piece)
        while rest:
            hook("write", path, rest[:CHUNK])
            rest = rest[file.write(rest[:CHUNK]) or 0 :]
    hook("sync", path)
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable. On Windows there is no such call; NTFS journals them."""
    hook("sync", path)
    if sys.platform != "win32":
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that has nothing to sync of a folder
                raise
        finally:
            os.close(folder)


def rename(path: Path, target: Path) -> None:
    hook("rename", path, target)
    path.replace(target)


def link(path: Path, target: Path) -> None:
    """A second name for a file; FileExistsError if it is taken, and OSError on a disk that knows no second names."""
    hook("link", path, target)
    os.link(path, target)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it; a link goes, what it points to stays."""
    if path.is_dir() and not path.is_symlink():
        for child in sorted(path.iterdir()):
            remove(child)
        hook("rmdir", path)
        path.rmdir()
    else:
        hook("unlink", path)
        path.unlink()


def beside(path: Path, kind: str) -> Path:
    """A name in the same folder that no other process chooses: `.tmp-0123456789ab-name`, of a long one the end."""
    return path.with_name(f".{kind}-{os.urandom(6).hex()}-{path.name[-40:]}")


@contextmanager
def writing(path: Path, size: int, temporary: Path | None = None) -> Iterator[None]:
    """Turns an OSError into a StorageError that says how much was needed; on any failure `temporary` is removed."""
    try:
        yield
    except BaseException as error:
        if temporary is not None and os.path.lexists(temporary):
            with suppress(OSError):  # the disk fails twice: the first failure is raised, and the next lock sweeps
                remove(temporary)
        if isinstance(error, OSError):
            raise _storage_error(path, error, size) from error
        raise


def _storage_error(path: Path, error: OSError, size: int) -> StorageError:
    why = f"{path} cannot be written: {error.strerror or error}"
    if error.errno not in FULL:
        return StorageError(f"{why}. Give another place, then run the same again; nothing older was touched")
    try:
        free = f"{shutil.disk_usage(path.parent).free / 1e6:,.3f} MB"
    except OSError:
        free = "an unknown amount"
    return StorageError(
        f"{why}; {size / 1e6:,.3f} MB needed, {free} free. "
        "Free space or give another folder, then run the same again; nothing older was touched"
    )


@contextmanager
def reading(path: Path) -> Iterator[BufferedReader]:
    """An open file; an OSError becomes Corrupt, so that what a disk cannot give is passed over like what it garbled."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise Corrupt(f"{path} cannot be read: {error.strerror}; restore it from a copy") from error


def write_atomic(path: Path, data: Data, size: int = 0) -> None:
    """Makes or replaces a file, and its folder if there is none. Raises StorageError.

    `size` is about that of pieces, in bytes.
    """
    temporary = beside(path, "tmp")
    with writing(path, len(data) if isinstance(data, (bytes, bytearray)) else size, temporary):
        make_folder(path.parent)
        create(temporary, data)
        rename(temporary, path)
        sync_folder(path.parent)


def write_new(path: Path, data: bytes | bytearray) -> None:
    """`write_atomic` of a file that must not be there yet. Raises UsageError if it is, and StorageError."""
    temporary = beside(path, "tmp")
    with writing(path, len(data), temporary):
        make_folder(path.parent)
        create(temporary, data)
        try:
            link(temporary, path)
        except OSError as error:  # FAT and some file systems of networks know no links
            if path.exists():
                raise UsageError(f"{path} is there already; give a new folder, or remove it") from error
            rename(temporary, path)
        else:
            remove(temporary)
        sync_folder(path.parent)


def to_json(value: Any) -> bytes:
    """Indented text; numbers that are not finite, which JSON lacks, become null."""
    data = strict.to_json(value, indent=1).encode() + b"\n"
    assert len(data) <= SMALL, f"{len(data)} bytes of JSON would not be read back"
    return data


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of `to_json`. Raises StorageError."""
    write_atomic(path, to_json(value))


def from_json(path: Path, data: bytes) -> Any:
    """The value of bytes that were read from `path`. Raises Corrupt."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path} is damaged: it is not JSON; restore it from a copy") from error


def read_small(path: Path) -> bytes:
    """A file of at most 1 MiB. Raises Corrupt for any other, a missing one included."""
    with reading(path) as file:
        if os.fstat(file.fileno()).st_size > SMALL:
            raise Corrupt(f"{path} is longer than the {SMALL} bytes that such a file may have; restore it from a copy")
        return file.read()


def read_json(path: Path) -> Any:
    """The value of a JSON file of at most 1 MiB. Raises Corrupt for any other file, a missing one included."""
    return from_json(path, read_small(path))


def cache_folder() -> Path:
    """`$UNDIFFUSE_CACHE`, else `undiffuse` in `$XDG_CACHE_HOME` or `~/.cache`. UsageError where there is no home."""
    if named := os.environ.get(CACHE):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "undiffuse")
    except RuntimeError as error:
        raise UsageError(f"there is no home folder to keep things in; set {CACHE} to a folder") from error
