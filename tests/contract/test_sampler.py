"""Every sampler on Gaussian data, where the exact denoiser is linear, each step's law is known and so is the truth."""

import math

import pytest
import torch

from undiffuse.diffusion.grid import Even
from undiffuse.diffusion.numbers import per_image, ready
from undiffuse.diffusion.parameterisation import Mu
from undiffuse.diffusion.process import PROCESSES, Edm, Jsd, Linear, Process, Straight
from undiffuse.diffusion.reverse import FixedLarge, FixedSmall, Learned, Prediction
from undiffuse.diffusion.sampler.ancestral import Ancestral
from undiffuse.diffusion.sampler.base import SAMPLERS, Sampler, Turn, renoise, sample
from undiffuse.diffusion.sampler.ddim import DDIM
from undiffuse.diffusion.sampler.deis import Deis, Ipndm
from undiffuse.diffusion.sampler.dpmpp import Dpmpp, DpmppSde
from undiffuse.diffusion.sampler.heun import Heun
from undiffuse.diffusion.sampler.unipc import Unipc
from undiffuse.errors import UsageError
from undiffuse.key import Key, Keys

F64 = torch.float64
MEAN, STD = 0.3, 0.4  # of the data

TABLES = {"const", "cosine", "jsd", "linear", "quad", "warmup10", "warmup50"}
SMOOTH = {"continuous-cosine", "edm", "sigmoid", "straight", "vdm"}
CASES = {
    "ancestral": Ancestral(),
    "ancestral small": Ancestral(FixedSmall()),
    "ddim": DDIM(),
    "ddim eta=0.5": DDIM(eta=0.5),
    "ddim eta=1": DDIM(eta=1.0),
    "heun": Heun(),
    "heun churn": Heun(churn=10.0, churn_max=8.0),
    "dpmpp 2": Dpmpp(),
    "dpmpp 3": Dpmpp(3),
    "dpmpp-sde": DpmppSde(),
    "unipc 1": Unipc(1),
    "unipc 2": Unipc(2),
    "unipc 3": Unipc(3),
    "unipc 2 bh1": Unipc(2, "bh1"),
    "deis 2": Deis(2),
    "deis 3": Deis(3),
    "deis 4": Deis(4),
    "ipndm 2": Ipndm(2),
    "ipndm 4": Ipndm(),
}
ALONE = ["ancestral", "ancestral small", "ddim", "ddim eta=0.5", "ddim eta=1", "heun"]  # a step knows of no other
MANY = sorted(CASES.keys() - {*ALONE, "heun churn"})  # a step remembers the last ones
every_case = pytest.mark.parametrize("case", CASES)
each_alone = pytest.mark.parametrize("case", ALONE)
every_process = pytest.mark.parametrize("process", sorted(TABLES | SMOOTH))


def test_the_names():
    assert set(PROCESSES.classes) == TABLES | SMOOTH
    assert (
        {SAMPLERS.name_of(sampler) for sampler in CASES.values()}
        == set(SAMPLERS.classes)
        == {"ancestral", "ddim", "deis", "dpmpp", "dpmpp-sde", "heun", "ipndm", "unipc"}
    )
    assert {name: cls().converges() for name, cls in SAMPLERS.classes.items()} == {
        **{"ancestral": (1, 1), "ddim": (1, 1), "deis": (3, 3), "dpmpp": (2, 2), "dpmpp-sde": (2, 2), "heun": (2, 2)},
        **{"ipndm": (2, 1), "unipc": (4, 4)},
    }


# --- Gaussian data, N(MEAN, STD²) a value ---


def exact(process: Process):
    """E[x_0 | x_t], which is linear in x_t."""

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        alpha, sigma = per_image(process.alpha(t), x), per_image(process.sigma(t), x)
        x_0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return Prediction(x_0, x_0)

    return denoise


