"""Each figure against a closed form: networks whose answers are known, so that every picture can be computed by hand."""


import pytest
import torch
from torch import nn

from undiffuse import explore
from undiffuse.denoiser import X0, Denoiser, FixedSmall
from undiffuse.errors import UsageError
from undiffuse.model import Model, to_uint8
from undiffuse.network.unet import UNet
from undiffuse.process import F64, Linear, Process
from undiffuse.recipe import ModelConfig

VARIANCE = 0.04  # of the Gaussian data, small enough that nothing is ever clipped


class Fixed(nn.Module):
    """x̂_0 = answer(x_t, t)."""

    def __init__(self, process: Process, answer):
        super().__init__()
        self.steps, self.answer = process.steps, answer

    def forward(self, x, time, cond):
        return self.answer(x, ((time.to(F64) + 1) / self.steps).reshape(-1, 1, 1, 1)).to(x)


def model(answer, steps: int = 1000, side: int = 16) -> Model:
    process = Linear(steps, 0.1 / steps, 20 / steps)
    config = ModelConfig((1, side, side), process, X0(), FixedSmall(), UNet())
    return Model(config, Denoiser(Fixed(process, answer), process, X0(), FixedSmall()), {})


def gain(process: Process, t):
    """E[x_0 | x_t] = gain · x_t for data N(0, VARIANCE)."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return alpha * VARIANCE / (alpha.square() * VARIANCE + sigma.square())


def gaussian(steps: int = 100) -> Model:
    process = Linear(steps, 0.1 / steps, 20 / steps)
    return model(lambda x, t: gain(process, t) * x, steps)


def names_t(x, t):
    return (2 * t - 1).expand_as(x)


def test_progressive_shows_what_the_denoiser_said_at_the_authors_times():
    images, times = explore.progressive(model(names_t, side=2), n=2)
    assert torch.equal(times, (torch.arange(950, -1, -50, dtype=F64) + 1) / 1000)
    expected = to_uint8((2 * times - 1).reshape(1, 20, 1, 1, 1)).expand(2, -1, 1, 2, 2)
    assert torch.equal(images, expected)


@pytest.mark.parametrize("steps", [None, 30])
def test_progressive_ends_at_the_sample_of_the_same_seed(steps):
    counted = []
    toy = gaussian()
    images, times = explore.progressive(toy, 3, seed=5, steps=steps, slots=7, progress=counted.append)
    assert torch.equal(images[:, -1], toy.sample(3, steps, seed=5))
    assert images.shape == (3, 7, 1, 16, 16) and len(times) == 7
    assert sum(counted) == (steps or 100)
    assert (times.diff() < 0).all()


def test_progressive_refuses_more_slots_than_steps():
    with pytest.raises(UsageError, match="11 slots along a chain of 10 steps are not possible; give 1 to 10"):
        explore.progressive(gaussian(), 1, steps=10, slots=11)
    with pytest.raises(UsageError, match="n = 0 images were asked for; give 1 or more"):
        explore.progressive(gaussian(), 0)


def test_shared_latents_leave_the_variance_that_the_chain_has_below_them():
    toy, n = gaussian(), 64
    images, times = explore.shared(toy, n, at=(1.0, 0.5, 0.2, 0.01))
    assert times.tolist() == [1.0, 0.5, 0.2, 0.01]
    assert (images[3] == images[3, :1]).all()  # one step remains, and the last step adds no noise
    grid = toy.times().flip(0)
    variance = torch.zeros((), dtype=F64)
    exact = [variance]
    for s, t in zip(grid[:-1], grid[1:], strict=True):  # Var[x_0 | x_t]: from the data upwards
        b, c = toy.process.posterior_coefficients(t, s)
        slope = b + c * gain(toy.process, t)
        added = toy.process.small_variance(t, s) if s > 0 else torch.zeros((), dtype=F64)
        exact.append((exact[-1][0] + added * exact[-1][1], slope) if False else (t, slope, added))
    for row, t in enumerate((1.0, 0.5, 0.2)):
        expected = torch.zeros((), dtype=F64)
        for entry in reversed([e for e in exact[1:] if e[0] <= t]):
            expected = entry[1].square() * expected + entry[2]
        measured = (images[row].double() / 127.5).var(0).mean()
        assert float(measured) == pytest.approx(float(expected), rel=0.06)


def test_shared_branches_leave_one_chain_and_do_not_depend_on_each_other():
    toy = gaussian()
    both, _ = explore.shared(toy, 2, seed=3, at=(0.5, 0.1), steps=20)
    small = explore.shared(toy, 2, seed=3, at=(0.1,), steps=20)[0][0]
    near = (both[1].double() - small.double()).square().mean().sqrt()
    assert near < 1e-9
    # All see the same x_T: what is common to two branches is more than chance.
    centred = both.flatten(2).double().mean(1) - 127.5
    assert float(torch.corrcoef(centred)[0, 1]) > 0.3
    assert not torch.equal(explore.shared(toy, 2, seed=4, at=(0.1,), steps=20)[0][0], small)


def test_shared_refuses_times_at_which_there_is_nothing_to_continue():
    for t in (0.0, 1.1):
        with pytest.raises(
            UsageError, match=rf"t = {t:g} is not possible here; give 0\.01 to 1, where 1 is pure noise"
        ):
            explore.shared(gaussian(), 2, at=(t,))
    with pytest.raises(UsageError, match="no t was given"):
        explore.shared(gaussian(), 2, at=())
