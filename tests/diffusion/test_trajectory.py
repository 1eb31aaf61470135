"""Distillation by trajectories: its target by hand and against an exact flow, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.codec.plans import gaussian
from undiffuse.diffusion.denoiser import X0, Denoiser, Edm, Eps, FixedSmall, Lattice, V
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.objective import Trajectory, spreads
from undiffuse.diffusion.process import Cosine, Linear, Process
from undiffuse.diffusion.process import Edm as Exploding
from undiffuse.diffusion.trajectory import Taught
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.network.base import NOTHING, Conditioning

BOUNDS = (0.3, 2.0, 80.0)


class Net(nn.Module):
    """F = tanh(weight x) + log-SNR/50 + class/10; it counts its passes."""

    def __init__(self, weight: float = 0.7):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.passes = []

    def forward(self, x, time, cond):
        self.passes.append((torch.is_grad_enabled(), len(x)))
        label = 0 if cond.label is None else cond.label.reshape(-1, 1, 1, 1) / 10
        return torch.tanh(self.weight * x) + time.reshape(-1, 1, 1, 1) / 50 + label


def built(process: Process, parameterisation=None, weight: float = 0.7) -> Denoiser:
    return Denoiser(Net(weight), process, parameterisation or V(), FixedSmall(), "logsnr", clip=False)


@pytest.mark.parametrize("process", [Cosine(), Exploding()], ids=["cosine", "edm"])
@pytest.mark.parametrize("bounds", [(80.0,), BOUNDS])
def test_the_loss_is_how_far_a_step_ends_from_where_the_teacher_does(process, bounds):
    """By hand in z: two steps of DPM-Solver++(2M), whose first is DDIM; the student's is DDIM."""
    student, teacher, n = built(process), built(process, weight=0.4), 48
    x_0, keys = Key(1).rows(n).uniform(1, 3, 2).float() * 2 - 1, Key(2).rows(n)
    cond = Conditioning(torch.arange(n) % 3)
    loss = Taught(Trajectory(bounds, substeps=2), teacher)(student, x_0, cond, keys)
    (low, _), eps = spreads(process), keys.fold("eps").normal(1, 3, 2).double().numpy()
    u = torch.exp(-process.logsnr(loss.t) / 2).numpy()
    expected = []
    for i in range(n):
        a = max((b for b in bounds if b < u[i] * (1 - 1e-9)), default=0.0)
        middle = ((u[i] ** (1 / 7) + max(a, low) ** (1 / 7)) / 2) ** 7

        def answer(of: Denoiser, z: np.ndarray, at: float, i: int = i) -> np.ndarray:
            t = process.time(-2 * torch.tensor([at], dtype=F64).log()).clamp(process.t_min, 1)
            x = (float(process.alpha(t)) * torch.from_numpy(z))[None].float()
            with torch.no_grad():
                return of(x, t, cond.at([i])).x_0[0].double().numpy()

        def moved(z: np.ndarray, x: np.ndarray, at: float, to: float) -> np.ndarray:
            return to / at * z + (1 - to / at) * x

        z = x_0[i].double().numpy() + u[i] * eps[i]
        first = answer(teacher, z, u[i])
        between = moved(z, first, u[i], middle)
        second = answer(teacher, between, middle)
        share = math.log(middle / a) / math.log(u[i] / middle) / 2 if a else 0.0  # the last step to 0 is of order 1
        there = moved(between, second + share * (second - first), middle, a)
        expected.append(np.sqrt(np.mean((moved(z, answer(student, z, u[i]), u[i], a) - there) ** 2)))
    assert loss.per_example.tolist() == pytest.approx(expected, rel=2e-3, abs=2e-4)
    assert set(np.round(u, 6)) == set(bounds)  # at nothing but the bounds


def test_only_the_student_has_a_gradient_and_each_step_is_walked_once():
    student, teacher, keys = built(Cosine()), built(Cosine()), Key(0).rows(32)
    Taught(Trajectory(BOUNDS), teacher)(student, torch.zeros(32, 1, 2, 2), NOTHING, keys).per_example.sum().backward()
    assert student.network.passes == [(True, 32)] and student.network.weight.grad.isfinite()
    assert [grad for grad, _ in teacher.network.passes] == [False] * 4 * 3 and teacher.network.weight.grad is None
    assert sum(count for _, count in teacher.network.passes) == 4 * 32


