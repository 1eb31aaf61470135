"""Fitted grids: the errors of steps by a closed form, the programme by trying all paths."""

import itertools

import numpy as np
import pytest
import torch

from undiffuse.diffusion.denoiser import Prediction
from undiffuse.diffusion.fit import Products, Watched, shortest
from undiffuse.diffusion.grid import LogSnr
from undiffuse.diffusion.numbers import F64, per_image
from undiffuse.diffusion.process import Cosine, Edm, Process
from undiffuse.diffusion.sampler.base import sample
from undiffuse.diffusion.sampler.dpmpp import Dpmpp
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


@pytest.mark.parametrize("process", [Cosine(), Edm()], ids=["cosine", "edm"])
def test_the_errors_of_steps_are_those_of_a_closed_form(process):
    times = LogSnr(sigma_min=0.01).times(process, 40)
    watched, end = seen(process, times)
    products = Products.of(process, times, watched.seen, end)
    u = torch.exp(-process.logsnr(times[:-1]) / 2)
    assert torch.allclose(products.u, u) and len(watched.seen) == 40
    v, spread = torch.cat([u, torch.zeros(1, dtype=F64)]), (STD**2 + u**2).sqrt()
    share = v / u[:, None]
    off = (STD**2 + v**2).sqrt() - share * spread[:, None] - (1 - share) * (STD**2 / spread)[:, None]
    scale = float((watched.seen[0][0] / spread[0]).square().mean().sqrt())
    found, later = products.errors(), torch.ones(40, 41).triu(1).bool()
    assert bool(found[~later].isinf().all())
    assert found[later].tolist() == pytest.approx((scale * off.abs())[later].tolist(), rel=0.02, abs=2e-3)


def test_the_programme_finds_what_trying_all_paths_does():
    n = 8
    errors = torch.from_numpy(np.random.default_rng(0).random((n, n + 1)))
    errors[~torch.ones(n, n + 1).triu(1).bool()] = torch.inf
    paths = shortest(errors, n)
    for steps, path in enumerate(paths, 1):
        every = [(0, *rest) for rest in itertools.combinations(range(1, n), steps - 1)]
        cost = {each: sum(float(errors[i, j]) for i, j in itertools.pairwise((*each, n))) for each in every}
        assert tuple(path) == min(cost, key=cost.__getitem__)


def test_the_errors_of_a_longer_path_fall_as_those_of_a_first_order_do():
    watched, end = seen(Cosine(), times := LogSnr().times(Cosine(), 40))
    errors = Products.of(Cosine(), times, watched.seen, end).errors()
    sums = [sum(float(errors[i, j]) for i, j in itertools.pairwise((*path, 40))) for path in shortest(errors, 20)]
    assert all(b < a for a, b in itertools.pairwise(sums))
    assert sums[15] / sums[7] == pytest.approx(0.5, abs=0.1)
