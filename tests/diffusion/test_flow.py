"""The ODE's likelihood against closed forms: Gaussian data, mixtures of levels, the truncated normal."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from undiffuse.data.format.procedural import Gaussian, entropy_bits, level_probabilities
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.flow import (
    TAU,
    FlowTerms,
    Solver,
    flow_bits,
    log_density,
    start,
    truncated_entropy,
    truncated_normal,
)
from undiffuse.diffusion.gaussian import LN2
from undiffuse.diffusion.parameterisation import X0, Eps
from undiffuse.diffusion.process import PROCESSES, Cosine, Edm, Jsd, Linear, Process, Straight
from undiffuse.diffusion.reverse import FixedSmall, Prediction
from undiffuse.errors import NotFiniteError, UsageError
from undiffuse.key import Key

F64 = torch.float64
PURE_NOISE = {"jsd", "straight", "continuous-cosine", "sigmoid"}  # alpha(1) = 0, so that the prior is exact
LAW = Gaussian(shape=(1, 2, 2))  # correlated: a Jacobian that is not diagonal


def ends(process: Process) -> tuple[list[float], list[float]]:
    """alpha and sigma where the ODE ends and where it begins."""
    times = torch.tensor([start(process), 1.0], dtype=F64)
    return process.alpha(times).tolist(), process.sigma(times).tolist()


def exact(law: Gaussian, process: Process):
    """E[x_0 | x_t] in float64."""

    def denoise(x, t):
        alpha, sigma = float(process.alpha(t[:1])), float(process.sigma(t[:1]))
        x_0 = (x + sigma**2 * law.score(x, alpha, sigma)) / alpha if alpha > 0 else law.mean + 0 * x
        return Prediction(x_0, x_0)

    return denoise


def noised(law: Gaussian, process: Process, count: int) -> torch.Tensor:
    (alpha, _), (sigma, _) = ends(process)
    keys = Key(7).rows(count)
    return alpha * (law.draw(keys)[0].double() / 127.5 - 1) + sigma * keys.fold("noise").normal(*law.shape).double()


def pulled_back(law: Gaussian, process: Process, x: torch.Tensor) -> torch.Tensor:
    """log p(x): the exact flow is linear along each axis of the law, so that N(0, prior_std²) comes back in one go."""
    alpha, sigma = ends(process)
    d = x[0].numel()
    eigenvalues = [law.std**2 * value for value in (1 + (d - 1) * law.correlation, 1 - law.correlation)]
    stretch = [
        math.sqrt((alpha[1] ** 2 * v + sigma[1] ** 2) / (alpha[0] ** 2 * v + sigma[0] ** 2)) for v in eigenvalues
    ]
    rest = x.flatten(1) - alpha[0] * law.mean
    common = rest.mean(1, keepdim=True)
    end = alpha[1] * law.mean + stretch[0] * common + stretch[1] * (rest - common)
    prior = stats.norm(0, process.prior_std).logpdf(end.numpy()).sum(1)
    return torch.from_numpy(prior) + math.log(stretch[0]) + (d - 1) * math.log(stretch[1])


@pytest.mark.parametrize("name", PROCESSES.classes)
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
def test_gaussian_data_have_the_density_of_the_closed_form(name, tolerance):
    """Ten tolerances in nats/dim: each step keeps one, and there are some tens of steps."""
    process = PROCESSES.classes[name]()
    x = noised(LAW, process, 5)
    solver = Solver(tolerance, probes=None)
    found, evaluations = log_density(exact(LAW, process), process, x, start(process), Key(0).rows(5), solver, F64)
    assert found.dtype == F64 and 20 < evaluations < 300
    error = (found - pulled_back(LAW, process, x)).abs().max() / 4
    assert error < 10 * tolerance
    if name in PURE_NOISE:  # then that is the density of the noised law itself
        (alpha, _), (sigma, _) = ends(process)
        own = LAW.std**2 * (1 - LAW.correlation) * torch.eye(4, dtype=F64) + LAW.std**2 * LAW.correlation
        mean = torch.full((4,), alpha * LAW.mean, dtype=F64)
        law = torch.distributions.MultivariateNormal(mean, alpha**2 * own + sigma**2 * torch.eye(4, dtype=F64))
        assert found == pytest.approx(law.log_prob(x.flatten(1)).numpy(), abs=40 * tolerance)


def test_the_density_is_of_this_law_and_no_other():
    process, other = Straight(), Gaussian(shape=(1, 2, 2), std=0.15)
    x = noised(LAW, process, 5)
    found, _ = log_density(exact(other, process), process, x, start(process), Key(0).rows(5), Solver(1e-5, None), F64)
    assert (found - pulled_back(LAW, process, x)).abs().max() / 4 > 1e-2
    assert found == pytest.approx(pulled_back(other, process, x).numpy(), abs=4e-4)


def test_half_the_tolerance_changes_no_more_than_the_tolerance():
    process = Cosine()
    x, keys = noised(LAW, process, 5), Key(0).rows(5)
    for tolerance in (1e-3, 1e-4, 1e-5):
        coarse, fine = (
            log_density(exact(LAW, process), process, x, start(process), keys, Solver(each), F64)[0]
            for each in (tolerance, tolerance / 2)
        )
        assert 0 < (coarse - fine).abs().max() / 4 < 10 * tolerance


MATRIX = torch.tensor([[0.3, -0.5, 0.1, 0.0], [0.2, 0.1, 0.4, -0.3], [0.0, 0.6, -0.2, 0.1], [0.5, 0.0, 0.3, 0.2]])


def linear(x, t):
    x_0 = (x.flatten(1) @ MATRIX.to(x.dtype).T).view_as(x)
    return Prediction(x_0, x_0)


def test_random_probes_are_unbiased_and_as_sure_as_they_should_be():
    """For x̂_0 = A x_t in the variance-preserving frame the noise is v'Av − tr A times the length of the integral."""
    process, count = Linear(), 4000
    x = torch.full((count, 1, 2, 2), 0.1, dtype=F64)
    found = {
        probes: log_density(linear, process, x, start(process), Key(3).rows(count), Solver(1e-4, probes), F64)[0]
        for probes in (None, 1, 4)
    }
    assert found[None].std() < 1e-9
    times = torch.tensor([start(process), 1.0], dtype=F64)
    length = float(torch.asinh((process.logsnr(times) / 2).exp()).diff().abs())
    symmetric = (MATRIX + MATRIX.T).double().triu(1)
    for probes in (1, 4):
        expected = float(symmetric.square().sum().sqrt()) * length / probes**0.5
        assert float(found[probes].std()) == pytest.approx(expected, rel=0.06)
        assert abs(float((found[probes] - found[None]).mean())) < 4 * expected / count**0.5