def test_a_loss_is_a_function_of_its_key_alone():
    student, teacher, x_0 = built(Cosine()), built(Cosine(), weight=0.2), torch.zeros(16, 1, 2, 2)
    taught, keys = Taught(Trajectory(BOUNDS), teacher), Key(4).rows(16)
    whole = taught(student, x_0, NOTHING, keys)
    part = taught(student, x_0[5:9], NOTHING, keys[5:9])
    assert torch.equal(whole.t[5:9], part.t)
    torch.testing.assert_close(whole.per_example[5:9], part.per_example, rtol=1e-5, atol=1e-6)


def test_the_target_is_where_the_exact_flow_leads():
    """Of Gaussian data of standard deviation 0.2, z ∝ √(0.04 + u²) along the flow."""
    model = gaussian((1, 4, 4))
    for substeps, close in ((4, 0.1), (32, 0.004)):
        taught = Taught(Trajectory(BOUNDS, substeps), model.denoiser)
        for step, (a, u) in enumerate(((0.0, 0.3), (0.3, 2.0), (2.0, 80.0))):
            times = taught.times(model.process, step)
            assert len(times) == substeps + 1 and bool((times.diff() < 0).all())
            alpha_u, alpha_a = model.process.alpha(times[[0, -1]]).tolist()
            z = Key(5).rows(50).normal(1, 4, 4) * math.hypot(0.2, u)
            ended = taught.walked((alpha_u * z), times, NOTHING) / alpha_a
            exact = z * math.hypot(0.2, a) / math.hypot(0.2, u)
            assert float((ended - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < close


def test_a_student_that_makes_the_steps_of_its_teacher_has_next_to_no_loss():
    """Data at one point: every line leads there, so D = that point is exact at every u, and any other answer is not."""

    class Point(nn.Module):
        def __init__(self, at: float):
            super().__init__()
            self.at = at

        def forward(self, x, time, cond):
            return torch.full_like(x, self.at)

    def point(at: float) -> Denoiser:
        return Denoiser(Point(at), Exploding(), X0(), FixedSmall(), "logsnr", clip=False)

    for at, exact in ((0.25, True), (0.3, False)):
        taught = Taught(Trajectory(BOUNDS), point(0.25))
        loss = taught(point(at), torch.full((64, 1, 2, 2), 0.25), NOTHING, Key(5).rows(64)).per_example
        assert float(loss.max()) < 1e-4 if exact else float(loss.min()) > 0.04


@pytest.mark.parametrize("given", [Eps(), Lattice(Eps())], ids=["eps", "lattice of eps"])
def test_what_cannot_be_distilled_is_refused(given):
    with pytest.raises(UsageError, match="cannot be distilled: its x̂_0 explodes .*; train one that predicts v, x0 or"):
        Trajectory().check(built(Cosine(), given))


def test_what_can_be_distilled_is_not():
    for given in (V(), X0(), Edm(), Lattice(V())):
        Trajectory().check(built(Cosine(), given))


@pytest.mark.parametrize("bounds", [(), (2.0, 2.0), (2.0, 1.0)])
def test_bounds_that_mean_nothing(bounds):
    with pytest.raises(UsageError, match="bounds .* do not rise; give one or more"):
        Trajectory(bounds)


@pytest.mark.parametrize(("bounds", "said"), [((200.0,), "200 to 200"), ((0.001, 80.0), "0.001 to 80")])
def test_bounds_beyond_the_process(bounds, said):
    words = f"bounds {said} are not possible; sigma/alpha of this process goes from 0.01 to 157.4"
    with pytest.raises(UsageError, match=words):
        Trajectory(bounds).check(built(Linear()))


def test_without_its_teacher_it_says_how_to_go_on():
    with pytest.raises(UsageError, match="^a distillation goes on with its teacher alone: give `undiffuse distill"):
        Trajectory()(built(Cosine()), torch.zeros(1, 1, 2, 2), NOTHING, Key(0).rows(1))
