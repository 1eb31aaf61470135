"""From the values that a file holds to levels of 0 to 255, and what they were before."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from undiffuse.errors import DataError

Number = float | int  # said in full, because the tests' type checker does not take an int for a float
Range = tuple[Number, Number]

# What reading made of an image, in the order in which it was done: what, and from what.
Note = tuple[str, str]


class Own(NamedTuple):
    """The values of a file in its own units: the least, the most, the mean, and their type."""

    least: Number
    most: Number
    mean: float
    kind: str

    @property
    def span(self) -> str:
        return f"{self.kind} values from {shown(self.least)} to {shown(self.most)}"

    @property
    def range(self) -> str:
        """The range that is most likely meant, as `--set` takes it."""
        return said(_likely(self.least, self.most))


UNKNOWN = "of a range that is not known"


def unsaid(found: Own) -> str:
    """What is missing for values of a type that does not say what is black and what is white."""
    return f"{found.span}; say what is black and what is white, for example --set data.range={found.range}"


def shown(value: Number) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def said(span: Range) -> str:
    """As `--set` takes it, without a space that a shell would need quotes for."""
    return f"[{shown(span[0])},{shown(span[1])}]"


def _likely(least: Number, most: Number) -> Range:
    """[0, 1], [-1, 1], whole bits, or the values' own."""
    if -1 <= least and most <= 1:
        return (0, 1) if least >= 0 else (-1, 1)
    if least < 0 or most > 65535:
        return least, most
    return 0, 2 ** max(8, math.ceil(math.log2(most + 1))) - 1


def own(values: np.ndarray) -> Own:
    """DataError for values that are not numbers, or not finite."""
    kind = "bool" if values.dtype == bool else str(values.dtype)
    if values.dtype.kind not in "buif":
        raise DataError(f"{kind} values; expected integers or real numbers")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise DataError(
            f"{bad:,} of {values.size:,} values are not finite (NaN or infinite); replace them, or leave them out"
        )
    if not values.size:
        return Own(0, 0, 0.0, kind)
    return Own(values.min().item(), values.max().item(), float(values.mean(dtype=np.float64)), kind)


def combined(parts: Sequence[tuple[Own, int]]) -> Own | None:
    """Of several images, each with the number of its values; None without any."""
    if not parts:
        return None
    total = sum(count for _, count in parts)
    mean = sum(each.mean * count for each, count in parts) / max(1, total)
    kinds = sorted({each.kind for each, _ in parts})
    return Own(min(each.least for each, _ in parts), max(each.most for each, _ in parts), mean, " and ".join(kinds))


def stretch(values: np.ndarray, low: Number, high: Number) -> UInt8[np.ndarray, "*shape"]:
    """`low` to 0 and `high` to 255, linearly and rounded; what lies outside is clipped."""
    result = np.empty(values.shape, np.uint8)
    rows, given = result.reshape(len(result), -1) if result.size else result, values.reshape(result.shape)
    for row, source in zip(rows, given, strict=True):  # one at a time: float64 takes eight times the room
        scaled = (source.astype(np.float64).ravel() - low) * (255 / (high - low))
        row[:] = np.clip(np.floor(scaled + 0.5), 0, 255).astype(np.uint8)
    return result


def beyond(span: Range) -> str:
    """What is done to values outside of a range."""
    return f"clipped to data.range={said(span)}"


def clipped(found: Own, low: Number, high: Number) -> tuple[Note, ...]:
    """The note for values that lie outside of a range."""
    if found.least >= low and found.most <= high:
        return ()
    return ((beyond((low, high)), f"{shown(found.least)} to {shown(found.most)}"),)
