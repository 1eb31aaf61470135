"""Distillation by trajectories: its target by hand and against an exact flow, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.codec.plans import gaussian
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.objective import Trajectory, spreads
from undiffuse.diffusion.parameterisation import X0, Edm, Eps, Lattice, V
from undiffuse.diffusion.process import Cosine, Linear, Process
from undiffuse.diffusion.process import Edm as Exploding
from undiffuse.diffusion.reverse import FixedSmall
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


def answer(of: Denoiser, z: np.ndarray, u: float, label: int) -> np.ndarray:
    """x̂_0 of one image at z = x/alpha."""
    process = of.process
    t = process.time(-2 * torch.tensor([u], dtype=F64).log()).clamp(process.t_min, 1)
    x = (float(process.alpha(t)) * torch.from_numpy(z))[None].float()
    with torch.no_grad():
        return of(x, t, Conditioning(torch.tensor([label]))).x_0[0].double().numpy()


def moved(z: np.ndarray, at: list[float], answers: list[np.ndarray]) -> np.ndarray:
    """A step of DPM-Solver++(2M) from at[-2] to at[-1], which is DDIM without an answer before, or to 0."""
    u, a = at[-2:]
    lean = math.log(u / a) / math.log(at[-3] / u) / 2 if a and len(answers) > 1 else 0.0
    x = answers[-1] + lean * (answers[-1] - answers[-2]) if lean else answers[-1]
    return a / u * z + (1 - a / u) * x


def by_hand(teacher: Denoiser, student: Denoiser, before: Denoiser, z: np.ndarray, bounds: tuple, label: int) -> float:
    """With two steps of the teacher for each; `before` gives the student's answers where they are used again."""
    low, walk = spreads(student.process)[0], []
    for u, a in zip(reversed(bounds), [*reversed(bounds[:-1]), low], strict=True):
        walk += [u, ((u ** (1 / 7) + a ** (1 / 7)) / 2) ** 7]
    walk, known, states = [*walk, 0.0], [], [z]
    for i in range(len(walk) - 1):
        known.append(answer(teacher, states[-1], walk[i], label))
        states.append(moved(states[-1], walk[max(0, i - 1) : i + 2], known))
    own, starts, off = walk[::2], states[::2], []
    for i in range(len(own) - 1):
        used = [answer(before, starts[i - 1], own[i - 1], label)] * (i > 0)
        there = moved(starts[i], own[max(0, i - 1) : i + 2], [*used, answer(student, starts[i], own[i], label)])
        off.append(np.sqrt(np.mean((there - starts[i + 1]) ** 2)))
    carried = [0.5 / math.hypot(0.5, a) for a in own[1:]]  # of an error, to the end, by normal data
    return float(np.average(off, weights=carried))


@pytest.mark.parametrize("process", [Cosine(), Exploding()], ids=["cosine", "edm"])
@pytest.mark.parametrize("bounds", [(80.0,), BOUNDS, (0.2, 0.7, 2.0, 80.0)])
def test_the_loss_is_how_far_steps_end_from_where_the_teacher_does(process, bounds):
    student, teacher, n = built(process), built(process, weight=0.4), 12
    x_0, keys = Key(1).rows(n).uniform(1, 3, 2).float() * 2 - 1, Key(2).rows(n)
    cond = Conditioning(torch.arange(n) % 3)
    loss = Taught(Trajectory(bounds, substeps=2), teacher)(student, x_0, cond, keys)
    z = (x_0 + bounds[-1] * keys.fold("eps").normal(1, 3, 2)).double().numpy()
    expected = [by_hand(teacher, student, student, z[i], bounds, i % 3) for i in range(n)]
    assert loss.per_example.tolist() == pytest.approx(expected, rel=2e-3, abs=2e-4)
    assert process.spread(loss.t).tolist() == pytest.approx([bounds[-1]] * n)


def test_the_gradient_is_of_the_answer_of_each_step_alone():
    student, teacher, bounds, by = built(Cosine()), built(Cosine(), weight=0.4), (0.2, 0.7, 2.0, 80.0), 2e-3
    keys = Key(2).rows(1)
    Taught(Trajectory(bounds, 2), teacher)(student, torch.zeros(1, 1, 3, 2), NOTHING, keys).per_example.sum().backward()
    z = (80 * keys.fold("eps").normal(1, 3, 2)).double().numpy()[0]
    up, down = (by_hand(teacher, built(Cosine(), weight=0.7 + each), student, z, bounds, 0) for each in (by, -by))
    assert float(student.network.weight.grad) == pytest.approx((up - down) / (2 * by), rel=0.02)


def test_only_the_student_has_a_gradient_and_all_its_steps_are_asked_at_once():
    student, teacher, keys = built(Cosine()), built(Cosine()), Key(0).rows(32)
    objective = Trajectory(BOUNDS)
    Taught(objective, teacher)(student, torch.zeros(32, 1, 2, 2), NOTHING, keys).per_example.sum().backward()
    assert student.network.passes == [(True, 32 * 3)] and student.network.weight.grad.isfinite()
    assert teacher.network.passes == [(False, 32)] * 4 * 3 and teacher.network.weight.grad is None
    assert (objective.evaluations, objective.taught) == (3, 12)  # of an image


def test_a_loss_is_a_function_of_its_key_alone():
    student, teacher, x_0 = built(Cosine()), built(Cosine(), weight=0.2), torch.zeros(16, 1, 2, 2)
    taught, keys = Taught(Trajectory(BOUNDS), teacher), Key(4).rows(16)
    whole = taught(student, x_0, NOTHING, keys)
    part = taught(student, x_0[5:9], NOTHING, keys[5:9])
    assert torch.equal(whole.t[5:9], part.t)
    torch.testing.assert_close(whole.per_example[5:9], part.per_example, rtol=1e-5, atol=1e-6)


def test_the_teacher_goes_where_the_exact_flow_leads():
    """Of Gaussian data of standard deviation 0.2, z ∝ √(0.04 + u²) along the flow."""
    model = gaussian((1, 4, 4))
    for substeps, close in ((4, 0.3), (32, 0.005), (128, 0.0003)):
        taught = Taught(Trajectory(BOUNDS, substeps), model.denoiser)
        times = taught.times(model.process)
        assert len(times) == 3 * substeps + 1 and bool((times.diff() < 0).all())
        own = model.process.spread(times[::substeps]).tolist()
        assert own == pytest.approx([80, 2, 0.3, 0], abs=1e-6)
        z = Key(5).rows(50).normal(1, 4, 4) * math.hypot(0.2, 80)
        states = taught.walked(float(model.process.alpha(times[:1])) * z, times, NOTHING)
        alphas = model.process.alpha(times[::substeps]).tolist()
        for state, alpha, u in zip(states, alphas, own, strict=True):
            exact = z * math.hypot(0.2, u) / math.hypot(0.2, 80)
            assert float((state / alpha - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < close


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
