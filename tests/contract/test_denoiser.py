"""Every process × parameterisation by an oracle, every variance by its table, and what a denoiser refuses."""

import math

import pytest
import torch
from torch import nn

from undiffuse.diffusion.denoiser import Denoiser, network_time
from undiffuse.diffusion.gaussian import decoder_nll, kl
from undiffuse.diffusion.lattice import FINE
from undiffuse.diffusion.numbers import ready
from undiffuse.diffusion.parameterisation import PARAMETERISATIONS, X0, Eps, Mu, V
from undiffuse.diffusion.process import PROCESSES, Edm, Jsd, Linear, Process, Straight
from undiffuse.diffusion.reverse import (
    VARIANCES,
    FixedLarge,
    FixedSmall,
    Learned,
    LearnedRange,
    Prediction,
    Step,
    bound_term,
    reverse,
)
from undiffuse.errors import UsageError
from undiffuse.network.base import Conditioning

F64 = torch.float64
TABLES = {"const", "cosine", "jsd", "linear", "quad", "warmup10", "warmup50"}
CONTINUOUS = {"continuous-cosine", "edm", "sigmoid", "straight", "vdm"}
FREE = {"edm", "eps", "lattice", "v", "x0"}  # of the process; mu is not
PAIRS = [(a, b) for a in sorted(TABLES | CONTINUOUS) for b in sorted(FREE)] + [(a, "mu") for a in sorted(TABLES)]
SHAPE = (2, 3, 3)


class Answer(nn.Module):
    """A network that says what it was told to say, and remembers what it was asked."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.output = output

    def forward(self, x, time, cond):
        self.asked = x, time, cond
        return self.output


def answering(output, process=None, parameterisation=None, variance=None, time="logsnr", clip=False) -> Denoiser:
    return Denoiser(
        Answer(output), process or Linear(), parameterisation or Eps(), variance or FixedLarge(), time=time, clip=clip
    )


def uniform(seed: int, *shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    """Within [−1, 1], so that bounds on the error need no allowance for large values."""
    return 2 * torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) - 1


def grid(*n: int) -> torch.Tensor:
    return torch.tensor(n, dtype=F64) / 1000


def points(process, parameterisation: str) -> torch.Tensor:
    """t with alpha and sigma above 0, on the grid, and between for what has a meaning there."""
    t = grid(1, 2, 3, 10, 100, 250, 500, 750, 990, 998, 999, 1000)
    if parameterisation != "mu":
        t = torch.cat([t, t[:-1] + 0.00037, torch.tensor([1e-4, 1e-3 / 7], dtype=F64)])
    return t[(process.alpha(t) > 0) & (process.sigma(t) > 0)]


def steps(process: Process, t: torch.Tensor, s: torch.Tensor, dtype: torch.dtype = F64) -> Step:
    return ready(torch.empty(1, *SHAPE, dtype=dtype), Step.between(process, t, s))


def column(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, 1, 1, 1)


# --- parameterisations ---


def test_the_names():
    assert set(PROCESSES.classes) == TABLES | CONTINUOUS
    assert set(PARAMETERISATIONS.classes) == FREE | {"mu"}
    assert set(VARIANCES.classes) == {"fixed-small", "fixed-large", "learned", "learned-range"}
    assert len(PAIRS) == 12 * 5 + 7


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("process, parameterisation", PAIRS)
def test_an_oracle_gives_x_0_back(process, parameterisation, dtype):
    process, F = PROCESSES.classes[process](), PARAMETERISATIONS.classes[parameterisation]()
    t = points(process, parameterisation)
    x_0, eps = uniform(0, len(t), *SHAPE, dtype=dtype), uniform(1, len(t), *SHAPE, dtype=dtype)
    denoiser, x_t = answering(torch.zeros_like(x_0), process, F), process.marginal(x_0, eps, t)
    known = denoiser(x_t, t).output  # what is added to the network's answer: nothing but by `lattice`
    denoiser.network.output = ready(x_0, denoiser.at(t)).target(x_0, eps) - known
    assert bool((known != 0).any()) == (parameterisation == "lattice" and process.logsnr(t).max() > -2 * math.log(FINE))
    found = denoiser(x_t, t).x_0
    bound = 8 * torch.finfo(dtype).eps * F.coefficients(process, t).out.abs().clamp(min=1)
    assert ((found - x_0).abs() <= column(bound)).all()


@pytest.mark.parametrize("process, parameterisation", PAIRS)
def test_the_target_is_what_the_coefficients_invert(process, parameterisation):
    """skip alpha + out on_x_0 = 1 and skip sigma + out on_eps = 0: the two ways of writing a row agree."""
    process, F = PROCESSES.classes[process](), PARAMETERISATIONS.classes[parameterisation]()
    t = points(process, parameterisation)
    skip, out, _, on_x_0, on_eps = F.coefficients(process, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    assert ((skip * alpha + out * on_x_0 - 1).abs() <= 1e-14 * (1 + (skip * alpha).abs())).all()
    assert ((skip * sigma + out * on_eps).abs() <= 1e-14 * (1e-300 + (skip * sigma).abs())).all()


def test_edm_is_table_1_of_karras():
    """In the frame alpha = 1 the coefficients are those printed; F's target has unit variance on data of std 0.5."""
    process, t = Edm(), torch.tensor([1e-4, 0.01, 0.3, 1.0], dtype=F64)
    sigma, data = 80 * t, 0.5
    skip, out, scale, on_x_0, on_eps = PARAMETERISATIONS.build("edm").coefficients(process, t)
    close = torch.testing.assert_close
    close(skip, data**2 / (sigma**2 + data**2), rtol=1e-13, atol=0)
    close(out, sigma * data / (sigma**2 + data**2).sqrt(), rtol=1e-13, atol=0)
    close(scale, 1 / (sigma**2 + data**2).sqrt(), rtol=1e-13, atol=0)
    close((on_x_0 * data) ** 2 + on_eps**2, torch.ones_like(t), rtol=1e-13, atol=0)
    close(network_time("sigma", process, t), sigma.log() / 4, rtol=1e-13, atol=0)


