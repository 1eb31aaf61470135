"""Bits per dimension: the variational bound of DDPM, term by term, and the rate-distortion curve that it implies.

L = prior + Σ KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) + decoder (Eq. 5), in bits per value of the image. As in the authors'
code, x̂_0 is clipped and every (image, t) has noise of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.gaussian import bits, prior_kl
from undiffuse.diffusion.grid import Grid, suited
from undiffuse.diffusion.numbers import F64, ready, row
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.reverse import Step, bound_term
from undiffuse.errors import UsageError
from undiffuse.key import Keys
from undiffuse.network.base import NOTHING, Conditioning


@dataclass(frozen=True, eq=False)
class Terms:
    """Terms of n images at k times each, all in bits/dim except `mse`, which is that of x̂_0 in [−1, 1].

    `weights` says how many terms of the chain each stands for: ones for the whole chain.
    """

    prior: Float[np.ndarray, "n"]
    bits: Float[np.ndarray, "n k"]
    mse: Float[np.ndarray, "n k"]
    index: Int[np.ndarray, "n k"]  # which step of the chain, 0 being the decoder's
    weights: Float[np.ndarray, "k"]

    def totals(self) -> Float[np.ndarray, "n"]:
        """The bound of each image; for stratified times an unbiased estimate of it."""
        return self.prior + self.bits @ self.weights

    def summary(self) -> dict[str, float | int | None]:
        """Means over the images: total with its standard error, None for one image, and its three parts."""
        totals, n = self.totals(), len(self.prior)
        weighted = self.bits * self.weights
        decoder = (weighted * (self.index == 0)).sum(1)
        return {
            "images": n,
            "bits_per_dim": float(totals.mean()),
            "standard_error": float(totals.std(ddof=1) / n**0.5) if n > 1 else None,
            "prior": float(self.prior.mean()),
            "rate": float((weighted.sum(1) - decoder).mean()),
            "decoder": float(decoder.mean()),
        }

    def rate_distortion(self) -> list[dict[str, float | int]]:
        """Table 4 and Fig. 5: bits received so far against the RMSE of x̂_0 on [0, 255], at every step of the chain.

        `step` counts reverse steps as the paper's T − t + 1; the decoder's bits are never part of the rate.
        """
        if (self.weights != 1).any():
            raise UsageError(
                "a rate-distortion curve needs every term of the chain; measure it without stratified times"
            )
        kl, mse = self.bits.mean(0), self.mse.mean(0)  # (k,), step 0 last in time
        k = len(kl)
        received = self.prior.mean() + np.concatenate([[0.0], np.cumsum(kl[:0:-1])])  # before step i = k − 1, …, 0
        return [
            {"step": s, "rate": float(received[s - 1]), "rmse": float(127.5 * mse[k - s] ** 0.5)}
            for s in range(1, k + 1)
        ]


NEAR = 1e-9  # of t_min: nearer than this, a grid that was computed has hit it


def chain(process: Process, steps: int | None = None, grid: Grid | None = None) -> Float[Tensor, "times"]:
    """The times of the bound, ascending from 0 to 1; 1/T is always one of them, because the decoder stands there."""
    times = (grid or suited(process)).times(process, steps).flip(0)
    times[-1] = 1  # where the prior is, wherever the grid would let samples begin
    if times[1] <= process.t_min * (1 + NEAR):
        times[1] = process.t_min
    else:
        times = torch.cat([times[:1], torch.tensor([process.t_min], dtype=F64, device="cpu"), times[1:]])
    return times


def strata(steps: int, draws: int) -> list[tuple[int, int]]:
    """`draws` ranges [a, b) that cover 0 … steps − 1, narrow where the terms are large: near the data."""
    if not 1 <= draws <= steps:
        raise UsageError(f"{draws} draws an image are not possible; give 1 to {steps}")
    edges = np.unique(np.round(np.geomspace(1, steps + 1, draws + 1)).astype(int)) - 1
    for edge in range(steps):  # rounding made some coincide: the smallest missing edges take their place
        if len(edges) == draws + 1:
            break
        edges = np.unique(np.append(edges, edge))
    return [(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]


@torch.no_grad()
def bound(
    denoiser: Denoiser,
    x_0: Float[Tensor, "b c h w"],
    keys: Keys,
    steps: int | None = None,
    draws: int | None = None,
    tick: Callable[[int], None] | None = None,
    cond: Conditioning = NOTHING,
    grid: Grid | None = None,
) -> Terms:
    """The terms of each image: all of the chain, or `draws` stratified ones, which cost that many evaluations.

    x_0 lies on the grid k/127.5 − 1. `steps` takes a coarser chain, and `grid` says where; unless given, what suits the
    process. `tick(b)` is called after each evaluation of the batch. Raises UsageError where the parameterisation has no
    bound (eps with alpha(1) = 0).
    """
    denoiser.parameterisation.check(denoiser.process)
    times = chain(denoiser.process, steps, grid)
    count, total = len(x_0), len(times) - 1
    if draws is None:
        index, weights = torch.arange(total, dtype=torch.int64, device="cpu").expand(count, -1), np.ones(total)
    else:
        index, weights = _stratified(keys, total, draws)
    steps_taken = index[:1] if draws is None else index  # (1, k) or (b, k)
    t, s = times[steps_taken.T + 1], times[steps_taken.T]
    moments, chain_steps = ready(x_0, denoiser.at(t), Step.between(denoiser.process, t, s))
    columns = []
    for k in range(index.shape[1]):
        moment, step = row(moments, k), row(chain_steps, k)
        x_t = moment.noised(x_0, keys.fold("eps", k).normal(*x_0.shape[1:]))
        prediction = denoiser(x_t, moment, cond)
        mse = (prediction.x_0 - x_0).square().flatten(1).mean(1)
        columns.append((bound_term(denoiser.variance, prediction, x_0, x_t, step), mse))
        if tick is not None:
            tick(count)
    end = torch.ones((), dtype=F64, device="cpu")
    process = denoiser.process
    prior = bits(prior_kl(x_0, float(process.alpha(end)), float(process.sigma(end)), process.prior_std))
    terms, mses = (torch.stack(column, 1).cpu().double().numpy() for column in zip(*columns, strict=True))
    return Terms(prior.cpu().double().numpy(), terms, mses, index.numpy(), weights)


def _stratified(keys: Keys, total: int, draws: int) -> tuple[Int[Tensor, "b k"], Float[np.ndarray, "k"]]:
    """One step a stratum, uniform within it, so that weight · term is an unbiased estimate of the stratum's sum."""
    ranges = strata(total, draws)
    uniform = keys.fold("strata").to("cpu").uniform(draws)  # (b, k)
    low, width = torch.tensor([(a, b - a) for a, b in ranges], dtype=torch.int64, device="cpu").T
    return low + torch.minimum((uniform * width).long(), width - 1), width.double().numpy()
