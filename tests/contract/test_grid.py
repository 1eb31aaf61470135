"""Grids of times and densities of t: by their formulas, and by what a chain of 20 steps makes of a known law."""

import math

import pytest
import torch

from tests.contract.test_sampler import MEAN, SMOOTH, STD, TABLES, every_process, law
from undiffuse.config import plain
from undiffuse.diffusion import density, grid
from undiffuse.diffusion.density import LogitNormal, LogNormal, Uniform
from undiffuse.diffusion.grid import GRIDS, Even, Karras, KarrasFew, LogSnr, Quadratic
from undiffuse.diffusion.likelihood import chain
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.objective import P2, MinSnr, Sigmoid, Simple, Vlb
from undiffuse.diffusion.process import PROCESSES, Cosine, Edm, Linear, Process, Straight
from undiffuse.diffusion.sampler.ddim import DDIM
from undiffuse.diffusion.sampler.heun import Heun
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.model.recipe import load_recipe

every_grid = pytest.mark.parametrize("name", sorted(GRIDS.classes))


def build(name: str) -> Process:
    return PROCESSES.classes[name]()


@every_process
@every_grid
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999, None])
def test_times_fall_from_noise_to_data(process, name, steps):
    process = build(process)
    times = GRIDS.build(name).times(process, steps)
    assert times.dtype == F64 and len(times) == (steps or 1000) + 1
    assert times[-1] == 0 and bool((times.diff() < 0).all()) and times[-2] >= process.t_min
    end = torch.ones(1, dtype=F64)
    if name in ("even", "quadratic") or process.logsnr(end) >= -2 * math.log(80) - 1e-9:
        assert times[0] == 1
    else:  # where sigma/alpha is 80
        assert float(process.logsnr(times[:1])) == pytest.approx(-2 * math.log(80), rel=1e-6)
    if process.steps and name == "even":
        assert torch.equal(times * 1000, (times * 1000).round())
        assert torch.equal(Even().times(process), torch.arange(1000, -1, -1, dtype=F64) / 1000)


def test_the_other_grids_are_even_in_what_they_say():
    """In numbers of a table whose σ/α runs from 0.01 to 157, on which no point is moved to n/T."""
    process, low = Linear(), (1e-4 / (1 - 1e-4)) ** 0.5
    ratio = (process.sigma(LogSnr().times(process, 5)) / process.alpha(LogSnr().times(process, 5)))[:-1]
    assert ratio.tolist() == pytest.approx([80 * (low / 80) ** (i / 4) for i in range(5)], rel=1e-9)
    root = Quadratic().times(process, 4)[:-1].sqrt()
    assert root.tolist() == pytest.approx([1 - i / 3 * (1 - 0.001**0.5) for i in range(4)], rel=1e-12)


@every_process
@every_grid
@pytest.mark.parametrize("steps", [2, 5, 6, 20])
def test_the_chain_of_the_bound_has_no_step_that_is_none(process, name, steps):
    """t_min once, however its σ/α was rounded on the way to it."""
    process = build(process)
    times = chain(process, steps, GRIDS.build(name))
    assert times[1] == process.t_min and float(times.diff().min()) > 1e-7


@pytest.mark.parametrize("text", ["karras,sigma_max=0.001", "log-snr,sigma_min=100"])
def test_a_grid_that_does_not_fall_is_refused(text):
    with pytest.raises(UsageError, match="does not fall; give sigma_min and sigma_max between 0.01 and 157"):
        GRIDS.build(text).times(Linear(), 4)