def test_v_of_the_variance_preserving_frame():
    process, t = Linear(), grid(1, 500, 1000)
    alpha, sigma = process.alpha(t), process.sigma(t)
    found = torch.stack(V().coefficients(process, t))
    expected = torch.stack([alpha, -sigma, torch.ones_like(t), -sigma, alpha])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_mu_is_the_posterior_s_mean():
    process, t = Linear(), grid(1, 2, 500, 1000)
    x_0, eps = uniform(2, 4, *SHAPE), uniform(3, 4, *SHAPE)
    expected, _ = process.posterior(process.marginal(x_0, eps, t), x_0, t, t - 1 / 1000)
    found = ready(x_0, answering(torch.empty(0), process, Mu()).at(t)).target(x_0, eps)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_eps_has_the_mean_of_equation_11():
    """(x_t − β_t/√(1 − ᾱ_t) ε)/√α_t."""
    process, t, s = Linear(), grid(2, 500, 1000), grid(1, 499, 999)
    x_t, eps = uniform(4, 3, *SHAPE), uniform(5, 3, *SHAPE)
    prediction = answering(eps, process)(x_t, t)
    mean, _ = reverse(steps(process, t, s), FixedLarge(), prediction, x_t)
    beta = column(torch.linspace(1e-4, 0.02, 1000, dtype=F64)[[1, 499, 999]])
    expected = (x_t - beta / column(process.sigma(t)) * eps) / (1 - beta).sqrt()
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("process", sorted(TABLES | CONTINUOUS))
def test_what_cannot_be_sampled_is_refused(process):
    process, name = PROCESSES.classes[process](), process
    ends_at_zero = {"jsd", "continuous-cosine", "sigmoid", "straight"}
    for F in (X0(), V()):
        F.check(process)
    Eps().check(process, needs_x_0=False)  # L_simple may be trained all the same
    if name in ends_at_zero:
        message = f"eps says nothing about x_0 at t = 1, where the process {name} has alpha = 0; .* predict x0 or v"
        with pytest.raises(UsageError, match=message):
            Eps().check(process)
    else:
        Eps().check(process)
    if name in TABLES:
        Mu().check(process)
    else:
        with pytest.raises(UsageError, match=f"mu needs a β-table, and {name} has none; choose x0 or v"):
            Mu().check(process, needs_x_0=False)


