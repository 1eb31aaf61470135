"""Precision and recall of Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric"."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.config import Count
from undiffuse.quality.metric.base import F64, Metric, Rows
from undiffuse.quality.metric.distances import blocks, few, radii, refuse_too_few, squared


def precision_recall(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], k: int) -> tuple[float, float]:
    """Of samples x beside real y: the share of x that lies inside a ball of y, and of y inside a ball of x.

    The ball of a row reaches to its k-th nearest other row of the same set.
    """
    ours, theirs = radii(x, k).square(), radii(y, k).square()
    precise, recalled = 0, torch.zeros(len(y), dtype=torch.bool, device="cpu")
    first_of = blocks(len(x), len(y))
    for first in first_of:
        rows = slice(first, first + first_of.step)
        near = squared(x[rows], y)
        precise += int((near <= theirs).any(1).sum())
        recalled |= (near <= ours[rows, None]).any(0)
    return precise / len(x), float(recalled.to(F64).mean())


@dataclass(frozen=True)
class PrecisionRecall(Metric):
    """How many samples lie among the real images, and how many real images among the samples.

    Of at most `most` images of each set, spread evenly.
    """

    k: Count = 3
    most: Count = 10_000
    place = 5
    labels: ClassVar[dict[str, str]] = {"precision": "precision", "recall": "recall"}
    better: ClassVar[dict[str, str]] = {"precision": "higher", "recall": "higher"}

    def __post_init__(self) -> None:
        refuse_too_few(self.most, self.k)

    @property
    def least(self) -> int:
        return self.k + 1

    def compute(self, samples: Rows, reference: Rows) -> dict[str, float]:
        x, y = few(samples.rows(), self.most), few(reference.rows(), self.most)
        precision, recall = precision_recall(x, y, self.k)
        return {"precision": precision, "recall": recall}
