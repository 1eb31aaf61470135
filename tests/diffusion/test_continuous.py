"""The bound in continuous time between two ends: its density, its loss, and a chain of it against both closed forms."""

import math

import pytest
import torch
from torch import nn

from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.density import AlphaSquared
from undiffuse.diffusion.gaussian import LN2
from undiffuse.diffusion.likelihood import bound, chain
from undiffuse.diffusion.numbers import per_image
from undiffuse.diffusion.objective import ContinuousVlb, Simple
from undiffuse.diffusion.parameterisation import PARAMETERISATIONS, X0
from undiffuse.diffusion.process import PROCESSES, Cosine, Edm, Sigmoid, Straight, Vdm
from undiffuse.diffusion.reverse import FixedSmall, LearnedRange
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.network.base import NOTHING

F64 = torch.float64
GRID = torch.arange(256, dtype=F64) / 127.5 - 1
MEAN, STD = 0.3, 0.4  # of Gaussian data


# --- the density ---


def test_the_density_of_gamma_is_the_formula_of_u():
    """γ(u) = −ln(e^(−Zu) (1 + e^(−γ_0)) − 1), u = frac(u_0 + row · 0.618034)."""
    process, keys = Vdm(), Key(1).rows(1000)
    gamma = -process.logsnr(AlphaSquared().t(process, keys))
    low, high = -13.3, 5.0
    z = math.log((1 + math.exp(-low)) / (1 + math.exp(-high)))
    u = (math.log(1 + math.exp(-low)) - torch.log1p(torch.exp(-gamma))) / z
    u_0 = float(keys.key.fold("t").uniform())
    expected = (u_0 + 0.6180339887498949 * torch.arange(1000, dtype=F64)) % 1
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(-torch.log(torch.exp(-z * u) * (1 + math.exp(-low)) - 1), gamma, rtol=1e-9, atol=1e-9)


def test_gamma_is_found_in_proportion_to_alpha_squared():
    """The share of each unit of γ is ∫ alpha² dγ / Z there; so evenly that a thousand rows miss it by a few."""
    process = Vdm()
    gamma = -process.logsnr(AlphaSquared().t(process, Key(2).rows(1000)))
    edges = torch.linspace(-13.3, 5, 20, dtype=F64)
    share = torch.log1p(torch.exp(-edges[:-1])) - torch.log1p(torch.exp(-edges[1:]))  # ∫ sigmoid(−γ) dγ
    assert float(share.sum()) == pytest.approx(13.3 - 0.0067, abs=1e-3)
    counts = torch.histogram(gamma, edges).hist
    assert (counts - 1000 * share / share.sum()).abs().max() < 4  # of chance it would be about 20


def test_u_is_by_the_row_of_the_batch_however_that_is_divided():
    process, keys, density = Vdm(), Key(3).rows(64), AlphaSquared()
    whole = density.t(process, keys)
    assert torch.equal(torch.cat([density.t(process, keys[:10]), density.t(process, keys[10:])]), whole)
    assert torch.equal(density.t(process, Key(3).rows(torch.tensor([63, 5]))), whole[[63, 5]])
    assert not torch.isclose(density.t(process, Key(4).rows(64)), whole).any()


# --- the loss ---


class Shrunk(nn.Module):
    """A network whose x̂_0 is E[x_0 | x_t] of N(MEAN, STD²), or that of a wrong spread, in any parameterisation."""

    def __init__(self, process, parameterisation, std: float = STD):
        super().__init__()
        self.process, self.parameterisation, self.std = process, parameterisation, std

    def forward(self, x, time, cond):
        t = self.process.time(time.double())
        alpha, sigma = (per_image(part, x) for part in self.process.alpha_sigma(t))
        skip, out, scale, *_ = (per_image(part, x) for part in self.parameterisation.coefficients(self.process, t))
        x_t = x / scale
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return (MEAN + gain * (x_t - alpha * MEAN) - skip * x_t) / out


def shrunk(process, name: str = "v") -> Denoiser:
    parameterisation = PARAMETERISATIONS.build(name)
    return Denoiser(Shrunk(process, parameterisation), process, parameterisation, FixedSmall(), "logsnr", clip=False)


def normal(count: int) -> torch.Tensor:
    return MEAN + STD * Key(5).fold("x").rows(count).normal(1, 4, 4).double()


PAIRS = [(process, name) for process in (Vdm(), Vdm(-6.0, 3.0), Edm()) for name in ("eps", "x0", "v", "edm")]
PAIRS += [(Sigmoid(), name) for name in ("x0", "v", "edm")]  # whose x̂_0 eps cannot tell at t = 1


