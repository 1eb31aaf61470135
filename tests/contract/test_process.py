"""Every process: its inverse, its frame, its posterior; and DDPM's tables, digit by digit."""

import math
from decimal import Decimal

import mpmath
import pytest
import torch

from undiffuse.diffusion.grid import Even
from undiffuse.diffusion.process import PROCESSES, Const, Cosine, Jsd, Linear, Process, Sigmoid, TableProcess, Vdm
from undiffuse.errors import UsageError

F64 = torch.float64
NAMES = sorted(PROCESSES.classes)
TABLES = ["const", "cosine", "jsd", "linear", "quad", "warmup10", "warmup50"]
FRAMES = {"straight": "straight", "edm": "variance exploding"}

every_process = pytest.mark.parametrize("name", NAMES)
every_table = pytest.mark.parametrize("name", TABLES)


def build(name: str) -> Process:
    return PROCESSES.classes[name]()


def times() -> torch.Tensor:
    """0, 1, the grid of a thousand, points between, and points crowded at both ends."""
    grid = torch.arange(1, 1000, dtype=F64) / 1000
    edge = torch.logspace(-12, -4, 30, dtype=F64)
    ends = torch.tensor([0, 1], dtype=F64)
    return torch.cat([ends, grid, grid + 0.00037, edge, 1 - edge]).unique()


def inside() -> torch.Tensor:
    """Points of (0, 1) that are on no grid."""
    return (torch.arange(1000, dtype=F64) + 0.37) / 1000


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """(t, s) for many s < t, both ends included."""
    points = torch.tensor([0, 0.001, 0.002, 0.0137, 0.1, 0.35, 0.5, 0.749, 0.9, 0.9983, 0.999, 1], dtype=F64)
    t, s = torch.meshgrid(points, points, indexing="ij")
    return t[t > s], s[t > s]


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-12, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def test_the_names():
    assert set(NAMES) == {*TABLES, *FRAMES, "continuous-cosine", "sigmoid", "vdm"}
    assert {name for name in NAMES if isinstance(build(name), TableProcess)} == set(TABLES)
    assert {name: build(name).frame for name in NAMES if build(name).frame != "variance preserving"} == FRAMES


@every_process
def test_time_is_the_inverse_of_logsnr(name):
    process, t = build(name), times()
    close(process.time(process.logsnr(t)), t, rtol=1e-12, atol=1e-15)
    inside = t[(t > 0) & (process.alpha(t) > 0)]
    close(process.spread(inside), process.sigma(inside) / process.alpha(inside), rtol=1e-9, atol=0)
    close(process.time_of_spread(process.spread(inside)), inside, rtol=1e-9, atol=1e-15)


@every_process
def test_logsnr_falls_strictly_from_infinity(name):
    process, t = build(name), times()
    logsnr = process.logsnr(t)
    assert logsnr.dtype == F64
    assert logsnr[0] == math.inf
    assert torch.isfinite(logsnr[1:-1]).all()
    assert (logsnr[1:] < logsnr[:-1]).all()


@every_process
def test_the_frame(name):
    process, t = build(name), times()
    alpha, sigma = process.alpha(t), process.sigma(t)
    if process.frame == "variance preserving":
        close(alpha.square() + sigma.square(), torch.ones_like(t))
    else:
        close(alpha + sigma if process.frame == "straight" else alpha, torch.ones_like(t))
    close(2 * torch.log(alpha / sigma)[1:-1], process.logsnr(t)[1:-1], rtol=1e-12, atol=1e-12)


