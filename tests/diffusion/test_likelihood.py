"""The bound against closed forms: its terms on Gaussian data, its total on data of known entropy."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from undiffuse.data.format.procedural import LEVEL, Gaussian, Law, PixelMixture
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.gaussian import LN2, bits, decoder_nll, prior_kl
from undiffuse.diffusion.likelihood import Terms, bound, chain, strata
from undiffuse.diffusion.parameterisation import X0, Eps
from undiffuse.diffusion.process import PROCESSES, Cosine, Edm, Jsd, Linear, Process, Straight
from undiffuse.diffusion.reverse import FixedLarge, FixedSmall, Learned
from undiffuse.errors import UsageError
from undiffuse.key import Key

TABLES = {"const", "cosine", "jsd", "linear", "quad", "warmup10", "warmup50"}
CONTINUOUS = {"continuous-cosine", "edm", "sigmoid", "straight", "vdm"}


class Exact(nn.Module):
    """The posterior mean of x_0 under a law: the network that training is after. It is told log-SNR."""

    def __init__(self, law: Law, process: Process):
        super().__init__()
        self.law, self.process = law, process

    def forward(self, x, time, cond=None):
        t = self.process.time(time[:1].double())
        alpha, sigma = float(self.process.alpha(t)), float(self.process.sigma(t))
        score = self.law.score(x.double(), alpha, sigma)
        return ((x + sigma**2 * score) / alpha).float()


class ByRow(nn.Module):
    """`Exact` for batches whose rows stand at different times."""

    def __init__(self, exact: Exact):
        super().__init__()
        self.exact = exact

    def forward(self, x, time, cond=None):
        return torch.cat([self.exact(x[i : i + 1], time[i : i + 1]) for i in range(len(x))])


def exact(law: Law, process: Process, **fields) -> Denoiser:
    return Denoiser(ByRow(Exact(law, process)) if fields.pop("by_row", False) else Exact(law, process), process, X0(),
                    fields.pop("variance", FixedSmall()), "logsnr", clip=fields.pop("clip", False))  # fmt: skip


def images(law: Law, count: int) -> torch.Tensor:
    levels, _ = law.draw(Key(5).fold("test data").rows(count))
    return levels.float() / 127.5 - 1


def test_the_bound_is_checked_on_every_process():
    assert set(PROCESSES.classes) == TABLES | CONTINUOUS


@pytest.mark.parametrize("name", PROCESSES.classes)
def test_terms_of_gaussian_data_are_the_closed_form(name):
    """Prior, each KL and the decoder, on a chain of 30 steps; a continuous process has one more, down to t_min."""
    steps = 30
    process = PROCESSES.classes[name](steps) if name in TABLES else PROCESSES.classes[name]()
    law, count = Gaussian(shape=(1, 4, 4), correlation=0.0), 600
    terms = bound(exact(law, process), images(law, count), Key(1).rows(count), None if name in TABLES else steps)
    times = chain(process, steps)
    snr = process.logsnr(times).exp()
    left = 1 / (1 / law.std**2 + snr[1:])  # the variance that x_t leaves of x_0
    divergences = 0.5 * (snr[:-1] - snr[1:]) * left / LN2  # equal covariances; the first, infinite, is the decoder's
    wide = process.prior_std
    alpha, sigma = float(process.alpha(times[-1])), float(process.sigma(times[-1]))
    moment = alpha**2 * (law.mean**2 + law.std**2 + LEVEL**2 / 12) + sigma**2
    prior = 0.5 * (moment / wide**2 - 1 - math.log(sigma**2 / wide**2)) / LN2
    assert terms.bits.shape == (count, len(times) - 1) == (count, steps + (name in CONTINUOUS))
    found = np.column_stack([terms.prior, terms.bits])
    expected = np.array([prior, decoder_of_a_normal_error(left[0], process), *divergences[1:].tolist()])
    error = found.std(0) / count**0.5
    assert np.all(np.abs(found.mean(0) - expected) < 4.5 * error + 1e-6 * (1 + expected))
    # Rounding to levels adds 1/12 of a level squared to the variance of the data, no more.
    assert terms.mse.mean(0) == pytest.approx(left.numpy(), rel=0.05, abs=(2 / 255) ** 2)


def decoder_of_a_normal_error(variance, process: Process) -> float:
    """The mean of the decoder's bits where x̂_0 misses a level, here the middle one, by N(0, variance)."""
    z = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    level = torch.full_like(z, 127 / 127.5 - 1)
    if process.ends:  # no network: the level's own likelihood among all 256, where x_t = alpha (level + spread z)
        spread = math.exp(-float(process.logsnr(torch.tensor(process.t_min))) / 2)
        levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
        nats = -(-0.5 * ((level + spread * z)[:, None] - levels).div(spread).square()).log_softmax(1)[:, 127]
    else:
        nats = decoder_nll(level, level + variance.sqrt() * z, process.variance_floor().log())
    return float((torch.exp(-(z**2) / 2) * nats).sum() * (z[1] - z[0]) / math.sqrt(2 * math.pi)) / LN2


