"""The losses: the zero-output closed forms of Table 2's six rows, L_simple to the bit, and what is refused."""

import math

import pytest
import torch
from torch import nn

from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.density import Importance, LogNormal, Uniform
from undiffuse.diffusion.objective import (
    OBJECTIVES,
    Hybrid,
    Simple,
    Trajectory,
    Vlb,
    by_quartile,
    quartile_sums,
)
from undiffuse.diffusion.parameterisation import PARAMETERISATIONS, Eps, Mu
from undiffuse.diffusion.process import Jsd, Linear, Straight
from undiffuse.diffusion.reverse import VARIANCES, FixedLarge, Learned, LearnedRange
from undiffuse.diffusion.trajectory import Taught
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.network.base import NOTHING
from undiffuse.network.unet import UNet

F64 = torch.float64
SMALL = UNet(channels=32, multipliers=(1, 2), blocks=1, attention=(1,))
NARROW = UNet(channels=16, multipliers=(1, 1), blocks=1, attention=())

NAMES = {"simple", "min-snr", "p2", "sigmoid", "vlb", "hybrid", "continuous-vlb", "trajectory"}

# Table 2: parameterisation, objective, variance; and whether the paper's run was stable.
ROWS = {
    "mu, L, learned": ("mu", "vlb", "learned", True),
    "mu, L, fixed": ("mu", "vlb", "fixed-large", True),
    "mu, simple": ("mu", "simple", "fixed-large", False),
    "eps, L, learned": ("eps", "vlb", "learned", False),
    "eps, L, fixed": ("eps", "vlb", "fixed-large", True),
    "eps, simple": ("eps", "simple", "fixed-large", True),
}


class Zero(nn.Module):
    """A network that says nothing, in as many channels as are asked for."""

    def __init__(self, times: int = 1):
        super().__init__()
        self.times = times

    def forward(self, x, time, cond):
        return torch.zeros_like(x).repeat(1, self.times, 1, 1)


class Wave(nn.Module):
    """One that says something, with a gradient, in as many channels as are asked for."""

    def __init__(self, times: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.4][:times]))

    def forward(self, x, time, cond):
        return torch.cat([torch.sin(x * w + time[:, None, None, None] / 500) for w in self.weight], dim=1)


def images(n: int, channels: int = 3, size: int = 8, seed: int = 0) -> torch.Tensor:
    levels = torch.randint(0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(seed))
    return levels / 127.5 - 1


def denoiser(row: str, network: nn.Module | None = None, process=None) -> Denoiser:
    parameterisation, _, variance, _ = ROWS[row]
    learned = VARIANCES.build(variance)
    if network is None:
        network = Zero(2 if learned.learned else 1)
    return Denoiser(network, process or Linear(), PARAMETERISATIONS.build(parameterisation), learned, clip=False)


def noise(keys, x_0: torch.Tensor, process=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The t and eps that an objective draws from these keys."""
    return Uniform().t(process or Linear(), keys), keys.fold("eps").normal(*x_0.shape[1:])


# --- step 0 of Table 2 ---


def zero_output(row: str, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The loss of a network that outputs 0, in float64, from the authors' recurrence and nothing of the package."""
    parameterisation, objective, variance, _ = ROWS[row]
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    bar = (1 - beta).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=F64), bar[:-1]])
    small = beta * (1 - before) / (1 - bar)
    small[0] = small[1]
    large = torch.cat([small[1:2], beta[1:]])
    c1, c2 = beta * before.sqrt() / (1 - bar), (1 - before) * (1 - beta).sqrt() / (1 - bar)

    def at(table: torch.Tensor) -> torch.Tensor:
        return table[(t * 1000).round().long() - 1].reshape(-1, 1, 1, 1)

    x_0, eps = x_0.double(), eps.double()
    x_t = at(bar).sqrt() * x_0 + (1 - at(bar)).sqrt() * eps
    mean = at(c1) * x_0 + at(c2) * x_t
    if objective == "simple":
        return (eps if parameterisation == "eps" else mean).square().mean((1, 2, 3))

    says = torch.zeros_like(x_0) if parameterisation == "mu" else at(c1) * x_t / at(bar).sqrt() + at(c2) * x_t
    log_variance = torch.zeros_like(at(large)) if variance == "learned" else at(large).log()
    ratio = at(small).log() - log_variance
    divergence = 0.5 * (ratio.exp() - 1 - ratio + (mean - says).square() / log_variance.exp())

    def cdf(edge: torch.Tensor) -> torch.Tensor:
        z = (edge - says) / (0.5 * log_variance).exp()
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    low, high = cdf(x_0 - 1 / 255), cdf(x_0 + 1 / 255)
    mass = torch.where(x_0 < -0.999, high, torch.where(x_0 > 0.999, 1 - low, high - low))
    nats = torch.where(at(torch.arange(1000)) == 0, -mass.clamp(min=1e-12).log(), divergence)
    return nats.mean((1, 2, 3)) / math.log(2)


