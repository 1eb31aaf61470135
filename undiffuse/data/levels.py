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
# What may look wrong with one image, noted as what was done to it is, and counted for a whole set by `remark`.
BLACK, WHITE, HIDDEN = "nearly black", "nearly white", "not seen on the background"
# Levels of 255 that are near. A mask of a few classes stays within, or 12 bits in a file of 16; photographs of a night
# do not, since one lamp or the noise of one picture is enough.
FEW = 16
QUARTER = 64  # of files of 16 bits, whose upper two are then never used: 14 bits, or fewer


def unsaid(found: Own) -> str:
    """What is missing for values of a type that does not say what is black and what is white."""
    return f"{found.span}; say what is black and what is white, for example --set 'data.range={found.range}'"


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
    kind = values.dtype.name  # whatever the order of its bytes
    if values.dtype.kind not in "buif":
        raise DataError(f"{values.dtype} values; expected integers or real numbers")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise DataError(
            f"{bad:,} of {values.size:,} values are not finite (NaN or infinite); replace them, or leave them out"
        )
    if not values.size:
        return Own(0, 0, 0.0, kind)
    least, most = (edge.item() for edge in (values.min(), values.max()))
    least, most = (int(least), int(most)) if values.dtype == bool else (least, most)
    return Own(least, most, float(values.mean(dtype=np.float64)), kind)


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


def extent(pixels: UInt8[np.ndarray, "n c h w"]) -> tuple[UInt8[np.ndarray, "n"], UInt8[np.ndarray, "n"]]:
    """The least and the greatest level of each image.

    A last channel that is 255 throughout counts as the opacity that it may be, and not as white.
    """
    if pixels.shape[1] not in (2, 4):
        flat = pixels.reshape(len(pixels), -1)
        return flat.min(1), flat.max(1)
    colours, last = pixels[:, :-1].reshape(len(pixels), -1), pixels[:, -1].reshape(len(pixels), -1)
    opaque = last.min(1) == 255
    least, most = colours.min(1), colours.max(1)
    return np.where(opaque, least, np.minimum(least, last.min(1))), np.where(
        opaque, most, np.maximum(most, last.max(1))
    )


def near(least: int, most: int, few: int, span: str) -> tuple[Note, ...]:
    """The note for an image whose levels all are within `few` of black, or within FEW of white."""
    if most <= few:
        return ((BLACK, span),)
    return ((WHITE, span),) if least >= 255 - FEW else ()