@pytest.mark.parametrize("process, name", PAIRS, ids=lambda part: part if isinstance(part, str) else repr(part))
def test_gaussian_data_cost_half_the_logarithm_of_their_shrinkage(process, name):
    """½ ∫ mse dSNR with mse = 1/(1/STD² + SNR) is ½ ln of (1/STD² + SNR) at both ends, for every F and frame."""
    count = 4000
    losses = ContinuousVlb()(shrunk(process, name), normal(count), NOTHING, Key(6).rows(count))
    snr = process.logsnr(torch.tensor([process.t_min, 1.0], dtype=F64)).exp()
    exact = 0.5 * float(torch.log((1 / STD**2 + snr[0]) / (1 / STD**2 + snr[1]))) / LN2
    rate = losses.per_example
    assert float(rate.std()) / count**0.5 < 0.02 * exact
    assert float(rate.mean()) == pytest.approx(exact, abs=3 * float(rate.std()) / count**0.5)


@pytest.mark.parametrize("name", ["x0", "v", "edm", "lattice"])
@pytest.mark.parametrize("process", [Vdm(), Edm(), Sigmoid(), Straight()], ids=lambda process: repr(process))
def test_each_example_costs_its_error_of_x_0_by_the_fall_of_snr(process, name):
    """½ SNR mse dγ, with dγ = Z/sigmoid(−γ) du: so the weight on the error of F, of any F and frame."""
    parameterisation, x_0, keys = PARAMETERISATIONS.build(name), normal(64), Key(12).rows(64)
    denoiser = Denoiser(Wave(), process, parameterisation, FixedSmall(), "logsnr", clip=False)
    loss = ContinuousVlb()(denoiser, x_0, NOTHING, keys)
    x_t = process.marginal(x_0, keys.fold("eps").normal(1, 4, 4), loss.t)
    mse = (denoiser(x_t, loss.t).x_0 - x_0).square().mean((1, 2, 3))
    logsnr, ends = process.logsnr(loss.t), process.logsnr(torch.tensor([process.t_min, 1.0], dtype=F64))
    z = float(torch.nn.functional.softplus(ends).diff().abs())  # ln(1 + SNR) at both ends
    expected = 0.5 * logsnr.exp() * mse * z / torch.sigmoid(logsnr) / LN2
    torch.testing.assert_close(loss.per_example, expected, rtol=1e-6, atol=0)


class Wave(nn.Module):
    """Some answer, to as many channels as there are of the image."""

    def forward(self, x, time, cond):
        return torch.sin(3 * x[:, :1] + time.double()[:, None, None, None])


def test_it_is_the_unweighted_loss_of_v_times_half_the_range():
    """½ Z ‖v − F‖² in nats, Z = ln((1 + e^13.3)/(1 + e^−5)): `simple` with this density but for a number."""
    denoiser, x_0, keys = shrunk(Vdm()), normal(16), Key(7).rows(16)
    loss, simple = ContinuousVlb()(denoiser, x_0, NOTHING, keys), Simple()(denoiser, x_0, NOTHING, keys)
    z = math.log((1 + math.exp(13.3)) / (1 + math.exp(-5)))
    torch.testing.assert_close(loss.per_example, z / 2 / LN2 * simple.per_example, rtol=1e-12, atol=0)
    assert torch.equal(loss.t, simple.t) and torch.equal(loss.terms["simple"], simple.per_example)
    assert torch.equal(loss.terms["vlb"], loss.per_example)


def test_what_it_cannot_train():
    with pytest.raises(
        UsageError, match="continuous-vlb is for processes without a β-table, and cosine is one; take vdm"
    ):
        ContinuousVlb().check(shrunk(Cosine()))
    learned = Denoiser(nn.Identity(), Vdm(), X0(), LearnedRange(), "logsnr")
    with pytest.raises(UsageError, match="objective continuous-vlb cannot train a learned variance"):
        ContinuousVlb().check(learned)
    with pytest.raises(UsageError, match="eps says nothing about x_0 at t = 1, where the process straight"):
        ContinuousVlb().check(shrunk(PROCESSES.build("straight"), "eps"))


# --- a chain of it ---


class Levels(nn.Module):
    """E[x_0 | x_t] where each value is by itself one of the levels, with these probabilities; told log-SNR, by row."""

    def __init__(self, p: torch.Tensor):
        super().__init__()
        self.log_p = p.log()

    def forward(self, x, time, cond):
        alpha, sigma = (torch.sigmoid(sign * time.double()).sqrt()[:, None, None, None, None] for sign in (1, -1))
        square = ((x.double()[..., None] - alpha * GRID) / sigma).square()
        return ((self.log_p - 0.5 * square).softmax(-1) @ GRID).to(x.dtype)


P = (3 * torch.sin(torch.arange(256, dtype=F64) / 9) + torch.arange(256, dtype=F64) % 3).softmax(0)  # of each level