def test_even_is_the_chain_of_ddpm_and_parts_of_it():
    assert Even().times(Linear(), 4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert (Even().times(Linear(10), 4) * 10).tolist() == [10, 8, 5, 2, 0]  # 7.5 and 2.5 are rounded to even
    assert Even().times(Straight(), 4).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_karras_is_equation_5():
    """sigma_i = (80^(1/7) + i/(n−1) (0.002^(1/7) − 80^(1/7)))^7, in numbers from the formula by hand for n = 5."""
    sigma = 80 * Karras().times(Edm(), 5)[:-1]
    expected = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)]
    assert sigma.tolist() == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx([80, 17.5278, 2.5152, 0.169753, 0.002], rel=1e-4)
    assert (80 * Karras(rho=1.0).times(Edm(), 3)[:-1]).tolist() == pytest.approx([80, 40.001, 0.002], rel=1e-12)
    # In any frame by sigma/alpha, and no further than the process goes.
    straight = Karras().times(Straight(), 5)[:-1]
    assert (straight / (1 - straight)).tolist() == pytest.approx(expected)
    times = Karras().times(Linear(), 5)
    ratio = (Linear().sigma(times) / Linear().alpha(times)).tolist()
    low = (1e-4 / (1 - 1e-4)) ** 0.5  # the least of this table
    of_table = [(80 ** (1 / 7) + i / 4 * (low ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)]
    assert ratio[:5] == pytest.approx(of_table, rel=1e-9)


def test_few_steps_of_karras_end_at_a_twentieth():
    """In numbers from the formula by hand for n = 4, on a table whose σ/α goes down to 0.01."""
    process = Linear()
    ratio = (process.sigma(KarrasFew().times(process, 4)) / process.alpha(KarrasFew().times(process, 4)))[:-1]
    assert ratio.tolist() == pytest.approx([80, 14.41596, 1.483212, 0.05], rel=1e-6)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_that_are_not_possible(steps):
    with pytest.raises(UsageError, match=rf"steps = {steps} is not possible; this model takes 1 to 1000"):
        Karras().times(Linear(), steps)


def off(process: Process, sampler, times: torch.Tensor) -> tuple[float, float]:
    """How far the end of a chain is from the data: its mean, and its standard deviation as a share."""
    mean, std = law(sampler, process, times, 0.0, process.prior_std)
    return abs(mean - MEAN), std / STD - 1


@every_process
def test_every_process_samples_a_known_law_in_20_steps(process):
    """Exactly: each step is linear. On its own grid if it has no table, else on the one of Karras."""
    process = build(process)
    times = (Karras() if process.steps else grid.suited(process)).times(process, 20)
    (mean, heun), (_, ddim) = off(process, Heun(), times), off(process, DDIM(), times)
    alpha, sigma = (float(part(torch.ones((), dtype=F64))) for part in (process.alpha, process.sigma))
    begun = alpha * MEAN * STD / math.hypot(alpha * STD, sigma)  # what an exact solver loses by beginning at N(0, I)
    assert abs(mean - begun) < 0.005 and abs(heun) < 0.05 and -0.16 < ddim < 0


@pytest.mark.parametrize("steps", [18, 36, 72])
def test_the_grid_of_edm_has_the_law_where_an_even_one_collapses(steps):
    own, even = (off(Edm(), Heun(), rule.times(Edm(), steps))[1] for rule in (grid.suited(Edm()), Even()))
    assert abs(own) < 0.06 * (18 / steps) ** 2 and even < -0.5


def test_heun_begins_at_pure_noise_like_ddim():
    """On the cosine table sigma/alpha begins at 20,000, with which the rule of Heun would weigh what it has rounded."""
    assert float(Cosine().sigma(torch.ones(1, dtype=F64)) / Cosine().alpha(torch.ones(1, dtype=F64))) > 1e4
    assert abs(off(Cosine(), Heun(), Even().times(Cosine(), 20))[1]) < 0.02


def test_the_chain_of_the_bound_follows_the_grid():
    times = chain(Edm(), 18)
    own = Karras().times(Edm(), 18).flip(0)
    assert times.tolist() == [0, Edm().t_min, *own[1:].tolist()]  # the decoder stands at t_min
    assert chain(Linear(), 4).tolist() == [0, 0.001, 0.25, 0.5, 0.75, 1]


def test_what_suits_each_process():
    names = {name: build(name).suits for name in TABLES | SMOOTH}
    assert {name: suits for name, suits in names.items() if suits != ("even", "uniform")} == {
        "edm": ("karras", "log-normal"),
        "straight": ("even", "logit-normal"),
        "vdm": ("even", "alpha-squared"),
    }


KEYS = Key(5).rows(20_000)


def test_uniform_takes_each_step_of_a_table_as_often():
    n = (Uniform().t(Linear(10), KEYS) * 10).round().long()
    assert (n.bincount(minlength=11)[1:] / 2000 - 1).abs().max() < 4 * (9 / 20_000) ** 0.5 and n.min() == 1
    t = Uniform().t(Edm(), KEYS)
    assert t.min() >= Edm().t_min and float(t.mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / 20_000) ** 0.5)


