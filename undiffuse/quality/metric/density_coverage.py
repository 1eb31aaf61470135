"""Density and coverage of Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models"."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.config import Count
from undiffuse.quality.metric.base import F64, Metric, Rows
from undiffuse.quality.metric.distances import blocks, few, radii, refuse_too_few, squared


def density_coverage(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], k: int) -> tuple[float, float]:
    """Of samples x beside real y: in how many k-balls of y a row of x lies, over k; how many balls hold one."""
    radius = radii(y, k).square()
    inside, nearest = 0, torch.full((len(y),), torch.inf, dtype=F64, device="cpu")
    first_of = blocks(len(x), len(y))
    for first in first_of:
        near = squared(x[first : first + first_of.step], y)
        inside += int((near < radius).sum())
        nearest = torch.minimum(nearest, near.min(0).values)
    return inside / (k * len(x)), float((nearest < radius).to(F64).mean())


@dataclass(frozen=True)
class DensityCoverage(Metric):
    """Precision and recall that one outlier does not move; density can exceed 1.

    Of at most `most` images of each set, spread evenly.
    """

    k: Count = 5
    most: Count = 10_000
    place = 6
    labels: ClassVar[dict[str, str]] = {"density": "density", "coverage": "coverage"}
    better: ClassVar[dict[str, str]] = {"density": "higher", "coverage": "higher"}

    def __post_init__(self) -> None:
        refuse_too_few(self.most, self.k)

    @property
    def least(self) -> int:
        return self.k + 1

    def compute(self, samples: Rows, reference: Rows) -> dict[str, float]:
        x, y = few(samples.rows(), self.most), few(reference.rows(), self.most)
        density, coverage = density_coverage(x, y, self.k)
        return {"density": density, "coverage": coverage}
