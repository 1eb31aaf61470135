"""A coded file as bytes: docs/codec-format.md in code. It knows no network, and raises Corrupt alone.

    magic | version and flags | id of the plan | steps | what the flags say | layers … | lossless ends | CRC-32

All lengths follow from the header, the scales and the plan, so that a file which was cut off is read as far as it goes.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from undiffuse.codec.plan import DELTA_BITS, LEAST, SCALES, Plan
from undiffuse.errors import Corrupt

MAGIC, VERSION = b"\xfdU", 1
SHORTEST = 8  # bytes of a header
ARCHIVE, SIZED, SEEDED, LABELLED, LOSSLESS = 1, 2, 4, 8, 16  # flags
MOST_IMAGES, MOST_GROUP, MOST_SIDE, MOST_VALUES = 1 << 12, 64, 1 << 14, 1 << 26
MOST_SEED, MOST_CLASS = (1 << 32) - 1, 1 << 20
SMALL = 1 << 18  # values of a file of which any first part is read: a few bytes can claim any size
Bits = UInt8[np.ndarray, "_"]
Status = Literal["complete", "partial", "damaged"]


@dataclass(frozen=True)
class Header:
    """What stands before the layers. `size` is (height, width) where it is not the model's own."""

    ident: bytes
    steps: int
    count: int = 1
    group: int = 1
    size: tuple[int, int] | None = None
    seed: int = 0
    label: int | None = None
    lossless: bool = False

    def pack(self) -> bytes:
        archive = (self.count, self.group) != (1, 1)
        parts = [(ARCHIVE, archive), (SIZED, self.size), (SEEDED, self.seed), (LABELLED, self.label is not None)]
        parts.append((LOSSLESS, self.lossless))
        flags = sum(flag for flag, there in parts if there)
        numbers = [self.count, self.group] if archive else []
        numbers += [*(self.size or ()), *([self.seed] if self.seed else [])]
        numbers += [] if self.label is None else [self.label]
        return MAGIC + bytes([VERSION << 5 | flags]) + self.ident + bytes([self.steps]) + b"".join(map(varint, numbers))

    def groups(self) -> list[range]:
        """The images of each."""
        return [range(i, min(i + self.group, self.count)) for i in range(0, self.count, self.group)]


@dataclass
class Group:
    """The bits of some images that share their paths: a row of scales for each layer, and the path of each step.

    Of a file that was cut off the last path may be short.
    """

    scales: list[list[int]] = field(default_factory=list)
    paths: list[Bits] = field(default_factory=list)


@dataclass(frozen=True)
class Parsed:
    """A file, read as far as it is good: so many `layers` of each group are whole; `ends` are there if all are."""

    header: Header
    groups: list[Group]
    status: Status
    layers: list[int]
    ends: list[bytes] = field(default_factory=list)
    why: str = ""


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the last byte is below 128."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def take_varint(data: bytes, place: int) -> tuple[int, int] | None:
    """The number there and where it ends; None where it is cut off, or longer than any that is written."""
    found = shift = 0
    while place < len(data) and shift <= 28:
        found |= (data[place] & 127) << shift
        place, shift = place + 1, shift + 7
        if data[place - 1] < 128:
            return found, place
    return None


@cache
def _crc8_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte << 1 ^ (0x107 if byte & 128 else 0)
        table.append(byte)
    return tuple(table)


def crc8(data: bytes) -> int:
    """x⁸ + x² + x + 1, from 0, the highest bit first (CRC-8/SMBUS)."""
    crc, table = 0, _crc8_table()
    for byte in data:
        crc = table[crc ^ byte]
    return crc


def number_bits(number: int, count: int) -> Bits:
    """The highest first."""
    return (number >> np.arange(count - 1, -1, -1) & 1).astype(np.uint8)


def bits_number(bits: Bits) -> int:
    return int("".join(map(str, bits.tolist())) or "0", 2)


