"""Fitted grids: the costs of steps by closed forms and by the solver itself, the programme by trying all paths."""

import itertools

import numpy as np
import pytest
import torch

from undiffuse.diffusion.fit import LEVEL, LONG, PREDICTED, Costs, Products, Watched
from undiffuse.diffusion.grid import LogSnr
from undiffuse.diffusion.numbers import per_image
from undiffuse.diffusion.process import Cosine, Edm, Process
from undiffuse.diffusion.reverse import Prediction
from undiffuse.diffusion.sampler.base import sample
from undiffuse.diffusion.sampler.dpmpp import Dpmpp
from undiffuse.diffusion.sampler.unipc import Unipc
from undiffuse.key import Key

STD = 0.3


def seen(process: Process, times: torch.Tensor, n: int = 50) -> tuple[Watched, torch.Tensor]:
    """Trajectories of data N(0, STD²): z_u goes as √(STD² + u²)."""

    def denoise(x, t):
        alpha, sigma = process.alpha_sigma(t)
        return Prediction(per_image(alpha * STD**2 / (alpha**2 * STD**2 + sigma**2), x) * x, x)

    watched, keys = Watched(Dpmpp(order=3)), Key(0).rows(n)
    alpha, sigma = process.alpha_sigma(times[:1])
    spread = (alpha**2 * STD**2 + sigma**2).sqrt().float()
    return watched, sample(watched, denoise, process, keys, (1, 2, 3), times, start=spread * keys.normal(1, 2, 3))


