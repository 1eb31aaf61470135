"""The kernel distance of Bińkowski et al. 2018, "Demystifying MMD GANs", which on Inception's features is KID."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.config import Count
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.quality.metric.base import F64, Metric, Rows
from undiffuse.quality.metric.distances import few

ONCE = 1 << 24  # values of a kernel that are held at once
GROUPS = 20  # of the jackknife
JUDGED = 4096  # images of a set, at most, that the standard error is taken of


def kernel_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """The unbiased squared MMD with the kernel (x·y/d + 1)³, in float64: of equal laws 0 in the mean."""
    x, y = x.to(F64), y.to(F64)
    return _unbiased(_kernel(x, x), _kernel(x, y), _kernel(y, y))


def kernel_distances(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    ours: Int[Tensor, "subsets size"],
    theirs: Int[Tensor, "subsets other"],
) -> Float[Tensor, "subsets"]:
    """The same of subsets, by the numbers of their rows."""
    x, y = x.to(F64), y.to(F64)
    parts = zip(_kernels(x, x, ours, ours), _kernels(x, y, ours, theirs), _kernels(y, y, theirs, theirs), strict=True)
    return torch.tensor([_unbiased(*each) for each in parts], dtype=F64, device="cpu")


def kernel_error(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """The standard error of `kernel_distance`: Tukey's jackknife, a twentieth of both sets left out at once."""
    x, y = x.to(F64), y.to(F64)
    ours, theirs = (torch.arange(len(z), dtype=torch.int64, device="cpu") % min(GROUPS, len(x), len(y)) for z in (x, y))
    n, m = (torch.bincount(z).to(F64) for z in (ours, theirs))
    within = [_left_out(_kernel(z, z).fill_diagonal_(0), group, group) for z, group in ((x, ours), (y, theirs))]
    across = _left_out(_kernel(x, y), ours, theirs)
    n, m = n.sum() - n, m.sum() - m
    each = within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * across / (n * m)
    return float(((len(each) - 1) * each.var(correction=0)).sqrt())


def _left_out(
    kernel: Float[Tensor, "n m"], ours: Int[Tensor, "n"], theirs: Int[Tensor, "m"]
) -> Float[Tensor, "groups"]:
    """The sum of a kernel without the rows and columns of each group."""
    groups = int(ours.max()) + 1
    rows = torch.zeros(groups, kernel.shape[1], dtype=F64, device="cpu").index_add_(0, ours, kernel)
    sums = torch.zeros(groups, groups, dtype=F64, device="cpu").index_add_(1, theirs, rows)
    return sums.sum() - sums.sum(0) - sums.sum(1) + sums.diagonal()


def _kernel(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernels(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], ours: Int[Tensor, "subsets _"], theirs: Int[Tensor, "subsets _"]
) -> Iterator[Tensor]:
    """Between the rows that each pair of subsets names; of few rows, which many subsets share, it is made once."""
    once = len(x) * len(y) <= min(ONCE, ours.numel() * theirs.shape[1])
    whole = _kernel(x, y) if once else None
    for i, j in zip(ours, theirs, strict=True):
        yield _kernel(x[i], y[j]) if whole is None else whole.index_select(0, i).index_select(1, j)


def _unbiased(ours: Float[Tensor, "n n"], across: Float[Tensor, "n m"], theirs: Float[Tensor, "m m"]) -> float:
    same = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (ours, theirs))
    return float(same - 2 * across.mean())


@dataclass(frozen=True)
class Kernel(Metric):
    """Mean over random subsets, chosen by `seed`, with the standard deviation over these.

    A subset has as many images as the smaller set where that has fewer; it is given as `kd_subset`. That deviation says
    little about the error, because the subsets share images; `kd_se` is the standard error, of at most 4,096 images of
    each set.
    """

    subsets: Count = 100
    size: Count = 1000
    seed: int = 0
    place = 4
    labels: ClassVar[dict[str, str]] = {"kd": "{kd}"}
    better: ClassVar[dict[str, str]] = {"kd": "lower"}
    errors: ClassVar[dict[str, str]] = {"kd": "kd_se"}

    def __post_init__(self) -> None:
        if self.size < 2:
            raise UsageError(f"size = {self.size} is too few for a mean over pairs; give 2 or more")

    @property
    def least(self) -> int:
        return 4  # with a group left out there are two

    def compute(self, samples: Rows, reference: Rows) -> dict[str, float]:
        x, y = samples.rows(), reference.rows()
        size, error = min(self.size, len(x), len(y)), kernel_error(few(x, JUDGED), few(y, JUDGED))
        if size == len(x) == len(y):  # every subset would be the whole
            return {"kd": kernel_distance(x, y), "kd_se": error, "kd_subset": float(size)}
        keys = [Key(self.seed).fold("kernel", side).rows(self.subsets) for side in (0, 1)]
        ours, theirs = (_subsets(key.uniform(len(z)), size) for key, z in zip(keys, (x, y), strict=True))
        values = kernel_distances(x, y, ours, theirs)
        spread = float(values.std(correction=0))
        return {"kd": float(values.mean()), "kd_sd": spread, "kd_se": error, "kd_subset": float(size)}


def _subsets(uniform: Float[Tensor, "subsets n"], size: int) -> Int[Tensor, "subsets size"]:
    """In each row the places of the smallest: so many of n, without repetition."""
    return uniform.argsort(1)[:, :size]
