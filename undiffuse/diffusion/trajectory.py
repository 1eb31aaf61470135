"""Distillation by trajectories: a step of the student ends where several steps of its teacher do."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.numbers import F64, ready
from undiffuse.diffusion.objective import Loss, Objective, Trajectory, spreads
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.sampler.base import Along, sample
from undiffuse.diffusion.sampler.dpmpp import Dpmpp
from undiffuse.key import Key, Keys
from undiffuse.network.base import Conditioning

RHO = 7.0  # of the teacher's steps within one of the student's: even in u^(1/ρ), as Karras et al. 2022


class Ends(NamedTuple):
    """Numbers of a step from u to a, float64 [b]: what is left of z_u at a, and the alphas there."""

    left: Float[Tensor, "b"]
    alpha_u: Float[Tensor, "b"]
    alpha_a: Float[Tensor, "b"]


@dataclass(frozen=True, eq=False)
class Taught(Objective):
    """`Trajectory` with the teacher at hand.

    In u = sigma/alpha and z = x/alpha, a step of N begins at a bound u and ends at the one below, a, or at 0. From
    z_u = x_0 + u ε the teacher walks there in several steps, to z_a. The student learns the x̂_0 whose straight line
    from z_u ends there too, x̂* = (z_a − (a/u) z_u)/(1 − a/u), by the loss (1 − a/u) |D(z_u, u) − x̂*|, the root mean
    square of what z_a is off. It is progressive distillation (Salimans & Ho 2022) in one stage, with the segments of
    SFD (Zhou et al. 2024), but from noised images in place of the student's own states.
    """

    of: Trajectory
    teacher: Denoiser

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        process, bounds = denoiser.process, torch.tensor([0.0, *self.of.bounds], dtype=F64, device="cpu")
        segment = (keys.fold("segment").uniform() * len(self.of.bounds)).long()
        u, a = bounds[segment + 1], bounds[segment]
        t, s = (process.time_of_spread(each).clamp(max=1) for each in (u, a))
        moment, ends = ready(x_0, denoiser.at(t), Ends(a / u, process.alpha(t), process.alpha(s)))
        x_t = moment.noised(x_0, keys.fold("eps").normal(*x_0.shape[1:]))
        x_s = torch.empty_like(x_t)
        for step in segment.unique().tolist():
            rows = (segment == step).nonzero().flatten()
            there = rows.to(x_0.device)
            x_s[there] = self.walked(x_t[there], self.times(process, step), cond.at(there))
        target = (x_s / ends.alpha_a - ends.left * x_t / ends.alpha_u) / (1 - ends.left)
        answer = denoiser(x_t, moment, cond).x_0
        off = torch.linalg.vector_norm((answer - target).flatten(1), dim=1) / x_0[0].numel() ** 0.5
        return Loss((1 - ends.left.flatten()) * off, {"trajectory": off}, t)

    def times(self, process: Process, step: int) -> Float[Tensor, "times"]:
        """Of the teacher's chain within a step, counted from the lowest."""
        a, u = (0.0, *self.of.bounds)[step : step + 2]
        low, _ = spreads(process)
        ends = torch.tensor([u, max(a, low)], dtype=F64, device="cpu") ** (1 / RHO)
        share = torch.linspace(0, 1, self.of.substeps + 1, dtype=F64, device="cpu")
        times = process.time_of_spread(torch.lerp(ends[0], ends[1], share) ** RHO).clamp(max=1)
        return times if a else torch.cat([times[:-1], times.new_zeros(1)])

    @torch.no_grad()
    def walked(
        self, x: Float[Tensor, "b c h w"], times: Float[Tensor, "times"], cond: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Where the teacher's chain of these times leads."""
        along, keys = Along(self.teacher, times, x, cond), Key(0).rows(len(x))  # which no deterministic solver asks
        return sample(Dpmpp(), along, self.teacher.process, keys, tuple(x.shape[1:]), times, start=x)