def exact(process: Process, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """z and x̂_0 at these times of the trajectory that ends at z = STD."""
    spread = (STD**2 + process.spread(times) ** 2).sqrt()
    return spread, STD**2 / spread


@pytest.mark.parametrize("process", [Cosine(), Edm()], ids=["cosine", "edm"])
def test_a_chain_is_seen_where_it_asks(process):
    times = LogSnr().times(process, 60)
    watched, end = seen(process, times)
    assert len(watched.seen) == 60
    z, x_0 = exact(process, times)
    first = watched.seen[0][0] / z[0]
    for i, (at, answer) in enumerate(watched.seen):
        assert torch.allclose(at, first * z[i], rtol=1e-3, atol=2e-3), i
        assert torch.allclose(answer, first * x_0[i], rtol=1e-3, atol=2e-3), i
    table = Products.of(process, times, watched.seen, end).table
    images = torch.cat([z[:-1], x_0[:-1], z[-1:]])
    assert torch.allclose(table, first.square().mean() * torch.outer(images, images), rtol=5e-3, atol=2e-3)


@pytest.fixture(scope="module", params=[Cosine(), Edm()], ids=["cosine", "edm"])
def known(request) -> tuple[Process, torch.Tensor, Products]:
    times = LogSnr(sigma_min=0.01).times(request.param, 30)
    z, x_0 = exact(request.param, times)
    images = torch.cat([z[:-1], x_0[:-1], z[-1:]])
    return request.param, times, Products(request.param.spread(times[:-1]), torch.outer(images, images))


def miss(process: Process, times: torch.Tensor) -> tuple[float, float]:
    """What predictor and corrector of the solver itself miss at the end of the step before the last."""
    (z, x_0), alpha = exact(process, times), process.alpha(times)
    c = Unipc(order=2).coefficients(process, times[:-1], times[1:])
    i = len(times) - 3
    ahead = c.on_x[i] * alpha[i] * z[i] + c.on_0[i] * x_0[i] + c.on_1[i] * x_0[i - 1]
    was = (c.was_0[i + 1], c.was_1[i + 1], c.was_2[i + 1])
    behind = c.was_x[i + 1] * alpha[i] * z[i] + sum(w * x_0[i + 1 - k] for k, w in enumerate(was))
    return tuple(float(each / alpha[i + 1] - z[i + 1]) for each in (ahead, behind))


@pytest.mark.parametrize("path", [(2, 7, 12), (0, 11, 14), (20, 21, 29), (3, 4, 28), (1, 15, 20)])
def test_a_step_costs_what_the_solver_misses_by_it(known, path):
    process, times, products = known
    chain = torch.cat([times[list(path)], times.new_tensor([process.t_min, 0.0])])
    ahead, behind = miss(process, chain[[0, 1, 2, 4]])
    step = float(process.logsnr(chain[2]) - process.logsnr(chain[1])) / 2
    expected = behind**2 + PREDICTED * (1 + (step / LONG) ** 4) * ahead**2
    assert float(products.costs().later[path]) == pytest.approx(expected, rel=1e-6, abs=1e-11)


@pytest.mark.parametrize("path", [(0, 5), (3, 20), (10, 12)])
def test_a_first_step_goes_by_eulers_rule_and_back_over_a_line(known, path):
    process, times, products = known
    costs, (u, v) = products.costs(), process.spread(times[list(path)]).tolist()
    (z_u, z_v), (x_u, x_v) = (each.tolist() for each in exact(process, times[list(path)]))
    step, left = np.log(u / v), v / u
    ahead = left * z_u + (1 - left) * x_u - z_v
    # The mean of a line in λ from x_u to x_v under e^(λ − λ_v): at v but for (1 − left (1 + h))/h of its slope.
    behind = left * z_u + (1 - left) * x_v - (x_v - x_u) * (1 - left * (1 + step)) / step - z_v
    expected = behind**2 + PREDICTED * (1 + (step / LONG) ** 4) * ahead**2
    assert float(costs.first[path]) == pytest.approx(expected, rel=1e-6, abs=1e-11)
    if path[0] == 0:
        assert float(costs.start[path[1]]) == pytest.approx(ahead**2, rel=1e-6)


def test_the_last_step_returns_the_answer(known):
    process, times, products = known
    costs, off = products.costs(), exact(process, times[:-1])[1] - STD
    assert LEVEL == 2 / 255 and bool((off.abs() < LEVEL).any())  # where a chain need not go
    assert torch.allclose(costs.first[:, 30], off.square().clamp(min=LEVEL**2), rtol=1e-6, atol=1e-11)
    for path in costs.grids(12)[3:]:
        assert path[-1] <= int((off.abs() < LEVEL).nonzero()[0])
    for i in range(1, 30):
        assert bool((costs.later[:i, i, 30] == costs.first[i, 30]).all()) and bool(costs.later[i:, i, 30].isinf().all())


def test_there_are_no_steps_backwards(known):
    costs = known[2].costs()
    ahead = torch.ones(30, 30).triu(1).bool()
    assert bool(costs.first[:, :30][~ahead].isinf().all()) and bool(costs.first[:, :30][ahead].isfinite().all())
    both = ahead[:, :, None] & ahead[None]
    assert bool(costs.later[..., :30][~both].isinf().all()) and bool(costs.later[..., :30][both].isfinite().all())
    assert bool(costs.start[0].isinf()) and bool(costs.start[1:].isfinite().all())


def test_the_programme_finds_what_trying_all_paths_does():
    n, rng = 8, np.random.default_rng(0)
    start, first, later = (torch.from_numpy(rng.random(shape)) for shape in [(n,), (n, n + 1), (n, n, n + 1)])
    ahead = torch.ones(n, n + 1).triu(1).bool()
    first[~ahead], later[:, ~ahead], later[~ahead[:, :n]] = torch.inf, torch.inf, torch.inf
    for steps, path in enumerate(Costs(start, first, later).grids(n), 1):

        def cost(each: tuple[int, ...]) -> float:
            way = (*each, n)
            rest = sum(float(later[way[k : k + 3]]) for k in range(len(way) - 2))
            return float(start[way[0]] + first[way[0], way[1]]) + rest

        assert tuple(path) == min(itertools.combinations(range(n), steps), key=cost)


def test_no_step_is_so_long_that_its_end_is_not_known(known, monkeypatch):
    """For the corrector alone a step could go from the top to the bottom, where x̂_0 is the image itself."""
    process, times, products = known

    def longest() -> float:
        return max(
            float(process.spread(times[path]).log().diff().abs().max()) for path in products.costs().grids(9)[1:]
        )

    assert longest() < 4.5
    monkeypatch.setattr("undiffuse.diffusion.fit.PREDICTED", 0.0)
    assert longest() > 6
