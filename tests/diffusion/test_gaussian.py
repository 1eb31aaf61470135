"""The bound's closed forms: the authors' decoder to the digit, KL against quadrature, the prior."""

import math

import pytest
import torch

from undiffuse.diffusion.gaussian import LN2, approximate_cdf, bits, decoder_nll, kl, prior_kl

F64 = torch.float64
LOG_VARIANCE = 2 * -4.908362567647835  # β̃ of the second step of DDPM's table


def level(k: float) -> float:
    return k / 127.5 - 1


def nll_bits(x_0: float, mean: float, log_variance: float = LOG_VARIANCE) -> float:
    value = [torch.tensor([number], dtype=F64) for number in (x_0, mean, log_variance)]
    return float(decoder_nll(*value)) / LN2


@pytest.mark.parametrize(
    "k, mean, expected, digits",
    [
        (127, level(127), 1.305665, 6),
        (128, level(127), 2.046613, 6),
        (0, -1.0, 0.509908, 6),
        (255, 1.0, 0.509908, 6),
        (0, -0.98, 6.0964, 4),
        (127, 0.9, 39.863137, 6),
    ],
)
def test_decoder_vectors(k, mean, expected, digits):
    assert nll_bits(level(k), mean) == pytest.approx(expected, abs=0.500001 * 10**-digits)


def test_the_floor_is_1e_12():
    worst = -math.log2(1e-12)
    assert worst == pytest.approx(39.863, abs=5e-4)
    for k, mean in [(0, 1.0), (255, -1.0), (127, 5.0), (127, -5.0)]:
        assert nll_bits(level(k), mean) == pytest.approx(worst, rel=1e-12)
    x_0, mean = torch.tensor([level(3)]), torch.tensor([0.9])
    assert float(decoder_nll(x_0, mean, torch.tensor([LOG_VARIANCE]))) / LN2 == pytest.approx(worst, rel=1e-6)


@pytest.mark.parametrize("log_variance", [LOG_VARIANCE, -6.0, -2.0, 0.0])
@pytest.mark.parametrize("mean", [-1.02, -1.0, -0.5037, 0.0, 0.9961, 1.3])
def test_the_bins_fill_the_line(mean, log_variance):
    """256 masses sum to one, and each is the normal's to twice the error of the tanh."""
    k = torch.arange(256, dtype=F64)
    x_0 = k / 127.5 - 1
    mass = torch.exp(-decoder_nll(x_0, torch.full_like(x_0, mean), torch.tensor(log_variance, dtype=F64)))
    assert float(mass.sum()) == pytest.approx(1, abs=256e-12 + 1e-13)
    edge = torch.cat([torch.tensor([-math.inf]), (2 * k[:-1] - 254) / 255, torch.tensor([math.inf])]).to(F64)
    normal = torch.special.ndtr((edge - mean) * math.exp(-0.5 * log_variance)).diff()
    assert float((mass - normal).abs().max()) <= 2 * 1.8e-4


def test_the_cdf_is_the_tanh_approximation_and_not_erf():
    x = torch.linspace(-6, 6, 4001, dtype=F64)
    error = (approximate_cdf(x) - torch.special.ndtr(x)).abs().max()
    assert float(error) == pytest.approx(1.8e-4, rel=0.05)


@pytest.mark.parametrize(
    "mean_1, std_1, mean_2, std_2", [(0.3, 1.0, -0.2, 1.0), (0.0, 0.1, 0.05, 0.2), (1.0, 2.0, 0.0, 1.0)]
)
def test_kl_is_the_integral(mean_1, std_1, mean_2, std_2):
    x = mean_1 + std_1 * torch.linspace(-12, 12, 20001, dtype=F64)

    def log_density(mean: float, std: float) -> torch.Tensor:
        return -0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)

    p, q = log_density(mean_1, std_1), log_density(mean_2, std_2)
    integral = torch.trapezoid(p.exp() * (p - q), x)
    given = [torch.tensor([v], dtype=F64) for v in (mean_1, 2 * math.log(std_1), mean_2, 2 * math.log(std_2))]
    torch.testing.assert_close(kl(*given)[0], integral, rtol=1e-10, atol=0)