def test_the_rows_are_those_of_the_paper():
    assert len(ROWS) == 6
    assert [row for row, (*_, stable) in ROWS.items() if not stable] == ["mu, simple", "eps, L, learned"]
    assert set(OBJECTIVES.classes) == NAMES


def rows_with_both_ends():
    """Sixteen rows, and with them one row each that draws the first, the second and the last t."""
    root = Key(0).fold("step 0")
    n = (Uniform().t(Linear(), root.rows(4000)) * 1000).round()
    ends = [int((n == end).nonzero()[0, 0]) for end in (1, 2, 1000)]
    return root.rows(torch.tensor([*ends, *range(16)]))


@pytest.mark.parametrize("network", ["zero", "fresh"])
@pytest.mark.parametrize("row", ROWS)
def test_the_loss_at_step_0_is_the_closed_form(row, network):
    """A fresh network's output is nearly 0, so its loss is that of one whose output is 0."""
    x_0, keys = images(19), rows_with_both_ends()
    torch.manual_seed(0)
    fresh = SMALL.build(3, 6 if ROWS[row][2] == "learned" else 3) if network == "fresh" else None
    with torch.no_grad():
        loss = OBJECTIVES.build(ROWS[row][1])(denoiser(row, fresh), x_0, NOTHING, keys)
    t, eps = noise(keys, x_0)
    assert torch.equal(loss.t, t) and t[:3].tolist() == [0.001, 0.002, 1.0]
    expected = zero_output(row, x_0, eps, t)
    torch.testing.assert_close(loss.per_example.double(), expected, rtol=1e-5, atol=0)


# --- L_simple ---


def test_simple_with_eps_is_the_mean_squared_error_to_the_bit():
    x_0, keys, process = images(6), Key(1).rows(6), Linear()
    torch.manual_seed(0)
    network = SMALL.build(3, 3).eval()
    nn.init.normal_(network.conv_out.weight, std=0.1)
    loss = Simple()(Denoiser(network, process, Eps(), FixedLarge(), clip=False), x_0, NOTHING, keys)
    t, eps = noise(keys, x_0)
    F = network(process.marginal(x_0, eps, t), (t * 1000 - 1).float())
    assert torch.equal(loss.per_example, (eps - F).square().flatten(1).mean(1))
    assert torch.equal(loss.terms["simple"], loss.per_example)


@pytest.mark.parametrize("name", OBJECTIVES.classes)
def test_same_keys_same_bits_and_each_row_by_itself(name):
    assert set(OBJECTIVES.classes) == NAMES
    objective = OBJECTIVES.build(name)
    learned = objective.needs_learned
    model = Denoiser(
        Wave(2 if learned else 1), Linear(), Eps(), LearnedRange() if learned else FixedLarge(), clip=False
    )
    objective = Taught(objective, model) if isinstance(objective, Trajectory) else objective
    x_0, keys = images(8), Key(2).rows(8)
    with torch.no_grad():
        first, again = (objective(model, x_0, NOTHING, keys).per_example for _ in range(2))
        part = objective(model, x_0[3:6], NOTHING, keys[3:6]).per_example
        other = objective(model, x_0, NOTHING, Key(3).rows(8)).per_example
    assert torch.equal(first, again)
    assert torch.equal(first[3:6], part)
    assert (first != other).all()