def test_fixed_large_adds_the_known_mismatch():
    """β in place of β̃ costs ½(r − 1 − log r) nats a value and step even where the mean is perfect."""
    process, law = Linear(steps=40, beta_end=0.3), Gaussian(shape=(1, 4, 4), correlation=0.0)
    x_0, keys = images(law, 8), Key(1).rows(8)
    small = bound(exact(law, process), x_0, keys)
    large = bound(exact(law, process, variance=FixedLarge()), x_0, keys)
    times = chain(process)
    ratio = process.small_variance(times[2:], times[1:-1]) / process.large_variance(times[2:], times[1:-1])
    mismatch = (0.5 * (ratio - 1 - ratio.log()) / LN2).numpy()
    assert large.bits[:, 1:] == pytest.approx(small.bits[:, 1:] * ratio.numpy() + mismatch, rel=1e-4, abs=1e-6)
    assert large.bits[:, 0] == pytest.approx(small.bits[:, 0])


class ExactWithVariance(Exact):
    """The true reverse step of Gaussian data is Gaussian: its mean and its variance β̃ + c² Var(x_0 | x_t)."""

    def forward(self, x, time, cond=None):
        t = (self.process.time(time[:1].double()) * self.process.steps).round() / self.process.steps
        s = t - 1 / self.process.steps
        left = 1 / (1 / self.law.std**2 + self.process.logsnr(t).exp())
        c = self.process.posterior_coefficients(t, s)[1]
        variance = float(self.process.small_variance(t, s.clamp(min=0)) + c.square() * left)
        x_0 = super().forward(x, time)
        return torch.cat([x_0, torch.full_like(x_0, math.log(variance))], 1)


@pytest.mark.parametrize("process", [Linear(steps=50, beta_start=1e-3, beta_end=0.3), Cosine(steps=100)])
def test_a_perfect_network_reaches_the_entropy_of_the_levels(process):
    """With the true reverse step nothing is lost, however coarse the chain, as long as sigma(1/T) spans some levels."""
    law = Gaussian(shape=(1, 4, 4), correlation=0.0)
    denoiser = Denoiser(ExactWithVariance(law, process), process, X0(), Learned(), "logsnr", clip=False)
    summary = bound(denoiser, images(law, 2000), Key(2).rows(2000)).summary()
    assert summary["standard_error"] < 0.01
    assert summary["bits_per_dim"] == pytest.approx(law.entropy_bits_per_dim(), abs=3 * summary["standard_error"])
    assert summary["prior"] + summary["rate"] + summary["decoder"] == pytest.approx(summary["bits_per_dim"])


class Black(nn.Module):
    """x̂_0 = 0 at every time."""

    def forward(self, x, time, cond=None):
        return x * 0


class White(nn.Module):
    """Far beyond 1."""

    def forward(self, x, time, cond=None):
        return torch.full_like(x, 3.0)


def test_the_squared_error_is_that_of_what_is_clipped():
    denoiser = Denoiser(White(), Linear(steps=10), X0(), FixedSmall(), clip=True)
    assert bound(denoiser, torch.zeros(2, 1, 1, 1), Key(0).rows(2)).mse.tolist() == [[1.0] * 10] * 2


def test_each_stratum_is_drawn_from_evenly_and_by_each_image_for_itself():
    """The step is uniform in 0 | 1–4 | 5–11 | … | 421–999, and stands for as many as there are."""
    count, counted = 400, []
    denoiser = Denoiser(Black(), Linear(), X0(), FixedSmall())
    terms = bound(denoiser, torch.zeros(count, 1, 1, 1), Key(3).rows(count), draws=8, tick=counted.append)
    assert counted == [count] * 8 and terms.mse.max() == 0
    edges = [0, 1, 5, 12, 31, 74, 177, 421, 1000]
    assert terms.weights.tolist() == [b - a for a, b in pairwise(edges)] == [1, 4, 7, 19, 43, 103, 244, 579]
    for k, (a, b) in enumerate(pairwise(edges)):
        drawn, width = terms.index[:, k], b - a
        assert drawn.min() >= a and drawn.max() < b
        assert set(drawn.tolist()) == set(range(a, b)) or width > 40
        deviation = ((width**2 - 1) / 12 / count) ** 0.5
        assert abs(drawn.mean() - (a + b - 1) / 2) <= 4.5 * deviation
    assert abs(np.corrcoef(terms.index[:, 6], terms.index[:, 7])[0, 1]) < 4.5 / count**0.5


@pytest.mark.slow
def test_stratified_times_are_unbiased():
    process, law = Linear(steps=50, beta_end=0.25), PixelMixture(shape=(1, 4, 4))
    x_0 = images(law, 400)
    whole = bound(exact(law, process), x_0, Key(3).rows(400)).totals()
    parts = bound(exact(law, process, by_row=True), x_0, Key(4).rows(400), draws=6)
    assert parts.bits.shape == (400, 6) and parts.weights.sum() == 50
    difference = parts.totals() - whole
    assert abs(difference.mean()) < 4 * difference.std() / 400**0.5
    assert abs(difference.mean()) < 0.05 * whole.mean()


