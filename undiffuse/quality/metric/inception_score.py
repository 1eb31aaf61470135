"""The Inception score of Salimans et al. 2016, "Improved Techniques for Training GANs"."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.config import Count
from undiffuse.quality.metric.base import F64, Metric, Rows


def inception_score(logits: Float[Tensor, "n k"], splits: int = 10) -> Float[Tensor, "splits"]:
    """exp E KL(p(y | x) ‖ p(y)) of each of so many contiguous parts, in float64."""
    log_p = torch.log_softmax(logits.to(F64), 1)
    n = len(log_p)
    scores = []
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        mean = part.exp().mean(0, keepdim=True)
        scores.append((part.exp() * (part - mean.log())).nansum(1).mean().exp())  # 0 log 0 is 0
    return torch.stack(scores)


@dataclass(frozen=True)
class InceptionScore(Metric):
    """Mean over contiguous parts of the samples, in their order, with the standard deviation over these."""

    splits: Count = 10
    part = "logits"
    compares = False
    place = 3
    labels: ClassVar[dict[str, str]] = {"is": "{is}"}
    better: ClassVar[dict[str, str]] = {"is": "higher"}
    errors: ClassVar[dict[str, str]] = {"is": "is_sd"}  # as the score is given in the literature

    @property
    def least(self) -> int:
        return self.splits

    def compute(self, samples: Rows, reference: None) -> dict[str, float]:
        scores = inception_score(samples.rows(), self.splits)
        return {"is": float(scores.mean()), "is_sd": float(scores.std(correction=0))}
