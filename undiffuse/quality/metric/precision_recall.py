"""Precision and recall of Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric"."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from undiffuse.config import Count
from undiffuse.quality.metric.base import Metric, Rows
from undiffuse.quality.metric.distances import blocks, few, radii, squared


def coverage_of(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], k: int) -> float:
    """The share of x that lies inside the ball of some row of y, up to its k-th nearest other row of y."""
    inside, radius = 0, radii(y, k).square()
    first_of = blocks(len(x), len(y))
    for first in first_of:
        inside += int((squared(x[first : first + first_of.step], y) <= radius).any(1).sum())
    return inside / len(x)


@dataclass(frozen=True)
class PrecisionRecall(Metric):
    """How many samples lie among the real images, and how many real images among the samples.

    Of at most `most` images of each set, spread evenly.
    """

    k: Count = 3
    most: Count = 10_000
    least = 4
    place = 5
    labels: ClassVar[dict[str, str]] = {"precision": "precision", "recall": "recall"}
    better: ClassVar[dict[str, str]] = {"precision": "higher", "recall": "higher"}

    def compute(self, samples: Rows, reference: Rows) -> dict[str, float]:
        x, y = few(samples.rows(), self.most), few(reference.rows(), self.most)
        return {"precision": coverage_of(x, y, self.k), "recall": coverage_of(y, x, self.k)}