def truth(process: Process, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of x_t."""
    return process.alpha(t) * MEAN, (process.alpha(t).square() * STD**2 + process.sigma(t).square()).sqrt()


def linear_steps(sampler: Sampler, process: Process, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """(a, b, c) of each step x -> a x + b + c z, read off three calls, two with one noise and one with another."""
    keys = [Key(0).fold("z", i).rows(len(t)) for i in range(2)]

    def step(x: float, keys: Keys) -> torch.Tensor:
        start = torch.full((len(t), 1), x, dtype=F64)
        c = ready(start, sampler.coefficients(process, t, s))
        return sampler.step(start, Turn(exact(process), process, c, t, s, None, keys))[0][:, 0]

    z = [key.normal(1)[:, 0].double() for key in keys]
    at_0 = [step(0.0, key) for key in keys]
    c = (at_0[0] - at_0[1]) / (z[0] - z[1])
    return torch.stack([step(1.0, keys[0]) - at_0[0], at_0[0] - c * z[0], c], dim=1)


def law(sampler: Sampler, process: Process, times: torch.Tensor, mean: float, std: float) -> tuple[float, float]:
    """The exact mean and standard deviation at the end of the chain."""
    t, s = times[:-1], times[1:]
    # A batch shares one t and one s, as far as the special steps at either end go.
    parts = [part for part in (slice(0, 1), slice(1, -1), slice(max(1, len(t) - 1), None)) if len(t[part])]
    for a, b, c in torch.cat([linear_steps(sampler, process, t[part], s[part]) for part in parts]).tolist():
        mean, std = a * mean + b, math.hypot(a * std, c)
    return mean, std


def logsnr_grid(steps: int, low: float = -4.0, high: float = 6.0) -> torch.Tensor:
    return torch.linspace(low, high, steps + 1, dtype=F64)


@every_case
def test_a_sampler_that_says_it_is_noisy_adds_noise_and_no_other_does(case):
    """Between the ends: chains of equal starts and other keys."""
    process, times, ends = Linear(), torch.tensor([0.5, 0.4, 0.3, 0.2], dtype=F64), []
    for seed in (0, 1):
        start = torch.zeros(2, 3, dtype=F64)
        ends.append(sample(CASES[case], exact(process), process, Key(seed).rows(2), (3,), times, start=start))
    assert torch.equal(*ends) != CASES[case].noisy


# --- one step, and the chain of them ---


@every_process
@pytest.mark.parametrize(
    "t, s", [(1.0, 0.999), (0.9, 0.5), (0.5, 0.499), (0.3, 0.001), (0.2, 0.0), (0.001, 0.0), (1.0, 0.0)]
)
def test_a_step_has_the_law_of_the_posterior_at_the_predicted_x_0(process, t, s):
    """Ancestral: a x + b is the posterior's mean, c its σ; DDIM's is Eq. 12 with σ = η β̃^½; no noise at s = 0."""
    process = PROCESSES.classes[process]()
    t, s = torch.tensor(t, dtype=F64), torch.tensor(s, dtype=F64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ((process.alpha(u), process.sigma(u)) for u in (t, s))
    slope = alpha_t * STD**2 / (alpha_t**2 * STD**2 + sigma_t**2)  # of x̂_0 in x_t
    offset = (1 - slope * alpha_t) * MEAN
    b, c = process.posterior_coefficients(t, s)
    small, large = process.small_variance(t, s), process.large_variance(t, s)
    noisy = float(s > 0)

    def found(case: str) -> list[float]:
        return linear_steps(CASES[case], process, t.reshape(1), s.reshape(1))[0].tolist()

    for case, variance in {"ancestral": large, "ancestral small": small}.items():
        expected = [b + c * slope, c * offset, noisy * variance.sqrt()]
        assert found(case) == pytest.approx([float(v) for v in expected], rel=1e-6, abs=1e-9)
    for case, eta in {"ddim": 0.0, "ddim eta=0.5": 0.5, "ddim eta=1": 1.0}.items():
        direction = (sigma_s**2 - eta**2 * small).clamp(min=0).sqrt() / sigma_t
        rest = alpha_s - direction * alpha_t
        expected = [direction + rest * slope, rest * offset, noisy * eta * small.sqrt()]
        assert found(case) == pytest.approx([float(v) for v in expected], rel=1e-6, abs=1e-9)


def test_heun_is_the_trapezium_rule():
    """In the frame alpha = 1: x + (sigma_s − sigma_t)(d_t + d_s)/2 with d = (x − x̂_0)/sigma (EDM, Algorithm 1)."""
    process, t, s = Edm(), torch.tensor([0.1], dtype=F64), torch.tensor([0.06], dtype=F64)
    high, low = 8.0, 4.8

    def d(x: float, sigma: float) -> float:
        return (x - (MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN))) / sigma

    def heun(x: float) -> float:
        euler = x + (low - high) * d(x, high)
        return x + (low - high) * (d(x, high) + d(euler, low)) / 2

    expected = [heun(1) - heun(0), heun(0), 0]
    assert linear_steps(Heun(), process, t, s)[0].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@each_alone
def test_samples_follow_the_law_of_the_discretised_chain(case):
    """Twenty thousand values in ten steps: mean and variance within four standard errors of the exact ones."""
    sampler, process = CASES[case], Linear()
    times, width, rows = Even().times(process, 10), 400, 50
    x = sample(sampler, exact(process), process, Key(1).rows(rows), (width,), times).double()
    mean, std = law(sampler, process, times, 0.0, 1.0)
    count = width * rows
    assert abs(std / STD - 1) > 1e-3  # so that it is not the truth of the data that is being met
    assert float(x.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(count))
    assert float(x.var()) == pytest.approx(std**2, rel=4 * math.sqrt(2 / count))


@every_process
def test_the_two_fixed_variances_bracket_the_truth(process):
    """β̃ is right for a single point and β for N(0, I) (DDPM, §3.2): data between them are narrowed and widened."""
    name, process = process, PROCESSES.classes[process]()
    times = Even().times(process)[:-1] if name in TABLES else process.time(logsnr_grid(300, -9, 9))
    start = [float(value) for value in truth(process, times[0])]
    (mean, small), (_, large) = (law(Ancestral(v), process, times, *start) for v in (FixedSmall(), FixedLarge()))
    expected_mean, expected = (float(value) for value in truth(process, times[-1]))
    assert mean == pytest.approx(expected_mean, rel=1e-9)
    assert 0.93 * expected < small < expected < large < 1.03 * expected


# --- the same samples in every frame ---


@every_case
def test_the_same_logsnr_grid_gives_the_same_samples_in_every_frame(case):
    """x/alpha is what is integrated: start alike, and all frames agree at each step and at the end."""
    sampler, keys, noise = (
        CASES[case],
        Key(2).rows(4),
        torch.randn(4, 6, dtype=F64, generator=torch.Generator().manual_seed(0)),
    )
    logsnr = logsnr_grid(12, -6.0, 6.0)
    found = {}
    for name in sorted(PROCESSES.classes):
        process, seen = PROCESSES.classes[name](), []
        times = torch.cat([process.time(logsnr), torch.zeros(1, dtype=F64)])
        start = process.marginal(torch.full((4, 6), MEAN, dtype=F64), noise, times[:1].expand(4))

        def watch(remaining, x, t, process=process, seen=seen):
            seen.append(x / per_image(process.alpha(t), x))

        seen.append(sample(sampler, exact(process), process, keys, (6,), times, watch, start))
        found[name] = torch.stack(seen)
    assert {PROCESSES.classes[name].frame for name in found} == {
        "variance preserving",
        "variance exploding",
        "straight",
    }
    for name in found:
        torch.testing.assert_close(
            found[name], found["straight"], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- the two names of one thing ---


@every_process
def test_ddim_with_eta_1_is_the_ancestral_step_with_the_small_variance(process):
    process = PROCESSES.classes[process]()
    times, keys = Even().times(process, 9), Key(3).rows(5)
    start = process.prior_std * keys.fold("start").normal(7).double()
    both = [
        sample(CASES[c], exact(process), process, keys, (7,), times, None, start)
        for c in ("ddim eta=1", "ancestral small")
    ]
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-7)
    t, s = times[1:-2], times[2:-1]
    steps = [linear_steps(CASES[case], process, t, s) for case in ("ddim eta=1", "ancestral small")]
    torch.testing.assert_close(*steps, rtol=1e-6, atol=1e-12)


# --- sample ---


def clipped(process: Process):
    """A denoiser with clipping, crude enough for it to matter, by single values."""

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        x_0 = (x / per_image(process.sigma(t), x)).clamp(-1, 1)
        return Prediction(x_0, x_0)

    return denoise


@every_case
@pytest.mark.parametrize("process", [Linear(), Jsd(), Straight(), Edm()], ids=lambda process: type(process).__name__)
def test_the_last_step_returns_the_clipped_x_0(case, process):
    times, said = Even().times(process, 6), []

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        assert (t >= process.t_min).all()  # a network is never called below it
        said.append(clipped(process)(x, t).x_0)
        return Prediction(said[-1], said[-1])

    x = sample(CASES[case], denoise, process, Key(4).rows(3), (50,), times)
    assert x.dtype == torch.float32 and x.isfinite().all()
    assert torch.equal(x, said[-1])
    assert float(x.abs().max()) == 1
    alone = sample(CASES[case], denoise, process, Key(4).rows(3), (50,), times[[0, -1]])
    assert torch.equal(alone, said[-1])


@each_alone
def test_a_chain_entered_half_way_sees_the_same_noise(case):
    process, keys, seen = Linear(), Key(5).rows(3), {}
    times = Even().times(process, 8)
    whole = sample(CASES[case], clipped(process), process, keys, (4,), times, lambda n, x, t: seen.update({n: (x, t)}))
    assert list(seen) == [8, 7, 6, 5, 4, 3, 2, 1]
    for remaining, (x, t) in seen.items():
        assert torch.equal(t, times[8 - remaining].expand(3))
        rest = sample(CASES[case], clipped(process), process, keys, (4,), times[8 - remaining :], start=x)
        assert torch.equal(rest, whole)


@every_case
def test_noise_does_not_depend_on_the_batch(case):
    process = Linear()
    times, keys = Even().times(process, 5), Key(6).rows(7)
    whole = sample(CASES[case], clipped(process), process, keys, (2, 3), times)
    parts = [sample(CASES[case], clipped(process), process, keys[i : i + 2], (2, 3), times) for i in range(0, 7, 2)]
    assert torch.equal(torch.cat(parts), whole)
    assert len({row.numpy().tobytes() for row in whole}) == 7
    other = sample(CASES[case], clipped(process), process, Key(7).rows(7), (2, 3), times)
    assert not torch.equal(other, whole)


@pytest.mark.parametrize("process", [Linear(), Edm()], ids=lambda process: type(process).__name__)
def test_the_chain_starts_from_the_prior(process):
    seen = []
    sample(
        DDIM(),
        clipped(process),
        process,
        Key(8).rows(50),
        (400,),
        Even().times(process, 1),
        lambda n, x, t: seen.append(x),
    )
    assert float(seen[0].std()) == pytest.approx(process.prior_std, rel=0.02)
    assert float(seen[0].mean()) == pytest.approx(0, abs=0.03 * process.prior_std)


@pytest.mark.parametrize("s", [0.5, 0.999, 1.0])
@pytest.mark.parametrize("t", [0.0, 0.001, 0.4999])
@every_process
def test_renoising_has_the_right_marginal(process, t, s):
    """A draw of q(x_s | x_t) on one of q(x_t | x_0) is one of q(x_s | x_0)."""
    process, keys = PROCESSES.classes[process](), Key(9).rows(1)
    t, s = torch.tensor([t], dtype=F64), torch.tensor([s], dtype=F64)
    z = keys.normal(1).double()

    def move(x: float) -> torch.Tensor:
        return renoise(process, torch.full((1, 1), x, dtype=F64), t, s, keys).reshape(1)

    ratio = move(1.0) - move(0.0)
    std = move(0.0) / z.reshape(1)
    close = torch.testing.assert_close
    close(ratio * process.alpha(t), process.alpha(s), rtol=1e-12, atol=1e-15)
    close((ratio * process.sigma(t)).square() + std.square(), process.sigma(s).square(), rtol=1e-12, atol=0)


@each_alone
def test_a_grid_that_rises_noises_again(case):
    """Down, up, down (RePaint): on the exact denoiser the law at the end is that of the same steps one by one."""
    sampler, process = CASES[case], Linear()
    times = torch.tensor([1.0, 0.6, 0.3, 0.7, 0.2, 0.0], dtype=F64)
    x = sample(sampler, exact(process), process, Key(10).rows(50), (400,), times).double()
    mean, std = law(sampler, process, times[:3], 0.0, 1.0)
    low, high = times[2], times[3]
    ratio = float(process.alpha(high) / process.alpha(low))
    added = float(process.sigma(high) ** 2 - (ratio * process.sigma(low)) ** 2)
    mean, std = law(sampler, process, times[3:], ratio * mean, math.sqrt((ratio * std) ** 2 + added))
    assert float(x.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(20_000))
    assert float(x.var()) == pytest.approx(std**2, rel=4 * math.sqrt(2 / 20_000))


@pytest.mark.parametrize("case", MANY)
def test_after_noise_is_added_nothing_is_remembered(case):
    """A chain that goes down, up and down is two chains, of which the second starts from what was noised again."""
    process, keys, seen = Linear(), Key(10).rows(3), {}
    times = torch.tensor([1.0, 0.8, 0.6, 0.3, 0.7, 0.5, 0.2, 0.0], dtype=F64)
    whole = sample(CASES[case], clipped(process), process, keys, (4,), times, lambda n, x, t: seen.update({n: x}))
    rest = sample(CASES[case], clipped(process), process, keys, (4,), times[4:], start=seen[3])
    assert torch.equal(rest, whole)


# --- what is refused on a strided chain ---


def test_a_learned_variance_and_mu_need_all_steps():
    process, keys = Linear(steps=10, beta_end=0.3), Key(11).rows(2)

    def learned(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        return Prediction(x.clamp(-1, 1), x, torch.full_like(x, -3.0))

    def mu(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        return Prediction(x.clamp(-1, 1), x, mean=0.9 * x)

    assert isinstance(Mu().check(process), type(None))
    for sampler, denoise, message in [
        (Ancestral(Learned()), learned, "learned log-variance belongs to steps of 1/T"),
        (Ancestral(FixedLarge()), mu, "mu prediction holds for steps of 1/T only"),
    ]:
        assert sample(sampler, denoise, process, keys, (3,), Even().times(process)).isfinite().all()
        with pytest.raises(UsageError, match=message):
            sample(sampler, denoise, process, keys, (3,), Even().times(process, 5))


def test_the_last_step_of_mu_is_the_network_s_own_mean():
    process, keys = Linear(steps=10, beta_end=0.3), Key(12).rows(2)

    def mu(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        return Prediction(torch.zeros_like(x), x, mean=torch.full_like(x, 3.0))

    assert (sample(Ancestral(), mu, process, keys, (3,), Even().times(process)) == 3).all()


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_is_within_0_and_1(eta):
    with pytest.raises(UsageError, match='sampler ddim: "eta" input should be .* than or equal to'):
        SAMPLERS.build({"name": "ddim", "eta": eta})