@every_process
def test_zero_is_the_data_and_one_is_the_prior(name):
    process = build(name)
    zero, one = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
    assert process.alpha(zero).tolist() == [1, 1]
    assert process.sigma(zero).tolist() == [0, 0]
    if process.ends:  # before pure noise, at a log-SNR of its own
        close(process.logsnr(one), torch.full_like(one, -process.gamma_1))
        close(torch.hypot(process.alpha(one), process.sigma(one)), torch.full_like(one, process.prior_std))
    else:
        close(process.sigma(one), torch.full_like(one, process.prior_std), rtol=4e-4)
    x_0, eps = torch.randn(2, 2, 3, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(process.marginal(x_0, eps, zero), x_0)
    assert torch.equal(process.time(torch.full((2,), math.inf, dtype=F64)), zero)


@every_process
def test_the_posterior_composes(name):
    """q(x_s | x_t, x_0) q(x_t | x_0) has the mean and variance of q(x_s | x_0), and the right covariance with x_t."""
    process, (t, s) = build(name), pairs()
    b, c = process.posterior_coefficients(t, s)
    variance = process.small_variance(t, s)
    assert all(torch.isfinite(value).all() for value in (b, c, variance))
    alpha_t, alpha_s = process.alpha(t), process.alpha(s)
    variance_t, variance_s = process.sigma(t).square(), process.sigma(s).square()
    close(b * alpha_t + c, alpha_s)
    close(b.square() * variance_t + variance, variance_s)
    close(b * variance_t, alpha_t / alpha_s * variance_s)


@every_process
def test_the_posterior_of_images(name):
    process, (t, s) = build(name), pairs()
    x_t, x_0 = torch.randn(2, len(t), 2, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    mean, variance = process.posterior(x_t, x_0, t, s)
    b, c = process.posterior_coefficients(t, s)
    close(mean, b[:, None, None] * x_t + c[:, None, None] * x_0)
    close(variance, process.small_variance(t, s))
    ends = s == 0
    assert ends.any() and torch.equal(mean[ends], x_0[ends]) and (variance[ends] == 0).all()


@every_process
def test_the_large_variance_is_the_step_s_own(name):
    """In the variance-preserving frame it is 1 − ᾱ_t/ᾱ_s; another frame only rescales x_s."""
    process, (t, s) = build(name), pairs()
    bar_t, bar_s = torch.sigmoid(process.logsnr(t)), torch.sigmoid(process.logsnr(s))
    close(process.large_variance(t, s) * bar_s / process.alpha(s).square(), 1 - bar_t / bar_s, atol=1e-15)
    assert (process.large_variance(t, s) > process.small_variance(t, s)).all()


@every_process
@pytest.mark.parametrize("steps", [None, 1, 2, 7, 50, 999, 1000])
def test_the_grid(name, steps):
    process = build(name)
    grid = Even().times(process, steps)
    assert len(grid) == (steps or 1000) + 1
    assert (grid[0], grid[-1]) == (1, 0)
    assert (grid[1:] < grid[:-1]).all()
    if process.steps:
        assert torch.equal(grid, (grid * 1000).round() / 1000)


@every_table
def test_a_table_is_exact_on_its_grid_however_t_was_reached(name):
    process = build(name)
    table = process.log_alpha_bar[1:]
    t = torch.arange(1, 1001, dtype=F64) / 1000
    exact = table - torch.log(-torch.expm1(table))
    assert torch.equal(process.logsnr(t), exact)
    assert torch.equal(process.logsnr((t - process.t_min).clamp(min=0))[1:], exact[:-1])


@every_table
def test_a_table_has_constant_beta_within_a_step(name):
    """ᾱ is geometric between grid points; the last step of jsd, which ends at 0, is linear in ᾱ instead."""
    process = build(name)
    left = torch.arange(1000, dtype=F64)
    bar = [torch.sigmoid(process.logsnr((left + part) / 1000)) for part in (0.0, 0.25, 0.5, 1.0)]
    inner = slice(0, 999) if name == "jsd" else slice(0, 1000)
    close((bar[1] ** 2)[inner], (bar[0] * bar[2])[inner])
    close((bar[2] ** 2)[inner], (bar[0] * bar[3])[inner])
    if name == "jsd":
        close(torch.stack([bar[1][-1], bar[2][-1], bar[3][-1]]), torch.tensor([0.75, 0.5, 0.0], dtype=F64) / 1000)


# --- the authors' tables, in 40 digits ---


def betas(name: str) -> list[mpmath.mpf]:
    """β_1 … β_1000 by the definitions of the authors' code, and of Improved DDPM for the cosine."""
    start, end, count = mpmath.mpf("0.0001"), mpmath.mpf("0.02"), 1000

    def line(low: mpmath.mpf, high: mpmath.mpf, points: int) -> list[mpmath.mpf]:
        return [low + (high - low) * i / (points - 1) for i in range(points)]

    def bar(i: int) -> mpmath.mpf:
        return mpmath.cos((mpmath.mpf(i) / count + mpmath.mpf("0.008")) / mpmath.mpf("1.008") * mpmath.pi / 2) ** 2

    return {
        "linear": lambda: line(start, end, count),
        "quad": lambda: [root**2 for root in line(mpmath.sqrt(start), mpmath.sqrt(end), count)],
        "const": lambda: [end] * count,
        "warmup10": lambda: line(start, end, 100) + [end] * 900,
        "warmup50": lambda: line(start, end, 500) + [end] * 500,
        "jsd": lambda: [mpmath.mpf(1) / (count - i) for i in range(count)],
        "cosine": lambda: [min(1 - bar(i + 1) / bar(i), mpmath.mpf("0.999")) for i in range(count)],
    }[name]()


def recurrence(name: str) -> dict[str, torch.Tensor]:
    """The derived arrays of the authors' code, index i = n − 1, rounded to float64 at the very end."""
    with mpmath.workdps(40):
        beta, bar, before = betas(name), mpmath.mpf(1), mpmath.mpf(1)
        rows = []
        for b in beta:
            before, bar = bar, bar * (1 - b)
            rest = 1 - bar
            rows.append(
                {
                    "alpha": mpmath.sqrt(bar),
                    "sigma": mpmath.sqrt(rest),
                    "beta": b,
                    "beta_tilde": b * (1 - before) / rest,
                    "c1": b * mpmath.sqrt(before) / rest,
                    "c2": (1 - before) * mpmath.sqrt(1 - b) / rest,
                }
            )
        return {key: torch.tensor([float(row[key]) for row in rows], dtype=F64) for key in rows[0]}


@every_table
def test_a_table_is_the_authors_recurrence(name):
    process, exact = build(name), recurrence(name)
    t = torch.arange(1, 1001, dtype=F64) / 1000
    s = torch.arange(0, 1000, dtype=F64) / 1000
    c2, c1 = process.posterior_coefficients(t, s)
    assert (exact["alpha"][-1] == 0) == (name == "jsd")
    for key, value in {
        "alpha": process.alpha(t),
        "sigma": process.sigma(t),
        "beta": process.large_variance(t, s),
        "beta_tilde": process.small_variance(t, s),
        "c1": c1,
        "c2": c2,
    }.items():
        torch.testing.assert_close(value, exact[key], rtol=1e-12, atol=0, msg=lambda m, key=key: f"{key}: {m}")


def printed(text: str, value: float) -> None:
    """`value` rounds to the digits printed, give or take half a unit of the last."""
    unit = Decimal(1).scaleb(Decimal(text).as_tuple().exponent)
    assert abs(Decimal(float(value)) - Decimal(text)) <= unit * Decimal("0.500001"), f"{float(value)!r} is not {text}"


@pytest.mark.parametrize(
    "name, last",
    [
        ("linear", "4.035830e-5"),
        ("quad", "7.334e-4"),
        ("const", "1.683e-9"),
        ("warmup10", "4.614e-9"),
        ("warmup50", "2.606e-7"),
        ("jsd", "0"),
    ],
)
def test_the_last_alpha_bar_as_printed(name, last):
    printed(last, build(name).alpha(torch.ones((), dtype=F64)).square())


PRINTED = {
    "beta": {0: "1e-4", 1: "1.19919920e-4", 500: "0.01005995996", 999: "0.02"},
    "alpha_bar": {
        0: "0.9999",
        1: "0.9997800921",
        99: "0.8970181",
        249: "0.5240854",
        499: "0.0785872429",
        749: "0.00335055",
        999: "4.035829765e-5",
    },
    "beta_tilde": {0: "0", 1: "5.4531876613e-5", 500: "0.0100513358", 999: "0.0199999835"},
    "c1": {0: "1.0", 1: "0.5452914995", 500: "0.0030580571", 999: "1.2835149e-4"},
    "c2": {0: "0.0", 1: "0.4547084990", 500: "0.9941043508", 999: "0.9899486783"},
    "1/alpha": {0: "1.00005", 500: "3.58525069", 999: "157.410457"},
    "sigma/alpha": {0: "0.01000050", 500: "3.44296711", 999: "157.407281"},
    "alpha": {999: "0.00635282"},
    "sigma": {999: "0.99997982"},
    "log_beta_tilde": {1: "-9.8167251"},
    "beta_tilde/beta": {
        1: "0.4547",
        2: "0.6113",
        5: "0.7780",
        10: "0.8639",
        50: "0.9646",
        100: "0.9821",
        500: "0.99914",
    },
    "vlb_weight": {1: "0.2727", 10: "0.0682", 100: "0.0100", 500: "0.00551", 999: "0.0102"},
}


@pytest.mark.parametrize("key, i", [(key, i) for key in PRINTED for i in PRINTED[key]])
def test_the_linear_table_as_printed(key, i):
    process = Linear()
    t, s = torch.tensor([i + 1, i], dtype=F64) / 1000
    alpha, sigma = process.alpha(t), process.sigma(t)
    small, large = process.small_variance(t, s), process.large_variance(t, s)
    c2, c1 = process.posterior_coefficients(t, s)
    value = {
        "beta": large,
        "alpha_bar": alpha**2,
        "beta_tilde": small,
        "c1": c1,
        "c2": c2,
        "1/alpha": 1 / alpha,
        "sigma/alpha": sigma / alpha,
        "alpha": alpha,
        "sigma": sigma,
        "log_beta_tilde": small.log(),
        "beta_tilde/beta": small / large,
        "vlb_weight": large / (2 * (1 - large) * sigma**2),  # β²/(2σ²α(1 − ᾱ)) with σ² = β
    }[key]
    printed(PRINTED[key][i], value)


def test_the_decoder_s_variance_is_beta_tilde_of_the_second_step():
    process = Linear()
    printed("5.4531876613e-5", process.variance_floor())
    printed("0.9415", 127.5 * process.variance_floor().sqrt())
    assert process.variance_floor() == process.small_variance(
        torch.tensor(0.002, dtype=F64), torch.tensor(0.001, dtype=F64)
    )


def test_vdm_is_even_in_gamma_between_its_ends():
    """γ = −13.3 at t_min, 5 at 1, half-way in the middle of both; nearer to the data sigma/alpha falls as t."""
    process = Vdm()
    t = torch.tensor([process.t_min, (1 + process.t_min) / 2, 1], dtype=F64)
    close(process.logsnr(t), torch.tensor([13.3, 4.15, -5], dtype=F64))
    below = process.t_min / torch.tensor([1, 10, 1000], dtype=F64)
    ratio = process.sigma(below) / process.alpha(below)
    close(ratio, math.exp(-13.3 / 2) * below / process.t_min)
    assert process.t_min == 1e-5


# --- what is refused ---


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Linear(steps=1), "process linear has steps = 1; give 2 or more"),
        (lambda: Jsd(steps=1), "process jsd has steps = 1; give 2 or more"),
        (lambda: Linear(beta_start=0.0), r"process linear has β from 0 to 0\.02; each must be above 0"),
        (lambda: Const(beta_end=1.0), "process const has β from 1 to 1; each must be above 0 and below 1"),
        (lambda: Sigmoid(start=1.0, end=1.0), "process sigmoid runs from 1 to 1; start must be below end"),
        (lambda: Vdm(5.0, 5.0), "process vdm runs from γ = 5 to 5; gamma_0 must be below gamma_1"),
    ],
)
def test_a_schedule_that_is_none_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_a_table_may_end_at_one():
    assert Linear(steps=2, beta_end=1.0).alpha(torch.ones((), dtype=F64)) == 0
    assert Cosine(beta_max=1.0).time(Cosine(beta_max=1.0).logsnr(torch.tensor(0.9995, dtype=F64))) == pytest.approx(
        0.9995
    )