@pytest.mark.parametrize("k", [0, 1, 100, 154, 155, 156, 200, 254, 255])
def test_the_decoder_keeps_its_digits_in_both_tails_in_float32(k):
    """As a plain difference of two CDFs, masses under 1e-7 would be 0 above the mean and below it."""
    for mean in (level(k) + offset for offset in (-0.04, -0.03, -0.01, 0.0, 0.02, 0.037)):
        single = decoder_nll(*(torch.tensor([v]) for v in (level(k), mean, LOG_VARIANCE)))
        assert float(single) / LN2 == pytest.approx(nll_bits(level(k), mean), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("log_variance", [-80.0, -40.0, -9.8, 0.0, 40.0])
def test_the_decoder_is_finite_with_its_gradient(log_variance):
    """A learned variance may be anything at the start of training."""
    x_0 = torch.tensor([-1.0, level(100), 1.0, 0.9, level(3)])
    mean = torch.tensor([2.0, level(100), 0.5, -70.0, level(3) + 0.03]).requires_grad_()
    log_var = torch.full((5,), log_variance).requires_grad_()
    nll = decoder_nll(x_0, mean, log_var)
    nll.sum().backward()
    for value in (nll, mean.grad, log_var.grad):
        assert value.isfinite().all()


def test_kl_special_cases():
    zero = torch.zeros(3)
    mean = torch.tensor([0.0, -2.0, 3.0])
    assert kl(mean, zero, mean, zero).tolist() == [0, 0, 0]
    assert kl(mean, zero, zero, zero).tolist() == [0, 2, 4.5]


@pytest.mark.parametrize("ratio", [1e-1, 1e-2, -1e-3, 4e-5])
def test_kl_of_nearly_equal_variances_keeps_its_digits_in_float32(ratio):
    """As in the prior and in each of DDPM's late steps; exp(r) − 1 − r would be rounding and nothing else."""
    zero = torch.zeros(1)
    exact = 0.5 * (ratio**2 / 2 + ratio**3 / 6 + ratio**4 / 24 + ratio**5 / 120)
    assert float(kl(zero, torch.tensor([ratio]), zero, zero)) == pytest.approx(exact, rel=1e-2)
    assert float(kl(zero, torch.tensor([ratio], dtype=F64), zero.to(F64), zero)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("square, printed", [(0.25, 7e-6), (0.3, 9e-6)])
def test_the_prior_of_ddpm(square, printed):
    """L_T of the linear table, ᾱ_T = 4.035830e-5: about 1e-5 bits/dim, says the paper."""
    alpha_bar = 4.035829765e-5
    x_0 = torch.full((2, 3, 4, 4), math.sqrt(square))
    found = bits(prior_kl(x_0, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), 1.0))
    exact = 0.5 * (alpha_bar * square - alpha_bar - math.log1p(-alpha_bar)) / LN2
    assert exact == pytest.approx(printed, abs=5e-7)
    assert found.tolist() == pytest.approx([exact, exact], rel=1e-3)


def test_the_prior_of_another_frame():
    x_0 = torch.full((1, 1, 2, 2), 0.5, dtype=F64)
    found = prior_kl(x_0, 1.0, 80.0, 80.0)
    torch.testing.assert_close(found, torch.full_like(x_0, 0.5 * 0.25 / 6400), rtol=1e-12, atol=0)


def test_bits_are_a_mean_over_each_image():
    nats = torch.tensor([[0.0, 2 * LN2], [LN2, LN2 * 5]]).reshape(2, 1, 1, 2)
    torch.testing.assert_close(bits(nats), torch.tensor([1.0, 3.0]))
