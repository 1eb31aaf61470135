"""Guidance of Gaussian data, where what the guided chain draws is known."""

import pytest
import torch

from undiffuse.diffusion.guide import Guided
from undiffuse.diffusion.numbers import per_image
from undiffuse.diffusion.process import Straight, Vdm
from undiffuse.diffusion.reverse import Prediction
from undiffuse.diffusion.sampler.base import sample
from undiffuse.diffusion.sampler.dpmpp import Dpmpp
from undiffuse.key import Key

F64 = torch.float64
STD = 0.4


def gaussian(process, mean: float):
    """E[x_0 | x_t] of N(mean, STD²)."""

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        alpha, sigma = per_image(process.alpha(t), x), per_image(process.sigma(t), x)
        x_0 = mean + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * mean)
        return Prediction(x_0, x_0)

    return denoise


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("process", [Vdm(), Straight()], ids=str)
def test_a_gaussian_led_away_from_one_of_equal_spread_is_a_gaussian_further_away(process, scale):
    """N(a, s²)^w N(b, s²)^(1 − w) is N(b + w (a − b), s²), at every level of noise: so the chains are the same."""
    a, b = 0.3, -0.2
    times, keys = torch.linspace(0.95, 0, 9, dtype=F64), Key(0).rows(5)
    guided = Guided(gaussian(process, a), gaussian(process, b), scale, clip=False)
    start = keys.normal(1, 3, 3).double()
    found = sample(Dpmpp(), guided, process, keys, (1, 3, 3), times, start=start)
    expected = sample(Dpmpp(), gaussian(process, b + scale * (a - b)), process, keys, (1, 3, 3), times, start=start)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_is_clipped_is_the_end_and_not_the_parts():
    """2 and 1.5 led by 3 are 0.5; clipped before they would be 1."""

    def says(value: float):
        return lambda x, t: Prediction(torch.full_like(x, value), x)

    x, t = torch.zeros(2, 1, 1, 1), torch.ones(2, dtype=F64)
    for clip in (True, False):
        assert bool((Guided(says(1.5), says(2.0), 3.0, clip)(x, t).x_0 == 0.5).all())
    assert bool((Guided(says(0.8), says(0.0), 2.0, True)(x, t).x_0 == 1).all())
    assert bool((Guided(says(0.8), says(0.0), 2.0, False)(x, t).x_0 == 1.6).all())