# --- what the network is told ---


def test_the_network_is_told_the_time_in_its_own_words():
    t = grid(1, 2, 290, 1000)
    for kind, expected in {
        "index": torch.tensor([0.0, 1.0, 289.0, 999.0]),
        "logsnr": Linear().logsnr(t).float(),
        "sigma": ((Linear().sigma(t) / Linear().alpha(t)).log() / 4).float(),
    }.items():
        denoiser = answering(torch.zeros(4, *SHAPE), time=kind)
        told = Conditioning(label=torch.tensor([0, 1, 2, 3]))
        denoiser(torch.zeros(4, *SHAPE), t, told)
        _, time, cond = denoiser.network.asked
        assert time.dtype == torch.float32
        torch.testing.assert_close(time, expected, rtol=1e-6, atol=1e-6 if kind == "sigma" else 0)
        assert cond is told


@pytest.mark.parametrize("process", [Straight(), Jsd(), Edm()])
def test_the_time_is_finite_at_the_noise_end(process):
    one = torch.ones(1, dtype=F64)
    assert network_time("logsnr", process, one) == max(-20, process.logsnr(one))
    assert network_time("sigma", process, one) == -network_time("logsnr", process, one) / 8


def test_an_index_needs_a_table():
    with pytest.raises(
        UsageError, match='time = "index" needs a β-table, and straight has none; give --set network.time=logsnr'
    ):
        network_time("index", Straight(), torch.ones(1, dtype=F64))


def test_the_input_is_scaled_by_c_in():
    denoiser = answering(torch.zeros(2, *SHAPE), Edm(), PARAMETERISATIONS.build("edm"))
    x_t, t = uniform(6, 2, *SHAPE, dtype=torch.float32), torch.tensor([0.1, 1.0], dtype=F64)
    denoiser(x_t, t)
    expected = x_t / column((64 * t * 100 * t + 0.25).sqrt()).float()
    torch.testing.assert_close(denoiser.network.asked[0], expected, rtol=1e-6, atol=0)


# --- clipping and mu's rules ---


@pytest.mark.parametrize("name", sorted(FREE))
def test_clipping_moves_the_mean(name):
    process, F, t, s = Linear(), PARAMETERISATIONS.build(name), grid(500, 500), grid(499, 499)
    x_t = 3 * uniform(7, 2, *SHAPE)
    output = 2 * uniform(8, 2, *SHAPE)
    free, clipped = (answering(output, process, F, clip=clip)(x_t, t) for clip in (False, True))
    assert (free.x_0.abs() > 1).any() and clipped.mean is None
    assert torch.equal(clipped.x_0, free.x_0.clamp(-1, 1))
    mean, _ = reverse(steps(process, t, s), FixedSmall(), clipped, x_t)
    assert torch.equal(mean, process.posterior(x_t, clipped.x_0, t, s)[0])


def test_for_mu_clipping_touches_only_the_reported_x_0():
    process, t, s = Linear(), grid(500, 500), grid(499, 499)
    x_t, output = 3 * uniform(9, 2, *SHAPE), 2 * uniform(10, 2, *SHAPE)
    prediction = answering(output, process, Mu(), clip=True)(x_t, t)
    assert torch.equal(prediction.x_0.abs().max(), torch.ones((), dtype=F64))
    mean, _ = reverse(steps(process, t, s), FixedLarge(), prediction, x_t)
    assert torch.equal(mean, output)


