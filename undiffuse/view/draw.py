"""Samples on their way to files, batch by batch: memory stays flat, and what was ended goes on where it was."""

import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from undiffuse.config import plain
from undiffuse.data.listing import GRID, MARK, is_picture, is_run
from undiffuse.errors import Corrupt, Locked, StorageError, UsageError
from undiffuse.figure import enlarged, grid, picture, png
from undiffuse.key import Key, Seed
from undiffuse.machine import disk, dist
from undiffuse.machine.lock import try_lock
from undiffuse.machine.store import LEFTOVER
from undiffuse.measure import claim
from undiffuse.measure.sets import said_of_drawing
from undiffuse.model.classes import Told
from undiffuse.model.model import Model, share_of
from undiffuse.strict import to_json

SHOWN, PIXELS = 1024, 1 << 24  # images that the grid has room for, and pixels


class Places(NamedTuple):
    """Where samples go: a folder of PNGs with a grid, and one uint8 array `arr_0` [n, h, w, c]; either, or both."""

    folder: Path | None = None
    npz: Path | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """n images of a model: what `Model.sample` takes, and the times and the labels that it makes of that."""

    model: Model
    n: int
    times: Tensor
    solver: Any
    told: Told
    seed: Seed = 0
    batch: int = 64

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What makes the images so: with as many of them, and in the same batches, they are the same to the bit."""
        found = said_of_drawing(self.model, self.times, self.solver, self.seed, self.told.words, counted=False)
        model = claim.digest([self.model.digest(), plain(self.model.config)])
        times = {"times": claim.digest(self.times.tolist())}  # a grid of the same name may be fitted anew
        return claim.asked(times | found | {"images": self.n, "precision": self.model.precision, "model": model})

    @property
    def turns(self) -> int:
        """Steps of a batch that this process takes."""
        return self.model.sampling_steps(self.n, self.times, self.batch)

    def names(self) -> list[str]:
        """Of the PNGs: the numbers of the images, or their seeds."""
        numbers = list(map(int, self.seed)) if isinstance(self.seed, Sequence) else range(self.n)
        digits = max(4, len(str(max(numbers))))
        return [f"{number:0{digits}}.png" for number in numbers]


def draw(
    job: Job, places: Places, columns: int | None = None, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Makes the files that are missing, and returns them by kind.

    Each PNG is whole or not there. The folder keeps what was asked in `.undiffuse`, by which no reader takes it for
    data; the array grows in `NAME.npz.partial`. Raises UsageError for a folder with samples of another command or other
    pictures, Locked for one that another process fills, and StorageError, which says how many pictures are written.
    """
    keys = Key.each(job.seed, job.n).fold("sample")
    with ExitStack() as stack:
        with dist.alike():
            files = _opened(job, places, stack) if dist.is_first() else []
        wanted = torch.zeros(job.n, dtype=torch.uint8, device="cpu")
        for each in files:
            wanted |= each.missing()
        dist.share([wanted])
        batch = share_of(job.n, job.batch)
        starts = [i for i in range(0, job.n, batch) if wanted[i : i + batch].any()]
        if progress is not None:  # what is there already
            progress((len(range(0, job.n, batch)) - len(starts)) * (len(job.times) - 1) // dist.size())
        drawn = job.model.draw(keys, job.times, job.solver, job.told.conditioning, batch, progress, starts)
        for first, images in drawn:
            with dist.alike():
                for each in files:
                    each.put(first, images)
        with dist.alike():
            return {kind: path for each in files for kind, path in each.end(columns).items()}


def _opened(job: Job, places: Places, stack: ExitStack) -> "list[Pictures | Array]":
    files: list[Pictures | Array] = []
    if places.folder is not None:
        files.append(stack.enter_context(_pictures(job, places.folder)))
    if places.npz is not None:
        files.append(stack.enter_context(_array(job, places.npz)))
    return files


@dataclass(frozen=True, eq=False)
class Pictures:
    """A PNG an image; `figure.picture` says how one holds the channels."""

    folder: Path
    names: list[str]

    def missing(self) -> UInt8[Tensor, "n"]:
        there = {path.name for path in self.folder.iterdir()}
        return torch.tensor([name not in there for name in self.names], dtype=torch.uint8, device="cpu")

    def put(self, first: int, images: UInt8[Tensor, "b c h w"]) -> None:
        for name, image in zip(self.names[first:], images, strict=False):
            if (self.folder / name).exists():
                continue
            try:
                disk.write_new(self.folder / name, png(picture(image)))
            except StorageError as error:
                there = len(self.names) - int(self.missing().sum())
                raise StorageError(f"{error}. {there} of {len(self.names)} pictures are written") from error

    def end(self, columns: int | None) -> dict[str, Path]:
        """The grid is of the files, which may be of several runs of the command."""
        if not (self.folder / GRID).exists():
            first = _read(self.folder / self.names[0])
            count = max(1, min(SHOWN, PIXELS // (first.shape[-2] * first.shape[-1])))
            shown = torch.stack([_read(self.folder / name) for name in self.names[:count]])
            sheet = grid(shown, columns or math.ceil(len(shown) ** 0.5), enlarged(shown.shape[-1]))
            disk.write_new(self.folder / GRID, png(sheet, drawn=True))
        return {"folder": self.folder, "grid": self.folder / GRID}


def _read(path: Path) -> UInt8[Tensor, "c h w"]:
    try:
        with Image.open(path) as found:
            values = torch.from_numpy(np.array(found))
    except (OSError, ValueError, SyntaxError) as error:
        raise Corrupt(f"{path} is damaged: {error}; remove it, and the same command makes it again") from error
    return values.permute(2, 0, 1) if values.ndim == 3 else values[None]


@contextmanager
def _pictures(job: Job, folder: Path) -> Iterator[Pictures]:
    refuse(folder)
    path, said = folder / MARK, disk.to_json(job.asked)
    with _claimed(path, said, lambda: any(map(is_picture, os.listdir(folder)))), _locked(path, folder):
        if not (folder / MARK).stat().st_size:  # that of a demonstration
            raise UsageError(f"{folder} holds samples already; give a new folder, or remove it")
        claim.check(folder, job.asked, MARK, "samples of another command")
        with disk.writing(folder, 0):
            for path in sorted(folder.iterdir()):
                if LEFTOVER.fullmatch(path.name):
                    disk.remove(path)
        yield Pictures(folder, job.names())


@contextmanager
def _claimed(path: Path, said: bytes, is_used: Callable[[], bool]) -> Iterator[None]:
    """The file says what is asked, unless it is there already; what ends before anything is drawn leaves none."""
    mine, new = False, not path.parent.exists()
    with suppress(UsageError):  # another process was faster; what it asks is compared then
        if not path.exists():
            disk.write_new(path, said)
            mine = True
    try:
        yield
    except BaseException:
        if mine and not is_used():
            disk.remove(path)
            if new and not os.listdir(path.parent):
                disk.remove(path.parent)
        raise


@contextmanager
def _locked(path: Path, what: Path) -> Iterator[BinaryIO]:
    with disk.writing(path, 0):
        file = open(path, "rb")
    with file:
        if not try_lock(file.fileno()):
            raise Locked(f"{what} is being written by another process; wait for its end, or give another place")
        yield file


def mark(folder: Path) -> None:
    """Leaves a mark by which no reader of data takes what is in the folder for data."""
    if not (folder / MARK).exists():
        disk.write_new(folder / MARK, b"")


def refuse(folder: Path) -> None:
    """UsageError for a file, or a folder with pictures that are not ours: samples beside them would mix with them."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give the name of a folder")
    if not folder.exists() and is_picture(folder.name):
        raise UsageError(f"{folder} is the name of a picture, and samples are many; give the name of a folder")
    if (folder / MARK).exists():
        return
    if folder.is_dir() and is_run(os.listdir(folder)):
        raise UsageError(f"{folder} holds a run; give a new folder for samples")
    other = next((path.name for path in sorted(folder.glob("*")) if is_picture(path.name)), None)
    if other is not None:
        raise UsageError(f"{folder} holds other pictures ({other}), which samples would mix with; give a new folder")


@dataclass(frozen=True, eq=False)
class Array:
    """Rows [h, w, c] one after the other behind a line of JSON that says what was asked, until all are there."""

    path: Path
    job: Job
    head: bytes
    batch: int  # of the command that began it: so many rows at most are written before they are synced

    @property
    def partial(self) -> Path:
        return partial_of(self.path)

    @property
    def _row(self) -> int:
        return math.prod(self.job.model.image_shape)

    def done(self) -> int:
        """How many rows are surely on the disk: what was written last may not be."""
        rows = (self.partial.stat().st_size - len(self.head)) // self._row
        return max(0, rows - self.batch)

    def missing(self) -> UInt8[Tensor, "n"]:
        return (torch.arange(self.job.n, dtype=torch.int64, device="cpu") >= self.done()).to(torch.uint8)

    def put(self, first: int, images: UInt8[Tensor, "b c h w"]) -> None:
        if first + len(images) <= self.done():
            return
        for part in images.permute(0, 2, 3, 1).split(self.batch):
            disk.append(self.partial, len(self.head) + first * self._row, part.contiguous().numpy().tobytes())
            first += len(part)

    def end(self, columns: int | None) -> dict[str, Path]:
        c, h, w = self.job.model.image_shape
        values = np.memmap(self.partial, np.uint8, "r", len(self.head), (self.job.n, h, w, c))
        disk.write_atomic(self.path, _zipped(values, self.job.batch), values.nbytes)
        with disk.writing(self.partial, 0):
            disk.remove(self.partial)
        return {"npz": self.path}


def partial_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


@contextmanager
def _array(job: Job, path: Path) -> Iterator[Array]:
    partial, batch = partial_of(path), share_of(job.n, job.batch)
    said = to_json(job.asked | {"batch": batch}).encode() + b"\n"
    with _claimed(partial, said, lambda: partial.stat().st_size > len(said)), _locked(partial, path) as file:
        head = file.readline(disk.SMALL)
        before = disk.from_json(partial, head)
        if not isinstance(before, dict) or {**before, "batch": 0} != json.loads(to_json(job.asked)) | {"batch": 0}:
            raise UsageError(f"{partial} is of another command; remove it, or give another --npz")
        yield Array(path, job, head, before["batch"])


def _zipped(values: np.ndarray, batch: int) -> Iterator[bytes]:
    """The bytes of an .npz with one array, in pieces."""
    out = _Pieces()
    with zipfile.ZipFile(out, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        for i in range(0, len(values), batch):
            file.write(values[i : i + batch].tobytes())
            yield out.taken()
    yield out.taken()


class _Pieces(io.RawIOBase):
    """What is written to it, until it is taken; it cannot go back, so nothing has to be kept."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def taken(self) -> bytes:
        found, self._pieces = b"".join(self._pieces), []
        return found
