"""Sets that are already arrays: NumPy's npy and npz, and the IDX files that MNIST made common."""

import gzip
import io
import math
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from undiffuse.data.arrange import no_split
from undiffuse.data.levels import FEW, UNKNOWN, Note, Own, extent, near
from undiffuse.data.listing import HELD_OUT, TRAIN, ending, is_hidden, splits
from undiffuse.data.made import Made, tally
from undiffuse.data.passed import Passed, beside
from undiffuse.data.picture import PLAIN, Axes, Reading
from undiffuse.data.source import ArraySource, Format, Source, Split
from undiffuse.errors import Corrupt, DataError, NoSplit

IMAGE_KEYS = ("images", "x", "arr_0")
LABEL_KEYS = ("labels", "y", "arr_1")
ENDINGS = (".npz", ".npy")
SOME = 4  # channels: of an axis with no more they are likely meant
MAX_CLASSES = 100_000
MAX_BYTES = 2**32
PIECE = 2**24  # bytes of one read


def array_source(
    images: np.ndarray,
    labels: np.ndarray | None,
    where: str,
    classes: tuple[str, ...] | None = None,
    reading: Reading = PLAIN,
) -> ArraySource:
    """A source from NHW, NHWC or NCHW, uint8 or as `reading` says; DataError says which shape or dtype was found."""
    numbered = labels is not None and labels.shape == images.shape[:1]
    images = _channels_first(images, where, reading.axes, numbered)
    if 0 in images.shape[1:]:
        raise DataError(f"{where} has images of shape {images.shape[1:]}; expected at least one pixel")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise DataError(
            f"{where} has labels {labels.dtype} {list(labels.shape)} for {len(images)} images; expected an integer each"
        )
    try:
        images, made, own = _levels(images, reading)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    images = np.ascontiguousarray(images)
    made, pixels = (*made, *_near(images, own)), torch.from_numpy(images)
    if labels is None or not len(labels):
        return ArraySource(pixels, made=made, own=own)
    count = len(classes) if classes else MAX_CLASSES
    if labels.min() < 0 or labels.max() >= count:
        raise DataError(f"{where} has labels from {labels.min()} to {labels.max()}; expected 0 to {count - 1}")
    classes = classes or tuple(str(label) for label in range(int(labels.max()) + 1))
    return ArraySource(pixels, torch.from_numpy(labels.astype(np.int64)), classes, made=made, own=own)


def _channels_first(images: np.ndarray, where: str, axes: Axes | None, numbered: bool = False) -> np.ndarray:
    """[n, c, h, w], by the axes that are given, or the only ones likely; `numbered`: the first is of images."""
    shape = images.shape
    if axes is not None and len(axes) != len(shape):
        raise DataError(f"{where} has shape {shape}, of {len(shape)} axes; data.axes={axes} names {len(axes)}")
    if axes is None and len(shape) not in (3, 4):
        raise DataError(f"{where} has shape {shape}; expected images as [n, h, w], [n, h, w, c] or [n, c, h, w]")
    likely = [axes] if axes is not None else [each for each in _likely(shape) if "n" in each or not numbered]
    if len(likely) > 1:
        ways = " or ".join(f"--set data.axes={each}" for each in likely)
        raise DataError(f"{where} has shape {shape}, which can be read in two ways; say which, {ways}")
    named = likely[0] if "n" in likely[0] else f"n{likely[0]}"
    images = images if "n" in likely[0] else images[None]
    if "c" not in named:
        return images[:, None]
    return images.transpose(0, 3, 1, 2) if named == "nhwc" else images


def _likely(shape: tuple[int, ...]) -> list[Axes]:
    """One reading where only one is likely, else both."""
    if len(shape) == 3:
        a, b, c = shape
        one: list[Axes] = ["hwc"] if 1 < c <= SOME < min(a, b) else ["chw"] if 1 < a <= SOME and a < min(b, c) else []
        return [*one, "nhw"]
    _, a, b, c = shape
    last, first = _is_likely(c, a, b), _is_likely(a, b, c)
    if 0 in shape[1:] or a == b == c == 1:
        return ["nchw"]
    return ["nhwc", "nchw"] if last == first else ["nhwc"] if last else ["nchw"]