def test_mu_reports_the_x_0_of_the_authors():
    """x̂_0 = (μ − c2 x_t)/c1."""
    process, t, s = Linear(), grid(2, 500), grid(1, 499)
    x_t, output = uniform(11, 2, *SHAPE), uniform(12, 2, *SHAPE)
    c2, c1 = (column(value) for value in process.posterior_coefficients(t, s))
    found = answering(output, process, Mu())(x_t, t).x_0
    torch.testing.assert_close(found, (output - c2 * x_t) / c1, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("s", [0, 498])
def test_mu_is_refused_on_a_strided_chain(s):
    process, t, s = Linear(), grid(500), grid(s)
    x_t = uniform(13, 1, *SHAPE)
    prediction = answering(x_t, process, Mu())(x_t, t)
    with pytest.raises(UsageError, match="mu prediction holds for steps of 1/T only; sample with all steps"):
        reverse(steps(process, t, s), FixedSmall(), prediction, x_t)


# --- variances ---


def log_variances(name: str, t: torch.Tensor, s: torch.Tensor, raw: float | None = None) -> torch.Tensor:
    x = torch.zeros(len(t), 1, 1, 1, dtype=F64)
    prediction = Prediction(x, x, None if raw is None else torch.full_like(x, raw))
    return VARIANCES.build(name).log_variance(steps(Linear(), t, s), prediction).flatten()


def authors() -> tuple[torch.Tensor, torch.Tensor]:
    """β and β̃ of the authors' recurrence, by plain float64."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    bar = (1 - beta).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=F64), bar[:-1]])
    return beta, beta * (1 - before) / (1 - bar)


def test_the_fixed_log_variances_over_the_whole_grid():
    """fixed-large is log [β̃_1, β_1, β_2, …]; fixed-small is log β̃ with index 0 patched by index 1."""
    beta, small = authors()
    n = torch.arange(1, 1001, dtype=F64)
    t, s = n / 1000, (n - 1) / 1000
    close = torch.testing.assert_close
    close(log_variances("fixed-large", t, s), torch.cat([small[1:2], beta[1:]]).log(), rtol=1e-11, atol=0)
    close(log_variances("fixed-small", t, s), torch.cat([small[1:2], small[1:]]).log(), rtol=1e-11, atol=0)


def test_the_fixed_log_variances_of_a_stride():
    """β of the step actually taken; at s = 0 the training table's decoder, whatever the chain."""
    bar = (1 - authors()[0]).cumprod(0)
    t, s = grid(1000, 500, 20), grid(500, 20, 0)
    floor = math.log(5.4531876613e-5)
    large = [math.log(1 - bar[999] / bar[499]), math.log(1 - bar[499] / bar[19]), floor]
    small = [
        large[0] + math.log((1 - bar[499]) / (1 - bar[999])),
        large[1] + math.log((1 - bar[19]) / (1 - bar[499])),
        floor,
    ]
    assert log_variances("fixed-large", t, s).tolist() == pytest.approx(large, rel=1e-9)
    assert log_variances("fixed-small", t, s).tolist() == pytest.approx(small, rel=1e-9)


def test_learned_is_the_network_s_word_and_holds_for_single_steps():
    t, s = grid(1, 2, 1000), grid(0, 1, 999)
    assert log_variances("learned", t, s, raw=-3.25).tolist() == [-3.25] * 3
    for t, s in [(grid(1000, 1000), grid(999, 998)), (grid(2), grid(0)), (grid(500), grid(499.5))]:
        with pytest.raises(UsageError, match="learned log-variance belongs to steps of 1/T; .* train learned-range"):
            log_variances("learned", t, s, raw=0.0)
    with pytest.raises(UsageError, match="learned log-variance belongs to steps of 1/T"):
        x = torch.zeros(1, 1, 1, 1)
        Learned().log_variance(steps(Straight(), grid(1000), grid(1000 - 1e-2)), Prediction(x, x, x))


def test_learned_range_runs_from_small_to_large_on_any_stride():
    t, s = grid(1000, 500, 2), grid(999, 20, 1)
    small, large = log_variances("fixed-small", t, s), log_variances("fixed-large", t, s)
    assert torch.equal(log_variances("learned-range", t, s, raw=-1.0), small)
    assert torch.equal(log_variances("learned-range", t, s, raw=1.0), large)
    torch.testing.assert_close(log_variances("learned-range", t, s, raw=0.5), 0.25 * small + 0.75 * large)


def test_learned_range_of_the_first_step_is_from_the_decoder_s_to_beta():
    """As in Improved DDPM, whose index 0 runs from β̃_1 to β_0."""
    t, s = grid(1), grid(0)
    assert log_variances("learned-range", t, s, raw=-1.0).tolist() == pytest.approx([math.log(5.4531876613e-5)])
    assert log_variances("learned-range", t, s, raw=1.0).tolist() == pytest.approx([math.log(1e-4)])


@pytest.mark.parametrize("variance", [Learned(), LearnedRange()])
def test_a_learned_variance_is_the_second_half_of_the_channels(variance):
    output = uniform(14, 2, 4, 3, 3)
    denoiser, x_t, t = answering(output, variance=variance), uniform(15, 2, *SHAPE), grid(1, 1000)
    prediction = denoiser(x_t, t)
    assert torch.equal(prediction.output, output[:, :2])
    assert torch.equal(prediction.raw_variance, output[:, 2:])
    with pytest.raises(UsageError, match="a learned variance needs a network with twice as many output channels"):
        reverse(steps(Linear(), t, t - 0.001), variance, prediction._replace(raw_variance=None), x_t)


# --- the score and the bound ---


@pytest.mark.parametrize("process", sorted(TABLES | CONTINUOUS))
def test_the_score_of_a_gaussian(process):
    """Data N(m, c²): x_t is N(alpha m, alpha² c² + sigma²), and E[x_0 | x_t] is linear."""
    process = PROCESSES.classes[process]()
    t, x_t, m, c = grid(1, 300, 999), uniform(16, 3, *SHAPE), 0.3, 0.4
    alpha, sigma = column(process.alpha(t)), column(process.sigma(t))
    variance = alpha**2 * c**2 + sigma**2
    x_0 = m + alpha * c**2 / variance * (x_t - alpha * m)
    found = answering(x_0, process, X0()).score(x_t, t)
    torch.testing.assert_close(found, -(x_t - alpha * m) / variance, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()])