@pytest.mark.parametrize("process", [Edm(), Straight(), Linear()], ids=lambda p: type(p).__name__)
def test_log_normal_is_normal_in_ln_sigma(process):
    t = LogNormal(-0.5, 0.8).t(process, KEYS)
    log_sigma = (process.sigma(t) / process.alpha(t)).log()
    assert float(log_sigma.mean()) == pytest.approx(-0.5, abs=4 * 0.8 / 20_000**0.5 + 0.002)
    assert float(log_sigma.std()) == pytest.approx(0.8, rel=0.03)
    middle = (log_sigma < -0.5 + 0.8).double().mean()
    assert float(middle) == pytest.approx(0.841345, abs=0.012)


def test_logit_normal_is_normal_in_logit_t():
    t = LogitNormal(0.3, 0.9).t(Straight(), KEYS)
    logit = (t / (1 - t)).log()
    assert float(logit.mean()) == pytest.approx(0.3, abs=4 * 0.9 / 20_000**0.5)
    assert float(logit.std()) == pytest.approx(0.9, rel=0.03)


@pytest.mark.parametrize("rule", [LogNormal(20.0, 5.0), LogNormal(-20.0, 5.0), LogitNormal(30.0), LogitNormal(-30.0)])
@pytest.mark.parametrize("process", [Linear(), Straight(), Edm(), Cosine()], ids=lambda p: type(p).__name__)
def test_no_t_leaves_what_a_network_is_asked(rule, process):
    t = rule.t(process, KEYS[:100])
    assert t.dtype == F64 and process.t_min <= t.min() and t.max() <= 1
    if process.steps:
        assert torch.equal(t * 1000, (t * 1000).round())


def test_a_density_does_not_depend_on_the_batch():
    for rule in (Uniform(), LogNormal(), LogitNormal()):
        assert torch.equal(rule.t(Edm(), KEYS[50:60]), rule.t(Edm(), KEYS)[50:60])


class Listener(torch.nn.Module):
    def forward(self, x, time, cond):
        self.time = time
        return torch.zeros_like(x)


@pytest.mark.parametrize("objective", [Simple, MinSnr, P2, Sigmoid])
def test_an_objective_takes_what_suits_the_process_or_what_is_named(objective):
    from undiffuse.diffusion.denoiser import Denoiser
    from undiffuse.diffusion.parameterisation import X0
    from undiffuse.diffusion.reverse import FixedLarge
    from undiffuse.network.base import NOTHING

    process, network, keys = Edm(), Listener(), Key(1).rows(50)
    denoiser = Denoiser(network, process, X0(), FixedLarge(), "sigma", clip=False)
    for named, rule in ((None, LogNormal()), (LogNormal(1.0, 0.1), LogNormal(1.0, 0.1)), (Uniform(), Uniform())):
        loss = objective(density=named)(denoiser, torch.zeros(50, 1, 2, 2), NOTHING, keys)
        assert torch.equal(loss.t, rule.t(process, keys))
        assert network.time.tolist() == pytest.approx((80 * loss.t).log().div(4).tolist(), rel=1e-5, abs=1e-6)


def test_a_density_is_a_setting():
    recipe = load_recipe("digits", ["objective.density=log-normal"])
    assert recipe.objective == Simple(LogNormal()) and "density" not in plain(load_recipe("digits").objective)
    recipe = load_recipe("digits", ["objective.density.name=log-normal", "objective.density.mean=0.5"])
    assert recipe.objective == Simple(LogNormal(mean=0.5))
    with pytest.raises(UsageError, match='density "log-norml" is not known. Did you mean "log-normal"'):
        load_recipe("digits", ["objective.density=log-norml"])
    assert load_recipe("digits", ["objective.name=vlb", "objective.density=uniform"]).objective == Vlb(Uniform())
    assert math.isclose(density.suited(Edm()).mean, -1.2)
