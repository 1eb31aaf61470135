"""The Fréchet distance between two Gaussians (Dowson & Landau 1982), which on Inception's features is FID.

FID is of Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule"; on spatial features it is Nash et al.
2021's sFID; its limit for many samples is of Chong & Forsyth 2020, "Effectively Unbiased FID".
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.config import Count
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.quality.metric.base import F64, Metric, Moments, Rows


def root(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The symmetric root of a covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


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
    half = root(covariance_1)
    product = torch.linalg.eigvalsh(half @ covariance_2 @ half).clamp(min=0).sqrt().sum()
    apart = mean_1 - mean_2
    return float(apart @ apart + covariance_1.trace() + covariance_2.trace() - 2 * product)


def _between(samples: Moments, reference: Moments) -> float:
    return frechet_distance(samples.mean, samples.covariance, reference.mean, reference.covariance)


def frechet_of_rows(rows: Float[Tensor, "n d"], mean: Float[Tensor, "d"], half: Float[Tensor, "d d"]) -> float:
    """The same between rows and a law of that mean and that root of its covariance.

    With A the centred rows over √(n − 1), Tr (Σ_1 Σ_2)^½ is the sum of the singular values of A Σ_2^½: the roots of the
    eigenvalues of the smaller of its two Gram matrices.
    """
    rows = rows.to(F64)
    apart = rows.mean(0) - mean
    product = (rows - rows.mean(0)) @ half / (len(rows) - 1) ** 0.5
    gram = product @ product.T if len(rows) < rows.shape[1] else product.T @ product
    trace = float(rows.var(0).sum()) + float(half.square().sum())
    return float(apart @ apart) + trace - 2 * float(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum())


@dataclass(frozen=True)
class Frechet(Metric):
    """Between Gaussians of the same means and covariances as the pooled features."""

    keeps = Moments
    place = 0
    labels: ClassVar[dict[str, str]] = {"fd": "{fd}"}
    better: ClassVar[dict[str, str]] = {"fd": "lower"}

    def compute(self, samples: Moments, reference: Moments) -> dict[str, float]:
        return {"fd": _between(samples, reference)}


@dataclass(frozen=True)
class SpatialFrechet(Metric):
    """The same of features that know their place in the image."""

    part = "spatial"
    keeps = Moments
    place = 2
    labels: ClassVar[dict[str, str]] = {"sfd": "{sfd}"}
    better: ClassVar[dict[str, str]] = {"sfd": "lower"}

    def compute(self, samples: Moments, reference: Moments) -> dict[str, float]:
        return {"sfd": _between(samples, reference)}


@dataclass(frozen=True)
class FrechetInfinity(Metric):
    """What the Fréchet distance tends to for many samples: the constant of a + b/n, fitted to random parts of them.

    The parts have from half of the samples to all: below four samples a feature the distance is no straight line in
    1/n, and a fit that reaches there falls short of the limit. `fd_infinity_bias` is what the distance is too high by
    with all the samples that there are, b/n; `fd_infinity_se` is the standard error of the fit, without that of the
    draw of the samples.
    """

    points: Count = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.points < 3:
            raise UsageError(f"points = {self.points} is too few to fit a line and its error; give 3 or more")

    keeps = Rows
    keeps_reference = Moments
    place = 1
    labels: ClassVar[dict[str, str]] = {"fd_infinity": "{fd}∞"}
    better: ClassVar[dict[str, str]] = {"fd_infinity": "lower"}
    errors: ClassVar[dict[str, str]] = {"fd_infinity": "fd_infinity_se"}

    @property
    def least(self) -> int:
        return 50

    def compute(self, samples: Rows, reference: Moments) -> dict[str, float]:
        rows, half = samples.rows(), root(reference.covariance)
        counts = torch.linspace(len(rows) / 2, len(rows), self.points + 1, dtype=F64, device="cpu")[1:].round().long()
        keys = Key(self.seed).fold("frechet").rows(len(counts))
        orders = keys.uniform(len(rows)).argsort(1)
        distances = [
            frechet_of_rows(rows[order[:count]], reference.mean, half)
            for order, count in zip(orders, counts.tolist(), strict=True)
        ]
        design = torch.stack([torch.ones_like(1 / counts), 1 / counts], 1).to(F64)
        found = torch.tensor(distances, dtype=F64, device="cpu")[:, None]
        fit = torch.linalg.lstsq(design, found).solution
        left = (found - design @ fit).square().sum() / max(1, len(counts) - 2)
        error = (left * torch.linalg.inv(design.T @ design)[0, 0]).sqrt()
        bias = float(fit[1]) / (len(rows) * samples.every)  # of very many only some are kept
        return {"fd_infinity": float(fit[0]), "fd_infinity_se": float(error), "fd_infinity_bias": bias}
