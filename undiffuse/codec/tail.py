"""What makes a file lossless: x_0 given where its bits have led, coded value by value with whole numbers alone.

The estimate m, in grey levels, becomes whole numbers on both sides, P = 512 m cut to steps of an eighth of a level.
Values so near to the edge of a step that another machine may round them to the other side are named in the file, which
chooses one of 64 places for the edges so that they are few. After that nothing is a float: the distribution of a value
is a table, found by how far off values of this estimate usually are, by how far off the ones around it were, and by the
fraction of P, for near the end m says with which odds the value is the level below or above.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from undiffuse.codec.coder import TOTAL_BITS, Decoder, Encoder
from undiffuse.errors import Corrupt

UNIT = 512  # of P, in a grey level
STEP_BITS = 6  # an eighth of a level is 2^6 units
PLACE_BITS = 6
PLACES = 1 << PLACE_BITS  # where its edges may be
GUARD = 0.25  # units: half a thousandth of a level, to either side of an edge; other batches were 0.0003 levels off
SPREADS = 28  # standard deviations that tables are for: 2^(i/4 − 3) levels
FRACTIONS = 5  # of |fraction of P|: 0, 1/8, … 1/2
MOST = 8  # levels off that a table knows; what is further off follows as a number
SYMBOLS = 2 * MOST + 3  # −MOST − 1 … MOST + 1, of which the outer ones say "further"
ACTIVITY = (6, 10, 14, 20, 30, 46)  # sixteenths: how far off the values around it were, by how far they should be
NEUTRAL = 3  # the activity of what nothing is around


class Differs(Corrupt):
    """This machine does not come to the same whole numbers, so that what follows them cannot be read."""


@dataclass(frozen=True)
class Tail:
    """Tables of a lossless end after `step` steps.

    `spreads` has at each knot of x̂_0 the standard deviation at scale 0, in eighths of an octave from 1/8 of a level;
    `activity` what is added to it by how far off the values around were; `steering`, in 64ths, how much of the error at
    the left, above, and of the channel before carries over; `tables` cumulative frequencies by spread and fraction.
    """

    step: int
    spreads: tuple[int, ...]
    activity: tuple[int, ...]
    steering: tuple[int, ...]
    tables: tuple[tuple[tuple[int, ...], ...], ...]

    def check(self) -> bool:
        """Whether these can be tables."""
        rows = [row for rows in self.tables for row in rows]
        shape = len(self.tables) == SPREADS and all(len(rows) == FRACTIONS for rows in self.tables)
        full = all(len(row) == SYMBOLS + 1 and row[0] == 0 and row[-1] == 1 << TOTAL_BITS for row in rows)
        rises = all(a < b for row in rows for a, b in zip(row, row[1:], strict=False))
        return shape and full and rises and len(self.activity) == len(ACTIVITY) + 1 and len(self.steering) == 3


def whole_map(m: Float[np.ndarray, "*x"], place: int) -> Int[np.ndarray, "*x"]:
    """Steps of an eighth of a level, whose edges the place says."""
    return np.floor(m.astype(np.float64) * 8 + place / PLACES).astype(np.int64)


def units(steps: Int[np.ndarray, "*x"], place: int) -> Int[np.ndarray, "*x"]:
    """P: the middle of each step."""
    return (steps << STEP_BITS) + (1 << STEP_BITS - 1) - place


def unsure(m: Float[np.ndarray, "*x"], place: int) -> Int[np.ndarray, "n"]:
    """Which values, flattened, another machine may round to the other side."""
    above = (m.astype(np.float64).reshape(-1) * 8 + place / PLACES) % 1
    width = GUARD / (1 << STEP_BITS)
    return np.flatnonzero((above < width) | (above > 1 - width))


def spreads_of(tail: Tail, p: Int[np.ndarray, "c h w"], scale: int) -> Int[np.ndarray, "c h w"]:
    """The spread of each value, in eighths of an octave, by whole numbers alone."""
    table, width, knots = np.array(tail.spreads, np.int64), 255 * UNIT, len(tail.spreads)
    place = p.clip(0, width) * (knots - 1)
    below = (place // width).clip(0, knots - 2)
    share = place - below * width
    return (table[below] * (width - share) + table[below + 1] * share + width // 2) // width + scale


class Around(NamedTuple):
    """What is known of a value before it is: the guess is `level` and, in the direction of `sign`, a fraction."""

    spread: int
    activity: int
    fraction: int
    sign: int
    level: int


Code = Callable[[Around], int]  # the value, which is known or found


def walk(tail: Tail, p: Int[np.ndarray, "c h w"], spread: Int[np.ndarray, "c h w"], code: Code) -> list[int]:
    """Every value in its order, by row, column and channel; `code` says it or is told it."""
    (channels, _, width), found = p.shape, list[int]()
    ps, spreads = (each.transpose(1, 2, 0).reshape(-1).tolist() for each in (p, spread))
    off, row = [0] * len(ps), width * channels
    usual = [int(UNIT * 0.8 * 2 ** (s / 8 - 3)) + 1 for s in range(8 * SPREADS)]
    left_share, above_share, before_share = tail.steering
    for i, here in enumerate(ps):
        column, channel = i % row // channels, i % channels
        around = [i - channels] if column else []
        if i >= row:
            around += [i - row, i - row + channels] if column < width - 1 else [i - row]
        if channel:
            around.append(i - 1)
        shift = (left_share * off[i - channels] if column else 0) + (above_share * off[i - row] if i >= row else 0)
        shift += before_share * off[i - 1] if channel else 0
        bin_ = NEUTRAL
        if around:
            ratio = 16 * sum(abs(off[j]) for j in around) // sum(usual[_held(spreads[j], 8 * SPREADS)] for j in around)
            bin_ = sum(ratio >= edge for edge in ACTIVITY)
        guess = here + (shift >> 6)
        level = max(0, min(255, (guess + UNIT // 2) // UNIT))
        part = guess - level * UNIT
        fraction = min(FRACTIONS - 1, (abs(part) + 32) >> STEP_BITS)
        value = code(Around(spreads[i], bin_, fraction, -1 if part < 0 else 1, level))
        off[i] = value * UNIT - here
        found.append(value)
    return found


def _held(index: int, most: int) -> int:
    return max(0, min(most - 1, index))


def row_of(tail: Tail, at: Around) -> int:
    """The spread that a value is expected to have."""
    return _held(at.spread + tail.activity[at.activity] >> 1, SPREADS)


def table_of(tail: Tail, at: Around) -> tuple[int, ...]:
    """The cumulative frequencies of a value."""
    return tail.tables[row_of(tail, at)][at.fraction]


def encode(
    tail: Tail, pixels: UInt8[np.ndarray, "n c h w"], m: Float[np.ndarray, "n c h w"], scales: list[int]
) -> bytes:
    """What follows the layers of a group: the place, what is unsure, checks, and the values."""
    coder = Encoder()
    chosen = [int(np.argmin([len(unsure(row, place)) for place in range(PLACES)])) for row in m]
    steps = np.stack([whole_map(row, place) for row, place in zip(m, chosen, strict=True)])
    for row, known, place in zip(m, steps, chosen, strict=True):
        coder.bits(place, PLACE_BITS)
        _put_unsure(coder, unsure(row, place), known.reshape(-1))
    coder.bits(_check(steps), 8)
    for image, known, place, scale in zip(pixels, steps, chosen, scales, strict=True):
        row = units(known, place)
        values = iter(image.transpose(1, 2, 0).reshape(-1).tolist())

        def code(at: Around, values: Iterator[int] = values) -> int:
            value = next(values)
            _put(coder, table_of(tail, at), at.sign * (value - at.level))
            return value

        walk(tail, row, spreads_of(tail, row, scale), code)
    return coder.end() + zlib.crc32(np.ascontiguousarray(pixels).tobytes()).to_bytes(4, "big")


def decode(tail: Tail, data: bytes, m: Float[np.ndarray, "n c h w"], scales: list[int]) -> UInt8[np.ndarray, "n c h w"]:
    """The values. Raises Differs where this machine does not come to the same numbers, Corrupt for damaged data."""
    coder = Decoder(data[:-4])
    steps, chosen = np.zeros(m.shape, np.int64), list[int]()
    for known, row in zip(steps, m, strict=True):
        chosen.append(place := coder.bits(PLACE_BITS))
        known[:] = whole_map(row, place)
        _take_unsure(coder, known.reshape(-1), (row.astype(np.float64).reshape(-1) * 8 + place / PLACES) % 1)
    if coder.bits(8) != _check(steps):
        raise Differs("this machine does not come to the numbers that the file was made with")
    found = []
    for known, place, scale in zip(steps, chosen, scales, strict=True):
        row = units(known, place)

        def code(at: Around) -> int:
            return max(0, min(255, at.level + at.sign * _take(coder, table_of(tail, at))))

        values = walk(tail, row, spreads_of(tail, row, scale), code)
        c, h, w = row.shape
        found.append(np.array(values, np.uint8).reshape(h, w, c).transpose(2, 0, 1))
    pixels = np.ascontiguousarray(np.stack(found))
    if zlib.crc32(pixels.tobytes()) != int.from_bytes(data[-4:], "big"):
        raise Differs("this machine comes to other values than those that the file was made of")
    return pixels


def _check(steps: Int[np.ndarray, "*x"]) -> int:
    return zlib.crc32(steps.astype("<i4").tobytes()) & 255


def symbol_of(off: int) -> int:
    """Of a value so many levels off, in the direction of the sign."""
    return max(-MOST - 1, min(MOST + 1, off)) + MOST + 1


def _put(coder: Encoder, table: Sequence[int], off: int) -> None:
    coder.put(table, symbol_of(off))
    if abs(off) > MOST:
        _put_number(coder, abs(off) - MOST - 1)


def _take(coder: Decoder, table: Sequence[int]) -> int:
    off = coder.take(table) - MOST - 1
    return off if abs(off) <= MOST else (1 if off > 0 else -1) * (MOST + 1 + _take_number(coder))


def _put_number(coder: Encoder, number: int) -> None:
    """Its length in bits, then the bits after the first."""
    length = (number + 1).bit_length()
    coder.bits(length, 5)
    for low in range(0, length - 1, 15):
        count = min(15, length - 1 - low)
        coder.bits((number + 1) >> low & (1 << count) - 1, count)


def _take_number(coder: Decoder) -> int:
    length, number = coder.bits(5), 0
    for low in range(0, length - 1, 15):
        number |= coder.bits(min(15, length - 1 - low)) << low
    return max(0, (number | 1 << length - 1) - 1) if length else 0


def _put_unsure(coder: Encoder, where: Int[np.ndarray, "n"], steps: Int[np.ndarray, "d"]) -> None:
    """Gaps between the places, and of each whether its step is an odd one."""
    _put_number(coder, len(where))
    for before, place in zip([-1, *where.tolist()], where.tolist(), strict=False):
        _put_number(coder, place - before - 1)
        coder.bits(int(steps[place]) & 1, 1)


def _take_unsure(coder: Decoder, steps: Int[np.ndarray, "d"], above: Float[np.ndarray, "d"]) -> None:
    """Moves each of them to the neighbouring step if this machine is on the other side of the edge."""
    place = -1
    for _ in range(_take_number(coder)):
        place += 1 + _take_number(coder)
        if place >= len(steps):
            raise Corrupt("the lossless part is damaged: it names values beyond the last one")
        if coder.bits(1) != int(steps[place]) & 1:
            steps[place] += 1 if above[place] > 0.5 else -1
