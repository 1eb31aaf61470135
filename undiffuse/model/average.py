"""Averages of the weights: DDPM's EMA, and power-function profiles from which one of any length is rebuilt afterwards.

A profile weights the weights θ(τ) of a run of t steps by p(τ) ∝ τ^gamma. Its *relative width* sigma_rel is the standard
deviation of p over t: the same share of a short run and of a long one (Karras et al. 2024, "Analyzing and Improving the
Training Dynamics of Diffusion Models", §3 and Appendix C).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from undiffuse.errors import Corrupt, UsageError
from undiffuse.machine.tensorfile import read_weights, write_weights

FOLDER = "ema"
SNAPSHOT = re.compile(r"step-(\d{9,})-(\d+(?:\.\d+)?(?:e-\d+)?)\.safetensors")
WIDEST = 12**-0.5  # of p = const, gamma = 0
NEGLIGIBLE = 1e-7  # a snapshot's share in the fit below which its file is not read; float16 rounds more away


class Ema:
    """shadow ← decay · shadow + (1 − decay) · weight, every step, from a copy of the initial weights.

    With `ramp`, decay is at most (1 + n)/(10 + n) after n updates, so that a short run forgets its first weights.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, ramp: bool = False):
        self.shadow = [parameter.detach().clone() for parameter in parameters]
        self.decay, self.ramp = decay, ramp

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter], step: int) -> None:
        """`step` counts the steps before this one, of which one that was skipped made no update."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay
        get_ema_multi_avg_fn(decay)(self.shadow, [parameter.detach() for parameter in parameters], None)


def width(gamma: float) -> float:
    """sigma_rel of τ^gamma: √(gamma + 1) / ((gamma + 2) √(gamma + 3)) (Eq. 123)."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def exponent(sigma_rel: float) -> float:
    """gamma ≥ 0 of a relative width: the largest root of (gamma + 2)² (gamma + 3) = (gamma + 1) / sigma_rel²."""
    if not 0 < sigma_rel <= WIDEST:
        raise UsageError(
            f"sigma_rel = {sigma_rel} is not possible; give more than 0, at most {WIDEST:.4f} (all steps alike)"
        )
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