def _is_likely(channels: int, height: int, width: int) -> bool:
    """Fewer channels than rows and columns: few, or of a square, or of half as many."""
    least = min(height, width)
    return channels < least and (channels <= SOME or height == width or 2 * channels <= least)


def _levels(images: np.ndarray, reading: Reading) -> tuple[np.ndarray, Made, Own | None]:
    """Values as levels of 0 to 255, what was done, and what they were if they were no such levels."""
    if images.dtype == np.uint8 and reading.range is None:
        return images, (), None
    whole = {np.dtype(bool): (0, 1), np.dtype(np.uint8): (0, 255)}.get(images.dtype)
    pixels, found, notes = reading.to_levels(images, whole)
    low, high = reading.range or (found.least, found.most)
    outside = sum(bool(((image < low) | (image > high)).any()) for image in images) if notes else 0
    made = tuple((what, len(images) if what == UNKNOWN else outside, of) for what, of in notes)
    return pixels, made, found


def _near(images: np.ndarray, own: Own | None) -> Made:
    """How many are nearly black or white."""
    if not len(images):
        return ()
    notes = list[Note]()
    for low, high in zip(*(edge.tolist() for edge in extent(images)), strict=True):
        notes += near(low, high, FEW, (own or Own(low, high, 0.0, "uint8")).span)
    return tally(notes)


def whole(split: Split, where: str) -> None:
    """Refuses the test split of something that is not split."""
    if split == "test":
        raise no_split(where, split)


class Numpy(Format):
    """An npy or npz file, or a folder with train.npz and test.npz."""

    @staticmethod
    def match(spec: str) -> int:
        path = Path(spec)
        return 2 if (ending(spec) in ENDINGS and path.is_file()) or _splits(path) else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        path, near = Path(spec), ()
        if path.is_dir():
            parts = _splits(path)
            if split not in parts:
                raise no_split(spec, split)
            near = beside(path, [part.name for part in parts.values()], split == "train")
            path = parts[split]
        else:
            whole(split, spec)
        arrays = load_arrays(path)
        images = next((key for key in (reading.picture, *IMAGE_KEYS) if key in arrays), None)
        if images is None:
            raise DataError(
                f"{path} has the arrays {', '.join(sorted(arrays))}; expected one named {' or '.join(IMAGE_KEYS)}"
            )
        labels = next((key for key in LABEL_KEYS if key in arrays), None)
        named = arrays.get("classes")
        classes = None if named is None or named.ndim != 1 else tuple(map(_word, named.tolist()))
        found = array_source(arrays[images], None if labels is None else arrays[labels], str(path), classes, reading)
        others = sorted(arrays.keys() - {images, labels, None if classes is None else "classes"})
        return replace(found, passed=(*near, *(Passed(1, f'"{key}" of {path.name}', "array") for key in others)))


def _word(name: Any) -> str:
    return name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)


