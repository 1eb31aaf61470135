"""The Fréchet distance between two Gaussians (Dowson & Landau 1982), which on Inception's features is FID.

FID is of Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule".
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.quality.metric.base import Metric, Moments


def frechet_distance(
    mean_1: Float[Tensor, "d"],
    covariance_1: Float[Tensor, "d d"],
    mean_2: Float[Tensor, "d"],
    covariance_2: Float[Tensor, "d d"],
) -> float:
    """‖μ_1 − μ_2‖² + Tr(Σ_1 + Σ_2 − 2 (Σ_1 Σ_2)^½), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of the symmetric Σ_1^½ Σ_2 Σ_1^½, which has those
    of Σ_1 Σ_2 and is positive semi-definite, so singular covariances need no special case.
    """
    values, vectors = torch.linalg.eigh(covariance_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ covariance_2 @ root).clamp(min=0).sqrt().sum()
    apart = mean_1 - mean_2
    return float(apart @ apart + covariance_1.trace() + covariance_2.trace() - 2 * product)


@dataclass(frozen=True)
class Frechet(Metric):
    """Between Gaussians of the same means and covariances as the pooled features."""

    keeps = Moments
    labels: ClassVar[dict[str, str]] = {"fd": "{fd}"}
    better: ClassVar[dict[str, str]] = {"fd": "lower"}

    def compute(self, samples: Moments, reference: Moments) -> dict[str, float]:
        distance = frechet_distance(samples.mean, samples.covariance, reference.mean, reference.covariance)
        return {"fd": distance}
