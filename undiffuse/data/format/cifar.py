"""CIFAR-10 as its authors publish it: the binary version, or the Python one through a reader that runs no code.

The Python version is a pickle. Of what a pickle may name, this reader knows the four names of a NumPy array, and puts
stand-ins of its own in their place; any other name is refused before it is looked up.
"""

import io
import operator
import pickle
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from undiffuse.data.arrange import no_split
from undiffuse.data.format.arrays import array_source
from undiffuse.data.format.tars import first_members, is_tar
from undiffuse.data.passed import beside
from undiffuse.data.picture import Reading
from undiffuse.data.source import Format, Source, Split
from undiffuse.errors import Corrupt, DataError

RECORD = 1 + 3 * 32 * 32
MAX_BYTES = 2**30  # what is longer than this is cut, and so refused
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Cifar10(Format):
    """`cifar-10-binary.tar.gz`, `cifar-10-python.tar.gz`, or either unpacked; the binary version if both are there."""

    @staticmethod
    def match(spec: str) -> int:
        path = Path(spec)
        if path.is_dir():
            return 2 if any((path / f"data_batch_1{ending}").is_file() for ending in (".bin", "")) else 0
        inside = {PurePosixPath(name).name for name in first_members(path)} if is_tar(path) else set()
        return 2 if inside & (_wanted("train") | _wanted("test")) else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        files = _folder(Path(spec), split) if Path(spec).is_dir() else _archive(Path(spec), split)
        if not files and split == "test":
            raise no_split(spec, split)
        images, labels = zip(*(_batch(spec, name, files) for name in BATCHES[split]), strict=True)
        source = array_source(np.concatenate(images), np.concatenate(labels), spec, CLASSES, reading)
        known = [*_wanted("train"), *_wanted("test"), "batches.meta", "batches.meta.txt", "readme.html"]
        return replace(source, passed=beside(Path(spec), known, split == "train")) if Path(spec).is_dir() else source


def _batch(spec: str, name: str, files: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [n, 3, 32, 32] and labels [n] of one file."""
    file, read = (f"{name}.bin", _binary) if f"{name}.bin" in files else (name, _python)
    if file not in files:
        raise DataError(f"{spec} has no {name}.bin or {name}; expected CIFAR-10's five data batches and test batch")
    try:
        pixels, labels = read(files[file])
        if pixels.shape != (len(labels), RECORD - 1) or not len(labels):
            raise DataError(f"pixels {pixels.shape} and labels {labels.shape}; expected [n, 3072] and [n]")
        if labels.min() < 0 or labels.max() > 9:
            raise DataError(f"labels from {labels.min()} to {labels.max()}; expected 0 to 9, so it is damaged")
    except (DataError, Corrupt) as error:
        raise type(error)(f"{spec}: {file}: {error}") from error
    return pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _wanted(split: Split) -> set[str]:
    return {name + ending for name in BATCHES[split] for ending in ("", ".bin")}


def _folder(path: Path, split: Split) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in _wanted(split) if (path / name).is_file()}


def _archive(path: Path, split: Split) -> dict[str, bytes]:
    """The files by their last name, read in memory: nothing is unpacked to disk."""
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                stream = archive.extractfile(member) if member.isfile() and name in _wanted(split) else None
                if stream is not None:
                    found[name] = stream.read(MAX_BYTES)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        why = str(error).partition("\n")[0]  # there is a line for each kind of compression
        raise DataError(f"{path} cannot be read as a tar archive: {why}") from error
    return found


def _binary(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    if len(data) % RECORD:
        raise DataError(f"{len(data)} bytes; expected records of {RECORD}, so it is damaged")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    return records[:, 1:], records[:, 0]


def _python(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        labels = np.array([operator.index(label) for label in batch[b"labels"]], np.int64)
        return batch[b"data"].array(), labels
    except (DataError, Corrupt):
        raise
    except Exception as error:  # on damaged bytes the unpickler raises nearly every type
        raise Corrupt(f"not CIFAR-10's Python version, or damaged ({type(error).__name__})") from error


class _Stub:
    """Stands for `numpy.ndarray`, `numpy.dtype` and what rebuilds them; takes their state and does nothing with it."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The uint8 array of an ndarray's state: (version, shape, dtype, Fortran order, bytes)."""
        _, shape, dtype, fortran, data = self.state
        if dtype.arguments[0] not in (b"u1", "u1"):
            raise DataError(f"pixels of type {dtype.arguments[0]}; expected u1, unsigned bytes")
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class ArrayUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists, dictionaries and NumPy arrays; every other name in the pickle is Corrupt."""

    NAMES = (
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
    )

    def find_class(self, module: str, name: str) -> type[_Stub]:
        if (module, name) not in self.NAMES:
            raise Corrupt(f"the pickle names {module}.{name}, which is refused; expected only NumPy arrays")
        return _Stub
