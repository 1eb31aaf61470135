"""Heun's second-order method, two evaluations a step, with or without noise (Karras et al. 2022, Algorithm 2)."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from undiffuse.config import Count, NonNegative, Positive
from undiffuse.diffusion.numbers import F64, added, combined
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.sampler.base import Sampler, Turn
from undiffuse.errors import UsageError

NOISE = 1000  # σ/α from which a step is as one from pure noise
MOST = 2**0.5 - 1  # sigma/alpha is raised by this share at most, so that noise is not more than doubled


class Coefficients(NamedTuple):
    """x_t rises to x_r = rise x + std z; −alpha and sigma at r, ±alpha and sigma at s, and half the length of the step.

    `churns` says where there is a rise, else r = t; `corrects` where the rule is used.
    """

    rise: Float[Tensor, "*n"]
    std: Float[Tensor, "*n"]
    less_r: Float[Tensor, "*n"]
    sigma_r: Float[Tensor, "*n"]
    alpha_s: Float[Tensor, "*n"]
    less_s: Float[Tensor, "*n"]
    sigma_s: Float[Tensor, "*n"]
    half: Float[Tensor, "*n"]
    churns: Bool[Tensor, "*n"]
    corrects: Bool[Tensor, "*n"]


@dataclass(frozen=True)
class Heun(Sampler):
    """The trapezium rule for d(x/alpha) = ε̂ d(sigma/alpha): DDIM's step, with the mean of ε̂ at its two ends.

    The step to s = 0 is DDIM's, and so is one from pure noise, where sigma/alpha is infinite or as good as that: the
    rule would weigh a rounding of ε̂ with it.

    With `churn`, S_churn of the paper, each step of the n first adds noise that makes sigma/alpha larger by the share
    churn/n, if it lies within `churn_min` and `churn_max`, 0.05 and 50 unless given. `churn_noise` is the standard
    deviation of that noise, 1 unless given. n is that of the chain, unless `steps` says of how many it is the end.
    """

    churn: NonNegative | None = None
    churn_noise: Positive | None = None
    churn_min: NonNegative | None = None
    churn_max: Positive | None = None
    steps: Count | None = None
    order = 2

    def __post_init__(self) -> None:
        alone = [name for name, value in vars(self).items() if value is not None and name != "churn"]
        if alone and self.churn is None:
            raise UsageError(f"sampler heun: {alone[0]} belongs to the churn; give churn too, such as 40")
        low, high = self.between
        if low >= high:
            raise UsageError(f"sampler heun: churn_min {low:g} is not below churn_max {high:g}, so nothing is churned")

    @property
    def noisy(self) -> bool:
        return bool(self.churn)

    @property
    def strays(self) -> bool:
        return bool(self.churn)

    def within(self, steps: int) -> "Heun":
        return replace(self, steps=steps) if self.churn and self.steps is None else self

    @property
    def between(self) -> tuple[float, float]:
        """sigma/alpha of the steps that are churned."""
        return 0.05 if self.churn_min is None else self.churn_min, 50.0 if self.churn_max is None else self.churn_max

    def raised(self, process: Process, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """r: t, or where noise has been added to."""
        log_ratio, (low, high) = -process.logsnr(t) / 2, self.between
        inside = (log_ratio.exp() >= low) & (log_ratio.exp() <= high)
        share = inside.to(F64) * min((self.churn or 0.0) / (self.steps or 1), MOST)
        return torch.where(share > 0, process.time(-2 * (log_ratio + torch.log1p(share))).clamp(max=1), t)

    def coefficients(self, process: Process, t: Float[Tensor, "*n"], s: Float[Tensor, "*n"]) -> Coefficients:
        r = self.raised(process, t) if self.churn else t
        (alpha_r, sigma_r), (alpha_s, sigma_s) = process.alpha_sigma(r), process.alpha_sigma(s)
        rise = alpha_r / process.alpha(t) if self.churn else torch.ones_like(alpha_r)
        std = (self.churn_noise or 1.0) * sigma_r * (-torch.expm1(process.logsnr(r) - process.logsnr(t))).sqrt()
        length = sigma_s - alpha_s * sigma_r / alpha_r
        corrects = (s > 0) & (sigma_r <= NOISE * alpha_r)
        return Coefficients(rise, std, -alpha_r, sigma_r, alpha_s, -alpha_s, sigma_s, length / 2, r > t, corrects)

    def step(self, x: Float[Tensor, "b *x"], at: Turn) -> tuple[Float[Tensor, "b *x"], Any]:
        c, t = at.c, at.t
        if c.churns.all():
            x, t = combined(c.rise, x, c.std, at.keys.normal(*x.shape[1:])), self.raised(at.process, t)
        x_0 = at.denoise(x, t).x_0
        eps = added(x, c.less_r, x_0) / c.sigma_r
        euler = combined(c.alpha_s, x_0, c.sigma_s, eps)
        if not c.corrects.all():
            return euler, None
        eps_s = added(euler, c.less_s, at.denoise(euler, at.s).x_0) / c.sigma_s
        return added(euler, c.half, eps_s - eps), None