def test_t_is_uniform_on_the_grid():
    n = (Uniform().t(Linear(steps=10), Key(4).rows(20_000)) * 10).round()
    assert n.unique().tolist() == list(range(1, 11))
    counts = n.histc(10, 1, 10)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 27.9  # χ² with 9 degrees of freedom, p = 0.001


def test_t_is_uniform_on_the_interval():
    t = Uniform().t(Straight(), Key(5).rows(20_000))
    assert t.dtype == F64 and float(t.min()) >= 1e-5 and float(t.max()) <= 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.01) and float(t.var()) == pytest.approx(1 / 12, rel=0.02)


def test_simple_with_eps_may_be_trained_where_alpha_ends_at_0():
    """x̂_0 is infinite at t = 1, and neither the loss nor its gradient is."""
    model = Denoiser(Wave(), Jsd(steps=2), Eps(), FixedLarge(), clip=False)
    Simple().check(model)
    loss = Simple()(model, images(8), NOTHING, Key(6).rows(8))
    assert (loss.t == 1).any()
    loss.per_example.sum().backward()
    assert loss.per_example.isfinite().all() and model.network.weight.grad.isfinite().all()


# --- the other weights ---


@pytest.mark.parametrize("parameterisation", [Eps(), Mu()])
@pytest.mark.parametrize("variance", [Learned(), LearnedRange()])
def test_in_hybrid_the_bound_moves_the_variance_alone(parameterisation, variance):
    def gradient(take) -> torch.Tensor:
        model = Denoiser(Wave(2), Linear(), parameterisation, variance, clip=False)
        take(model).sum().backward()
        return model.network.weight.grad

    x_0, keys = images(16), Key(8).rows(16)
    hybrid = gradient(lambda model: Hybrid(weight=0.002)(model, x_0, NOTHING, keys).per_example)
    simple = gradient(lambda model: Hybrid()(model, x_0, NOTHING, keys).terms["simple"])
    vlb = gradient(lambda model: Vlb()(model, x_0, NOTHING, keys).per_example)
    assert vlb[0] != 0 and simple[1] == 0 and vlb[1] != 0
    assert hybrid[0] == simple[0]
    torch.testing.assert_close(hybrid[1], 0.002 * 1000 * vlb[1], rtol=1e-5, atol=0)


def test_hybrid_is_the_sum_of_its_terms():
    model = Denoiser(Wave(2), Linear(steps=400), Eps(), LearnedRange(), clip=False)
    with torch.no_grad():
        loss = Hybrid(weight=0.01)(model, images(4), NOTHING, Key(9).rows(4))
    torch.testing.assert_close(loss.per_example, loss.terms["simple"] + 4 * loss.terms["vlb"], rtol=1e-6, atol=0)


# --- what is refused ---


@pytest.mark.parametrize(
    "objective, parameterisation, variance, process, message",
    [
        (
            "simple",
            "eps",
            "learned",
            Linear(),
            "objective simple cannot train a learned variance; choose vlb or hybrid",
        ),
        ("min-snr", "v", "learned-range", Linear(), "objective min-snr cannot train a learned variance"),
        ("hybrid", "eps", "fixed-small", Linear(), "objective hybrid is for a learned variance; choose learned-range"),
        ("vlb", "v", "fixed-small", Straight(), "objective vlb needs a β-table, and straight has none; choose simple"),
        ("hybrid", "v", "learned-range", Straight(), "objective hybrid needs a β-table, and straight has none"),
        ("simple", "mu", "fixed-large", Straight(), "mu needs a β-table, and straight has none; choose x0 or v"),
        (
            "vlb",
            "eps",
            "fixed-large",
            Jsd(),
            "eps says nothing about x_0 at t = 1, where the process jsd has alpha = 0",
        ),
        ("min-snr", "eps", "fixed-large", Jsd(), "eps says nothing about x_0 at t = 1"),
        ("p2", "eps", "learned", Linear(), "objective p2 cannot train a learned variance; choose vlb or hybrid"),
        ("sigmoid", "eps", "fixed-large", Jsd(), "eps says nothing about x_0 at t = 1"),
        (
            Vlb(LogNormal()),
            "eps",
            "fixed-large",
            Linear(),
            "objective vlb is a sum over all steps, and density log-normal does not make up for how often it takes "
            "each; choose uniform or importance",
        ),
        (
            Simple(Importance()),
            "v",
            "fixed-large",
            Straight(),
            "density importance needs a β-table, and straight has none; choose uniform",
        ),
    ],
)
def test_what_an_objective_cannot_train_is_refused(objective, parameterisation, variance, process, message):
    model = Denoiser(Zero(), process, PARAMETERISATIONS.build(parameterisation), VARIANCES.build(variance))
    with pytest.raises(UsageError, match=message):
        OBJECTIVES.build(objective).check(model)


