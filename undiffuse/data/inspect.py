"""What is in a data set before it is trained on: counts, sizes, a contact sheet, and every file that is bad."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from undiffuse import figure
from undiffuse.data import made as making
from undiffuse.data import remark
from undiffuse.data.format.packed import PackedSource
from undiffuse.data.levels import UNKNOWN, Note, Own, combined, unsaid
from undiffuse.data.made import Made, summed, tally
from undiffuse.data.pack import WORKERS
from undiffuse.data.passed import Passed, frames, merged
from undiffuse.data.picture import PLAIN, Reading
from undiffuse.data.source import Item, Source, open_raw
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
    """Counts of the readable images, the most frequent first; mean and std are of all values, in [0, 1].

    `values` are those of the files, in their own units; `made` is what became of them on the way to 0 … 255, and
    `wrong` one line about what looks wrong with that, empty if nothing does.
    """

    count: int
    sizes: dict[tuple[int, int], int]  # (height, width)
    channels: dict[int, int]
    labels: dict[str, int]
    mean: float
    std: float
    values: Own
    made: Made
    wrong: str
    bad: tuple[Bad, ...]
    passed: tuple[Passed, ...]
    sheet: Image.Image


def inspect(source: Source, reading: Reading = PLAIN) -> Summary:
    """Decodes everything once. DataError if nothing can be decoded. `reading` is what the source was opened with."""
    sizes, channels, labels = Counter[tuple[int, int]](), Counter[int](), Counter[str]()
    values = torch.zeros(256, dtype=torch.int64, device="cpu")
    chosen = set(np.linspace(0, len(source) - 1, CELLS**2).round().astype(int).tolist())
    cells: list[Tensor] = []
    owns, notes = list[tuple[Own, int]](), list[Note]()
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
        notes += item.made
        if item.own is not None:
            owns.append((item.own, item.image.numel()))
        if index in chosen:
            cells.append(item.image)
    if not sizes:
        raise DataError(f"none of {len(source)} images can be read; the first is {bad[0].path} ({bad[0].reason})")
    mean, std = _moments(values)
    count = len(source) - len(bad)
    own = source.own or _own(values, owns, count, mean)
    made = summed(source.made, tally(notes))
    return Summary(
        count=count,
        sizes=dict(sizes.most_common()),
        channels=dict(channels.most_common()),
        labels=dict(labels.most_common()),
        mean=mean,
        std=std,
        values=own,
        made=tuple(each for each in making.done(made) if each[0] != UNKNOWN),
        wrong=_wrong(source, own, made, count, reading),
        bad=tuple(bad),
        passed=merged(source.passed, frames(more)),
        sheet=contact_sheet(cells),
    )


def _own(values: Int[Tensor, "256"], owns: list[tuple[Own, int]], count: int, mean: float) -> Own:
    """Of the files where all are known, else of the levels that they became."""
    found = combined(owns)
    if found is not None and len(owns) == count:
        return found
    levels = values.nonzero().flatten()
    return Own(int(levels[0]), int(levels[-1]), 255 * mean, "uint8")


def _wrong(source: Source, own: Own, made: Made, count: int, reading: Reading) -> str:
    """What `train` would say of them."""
    if reading.range is not None:
        return ""
    if making.count(made, UNKNOWN):
        return unsaid(own)
    found = remark.judge(source, made, count, reading)
    return found.line if found else ""


@dataclass(frozen=True)
class Checked:
    """How many images there are, those that cannot be decoded, what was not taken for one, and what looks wrong."""

    count: int
    bad: tuple[Bad, ...]
    passed: tuple[Passed, ...]
    wrong: str = ""
    refused: bool = False  # by `train`, because of what looks wrong


def check(spec: str | Path, split: str = "train", show_progress: bool = False, reading: Reading = PLAIN) -> Checked:
    """Decodes every image of a path or a named set, and lists those that fail. Corrupt for a damaged packed folder."""
    source, bad, notes = open_raw(spec, split, replace(reading, least=(1, 1))), list[Bad](), list[Note]()
    if isinstance(source, PackedSource):  # each of its bytes is a good pixel, so only the checksums can tell
        source.verify()
        return _checked(source, (), source.passed, source.made, reading)
    more = 0

    def one(index: int) -> Bad | Item:
        try:
            item = source[index]
        except DataError as error:
            return _bad(source, index, error)
        return replace(item, image=item.image[:, :0])  # which is not kept

    with ThreadPoolExecutor(WORKERS) as pool, log.progress(len(source), "checking", show_progress) as bar:
        for first in range(0, len(source), PART):
            part = range(first, min(first + PART, len(source)))
            for found in pool.map(one, part):
                if isinstance(found, Bad):
                    bad.append(found)
                else:
                    notes += found.made
                    more += found.frames - 1
            bar.advance(len(part))
    passed, made = merged(source.passed, frames(more)), summed(source.made, tally(notes))
    return _checked(source, tuple(bad), passed, made, reading)


def _checked(source: Source, bad: tuple[Bad, ...], passed: tuple[Passed, ...], made: Made, reading: Reading) -> Checked:
    looks = None if reading.range else remark.judge(source, made, len(source) - len(bad), reading)
    line, refused = looks or ("", False)
    return Checked(len(source), bad, passed, line, refused)


def contact_sheet(images: list[UInt8[Tensor, "_ _ _"]]) -> Image.Image:
    """Up to 64 images [c, h, w] of any sizes, each whole, on white."""
    rows = -(-len(images) // CELLS)
    sheet = Image.new("RGB", (CELLS * CELL, rows * CELL), "white")
    for index, image in enumerate(images):
        picture = _into_cell(figure.picture(image)).convert("RGBA")
        row, column = divmod(index, CELLS)
        place = (column * CELL + (CELL - picture.width) // 2, row * CELL + (CELL - picture.height) // 2)
        sheet.paste(picture, place, picture)
    return sheet


def _into_cell(picture: Image.Image) -> Image.Image:
    """Small pictures by whole factors, so that their pixels stay square; large ones reduced."""
    scale = CELL / max(picture.size)
    if scale >= 1:
        return picture.resize((picture.width * int(scale), picture.height * int(scale)), Image.Resampling.NEAREST)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _moments(values: Int[Tensor, "256"]) -> tuple[float, float]:
    level = torch.arange(256, dtype=torch.float64, device="cpu") / 255
    p = values.double() / values.sum()
    mean = (p * level).sum()
    return float(mean), float((p * (level - mean) ** 2).sum().sqrt())


def _bad(source: Source, index: int, error: DataError) -> Bad:
    return Bad(source.name(index), str(error).removeprefix(f"{source.name(index)}: "))
