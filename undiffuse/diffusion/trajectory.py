"""Distillation by trajectories: each step of the student ends where several steps of its teacher do."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.numbers import F64, combined, ready
from undiffuse.diffusion.objective import Loss, Objective, Trajectory, spreads
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.sampler.base import Along, sample
from undiffuse.diffusion.sampler.dpmpp import Dpmpp
from undiffuse.diffusion.sampler.multistep import summed
from undiffuse.key import Key, Keys
from undiffuse.network.base import Conditioning

DATA = 0.5  # standard deviation of the data, as Karras et al. 2022 have it
RHO = 7.0  # of the teacher's steps within one of the student's: even in u^(1/ρ), as Karras et al. 2022
SOLVER = Dpmpp()  # of teacher and student


class Ends(NamedTuple):
    """What an error of x counts where each step of the student ends, float64 [n b]."""

    scale: Float[Tensor, "rows"]


@dataclass(frozen=True, eq=False)
class Taught(Objective):
    """`Trajectory` with the teacher at hand.

    In u = sigma/alpha and z = x/alpha, a chain begins at z = x_0 + u ε with u the highest bound, and the teacher walks
    it to 0, several steps for each of the student's. The student is asked where its own steps begin, all at once, and
    from its answers the same solver makes its steps, each from the teacher's state; an answer that a later step uses
    again has no gradient there. The loss is the mean over the steps of the root mean square by which z is off at their
    ends, each times what normal data would carry of it to u = 0: 1/√(1 + (u/0.5)²), over the mean of these.
    It is progressive distillation (Salimans & Ho 2022) in one stage, on whole trajectories as SFD (Zhou et al. 2024),
    but from the teacher's states in place of the student's own, and with a solver of order 2.
    """

    of: Trajectory
    teacher: Denoiser
    labels: Int[Tensor, "classes"] | None = None  # of the teacher, for each of the student's; None where they are alike

    def __call__(self, denoiser: Denoiser, x_0: Float[Tensor, "b c h w"], cond: Conditioning, keys: Keys) -> Loss:
        process, n, b = denoiser.process, len(self.of.bounds), len(x_0)
        times = self.times(process)
        t, s = times[:-1][:: self.of.substeps], times[self.of.substeps :: self.of.substeps]
        steps = SOLVER.coefficients(process, t[:, None], s[:, None])
        carried = (1 + (process.spread(s) / DATA).square()).rsqrt()
        counted = carried / carried.mean() / process.alpha(s)
        # The rows are those of all images, step after step.
        scale, *numbers = (number.flatten().repeat_interleave(b) for number in (counted, *steps))
        asked = denoiser.at(t.repeat_interleave(b))
        moment, steps, ends = ready(x_0, asked, type(steps)(*numbers), Ends(scale))
        noise = keys.fold("eps").normal(*x_0.shape[1:])
        told = cond if self.labels is None or cond.label is None else Conditioning(self.labels[cond.label])
        states = self.walked(combined(moment.alpha[:b], x_0, moment.sigma[:b], noise), times, told)
        images = torch.arange(b, dtype=torch.int64, device=x_0.device).repeat(n)
        answers = denoiser(states[:-1].flatten(0, 1), moment, cond.at(images)).x_0
        before = torch.cat([answers[:b], answers[:-b]]).detach()  # the first step has none, and counts it 0 times
        made = summed(steps.on_x, states[:-1].flatten(0, 1), (steps.on_0, steps.on_1), (answers, before))
        off = torch.linalg.vector_norm(((made - states[1:].flatten(0, 1)) * ends.scale).flatten(1), dim=1)
        loss = off.unflatten(0, (n, b)).mean(0) / x_0[0].numel() ** 0.5
        return Loss(loss, {"trajectory": loss}, t[:1].expand(b))

    def times(self, process: Process) -> Float[Tensor, "times"]:
        """Of the teacher's chain, falling to 0; every `substeps`-th is one of the student's."""
        low, _ = spreads(process)
        ends = torch.tensor([*reversed(self.of.bounds), low], dtype=F64, device="cpu")[:, None] ** (1 / RHO)
        share = torch.linspace(0, 1, self.of.substeps + 1, dtype=F64, device="cpu")[:-1]
        times = process.time_of_spread(torch.lerp(ends[:-1], ends[1:], share).flatten() ** RHO).clamp(max=1)
        return torch.cat([times, times.new_zeros(1)])

    @torch.no_grad()
    def walked(
        self, x: Float[Tensor, "b c h w"], times: Float[Tensor, "times"], cond: Conditioning
    ) -> Float[Tensor, "states b c h w"]:
        """Where the teacher's chain of these times is at each of the student's, the first and the last included."""
        states = []

        def note(remaining: int, x: Tensor, t: Tensor) -> None:
            if remaining % self.of.substeps == 0:
                states.append(x)

        along, keys = Along(self.teacher, times, x, cond), Key(0).rows(len(x))  # which no deterministic solver asks
        end = sample(SOLVER, along, self.teacher.process, keys, tuple(x.shape[1:]), times, note, start=x)
        return torch.stack([*states, end])
