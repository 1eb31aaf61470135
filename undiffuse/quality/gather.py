"""One pass over a set of images: each batch becomes features once, for all metrics, and is never made again.

Batches are divided among the processes of a run. With a folder each finished batch is a file there, so a stopped pass
goes on where it was.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from undiffuse.machine import dist
from undiffuse.machine.arrayfile import reading_arrays, write_arrays
from undiffuse.machine.tensorfile import refuse_newer
from undiffuse.quality.feature.base import Extractor
from undiffuse.quality.metric.base import Features, refuse_not_finite

FORMAT, IMAGES = 1, "images"

Images = Callable[[Int[Tensor, "b"]], UInt8[Tensor, "b c h w"]]  # those of these numbers
Found = dict[str, Features]  # by the name of the extractor


@dataclass(frozen=True)
class Kept:
    """A folder with a file for each finished batch; those that begin below image `images` hold their images as well."""

    folder: Path
    images: int = 0

    def path(self, first: int) -> Path:
        """The file of the batch that begins with that image."""
        return self.folder / f"part-{first:08d}.npz"

    def write(self, first: int, found: Found, images: UInt8[Tensor, "b c h w"]) -> None:
        """Whole or not at all. Raises StorageError."""
        arrays: dict[str, Any] = {
            f"{name}.{part}": each[part].numpy() for name, each in found.items() for part in each.parts()
        }
        if first < self.images:
            arrays[IMAGES] = images.numpy()
        write_arrays(self.path(first), {"format": np.array(FORMAT)} | arrays)

    def read(self, first: int, rows: int, extractors: Sequence[Extractor]) -> Found | None:
        """The features of a finished batch; None if it is not there, or holds less. Raises Corrupt."""
        path = self.path(first)
        if not path.exists():
            return None
        with reading_arrays(path, "is damaged; delete it, and the same command makes it again") as arrays:
            refuse_newer(path, arrays["format"].item())
            if first < self.images and IMAGES not in arrays.files:
                return None
            found = {each.name: _features(arrays, each) for each in extractors}
        whole = {name: each for name, each in found.items() if each is not None and len(each.pool) == rows}
        return whole if len(whole) == len(found) else None

    def read_images(self, first: int) -> UInt8[Tensor, "b c h w"]:
        """The images of a finished batch."""
        with np.load(self.path(first)) as arrays:
            return torch.from_numpy(arrays[IMAGES])


def _features(arrays: "np.lib.npyio.NpzFile", extractor: Extractor) -> Features | None:
    names = {part: f"{extractor.name}.{part}" for part in extractor.dimensions}
    if not all(name in arrays.files for name in names.values()):
        return None
    found = {part: torch.from_numpy(arrays[name]) for part, name in names.items()}
    if any(rows.shape[1:] != (extractor.dimensions[part],) for part, rows in found.items()):
        return None
    return Features(**found)


def gather(
    images: Images,
    n: int,
    extractors: Sequence[Extractor],
    take: Callable[[str, Features, Int[Tensor, "b"]], None],
    batch: int = 64,
    kept: Kept | None = None,
    tick: Callable[[int], None] | None = None,
    timed: Callable[[float], None] | None = None,
    see: Callable[[UInt8[Tensor, "b c h w"], Int[Tensor, "b"]], None] | None = None,
    seen: int = 0,
) -> None:
    """Gives the features of this process's share of n images to `take(extractor's name, features, numbers)`.

    `timed` is told the seconds of the first batch that is not read from `kept`; `see` is given the images of the
    batches that begin below image `seen`, and their numbers. Raises NotFiniteError, before anything of that batch is
    kept, for features with NaN or infinity in them; if one process does, all do.
    """
    with dist.alike():
        for first in dist.turns(n, batch):
            index = torch.arange(first, min(first + batch, n), dtype=torch.int64, device="cpu")
            pictures, found = None, None if kept is None else kept.read(first, len(index), extractors)
            if found is None:
                began = time.monotonic()
                pictures = images(index)
                found = {each.name: on_cpu(each(pictures)) for each in extractors}
                for features in found.values():
                    for part in features.parts():
                        refuse_not_finite(features[part], index, part)
                if kept is not None:
                    kept.write(first, found, pictures)
                if timed is not None:
                    timed(time.monotonic() - began)
                    timed = None
            if see is not None and first < seen:
                if pictures is None:
                    pictures = kept.read_images(first) if kept and first < kept.images else images(index)
                see(pictures, index)
            for name, features in found.items():
                take(name, features, index)
            if tick is not None:
                tick(len(index))


def on_cpu(features: Features) -> Features:
    """The same features in the memory of the processor."""
    return Features(**{part: features[part].to("cpu", torch.float32) for part in features.parts()})


def exchange(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The tensors of every process, in their order; the same in each."""
    if dist.size() == 1:
        return [tensors]
    return [tuple(_sent(tensor, source) for tensor in tensors) for source in range(dist.size())]


def _sent(tensor: Tensor, source: int) -> Tensor:
    """That of one process, of whatever shape. All processes have one of as many dimensions."""
    shape = torch.tensor(tensor.shape, dtype=torch.int64, device="cpu")
    dist.share([shape], source)
    sent = (
        tensor.contiguous() if dist.rank() == source else torch.empty(shape.tolist(), dtype=tensor.dtype, device="cpu")
    )
    if sent.numel():
        dist.share([sent], source)
    return sent