def test_one_probe_is_exact_where_values_do_not_touch_each_other():
    process, law = Linear(), Gaussian(shape=(1, 2, 2), correlation=0.0)
    x, keys = noised(law, process, 3), Key(0).rows(3)
    exactly, estimated = (
        log_density(exact(law, process), process, x, start(process), keys, Solver(1e-5, probes), F64)[0]
        for probes in (None, 1)
    )
    assert estimated == pytest.approx(exactly.numpy(), abs=1e-9)


@pytest.mark.parametrize("tau", [0.05, 0.392, 0.61, 1.0, TAU, 8.0])
def test_the_entropy_of_the_truncated_normal(tau):
    law = stats.truncnorm(-tau, tau)
    numeric, _ = integrate.quad(lambda e: -law.pdf(e) * law.logpdf(e), -tau, tau)
    assert truncated_entropy(tau) == pytest.approx(numeric, abs=1e-9)
    assert truncated_entropy(tau) <= math.log(2 * tau)  # nothing within ±tau is less certain than the uniform law
    drawn = truncated_normal(Key(1).rows(50), tau, (1, 10, 20)).flatten().numpy()
    assert np.abs(drawn).max() < tau
    assert stats.kstest(drawn, law.cdf).pvalue > 0.01


def test_the_truncated_normal_becomes_the_uniform_and_the_whole_one():
    assert truncated_entropy(1e-3) == pytest.approx(math.log(2e-3), abs=1e-6)
    assert truncated_entropy(30.0) == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=1e-12)


@pytest.mark.parametrize("name", PROCESSES.classes)
def test_the_ode_ends_where_half_a_bin_is_three_deviations_or_at_t_min(name):
    process = PROCESSES.classes[name]()
    (alpha, _), (sigma, _) = ends(process)
    tau = alpha / (255 * sigma)
    assert start(process) >= process.t_min
    assert tau == pytest.approx(TAU) if start(process) > process.t_min else tau <= TAU
    assert (tau == pytest.approx(TAU)) == (name in {"edm", "straight", "continuous-cosine", "vdm"})


