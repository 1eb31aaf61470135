"""Distances between many rows, a block at a time."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.errors import UsageError

BLOCK = 1 << 24  # distances at a time


def blocks(n: int, m: int) -> range:
    """The first of each block of n rows whose distances to m others are held at once."""
    return range(0, n, max(1, BLOCK // max(1, m)))


def squared(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """‖x_i − y_j‖²; rounding can make one of zero slightly negative, which is held at zero."""
    found = torch.addmm(y.square().sum(1), x, y.T, alpha=-2)
    return found.add_(x.square().sum(1)[:, None]).clamp_(min=0)


def nearest(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], k: int, skip: Int[Tensor, "n"] | None = None
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Distances and numbers of the k rows of y that are nearest to each row of x, the nearest first.

    `skip` names for each row of x the one of y that does not count, itself for instance.
    """
    distances, numbers = [], []
    first_of = blocks(len(x), len(y))
    for first in first_of:
        rows = slice(first, first + first_of.step)
        near = squared(x[rows], y)
        if skip is not None:
            near.scatter_(1, skip[rows][:, None], torch.inf)
        values, index = near.topk(k, 1, largest=False)
        distances.append(values.sqrt())
        numbers.append(index)
    return torch.cat(distances), torch.cat(numbers)


def radii(x: Float[Tensor, "n d"], k: int) -> Float[Tensor, "n"]:
    """The distance of each row to its k-th nearest other row."""
    return nearest(x, x, k, torch.arange(len(x), dtype=torch.int64, device="cpu"))[0][:, -1]


def refuse_too_few(most: int, k: int) -> None:
    """UsageError where so many rows have no k-th nearest other one, beside which there are more."""
    if most <= k + 1:
        raise UsageError(f"most = {most} is not possible with k = {k}; give {k + 2} or more")


def few(x: Float[Tensor, "n d"], most: int) -> Float[Tensor, "m d"]:
    """At most so many rows, spread evenly, in float64."""
    index = torch.arange(min(most, len(x)), dtype=torch.int64, device="cpu") * len(x) // min(most, len(x))
    return x[index].to(torch.float64)
