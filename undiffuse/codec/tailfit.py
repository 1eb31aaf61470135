"""The tables of a lossless end, from images that were coded: how far off the estimate was, and how that shows."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import log2
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from undiffuse.codec import tail as tails
from undiffuse.codec.coder import TOTAL_BITS
from undiffuse.codec.tail import ACTIVITY, FRACTIONS, MOST, SPREADS, SYMBOLS, UNIT, Around, Tail

PRIOR = 24  # of how many values the guess at a table counts as many


class Seen(NamedTuple):
    """An image, its estimate in grey levels after some steps, and its scale there."""

    pixels: UInt8[np.ndarray, "c h w"]
    m: Float[np.ndarray, "c h w"]
    scale: int


def spread_index(square: float, shape: Sequence[float]) -> tuple[int, ...]:
    """Standard deviations of x̂_0 at the knots, in eighths of an octave from an eighth of a level."""
    return tuple(round(8 * (log2(max(127.5 * (square * h) ** 0.5, 1e-3)) + 3)) for h in shape)


def fit(step: int, square: float, shape: Sequence[float], seen: Sequence[Seen]) -> Tail:
    """Tables from images whose mean square error is expected to be `square`, times `shape` at the knots."""
    tail = replace(guess(step, square, shape), steering=_steering(seen))
    tail = replace(tail, activity=_activity(tail, seen))
    counts = np.zeros((SPREADS, FRACTIONS, SYMBOLS))
    for at, value in _walked(tail, seen):
        counts[tails.row_of(tail, at), at.fraction, tails.symbol_of(at.sign * (value - at.level))] += 1
    return replace(tail, tables=_frequencies(counts + PRIOR * _priors()))


def guess(step: int, square: float, shape: Sequence[float]) -> Tail:
    """Tables before anything was seen."""
    flat = (0,) * (len(ACTIVITY) + 1)
    return Tail(step, spread_index(square, shape), flat, (0, 0, 0), _frequencies(_priors()))


def bits(tail: Tail, seen: Sequence[Seen]) -> float:
    """What the values of an image take, on the average, without what a file has beside them."""
    total = 0.0
    for at, value in _walked(tail, seen):
        table, off = tails.table_of(tail, at), at.sign * (value - at.level)
        symbol = tails.symbol_of(off)
        total += TOTAL_BITS - log2(table[symbol + 1] - table[symbol])
        if abs(off) > MOST:
            total += 4 + (abs(off) - MOST).bit_length()
    return total / len(seen)


def _walked(tail: Tail, seen: Sequence[Seen]) -> list[tuple[Around, int]]:
    found = list[tuple[Around, int]]()
    for each in seen:
        p, values = _units(each), iter(each.pixels.transpose(1, 2, 0).reshape(-1).tolist())

        def code(at: Around, values: Iterator[int] = values) -> int:
            found.append((at, value := next(values)))
            return value

        tails.walk(tail, p, tails.spreads_of(tail, p, each.scale), code)
    return found


def _units(each: Seen) -> Int[np.ndarray, "c h w"]:
    return tails.units(tails.whole_map(each.m, 0), 0)


def _steering(seen: Sequence[Seen]) -> tuple[int, ...]:
    """Least squares: how much of the error at the left, above and of the channel before is found again."""
    off = np.stack([UNIT * each.pixels.astype(np.int64) - _units(each) for each in seen]).astype(float)
    here = off[:, 1:, 1:, 1:] if off.shape[1] > 1 else off[:, :, 1:, 1:]
    around = [off[..., 1:, :-1], off[..., :-1, 1:]]
    if off.shape[1] > 1:
        around = [each[:, 1:] for each in around] + [off[:, :-1, 1:, 1:]]
    columns = np.stack([each.reshape(-1) for each in around], 1)
    shares = np.linalg.lstsq(columns, here.reshape(-1), rcond=None)[0].tolist()
    return tuple(round(64 * share) for share in [*shares, 0.0][:3])


def _activity(tail: Tail, seen: Sequence[Seen]) -> tuple[int, ...]:
    """What is added to the spread, so that it is that of the errors in each bin."""
    errors, expected = np.zeros(len(ACTIVITY) + 1), np.zeros(len(ACTIVITY) + 1)
    for at, value in _walked(tail, seen):
        errors[at.activity] += abs(value - at.level)
        expected[at.activity] += 0.8 * 2 ** (at.spread / 8 - 3)
    ratio = (errors + 1) / (expected + 1)
    return tuple(round(8 * log2(r)) for r in ratio)


def _priors() -> Float[np.ndarray, "spreads fractions symbols"]:
    return np.array([[_prior(s, f) for f in range(FRACTIONS)] for s in range(SPREADS)])


def _prior(spread: int, fraction: int) -> Float[np.ndarray, "symbols"]:
    """A logistic law of that standard deviation around the fraction."""
    scale = 2 ** (spread / 4 - 3) * 3**0.5 / np.pi
    edges = (np.arange(-MOST - 0.5, MOST + 1) - fraction / 8) / scale
    below = 1 / (1 + np.exp(-edges.clip(-60, 60)))
    return np.diff(np.concatenate([[0.0], below, [1.0]]))


def _frequencies(weights: object) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Cumulative, of whole numbers that are 1 at least."""
    found = np.asarray(weights, float)
    share = found / found.sum(-1, keepdims=True)
    whole = 1 + np.floor(share * ((1 << TOTAL_BITS) - SYMBOLS)).astype(np.int64)
    most = whole.argmax(-1)[..., None]
    left = (1 << TOTAL_BITS) - whole.sum(-1, keepdims=True)
    np.put_along_axis(whole, most, np.take_along_axis(whole, most, -1) + left, -1)
    cumulative = np.concatenate([np.zeros((*whole.shape[:-1], 1), np.int64), whole.cumsum(-1)], -1)
    return tuple(tuple(tuple(row) for row in rows) for rows in cumulative.tolist())