class Levels(nn.Module):
    """E[x_0 | x_t] where each value is by itself one of 256 levels, with these probabilities. It is told log-SNR."""

    def __init__(self, p: torch.Tensor, process: Process):
        super().__init__()
        self.log_p, self.process, self.seen = p.double().log(), process, []

    def log_parts(self, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        levels = torch.arange(256, dtype=F64) / 127.5 - 1
        square = ((x.double()[..., None] - alpha * levels) / sigma).square()
        return self.log_p - 0.5 * square - math.log(sigma * math.sqrt(2 * math.pi))

    def forward(self, x, time, cond=None):
        t = self.process.time(time[:1].double())
        self.seen.append((float(t), x.dtype))
        share = self.log_parts(x, float(self.process.alpha(t)), float(self.process.sigma(t))).softmax(-1)
        return (share @ (torch.arange(256, dtype=F64) / 127.5 - 1)).to(x.dtype)


def denoiser(network: nn.Module, process: Process, clip: bool = False) -> Denoiser:
    return Denoiser(network, process, X0(), FixedSmall(), "logsnr", clip=clip).eval()


def cost(p: torch.Tensor, process: Process, network: Levels) -> float:
    """The expected bits of a value by quadrature over the noise that spreads it."""
    (alpha, _), (sigma, _) = ends(process)
    tau = alpha / (255 * sigma)
    nodes, weights = np.polynomial.legendre.leggauss(48)
    noise = torch.from_numpy(tau * nodes)
    density = torch.from_numpy(tau * weights * stats.truncnorm(-tau, tau).pdf(tau * nodes))
    levels = torch.arange(256, dtype=F64)[:, None] / 127.5 - 1
    log_p = network.log_parts(alpha * levels + sigma * noise, alpha, sigma).logsumexp(-1)
    mean = log_p @ density  # (256,)
    return -float(torch.where(p > 0, p * (mean + truncated_entropy(tau) + math.log(sigma)), 0.0).sum()) / LN2


SMOOTH = level_probabilities(0.1, 0.16)
UNIFORM = torch.full((256,), 1 / 256, dtype=F64)
ROUGH = torch.zeros(256, dtype=F64).index_fill(0, torch.tensor([0, 10, 11, 200, 255]), 0.2)


@pytest.mark.parametrize(
    "process, p, least, most",
    [
        (Linear(), SMOOTH, 0.0, 3e-3),  # as the levels look at sigma = 0.01: nearly a density
        (Linear(), UNIFORM, 0.0, 0.02),  # what leaks out of both ends
        (Cosine(), ROUGH, 0.6, 1.2),  # a level that stands alone is blurred over its neighbours
        (Jsd(50), SMOOTH, 0.05, 0.2),  # sigma = 0.14 is nearly as wide as the law, and alpha is 0.99
        (Straight(), SMOOTH, 0.0, 4e-3),
        (Edm(), UNIFORM, 0.0, 4e-3),
        (Straight(), ROUGH, 0.0, 4e-3),  # −log2 erf(3/√2) = 0.0039
    ],
)
def test_the_bits_of_levels_bound_their_entropy(process, p, least, most):
    """Each image to thirty tolerances, its mean to the standard error, and the gap to the entropy as wide as stated."""
    network, count, shape = Levels(p, process), 20, (1, 2, 4)
    keys = Key(5).rows(count)
    drawn = torch.multinomial(p.expand(count, -1), 8, True, generator=torch.Generator().manual_seed(0))
    x_0 = (drawn.float() / 127.5 - 1).view(count, *shape)
    terms = flow_bits(denoiser(network, process), x_0, keys, Solver(1e-4))
    (alpha, _), (sigma, _) = ends(process)
    tau = alpha / (255 * sigma)
    z = alpha * x_0.double() + sigma * truncated_normal(keys.fold("dequantise"), tau, shape)
    nats = network.log_parts(z, alpha, sigma).logsumexp(-1).flatten(1).mean(1)
    closed = -(nats + truncated_entropy(tau) + math.log(sigma)).numpy() / LN2
    assert terms.bits == pytest.approx(closed, abs=30 * 1e-4 / LN2)
    expected, summary = cost(p, process, network), terms.summary()
    assert least <= expected - entropy_bits(p) <= most
    paired = -torch.log2(p)[drawn].double().mean(1).numpy()  # what the images that were drawn cost at best
    excess = terms.bits - paired
    assert abs(excess.mean() - (expected - entropy_bits(p))) < 4 * excess.std() / count**0.5 + 2e-3
    assert summary["images"] == count and summary["evaluations"] == len(network.seen) == terms.evaluations[0]
    times = [t for t, _ in network.seen]
    assert min(times) >= start(process) - 1e-6 and max(times) <= 1 + 1e-6  # log-SNR is float32
    assert {dtype for _, dtype in network.seen} == {torch.float32}


class Constant(nn.Module):
    """x̂_0 is the same level at every time."""

    def forward(self, x, time, cond=None):
        return 0 * x + 0.2


@pytest.mark.parametrize("process", [Cosine(), Straight(), Edm()])
def test_a_value_costs_at_least_the_noise_that_is_cut_off(process):
    """−log2 erf(tau/√2): 1.13 bits on the cosine table of a thousand steps, 0.004 where tau is 3."""
    (alpha, _), (sigma, _) = ends(process)
    x_0 = torch.full((50, 1, 8, 8), 0.2)
    terms = flow_bits(denoiser(Constant(), process), x_0, Key(2).rows(50))
    expected = -math.log2(math.erf(alpha / (255 * sigma) / math.sqrt(2)))
    assert expected == pytest.approx(1.1255 if isinstance(process, Cosine) else 0.0039, abs=1e-3)
    assert terms.bits.mean() == pytest.approx(expected, abs=4 * terms.summary()["standard_error"] + 1e-3)


def test_a_wrong_network_costs_what_it_is_wrong_by():
    """Levels taken for wider than they are: the KL of the two laws, 0.192 bits."""
    process, count = Straight(), 60
    wide = level_probabilities(0.1, 0.28)
    divergence = float((SMOOTH * (SMOOTH / wide).log2()).sum())
    drawn = torch.multinomial(SMOOTH.expand(count, -1), 16, True, generator=torch.Generator().manual_seed(0))
    x_0, keys = (drawn.float() / 127.5 - 1).view(count, 1, 4, 4), Key(5).rows(count)
    right, wrong = (
        flow_bits(denoiser(Levels(p, process), process), x_0, keys, Solver(1e-3)).bits for p in (SMOOTH, wide)
    )
    assert divergence > 0.15
    assert (wrong - right).mean() == pytest.approx(divergence, abs=4 * (wrong - right).std() / count**0.5)


def test_an_image_s_bits_depend_on_its_batch_only_within_the_tolerance():
    process, keys = Straight(), Key(5).rows(6)
    x_0 = (torch.arange(96).view(6, 1, 4, 4) * 2).float() / 127.5 - 1
    model = denoiser(Levels(UNIFORM, process), process)
    together = flow_bits(model, x_0, keys).bits
    alone = np.concatenate([flow_bits(model, x_0[i : i + 1], keys[i : i + 1]).bits for i in range(6)])
    assert np.abs(together - alone).max() < 30 * 1e-5 / LN2
    assert np.ptp(together) > 1e-3


class Broken(nn.Module):
    """NaN below t = 0.5, or other noise at each call."""

    def __init__(self, noise: bool):
        super().__init__()
        self.noise = noise

    def forward(self, x, time, cond=None):
        return 0 * x + torch.randn_like(x) if self.noise else torch.where(time[0] > 0, math.nan, x)


def test_what_has_no_likelihood_is_refused(monkeypatch):
    x_0, keys = torch.zeros(2, 1, 2, 2), Key(0).rows(2)
    for bad in (denoiser(Constant(), Linear(), clip=True), denoiser(Constant(), Linear()).train()):
        with pytest.raises(UsageError, match=r"the ODE needs a smooth denoiser; give it clip=False and \.eval\(\)"):
            flow_bits(bad, x_0, keys)
    with pytest.raises(NotFiniteError, match=r"answer at t = 0\.001 is not finite, so there is no number to give"):
        flow_bits(denoiser(Broken(noise=False), Linear()), x_0, keys)
    with pytest.raises(UsageError, match="x0 or v"):
        flow_bits(Denoiser(Constant(), Jsd(), Eps(), FixedSmall(), clip=False).eval(), x_0, keys)
    monkeypatch.setattr("undiffuse.diffusion.flow.MOST", 300)
    with pytest.raises(UsageError, match=r"took more than 300 evaluations to a tolerance of 1e-05; give a larger one"):
        flow_bits(denoiser(Broken(noise=True), Linear()), x_0, keys)
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(
        UsageError, match=r'the ODE needs torchdiffeq; install the extra: pip install "undiffuse\[ode\]"'
    ):
        flow_bits(denoiser(Constant(), Linear()), x_0, keys)


@pytest.mark.parametrize("tolerance", [0.0, -1e-5, 1e-8, 1.0, math.nan, math.inf])
def test_a_tolerance_that_cannot_be_kept_is_refused(tolerance):
    with pytest.raises(UsageError, match=r"tolerance = .* is not possible; give 1e-07 to 0\.1"):
        Solver(tolerance)
    with pytest.raises(UsageError, match="probes = 0 is not possible; give 1 or more"):
        Solver(probes=0)


def test_the_summary_of_two_images_exactly():
    terms = FlowTerms(np.array([4.0, 7.0]), np.array([50, 70]))
    assert terms.summary() == {
        "images": 2,
        "bits_per_dim": 5.5,
        "standard_error": pytest.approx(1.5),
        "evaluations": 60.0,
    }
    assert FlowTerms(np.array([4.0]), np.array([50])).summary()["standard_error"] is None
