"""What is in a data set before it is trained on: counts, sizes, a contact sheet, and every file that is bad."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from undiffuse.data.format.packed import PackedSource
from undiffuse.data.pack import WORKERS
from undiffuse.data.passed import Passed, frames, merged
from undiffuse.data.picture import PLAIN, Reading
from undiffuse.data.source import Source, open_raw
from undiffuse.errors import DataError
from undiffuse.machine import log

CELLS = 8  # the contact sheet has this many rows and columns
CELL = 64  # pixels
PART = 256  # images between two signs of progress


@dataclass(frozen=True)
class Bad:
    """An image that cannot be decoded."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Summary:
    """Counts of the readable images, the most frequent first; mean and std are of all values, in [0, 1]."""

    count: int
    sizes: dict[tuple[int, int], int]  # (height, width)
    channels: dict[int, int]
    labels: dict[str, int]
    mean: float
    std: float
    bad: tuple[Bad, ...]
    passed: tuple[Passed, ...]
    sheet: Image.Image


def inspect(source: Source) -> Summary:
    """Decodes everything once. DataError if nothing can be decoded."""
    sizes, channels, labels = Counter[tuple[int, int]](), Counter[int](), Counter[str]()
    values = torch.zeros(256, dtype=torch.int64)
    chosen = set(np.linspace(0, len(source) - 1, CELLS**2).round().astype(int).tolist())
    cells: list[Tensor] = []
    bad, more = [], 0
    for index in range(len(source)):
        try:
            item = source[index]
        except DataError as error:
            bad.append(_bad(source, index, error))
            continue
        c, h, w = item.image.shape
        sizes[h, w] += 1
        channels[c] += 1
        more += item.frames - 1
        if item.label is not None:
            labels[source.classes[item.label] if source.classes else str(item.label)] += 1
        values += item.image.flatten().bincount(minlength=256)
        if index in chosen:
            cells.append(item.image)
    if not sizes:
        raise DataError(f"none of {len(source)} images can be read; the first is {bad[0].path} ({bad[0].reason})")
    mean, std = _moments(values)
    return Summary(
        count=len(source) - len(bad),
        sizes=dict(sizes.most_common()),
        channels=dict(channels.most_common()),
        labels=dict(labels.most_common()),
        mean=mean,
        std=std,
        bad=tuple(bad),
        passed=merged(source.passed, frames(more)),
        sheet=contact_sheet(cells),
    )


@dataclass(frozen=True)
class Checked:
    """How many images there are, those that cannot be decoded, and what was not taken for one."""

    count: int
    bad: tuple[Bad, ...]
    passed: tuple[Passed, ...]


def check(spec: str | Path, split: str = "train", show_progress: bool = False, reading: Reading = PLAIN) -> Checked:
    """Decodes every image of a path or a named set, and lists those that fail. Corrupt for a damaged packed folder."""
    source, bad, more = open_raw(spec, split, reading), list[Bad](), 0
    if isinstance(source, PackedSource):  # each of its bytes is a good pixel, so only the checksums can tell
        source.verify()
        return Checked(len(source), (), source.passed)

    def one(index: int) -> Bad | int:
        try:
            return source[index].frames - 1
        except DataError as error:
            return _bad(source, index, error)

    with ThreadPoolExecutor(WORKERS) as pool, log.progress(len(source), "checking", show_progress) as bar:
        for first in range(0, len(source), PART):
            part = range(first, min(first + PART, len(source)))
            for found in pool.map(one, part):
                if isinstance(found, Bad):
                    bad.append(found)
                else:
                    more += found
            bar.advance(len(part))
    return Checked(len(source), tuple(bad), merged(source.passed, frames(more)))


def contact_sheet(images: list[UInt8[Tensor, "_ _ _"]]) -> Image.Image:
    """Up to 64 images [c, h, w] of any sizes, each whole, on white."""
    rows = -(-len(images) // CELLS)
    sheet = Image.new("RGB", (CELLS * CELL, rows * CELL), "white")
    for index, image in enumerate(images):
        array = image.permute(1, 2, 0).numpy()
        picture = _into_cell(Image.fromarray(array[..., 0] if array.shape[2] < 3 else array[..., :3]))
        row, column = divmod(index, CELLS)
        sheet.paste(picture, (column * CELL + (CELL - picture.width) // 2, row * CELL + (CELL - picture.height) // 2))
    return sheet


def _into_cell(picture: Image.Image) -> Image.Image:
    """Small pictures by whole factors, so that their pixels stay square; large ones reduced."""
    scale = CELL / max(picture.size)
    if scale >= 1:
        return picture.resize((picture.width * int(scale), picture.height * int(scale)), Image.Resampling.NEAREST)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _moments(values: Int[Tensor, "256"]) -> tuple[float, float]:
    level = torch.arange(256, dtype=torch.float64) / 255
    p = values.double() / values.sum()
    mean = (p * level).sum()
    return float(mean), float((p * (level - mean) ** 2).sum().sqrt())


def _bad(source: Source, index: int, error: DataError) -> Bad:
    return Bad(source.name(index), str(error).removeprefix(f"{source.name(index)}: "))