class Profiles:
    """One power-function average of the weights for each relative width.

    shadow ← beta · shadow + (1 − beta) · weight with beta = (1 − 1/t)^(gamma + 1) at the t-th update. After n updates
    the k-th weights count (k^(gamma + 1) − (k − 1)^(gamma + 1)) / n^(gamma + 1): ∫ p(τ) dτ from k − 1 to k, exactly.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], sigma_rels: Iterable[float]):
        weights = [parameter.detach() for parameter in parameters]
        self.shadows = {sigma_rel: [weight.clone() for weight in weights] for sigma_rel in sigma_rels}
        self._powers = {sigma_rel: exponent(sigma_rel) + 1 for sigma_rel in self.shadows}

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter], step: int) -> None:
        """`step` counts the steps before this one, of which one that was skipped made no update."""
        weights: list[Tensor] = list(parameters)
        for sigma_rel, shadow in self.shadows.items():
            beta = (step / (step + 1)) ** self._powers[sigma_rel]
            get_ema_multi_avg_fn(beta)(shadow, weights, None)

    def tensors(self, names: Sequence[str]) -> dict[str, Shaped[Tensor, "..."]]:
        """The state for a checkpoint, `0.05/name`; not copied."""
        return {f"{s}/{name}": t for s, shadow in self.shadows.items() for name, t in zip(names, shadow, strict=True)}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Shaped[Tensor, "..."]], names: Sequence[str]) -> None:
        for name, shadow in self.tensors(names).items():
            shadow.copy_(tensors[name])

    def snapshot(self, run: Path, step: int, names: Sequence[str], meta: Mapping[str, Any]) -> None:
        """Writes each average to `RUN/ema/step-000000500-0.05.safetensors`, which `load` takes as a model.

        In float16: a fit adds up shares whose squares sum to about 1 between the stored widths, so what it rounds away
        stays near 1e-4 of a weight, and half the space counts where nothing is ever deleted. Raises StorageError.
        """
        for sigma_rel, shadow in self.shadows.items():
            path = run / FOLDER / f"step-{step:09d}-{sigma_rel}.safetensors"
            half = {name: tensor.half() for name, tensor in zip(names, shadow, strict=True)}
            write_weights(path, half, {**meta, "step": step, "average": {"sigma_rel": sigma_rel, "step": step}})


@dataclass(frozen=True)
class Snapshot:
    """The average of one relative width after `step` updates, and the file that holds it."""

    step: int
    sigma_rel: float
    path: Path

    def read(self) -> tuple[dict[str, Shaped[Tensor, "..."]], dict[str, Any]]:
        """Its weights and metadata. Raises Corrupt for a damaged file, or one that was renamed."""
        tensors, meta = read_weights(self.path)
        if meta.get("average") != {"sigma_rel": self.sigma_rel, "step": self.step}:
            raise Corrupt(f"{self.path} holds {meta.get('average')}, not what its name says; restore its name")
        return tensors, meta


def snapshots(run: Path) -> list[Snapshot]:
    """Those of a run folder, by step and width, from their names alone."""
    folder = run / FOLDER
    found = [(SNAPSHOT.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    listed = [Snapshot(int(match[1]), float(match[2]), path) for match, path in found if match]
    return sorted(listed, key=lambda each: (each.step, each.sigma_rel))


class Fit(NamedTuple):
    """The share of each stored profile in another, and the norm of what they miss of it, relative to its own."""

    shares: Float[Tensor, "n"]
    error: float


def fit(stored: Sequence[tuple[int, float]], step: int, sigma_rel: float) -> Fit:
    """The least-squares fit of the profile (step, sigma_rel) by stored ones, in closed form and float64.

    ⟨p_a, p_b⟩ = (g_a + 1)(g_b + 1)/(g_a + g_b + 1) · (m/t_a)^g_a (m/t_b)^g_b / max(t_a, t_b) with m = min(t_a, t_b).
    """
    wanted = [*stored, (step, sigma_rel)]
    t = torch.tensor([at for at, _ in wanted], dtype=torch.float64, device="cpu")
    g = torch.tensor([exponent(each) for _, each in wanted], dtype=torch.float64, device="cpu")
    earlier = torch.minimum(t[:, None], t)
    ratio = (earlier / t[:, None]) ** g[:, None] * (earlier / t) ** g / torch.maximum(t[:, None], t)
    inner = (g[:, None] + 1) * (g + 1) / (g[:, None] + g + 1) * ratio
    norm = inner.diagonal().sqrt()
    cosine = inner / norm[:, None] / norm  # neighbours are nearly parallel: unit diagonals condition best
    gram, target = cosine[:-1, :-1], cosine[:-1, -1]
    scaled = torch.linalg.lstsq(gram, target[:, None], driver="gelsd").solution[:, 0]
    missed = 1 - 2 * scaled @ target + scaled @ gram @ scaled
    return Fit(scaled * norm[-1] / norm[:-1], float(missed.clamp(min=0).sqrt()))


def reconstruct(
    stored: Sequence[Snapshot], sigma_rel: float, step: int | None = None
) -> tuple[dict[str, Float[Tensor, "..."]], dict[str, Any]]:
    """The weights averaged with another width, at any step from the first snapshot to the last, which is the default.

    Returns them in float32 with the metadata of a model; `meta["average"]["error"]` is that of the fit. Raises
    UsageError for what cannot be fitted, Corrupt for a damaged snapshot.
    """
    if not stored:
        raise UsageError("there are no EMA snapshots; train with --set 'train.ema_profiles=[0.05,0.1]'")
    first, last = stored[0].step, stored[-1].step
    step = last if step is None else step
    if not first <= step <= last:
        raise UsageError(f"step {step} is outside the EMA snapshots; give {first} to {last}")
    shares, error = fit([(each.step, each.sigma_rel) for each in stored], step, sigma_rel)
    total: dict[str, Tensor] = {}
    meta: dict[str, Any] = {}
    for snapshot, share in zip(stored, shares.tolist(), strict=True):
        if abs(share) > NEGLIGIBLE:
            tensors, found = snapshot.read()
            if meta and found["model"] != meta["model"]:
                raise Corrupt(f"{snapshot.path} is of another model than those before it; move it away")
            meta = found
            for name, tensor in tensors.items():
                total[name] = total.get(name, 0) + share * tensor.double()
    images = meta.get("images", 0) * step // meta["step"]
    average = {"sigma_rel": sigma_rel, "step": step, "snapshots": len(stored), "error": error}
    return {name: tensor.float() for name, tensor in total.items()}, {
        **meta, "step": step, "images": images, "average": average
    }  # fmt: skip
