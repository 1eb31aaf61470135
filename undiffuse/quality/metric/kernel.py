"""The kernel distance of Bińkowski et al. 2018, "Demystifying MMD GANs", which on Inception's features is KID."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.config import Count
from undiffuse.key import Key
from undiffuse.quality.metric.base import F64, Metric, Rows


def kernel_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """The unbiased squared MMD with the kernel (x·y/d + 1)³, in float64: of equal laws 0 in the mean."""
    x, y = x.to(F64), y.to(F64)
    within = [_kernel(z, z) for z in (x, y)]
    same = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in within)
    return float(same - 2 * _kernel(x, y).mean())


def _kernel(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


@dataclass(frozen=True)
class Kernel(Metric):
    """Mean over random subsets, chosen by `seed`, with the standard deviation over these.

    A subset has as many images as the smaller set where that has fewer; it is given as `kd_subset`.
    """

    subsets: Count = 100
    size: Count = 1000
    seed: int = 0
    place = 4
    labels: ClassVar[dict[str, str]] = {"kd": "{kd}"}
    better: ClassVar[dict[str, str]] = {"kd": "lower"}

    def compute(self, samples: Rows, reference: Rows) -> dict[str, float]:
        x, y = samples.rows(), reference.rows()
        size = min(self.size, len(x), len(y))
        if size == len(x) == len(y):  # every subset would be the whole
            return {"kd": kernel_distance(x, y), "kd_subset": float(size)}
        keys = [Key(self.seed).fold("kernel", side).rows(self.subsets) for side in (0, 1)]
        ours, theirs = (_subsets(key.uniform(len(z)), size) for key, z in zip(keys, (x, y), strict=True))
        each = [kernel_distance(x[i], y[j]) for i, j in zip(ours, theirs, strict=True)]
        values = torch.tensor(each, dtype=F64, device="cpu")
        return {"kd": float(values.mean()), "kd_sd": float(values.std(correction=0)), "kd_subset": float(size)}


def _subsets(uniform: Float[Tensor, "subsets n"], size: int) -> Int[Tensor, "subsets size"]:
    """In each row the places of the smallest: so many of n, without repetition."""
    return uniform.argsort(1)[:, :size]