@pytest.mark.parametrize("row", ROWS)
def test_all_rows_of_table_2_are_allowed(row):
    OBJECTIVES.build(ROWS[row][1]).check(denoiser(row))


# --- training ---


def waves() -> torch.Tensor:
    """Eight smooth 8×8 images, repeated to a batch of 32."""
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    angles = [2 * math.pi * n / 8 for n in range(8)]
    level = torch.stack([127.5 + 100 * torch.sin(1.7 * a + 0.6 * (math.cos(a) * y + math.sin(a) * x)) for a in angles])
    return (level.round() / 127.5 - 1)[:, None].repeat(4, 1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row, share",
    [("mu, L, learned", 1 / 5), ("mu, L, fixed", 1 / 10), ("eps, L, fixed", 1 / 2), ("eps, simple", 1 / 8)],
)
def test_a_narrow_network_overfits_eight_images(row, share):
    """The loss on fixed noise falls below that share of its start. The two other rows the paper calls unstable."""
    assert ROWS[row][3]
    torch.manual_seed(0)
    network = NARROW.build(1, 2 if ROWS[row][2] == "learned" else 1)
    model = denoiser(row, network, Linear(steps=100, beta_start=1e-3, beta_end=0.2))
    objective, x_0, key = OBJECTIVES.build(ROWS[row][1]), waves(), Key(10)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)

    def held() -> float:
        with torch.no_grad():
            keys = key.fold("held").rows(256)
            return float(objective(model, x_0.repeat(8, 1, 1, 1), NOTHING, keys).per_example.mean())

    before = held()
    for step in range(75):
        adam.zero_grad()
        objective(model, x_0, NOTHING, key.fold(step).rows(32)).per_example.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
    assert held() < share * before


def test_the_loss_is_split_by_quartile_of_t():
    """Lower edges belong to a quarter, and 1 to the last; a quarter without examples is left out."""
    t = torch.tensor([0.001, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1.0], dtype=F64)
    loss = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], requires_grad=True)
    sums = quartile_sums(loss, t)
    assert sums.tolist() == [[3, 4, 24, 96], [2, 1, 2, 2]] and not sums.requires_grad
    assert by_quartile(sums) == {"loss_q1": 1.5, "loss_q2": 4.0, "loss_q3": 12.0, "loss_q4": 48.0}
    assert by_quartile(quartile_sums(loss[3:5], t[3:5])) == {"loss_q3": 12.0}


def test_quartiles_of_parts_add_up_to_those_of_the_batch():
    generator = torch.Generator().manual_seed(0)
    loss, t = torch.rand(100, generator=generator), torch.rand(100, generator=generator, dtype=F64)
    parts = sum(quartile_sums(loss[i : i + 7], t[i : i + 7]) for i in range(0, 100, 7))
    whole = quartile_sums(loss, t)
    assert torch.allclose(parts, whole, rtol=1e-6) and whole[1].sum() == 100
    assert whole[0].sum().item() == pytest.approx(loss.sum().item(), rel=1e-6)
    for i in range(4):
        mine = loss[(t >= i / 4) & (t < (i + 1) / 4)]
        assert by_quartile(whole)[f"loss_q{i + 1}"] == pytest.approx(mine.mean().item(), rel=1e-6)


def test_a_loss_that_is_not_finite_stays_in_its_quarter():
    sums = quartile_sums(torch.tensor([float("nan"), 2.0]), torch.tensor([0.1, 0.9], dtype=F64))
    assert math.isnan(by_quartile(sums)["loss_q1"]) and by_quartile(sums)["loss_q4"] == 2