def parse_header(data: bytes) -> tuple[Header, int]:
    """The header and its length. Raises Corrupt."""
    if data[:2] != MAGIC:
        raise Corrupt("this is no coded image: it does not begin as one; files are made by `undiffuse encode`")
    if len(data) < SHORTEST:
        raise Corrupt(
            f"the file is cut off in its header, of {SHORTEST} bytes or more: {len(data)} are there; restore it"
        )
    version, flags = data[2] >> 5, data[2] & 31
    if version != VERSION:
        raise Corrupt(f"the file has format {version}, and this undiffuse reads {VERSION}; upgrade undiffuse")
    place = 8

    def number(least: int, most: int, what: str) -> int:
        nonlocal place
        taken = take_varint(data, place)
        if taken is None:
            raise Corrupt(f"the file is cut off or damaged in its header, where {what} stands")
        found, place = taken
        if not least <= found <= most:
            raise Corrupt(
                f"the file is damaged: its header says that {what} is {found}, and {least} to {most} are possible"
            )
        return found

    count = number(1, MOST_IMAGES, "the number of images") if flags & ARCHIVE else 1
    group = number(1, MOST_GROUP, "the size of a group") if flags & ARCHIVE else 1
    size = (number(1, MOST_SIDE, "the height"), number(1, MOST_SIDE, "the width")) if flags & SIZED else None
    seed = number(1, MOST_SEED, "the seed") if flags & SEEDED else 0
    label = number(0, MOST_CLASS, "the class") if flags & LABELLED else None
    return Header(data[3:7], data[7], count, group, size, seed, label, bool(flags & LOSSLESS)), place


def units(header: Header, plan: Plan) -> Iterator[tuple[int, int, range, range]]:
    """(layer, group, its images, its steps) in the order of the file: any prefix holds all images at lower quality."""
    end = 0
    for layer, size in enumerate(plan.layers):
        steps = range(end, min(end + size, header.steps))
        end += size
        for number, images in enumerate(header.groups() if steps else []):
            yield layer, number, images, steps


Shape = tuple[int, int, int]


def canvas(size: tuple[int, int] | None, own: Shape) -> Shape:
    """(channels, height, width) of what is coded: an image, but no smaller than those of the model."""
    c, h, w = own
    return own if size is None else (c, max(h, size[0]), max(w, size[1]))


def pack(header: Header, groups: Sequence[Group], plan: Plan, ends: Sequence[bytes] = ()) -> bytes:
    """The whole file; `ends` has what makes each group lossless."""
    head, parts = header.pack(), list[Bits]()
    for layer, number, _, steps in units(header, plan):
        group, said = groups[number], list[Bits]()
        if layer:
            pairs = zip(group.scales[layer - 1], group.scales[layer], strict=True)
            said += [number_bits(now - before - LEAST, DELTA_BITS) for before, now in pairs]
        unit = np.concatenate([*said, *(group.paths[step] for step in steps)])
        parts += [unit, number_bits(crc8(head + np.packbits(unit).tobytes()), 8)]
    body = head + np.packbits(np.concatenate(parts)).tobytes()
    body += b"".join(varint(len(end)) + end for end in ends)
    return body + zlib.crc32(body).to_bytes(4, "big")


