"""The nearest images of a large set to each of some, however large the set is, and how near that is for such images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from undiffuse.quality.metric.distances import squared

F64 = torch.float64
VALUES = 1 << 25  # of the set that is looked through, in float32, at a time: 128 MiB
DISTANCES = 1 << 24  # at a time
AROUND = 50  # images around a training image that say what is near there
DARK = 128  # the level that is subtracted, so that sums of squares of up to 1,024 values are exact in float32


@dataclass(frozen=True, eq=False)
class Points:
    """Points in a space, by number, read when they are needed."""

    n: int
    rows: Callable[[Int[Tensor, "b"]], Float[Tensor, "b d"]]  # float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def some(self, index: Int[Tensor, "m"]) -> "Points":
        """Those of these numbers, in that order."""
        return Points(len(index), lambda chosen: self.rows(index[chosen]), self.device)


def points(rows: Float[Tensor, "n d"]) -> Points:
    """Features, which are held in memory."""
    return Points(len(rows), lambda index: rows[index].to(torch.float32))


def pixels(n: int, images: Callable[[Int[Tensor, "b"]], UInt8[Tensor, "b c h w"]], device: torch.device) -> Points:
    """Images as points; `device` is where distances are computed."""
    return Points(n, lambda index: images(index).flatten(1).to(torch.float32) - DARK, device)


def nearest(
    x: Points, y: Points, k: int = 1, skip: Int[Tensor, "n"] | None = None, tick: Callable[[int], Any] = int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Distances to the k points of y nearest to each of x, the nearest first, and their numbers.

    `skip` is the number of a point of y that does not count, −1 for none. Found in float32; the first distance is then
    computed anew in float64 as a difference, since that of a copy is lost in rounding. `tick` is told the points of y
    that are done.
    """
    near = torch.full((x.n, k), torch.inf, dtype=torch.float32, device="cpu")
    number = torch.full((x.n, k), -1, dtype=torch.int64, device="cpu")
    width = _width(y)
    for those in _parts(y, VALUES // width):
        rows = y.rows(those).to(y.device)
        for these in _parts(x, min(VALUES // width, DISTANCES // len(those))):
            found = squared(x.rows(these).to(y.device), rows)
            if skip is not None:
                place = skip[these].to(y.device) - int(those[0])
                inside = torch.nonzero((place >= 0) & (place < len(those)))[:, 0]
                found[inside, place[inside]] = torch.inf
            values, place = found.topk(min(k, len(those)), largest=False)
            values = torch.cat([near[these], values.cpu()], 1)
            candidates = torch.cat([number[these], those[place.cpu()]], 1)
            near[these], best = values.topk(k, largest=False)
            number[these] = candidates.gather(1, best)
        tick(len(those))
    distance = near.to(F64).sqrt()
    distance[:, 0] = _exact(x, y, number[:, 0])
    return distance, number


def _parts(x: Points, size: int) -> list[Int[Tensor, "b"]]:
    return list(torch.arange(x.n, dtype=torch.int64, device="cpu").split(max(1, size)))


def _width(x: Points) -> int:
    return x.rows(torch.zeros(1, dtype=torch.int64, device="cpu")).shape[1]


def _exact(x: Points, y: Points, number: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    parts = [
        (x.rows(these).to(F64) - y.rows(number[these]).to(F64)).square().sum(1).sqrt()
        for these in _parts(x, VALUES // (4 * _width(y)))
    ]
    return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class Near:
    """The training image nearest to each image: its number, its distance, and that over the `ratio`'s unit.

    The unit is the mean distance of that training image to the `around` others nearest to it.
    """

    number: Int[Tensor, "n"]
    distance: Float[Tensor, "n"]
    ratio: Float[Tensor, "n"]


def around(training: int, is_apart: bool) -> int:
    """How many images around a training image count: 50, or all where there are fewer.

    Without `is_apart` the images that are judged are training images too, and neither counts for the other's.
    """
    return min(AROUND, training - (1 if is_apart else 2))


def near(x: Points, training: Points, skip: Int[Tensor, "n"] | None, k: int, tick: Callable[[int], Any] = int) -> Near:
    """Plain images are near to everything, so a distance counts in units of those around the training image.

    `skip` gives the numbers of x where they are training images themselves: each is then compared with the others, and
    does not count among the k around its nearest one either, as if it had been held out alone.
    """
    distance, number = (each[:, 0] for each in nearest(x, training, 1, skip, tick))
    some, which = number.unique(return_inverse=True)
    extra = 0 if skip is None else 1
    far, others = (each[which] for each in nearest(training.some(some), training, k + extra, some, tick))
    if skip is not None:
        far = far.masked_fill(others == skip[:, None], torch.inf).sort(1).values[:, :k]
    unit = far.mean(1)
    return Near(number, distance, torch.where(distance == 0, 0.0, distance / unit))