def levels(count: int, seed: int) -> torch.Tensor:
    u = Key(seed).fold("levels").rows(count).uniform(1, 4, 4)
    return GRID[torch.searchsorted(P.cumsum(0), u).clamp(max=255)].float()


def of_levels(p: torch.Tensor, clip: bool = False) -> Denoiser:
    return Denoiser(Levels(p), Vdm(), X0(), FixedSmall(), "logsnr", clip=clip)


def test_a_perfect_network_reaches_the_entropy_of_the_levels():
    """Prior, rate in continuous time and reconstruction are H(x_0) + KL(q(x_1) ‖ N(0, 1)): nothing is lost between."""
    count, draws, denoiser = 4000, 4, of_levels(P)
    x_0, keys = levels(count, 1), Key(8).rows(count)
    with torch.no_grad():
        rate = sum(ContinuousVlb()(denoiser, x_0, NOTHING, keys.fold(i)).per_example for i in range(draws)) / draws
    ends = bound(denoiser, x_0, keys, steps=1)  # whose rate is of no use, but not the two other terms
    total = rate.double() + torch.from_numpy(ends.prior + ends.bits[:, 0])
    entropy = -float(P @ P.log()) / LN2
    alpha, sigma = (float(part(torch.ones((), dtype=F64))) for part in (Vdm().alpha, Vdm().sigma))
    x = torch.linspace(-9, 9, 4001, dtype=F64)
    q = torch.exp(-0.5 * ((x[:, None] - alpha * GRID) / sigma).square()) @ P / (sigma * math.sqrt(2 * math.pi))
    end = float((q * (q.log() + 0.5 * x.square() + 0.5 * math.log(2 * math.pi))).sum() * (x[1] - x[0])) / LN2
    error = float(total.std()) / count**0.5
    assert error < 0.03 and entropy > 5 and 0 < end < 0.01
    assert float(total.mean()) == pytest.approx(entropy + end, abs=3 * error)


def test_what_a_chain_costs_more_is_what_its_steps_cut_off_the_curve_of_the_error():
    """L_T − L_∞ = Σ ½ ΔSNR mse − ½ ∫ mse dSNR, on a measured curve of a network that has learnt other levels."""
    wrong, steps, fine = of_levels(P.flip(0).softmax(0)), 20, 240
    a, b = (bound(wrong, levels(n, 2), Key(9).rows(n), steps=k) for n, k in ((1200, steps), (300, fine)))
    x_0, keys = levels(6000, 3), Key(10).rows(6000)
    with torch.no_grad():
        continuous = ContinuousVlb()(wrong, x_0, NOTHING, keys).per_example.double()
    chain_rate = torch.from_numpy(a.bits[:, 1:].sum(1))

    process, times = wrong.process, chain(wrong.process, fine)[1:]
    snr, every = process.logsnr(times).exp(), fine // steps
    mse = torch.from_numpy(b.mse)  # at t_min and 1/240 … 1
    coarse = torch.zeros_like(snr)
    coarse[every::every] = 0.5 * (snr[:-every:every] - snr[every::every])  # each step by the error where it begins
    # By the trapezium in γ, dSNR = SNR dγ.
    width = -process.logsnr(times).diff()
    whole = torch.zeros_like(snr)
    whole[:-1] += 0.25 * snr[:-1] * width
    whole[1:] += 0.25 * snr[1:] * width
    # With both on the same images and noise the curve's own error nearly cancels.
    expected = mse @ (coarse - whole) / LN2
    found = chain_rate.mean() - continuous.mean()
    errors = [float(part.std()) / len(part) ** 0.5 for part in (chain_rate, continuous, expected)]
    assert float(expected.mean()) > 10 * math.hypot(*errors)
    assert float(found) == pytest.approx(float(expected.mean()), abs=3 * math.hypot(*errors))


def test_the_reconstruction_asks_no_network():
    """The term of the step to 0 is the same whatever the network says; all others are not."""
    x_0, keys = levels(4, 4), Key(11).rows(4)
    a, b = (bound(of_levels(p), x_0, keys, steps=5) for p in (P, P.flip(0)))
    assert (a.bits[:, 0] == b.bits[:, 0]).all() and (a.bits[:, 1:] != b.bits[:, 1:]).all()
    a, b = (bound(of_levels(p), x_0, keys, steps=20, draws=6) for p in (P, P.flip(0)))  # 6 of the 21 terms
    assert a.bits.shape == (4, 6) and (a.index[:, 0] == 0).all() and (a.index[:, 1:] > 0).all()
    assert (a.bits[:, 0] == b.bits[:, 0]).all() and (a.bits[:, 1:] != b.bits[:, 1:]).all()