def parse(data: bytes, plan: Plan, own: Shape) -> Parsed:
    """What a file says, as far as it is whole and good; `own` is the shape of the model's images.

    Raises Corrupt where its first layer is damaged, or where a large file is cut off in it.
    """
    header, place = parse_header(data)
    if header.ident != plan.ident:
        raise Corrupt(
            f"the file was made with other tables or another model ({header.ident.hex()}) than this one "
            f"({plan.ident.hex()}); give the model that it was made with"
        )
    if not 1 <= header.steps <= plan.steps:
        raise Corrupt(f"the file is damaged: it says {header.steps} steps, and the plan has {plan.steps}")
    values = prod(canvas(header.size, own))
    if values * header.count > MOST_VALUES:
        raise Corrupt(f"the file says {header.count} images of {values} values, which are more than {MOST_VALUES}")
    bits, found = np.unpackbits(np.frombuffer(data, np.uint8, offset=place)), _Reader(header, plan, values)
    for unit in units(header, plan):
        if not found.take(unit, bits, data[:place]):
            break
    whole = not found.why
    ends, end = _ends(data, place + -(-found.used // 8), len(found.groups) if header.lossless and whole else 0)
    if whole and end is not None and len(data) > end:
        why = f"{len(data) - end} bytes follow where it should end"
        return Parsed(header, found.groups, "damaged", found.layers, why=why)
    full = whole and len(data) == end
    if full and zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "big"):
        return Parsed(header, found.groups, "complete", found.layers, ends)
    if not found.layers[0] and (found.damaged or values * header.count > SMALL):
        raise Corrupt(f"nothing can be decoded: {found.why}")
    kept = ends if end is not None else []  # each has a CRC of its own
    if full:
        return Parsed(header, found.groups, "damaged", found.layers, kept, WRONG)
    status: Status = "damaged" if found.damaged else "partial"
    why = found.why + ", so that nothing of it is checked" * (not found.layers[0])
    why = why or ("it is cut off in its CRC-32" if end else "it is cut off in what makes it lossless")
    return Parsed(header, found.groups, status, found.layers, kept, why)


WRONG = "its CRC-32 is not that of its bytes"


def _ends(data: bytes, place: int, count: int) -> tuple[list[bytes], int | None]:
    """The lossless ends from there on, and where the file ends; None if it does before them."""
    found = list[bytes]()
    for _ in range(count):
        size, place = take_varint(data, place) or (0, len(data) + 1)
        if place + size > len(data):
            return found, None
        found.append(data[place : place + size])
        place += size
    return found, place + 4


class _Reader:
    """Takes one unit after another."""

    def __init__(self, header: Header, plan: Plan, values: int):
        self.header, self.plan, self.values = header, plan, values
        self.groups = [Group() for _ in header.groups()]
        self.layers = [0] * len(self.groups)
        self.used, self.why, self.damaged = 0, "", False

    def take(self, unit: tuple[int, int, range, range], bits: Bits, head: bytes) -> bool:
        """Whether it was whole and good; of one that was cut off the steps that are there are kept."""
        layer, number, images, steps = unit
        group, place = self.groups[number], self.used
        scales = [0] * len(images)
        if layer:
            end = place + DELTA_BITS * len(images)
            if end > len(bits):
                return self._ends(layer, number, "partial")
            said = bits[place:end].reshape(-1, DELTA_BITS) @ (4, 2, 1)
            scales = [before + int(delta) + LEAST for before, delta in zip(group.scales[-1], said, strict=True)]
            place = end
            if max(map(abs, scales)) > SCALES:
                return self._ends(layer, number, "damaged")
        paths, least = list[Bits](), list[int]()
        for step in steps:
            end = place + (total := sum(self.plan.budgets(step, scales, self.values)))
            paths.append(bits[place:end])
            least.append(min(self.plan.memory, total))
            place = end
        if place + 8 > len(bits):
            group.scales.append(scales)
            group.paths += [path for path, n in zip(paths, least, strict=True) if len(path) >= n]
            return self._ends(layer, number, "partial")
        if crc8(head + np.packbits(bits[self.used : place]).tobytes()) != bits_number(bits[place : place + 8]):
            return self._ends(layer, number, "damaged")
        group.scales.append(scales)
        group.paths += paths
        self.layers[number], self.used = self.layers[number] + 1, place + 8
        return True

    def _ends(self, layer: int, number: int, status: Status) -> bool:
        where = f"layer {layer + 1} of {len(self.plan.layers)}"
        where += f", from image {number * self.header.group} on" if self.header.count > 1 else ""
        self.damaged = status == "damaged"
        self.why = f"it is damaged in {where}" if self.damaged else f"it is cut off in {where}"
        return False