@pytest.mark.parametrize("steps, draws", [(1000, 8), (1000, 1), (1000, 1000), (10, 7), (1, 1)])
def test_strata_cover_the_chain_once(steps, draws):
    ranges = strata(steps, draws)
    assert [i for a, b in ranges for i in range(a, b)] == list(range(steps))
    assert len(ranges) == draws
    assert ranges[0] == (0, 1) or draws < 8  # with enough draws the decoder's term is never left to chance


def test_strata_end_at_the_nearest_whole_numbers_of_a_geometric_row():
    """1001^(i/8) is 1, 2.37, 5.62, 13.3, 31.6, 75.0, 177.9, 422.0, 1001; 0.2 · 5 steps leave no room for two."""
    assert [a for a, _ in strata(1000, 8)] == [0, 1, 5, 12, 31, 74, 177, 421]
    assert strata(12, 4) == [(0, 1), (1, 3), (3, 6), (6, 12)]  # 13^(i/4) is 1, 1.90, 3.61, 6.85, 13
    assert strata(5, 4) == [(0, 1), (1, 2), (2, 3), (3, 5)]  # of 1, 1.57, 2.45, 3.83, 6 two round to 2


def test_the_summary_of_two_images_exactly():
    """Totals of 4 and 7 bits/dim: the mean is 5.5, and its standard error √(½ · 3²/2) = 1.5."""
    bits = np.array([[1.0, 0.5], [2.0, 1.0]])  # the second column stands for four terms
    index = np.array([[0, 3], [0, 1]])
    summary = Terms(np.array([1.0, 1.0]), bits, bits, index, np.array([1.0, 4.0])).summary()
    assert summary == {
        "images": 2, "bits_per_dim": 5.5, "standard_error": pytest.approx(1.5, rel=1e-12), "prior": 1.0, "rate": 3.0,
        "decoder": 1.5,
    }  # fmt: skip


def test_noise_does_not_depend_on_the_batch():
    law, process = Gaussian(shape=(1, 4, 4)), Linear(steps=20, beta_end=0.5)
    x_0, keys = images(law, 6), Key(1).rows(6)
    whole = bound(exact(law, process), x_0, keys)
    halves = [bound(exact(law, process), x_0[i : i + 3], keys[i : i + 3]) for i in (0, 3)]
    assert np.concatenate([half.bits for half in halves]) == pytest.approx(whole.bits, rel=1e-6, abs=1e-7)
    assert np.array_equal(np.concatenate([half.index for half in halves]), whole.index)


def test_rate_distortion_has_the_form_of_table_4():
    k = 5
    bits, mse = np.array([[1.9, 0.5, 0.25, 0.125, 0.0625]]), np.array([[0.01, 0.04, 0.09, 0.16, 0.25]])
    terms = Terms(np.array([0.001]), bits, mse, np.arange(k)[None], np.ones(k))
    curve = terms.rate_distortion()
    assert [row["step"] for row in curve] == [1, 2, 3, 4, 5]
    assert [row["rate"] for row in curve] == pytest.approx([0.001, 0.0635, 0.1885, 0.4385, 0.9385])
    assert [row["rmse"] for row in curve] == pytest.approx([127.5 * d for d in (0.5, 0.4, 0.3, 0.2, 0.1)])
    assert terms.summary()["bits_per_dim"] == pytest.approx(0.9385 + 1.9)
    with pytest.raises(UsageError, match="needs every term of the chain"):
        Terms(np.array([0.0]), bits[:, :2], mse[:, :2], np.arange(2)[None], np.array([1.0, 4.0])).rate_distortion()


def test_a_coarser_chain_still_ends_at_the_decoder():
    assert chain(Linear()).tolist() == [i / 1000 for i in range(1001)]
    for steps in (1, 7, 50, 999):
        times = chain(Linear(), steps)
        assert times[0] == 0 and times[1] == 0.001 and times[-1] == 1 and (times.diff() > 0).all()


def test_what_has_no_bound_is_refused():
    law = Gaussian(shape=(1, 4, 4))
    for process in (Jsd(steps=20), Straight()):
        denoiser = Denoiser(Exact(law, Linear()), process, Eps(), FixedSmall())
        with pytest.raises(UsageError, match="x0 or v"):
            bound(denoiser, images(law, 1), Key(0).rows(1))
    with pytest.raises(UsageError, match="0 draws an image are not possible; give 1 to 20"):
        bound(exact(law, Linear(steps=20)), images(law, 1), Key(0).rows(1), draws=0)


def test_prior_of_a_wide_process_is_measured_in_its_own_frame():
    law, process = Gaussian(shape=(1, 2, 2)), Edm(sigma_max=40.0)
    end = torch.ones((), dtype=torch.float64)
    x_0 = images(law, 4)
    got = bits(prior_kl(x_0, float(process.alpha(end)), float(process.sigma(end)), process.prior_std))
    assert got == pytest.approx((x_0.square().flatten(1).mean(1) / 1600 / 2 / math.log(2)).numpy(), rel=1e-4)