def test_the_bound_at_the_first_step_is_the_decoder(variance):
    x_0 = torch.randint(0, 256, (2, *SHAPE), generator=torch.Generator().manual_seed(17)) / 127.5 - 1
    guess = x_0 + 0.01 * uniform(18, 2, *SHAPE, dtype=torch.float32)
    denoiser, t, s = answering(guess, parameterisation=X0(), variance=variance), grid(1, 1), grid(0, 0)
    x_t = Linear().marginal(x_0, uniform(19, 2, *SHAPE, dtype=torch.float32), t)
    found = bound_term(variance, denoiser(x_t, t), x_0, x_t, steps(Linear(), t, s, torch.float32))
    expected = decoder_nll(x_0, guess, torch.tensor(math.log(5.4531876613e-5))).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_the_bound_of_a_step_is_its_kl():
    process, t, s = Linear(), grid(2, 500, 1000), grid(1, 20, 999)
    x_0, x_t, guess = uniform(20, 3, *SHAPE), uniform(21, 3, *SHAPE), uniform(22, 3, *SHAPE)
    denoiser = answering(guess, process, X0(), FixedLarge())
    mean_q, variance_q = process.posterior(x_t, x_0, t, s)
    mean_p, variance_p = process.posterior(x_t, guess, t, s)[0], process.large_variance(t, s)
    expected = kl(mean_q, column(variance_q.log()), mean_p, column(variance_p.log())).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(
        bound_term(denoiser.variance, denoiser(x_t, t), x_0, x_t, steps(process, t, s)), expected, rtol=1e-9, atol=0
    )


def test_fixed_large_costs_half_a_bit_even_with_a_perfect_mean():
    """0.486 bits/dim from β against β̃ alone: 0.175 at i = 1, 0.075 at i = 2. fixed-small costs nothing."""
    process, n = Linear(), torch.arange(2, 1001, dtype=F64)
    t, s, x_t = n / 1000, (n - 1) / 1000, torch.zeros(999, 1, 1, 1)
    cost = {}
    for variance in (FixedLarge(), FixedSmall()):
        denoiser = answering(x_t, process, X0(), variance)
        cost[variance] = bound_term(variance, denoiser(x_t, t), x_t, x_t, steps(process, t, s, torch.float32))
    assert float(cost[FixedLarge()].sum()) == pytest.approx(0.486, abs=5e-4)
    assert cost[FixedLarge()][:2].tolist() == pytest.approx([0.175, 0.075], abs=5e-4)
    assert (cost[FixedSmall()] == 0).all()