def _splits(path: Path) -> dict[str, Path]:
    """The files of the two splits in a folder; that of the training split may be alone."""
    files = {file.stem: file for file in _listing(path) if ending(file.name) in ENDINGS and file.is_file()}
    if named := splits(files):
        return {word: files[name] for word, name in named.items()}
    return next(({"train": files[name]} for name in files if name.lower() in TRAIN), {})


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz, or of an npy as `arr_0`. DataError if damaged, Corrupt if it holds Python objects."""
    try:
        with path.open("rb") as file:
            start = file.read(6)
            if start[:1] == b"\x80":
                raise Corrupt(f"{path} is a pickle, which is never executed; expected NumPy's npy or npz")
            if start != b"\x93NUMPY" and start[:4] not in (b"PK\x03\x04", b"PK\x05\x06"):
                raise DataError(f"{path} begins with {start.hex()}; expected NumPy's npy or npz")
            file.seek(0)
            loaded = np.load(file)
            arrays = {"arr_0": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
            return {key: array for key, array in arrays.items() if isinstance(array, np.ndarray)}
    except (Corrupt, DataError):
        raise
    except Exception as error:  # on damaged bytes NumPy's readers raise nearly every type
        if "Object arrays" in str(error):
            raise Corrupt(f"{path} holds Python objects, which are never loaded; expected plain arrays") from error
        raise DataError(f"{path} is damaged: {error or type(error).__name__}") from error


class Idx(Format):
    """An IDX file of unsigned bytes, gzipped or not, or a folder with the four names of MNIST."""

    @staticmethod
    def match(spec: str) -> int:
        path = Path(spec)
        below = any(_is_idx(file) and "images" in file.name.lower() for file in _listing(path))
        return 2 if below or (_is_idx(path) and path.is_file()) else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        path = Path(spec)
        if not path.is_dir():
            whole(split, spec)
            wanted = re.sub(r"images([-.])idx[34]", r"labels\1idx1", path.name.lower())
            labels = [file for file in _listing(path.parent) if file.name.lower() == wanted != path.name.lower()]
            return _pair(path, labels[0] if labels else None, reading)
        words = {file.name: file.name.lower().partition("-")[0] for file in _listing(path) if _is_idx(file)}
        prefix = next((word for word in (TRAIN if split == "train" else HELD_OUT) if word in words.values()), None)
        images = None if prefix is None else _one(path, prefix, "images")
        if prefix is None or images is None:
            shown = prefix or ("train" if split == "train" else "t10k")
            kind = DataError if split == "train" else NoSplit
            raise kind(f"{path} has no file {shown}-images-idx3-ubyte or .gz; expected the four names of MNIST")
        near = beside(path, list(words), split == "train")
        return replace(_pair(images, _one(path, prefix, "labels"), reading), passed=near)


def _listing(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if not is_hidden(file.name)) if path.is_dir() else []


def _is_idx(path: Path) -> bool:
    return re.search(r"idx\d-ubyte(\.gz)?$", path.name, re.IGNORECASE) is not None


def _one(folder: Path, prefix: str, kind: str) -> Path | None:
    found = [f for f in _listing(folder) if _is_idx(f) and f.name.lower().startswith(f"{prefix}-{kind}")]
    return found[0] if found else None


def _pair(images: Path, labels: Path | None, reading: Reading) -> ArraySource:
    values = None if labels is None else read_idx(labels)
    array = read_idx(images)
    if array.ndim == 3 and reading.axes is None:
        reading = replace(reading, axes="nhw")  # as MNIST has them
    return array_source(array, values, str(images), reading=reading)


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file of unsigned bytes: magic 00 00 08 n, n big-endian 32-bit lengths, the values."""
    try:
        with gzip.open(path) if ending(path.name) == ".gz" else path.open("rb") as file:
            return _read_idx(file, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_idx(file: io.BufferedIOBase, path: Path) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4 or magic[:3] != b"\x00\x00\x08" or not 1 <= magic[3] <= 4:
        raise DataError(f"{path} begins with {magic.hex()}; expected 0000080n, an IDX file of unsigned bytes")
    lengths = file.read(4 * magic[3])
    if len(lengths) < 4 * magic[3]:
        raise DataError(f"{path} ends within its header; it is damaged")
    shape = np.frombuffer(lengths, ">u4").tolist()
    size = math.prod(shape)
    values = bytearray()
    # In pieces, because room for what a header only claims would be taken at once.
    while size <= MAX_BYTES and len(values) <= size and (piece := file.read(min(PIECE, size + 1 - len(values)))):
        values += piece
    if len(values) != size:
        raise DataError(f"{path} does not hold the {size} bytes of its shape {shape}; it is damaged")
    return np.frombuffer(values, np.uint8).reshape(shape)
