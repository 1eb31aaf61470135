"""Consistency tuning in segments: its algebra by hand, the law of u, and what it refuses."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from undiffuse.diffusion.denoiser import X0, Denoiser, Edm, Eps, FixedSmall, Lattice, V
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.objective import Consistency, spreads
from undiffuse.diffusion.process import Cosine, Linear, Process
from undiffuse.diffusion.process import Edm as Exploding
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.network.base import NOTHING

BOUNDS = (0.3, 2.0, 80.0)


class Net(nn.Module):
    """F = tanh(weight x) + log-SNR/50, with dropout if asked; it counts its passes."""

    def __init__(self, drop: float = 0.0):
        super().__init__()
        self.weight, self.drop = nn.Parameter(torch.tensor(0.7)), nn.Dropout(drop)
        self.passes, self.masks = [], []

    def forward(self, x, time, cond):
        self.passes.append((torch.is_grad_enabled(), x.detach()))
        self.masks.append(self.drop(torch.ones_like(x)))
        return torch.tanh(self.weight * x) * self.masks[-1] + time.reshape(-1, 1, 1, 1) / 50


def built(process: Process, parameterisation=None, drop: float = 0.0) -> Denoiser:
    return Denoiser(Net(drop), process, parameterisation or V(), FixedSmall(), "logsnr", clip=False)


def u_of(process: Process, t: torch.Tensor) -> torch.Tensor:
    return torch.exp(-process.logsnr(t) / 2)


@pytest.mark.parametrize("process", [Cosine(), Exploding()], ids=["cosine", "edm"])
@pytest.mark.parametrize("bounds", [(80.0,), BOUNDS])
def test_the_target_is_the_x_0_whose_line_meets_the_other_one_at_the_bound(process, bounds):
    denoiser, n = built(process), 64
    x_0, keys = Key(1).rows(n).uniform(1, 3, 2).float() * 2 - 1, Key(2).rows(n)
    objective = Consistency(bounds, q=16.0)
    loss = objective(denoiser, x_0, NOTHING, keys)
    (low, _), eps = spreads(process), keys.fold("eps").normal(1, 3, 2).double().numpy()
    u, x = u_of(process, loss.t).numpy(), x_0.double().numpy()
    expected = []
    for i in range(n):
        a = max((b for b in bounds if b < u[i]), default=0.0)
        r = u[i] * (1 - (1 + 8 / (1 + np.exp(u[i]))) / 16)
        r = a if r < max(a, low) else r

        def answer(at: float, i: int = i) -> np.ndarray:
            t = process.time(-2 * torch.tensor([at], dtype=F64).log()).clamp(process.t_min, 1)
            z = torch.from_numpy(x[i] + at * eps[i])
            with torch.no_grad():
                return denoiser((float(process.alpha(t)) * z)[None].float(), t).x_0[0].double().numpy()

        if r == a:
            target = x[i]
        else:  # where both lines are at a
            there = (a / r) * (x[i] + r * eps[i]) + (1 - a / r) * answer(r)
            target = (there - (a / u[i]) * (x[i] + u[i] * eps[i])) / (1 - a / u[i])
        off = np.sqrt(np.mean((answer(u[i]) - target) ** 2))
        expected.append((1 - a / u[i]) / (u[i] - r) * off)
    assert loss.per_example.tolist() == pytest.approx(expected, rel=2e-3, abs=1e-4)


def test_only_the_pass_at_u_has_a_gradient_and_none_is_needed_where_all_end_at_the_bound():
    denoiser, keys = built(Cosine()), Key(0).rows(8)
    Consistency(BOUNDS)(denoiser, torch.zeros(8, 1, 2, 2), NOTHING, keys).per_example.sum().backward()
    assert [grad for grad, _ in denoiser.network.passes] == [False, True]
    assert denoiser.network.weight.grad is not None and denoiser.network.weight.grad.isfinite()
    denoiser = built(Cosine())
    found = Consistency((80.0,), q=5.0 + 1e-9)  # at small u, r is below the u of t_min, which ends at the data
    near = found.before(torch.tensor([0.005, 0.02, 1.0], dtype=F64), 0.004)
    assert near[0].tolist() == [0, 0, 0] and near[1][0] == 0 and near[1][2] > 0.004
    only = Consistency((0.0065,))
    only(denoiser, torch.zeros(8, 1, 2, 2), NOTHING, keys)
    assert [grad for grad, _ in denoiser.network.passes] == [True]


def test_r_and_a_by_hand():
    """q = 256: at u = 1 the share that is left out is (1 + 8 · 0.268941)/256, at u = 50 it is 1/256."""
    a, r = Consistency(BOUNDS).before(torch.tensor([1.0, 50.0, 0.301, 0.3], dtype=F64), 0.006)
    assert a.tolist() == [0.3, 2.0, 0.3, 0.0]
    assert r.tolist() == pytest.approx([1 - 3.151531 / 256, 50 - 50 / 256, 0.3, 0.3 * (1 - 4.404460 / 256)], rel=1e-6)


def test_u_has_the_law_that_is_said():
    process, objective = Cosine(), Consistency((80.0,), sigma_data=0.3, spread=1.5)
    u = objective.drawn(process, Key(3).rows(20_000))
    middle, (low, _) = -1.1 + np.log(0.6), spreads(process)
    cut = stats.truncnorm((np.log(low) - middle) / 1.5, (np.log(80) - middle) / 1.5, middle, 1.5)
    assert stats.kstest(u.log().numpy(), cut.cdf).pvalue > 1e-3
    assert torch.equal(u[5:9], objective.drawn(process, Key(3).rows(20_000)[5:9]))


def test_both_passes_drop_the_same():
    denoiser = built(Cosine(), drop=0.5).train()
    Consistency(BOUNDS)(denoiser, torch.zeros(8, 1, 9, 9), NOTHING, Key(4).rows(8))
    first, second = denoiser.network.masks
    assert torch.equal(first, second) and 0 < float((first == 0).float().mean()) < 1
    denoiser.network.masks.clear()
    Consistency(BOUNDS)(denoiser, torch.zeros(8, 1, 9, 9), NOTHING, Key(4).rows(16)[8:])
    assert not torch.equal(denoiser.network.masks[0], first)


def test_a_true_consistency_function_has_next_to_no_loss():
    """Data at one point: every line leads there, so D = that point is exact at every u, and any other answer is not."""

    class Point(nn.Module):
        def __init__(self, at: float):
            super().__init__()
            self.at = at

        def forward(self, x, time, cond):
            return torch.full_like(x, self.at)

    for at, exact in ((0.25, True), (0.3, False)):
        denoiser = Denoiser(Point(at), Exploding(), X0(), FixedSmall(), "logsnr", clip=False)
        loss = Consistency(BOUNDS)(denoiser, torch.full((64, 1, 2, 2), 0.25), NOTHING, Key(5).rows(64)).per_example
        assert (float(loss.max()) < 1e-3) == exact


@pytest.mark.parametrize("given", [Eps(), X0(), Lattice(Eps())], ids=["eps", "x0", "lattice of eps"])
def test_what_cannot_be_distilled_is_refused(given):
    with pytest.raises(UsageError, match="cannot be distilled: its x̂_0 .*; train one that predicts v or edm"):
        Consistency().check(built(Cosine(), given))


def test_what_can_be_distilled_is_not():
    for given in (V(), Edm(), Lattice(V())):
        Consistency().check(built(Cosine(), given))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bounds": ()}, "bounds .* do not rise; give one or more"),
        ({"bounds": (2.0, 2.0)}, "do not rise"),
        ({"q": 5.0}, "q = 5 is not possible; give more than 5"),
    ],
)
def test_fields_that_mean_nothing(fields, words):
    with pytest.raises(UsageError, match=words):
        Consistency(**fields)


def test_bounds_beyond_the_process():
    with pytest.raises(UsageError, match="bounds up to 200 are not possible; sigma/alpha of this process ends at 157"):
        Consistency((200.0,)).check(built(Linear()))
