"""Each figure against a closed form: networks whose answers are known, so that each picture can be computed by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from undiffuse.data.source import ArraySource
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.parameterisation import X0
from undiffuse.diffusion.process import Linear, Process
from undiffuse.diffusion.reverse import FixedSmall, Learned
from undiffuse.diffusion.sampler.ddim import DDIM
from undiffuse.errors import DataError, UsageError
from undiffuse.key import Key
from undiffuse.model.model import Model, to_float, to_uint8
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.unet import UNet
from undiffuse.quality.feature.base import Extractor
from undiffuse.quality.metric.base import Features
from undiffuse.view import explore

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


def gaussian(steps: int = 50) -> Model:
    process = Linear(steps, 0.1 / steps, 20 / steps)
    return model(lambda x, t: gain(process, t) * x, steps)


def names_t(x, t):
    return (2 * t - 1).expand_as(x)


def test_progressive_shows_what_the_denoiser_said_at_the_authors_times():
    images, times = explore.progressive(model(names_t, steps=100, side=2), n=2, solver="ancestral")
    assert torch.equal(times, (torch.arange(95, -1, -5, dtype=F64) + 1) / 100)  # of 1000 steps: 950, 900, …, 0
    expected = to_uint8((2 * times - 1).reshape(-1, 1, 1, 1)).reshape(1, 20, 1, 1, 1)
    assert torch.equal(images, expected.expand(2, -1, 1, 2, 2))


@pytest.mark.parametrize("steps", [None, 30])
def test_progressive_ends_at_the_sample_of_the_same_seed(steps):
    counted = []
    toy = gaussian()
    images, times = explore.progressive(toy, 3, 5, steps, 7, counted.append, "ancestral")
    assert torch.equal(images[:, -1], toy.sample(3, steps, "ancestral", seed=5))
    assert images.shape == (3, 7, 1, 16, 16) and len(times) == 7
    assert sum(counted) == (steps or 50)
    assert (times.diff() < 0).all()


def test_the_last_of_progressive_is_the_sample_of_a_solver_that_churns_too():
    """Which raises x_t before it asks: what is said of x_t itself is something else."""
    toy = gaussian()
    images, _ = explore.progressive(toy, 2, 5, 10, 3, solver="heun,churn=5")
    assert torch.equal(images[:, -1], toy.sample(2, 10, "heun,churn=5", seed=5))


@pytest.mark.parametrize("solver", ["ancestral", "ddim,eta=1", "heun,churn=3"])
def test_a_chain_that_is_entered_half_way_has_the_noise_of_the_whole(solver):
    """A picture that is at t what the whole chain is there, continued by `interpolate` and by `shared`."""
    toy = gaussian()
    times, keys, seen = toy.times(10), Key(3).rows(2), {}
    whole = toy.chain(keys, times, toy.sampler(solver), callback=lambda left, x, t: seen.update({left: x.clone()}))
    sampler = toy.sampler(solver).within(10)
    assert torch.equal(toy.chain(keys, times[5:], sampler, start=seen[5]), whole)
    for chains in (explore._shared_chains, explore._interpolation_chains):
        found = chains(toy, [0.5], 10, solver)
        assert found[0] == sampler and len(found[-1][-1]) == 6


def test_slots_that_do_not_divide_the_steps_are_spread_over_all_of_them():
    """The last of 30 steps and those after 0, 4, 8, 12, 17, 21 and 25 more: ⌊30 k/7⌋."""
    times = explore.progressive(gaussian(30), 1, slots=7, solver="ancestral")[1]
    assert (30 * times).round().tolist() == [26, 22, 18, 13, 9, 5, 1]


def test_progressive_refuses_more_slots_than_steps():
    with pytest.raises(UsageError, match="11 slots along a chain of 10 steps are not possible; give 1 to 10"):
        explore.progressive(gaussian(), 1, steps=10, slots=11)
    with pytest.raises(UsageError, match="n = 0 is not possible; give 1 or more"):
        explore.progressive(gaussian(), 0)


def spread(toy: Model, t: float, start: float = 0.0) -> float:
    """The variance of the chain's last x, where x_t has variance `start`."""
    times = toy.times()
    variance = start
    for t, s in [(t_, s_) for t_, s_ in zip(times[:-1], times[1:], strict=True) if t_ <= t]:
        b, c = toy.process.posterior_coefficients(t, s)
        added = toy.process.small_variance(t, s) if s > 0 else 0.0
        variance = float((b + c * gain(toy.process, t)).square() * variance + added)
    return variance


def test_shared_latents_leave_the_variance_that_the_chain_has_below_them():
    toy, n = gaussian(), 64
    images, times = explore.shared(toy, n, at=(1.0, 0.5, 0.2, 0.02), solver="ancestral")
    assert times.tolist() == [1.0, 0.5, 0.2, 0.02]
    assert (images[3] == images[3, :1]).all()  # one step remains, and the last step adds no noise
    x = images.double() / 127.5 - 1
    for row, t in enumerate((1.0, 0.5, 0.2)):
        assert float(x[row].var(0).mean()) == pytest.approx(spread(toy, t), rel=0.06)
    # Row means are those of one chain: what is decided at 0.5 is part of what is decided at 0.2.
    whole = spread(toy, 1.0, start=1.0)
    early, late = (whole - spread(toy, t) * (1 - 1 / n) for t in (0.5, 0.2))
    decided = x.mean(1).flatten(1)
    expected = (whole - spread(toy, 0.5)) / (early * late) ** 0.5
    assert float(torch.corrcoef(decided[1:3])[0, 1]) == pytest.approx(expected, abs=0.1)


def test_shared_branches_do_not_depend_on_each_other_but_on_the_seed():
    toy = gaussian()
    given = {"steps": 20, "solver": "ancestral"}
    both, _ = explore.shared(toy, 2, seed=3, at=(0.5, 0.1), **given)
    alone, _ = explore.shared(toy, 2, seed=3, at=(0.5,), **given)
    assert torch.equal(both[:1], alone)
    assert not torch.equal(explore.shared(toy, 2, seed=4, at=(0.5,), **given)[0], alone)


def test_shared_refuses_times_at_which_there_is_nothing_to_continue():
    for t in (0.0, 1.1):
        with pytest.raises(
            UsageError, match=rf"t = {t:g} is not possible here; give 0\.02 to 1, where 1 is pure noise"
        ):
            explore.shared(gaussian(), 2, at=(t,))
    with pytest.raises(UsageError, match="no t was given"):
        explore.shared(gaussian(), 2, at=())


def quarter(x, t):
    return x / 4


def pictures(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_interpolation_mixes_the_noised_pictures():
    """With one step from t to 0 the result is x̂_0 = x̄_t/4, so that x̄_t can be read off it."""
    toy, a, b = model(quarter), pictures(0), pictures(1)
    lambdas, ts = (0.0, 0.3, 1.0), (0.3, 0.6)
    latents = 4 * to_float(explore.interpolate(toy, a, b, ts, lambdas, steps=1).flatten(0, 1)).reshape(2, 3, 256)
    noise = []
    for t, (first, mixed, second) in zip(ts, latents.double(), strict=True):
        np.testing.assert_allclose(mixed, 0.7 * first + 0.3 * second, atol=4 / 127.5)
        alpha, sigma = (f(torch.tensor(t, dtype=F64)) for f in (toy.process.alpha, toy.process.sigma))
        ends = torch.stack([a, b]).flatten(1) / 127.5 - 1
        noise.append((torch.stack([first, second]) - alpha * ends) / sigma)
    resolution = 2 / 127.5 / float(toy.process.sigma(torch.tensor(0.3, dtype=F64)))
    np.testing.assert_allclose(noise[0], noise[1], atol=2 * resolution)  # the same in each row
    assert noise[0].std() == pytest.approx(1, abs=0.1)
    assert abs(float(torch.corrcoef(noise[0])[0, 1])) < 0.2  # but not for both pictures


def test_interpolation_at_0_mixes_pixels_and_calls_no_network():
    def never(x, t):
        raise AssertionError

    a, b = pictures(0), pictures(1)
    ends = explore.interpolate(model(never), a, b, at=(0.0,), lambdas=(0.0, 0.5, 1.0))[0]
    assert torch.equal(ends[0], a) and torch.equal(ends[2], b)
    assert (ends[1].double() - (a.double() + b.double()) / 2).abs().max() <= 0.5


def test_interpolation_takes_as_many_steps_as_the_chain_has_below_t():
    seen = []

    def counting(x, t):
        seen.append(float(t[0]))
        return x * 0

    toy = model(counting, steps=100)
    explore.interpolate(toy, pictures(0), pictures(1), at=(0.25, 1.0), lambdas=(0.5,), steps=10, solver="ancestral")
    assert seen == pytest.approx([0.25, 0.2, 0.1] + [k / 10 for k in range(10, 0, -1)])


def test_rows_of_an_interpolation_do_not_depend_on_each_other():
    toy, a, b = gaussian(), pictures(0), pictures(1)
    rows = explore.interpolate(toy, a, b, (0.25, 0.5), (0.2, 0.8), seed=2)
    assert torch.equal(rows[1:], explore.interpolate(toy, a, b, (0.5,), (0.2, 0.8), seed=2))
    assert not torch.equal(rows, explore.interpolate(toy, a, b, (0.25, 0.5), (0.2, 0.8), seed=3))


def test_interpolation_refuses_what_has_no_meaning():
    toy, a = gaussian(), pictures(0)
    with pytest.raises(DataError, match=r"the second picture is 1×8×16 \(channels .*\); this model needs 1×16×16"):
        explore.interpolate(toy, a, a[:, :8])
    with pytest.raises(UsageError, match="t = -0.1 is not possible here; give 0 to 1"):
        explore.interpolate(toy, a, a, (-0.1,))
    with pytest.raises(UsageError, match="0 times and 11 mixtures were asked for"):
        explore.interpolate(toy, a, a, ())


@pytest.mark.parametrize("crop", [None, (1, 0, 2, 3), (1, 0, 3, 5), (2, 3)])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_neighbours_are_those_of_integer_arithmetic(monkeypatch, crop, chunk):
    monkeypatch.setattr(explore, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 256, (40, 2, 4, 5), dtype=torch.uint8, generator=generator)
    train[31] = train[7]  # a tie
    samples = torch.cat([train[[31]], torch.randint(0, 256, (6, 2, 4, 5), dtype=torch.uint8, generator=generator)])
    index, distance = explore.neighbours(samples, ArraySource(train), 5, crop)
    top, left, h, w = {None: (0, 0, 4, 5), (2, 3): (1, 1, 2, 3)}.get(crop, crop)  # (2, 3) is in the middle
    cut = (slice(None), slice(None), slice(top, top + h), slice(left, left + w))
    squared = (samples[cut][:, None].long() - train[cut].long()).square().flatten(2).sum(2)
    for row in range(len(samples)):
        order = sorted(range(40), key=lambda i, row=row: (int(squared[row, i]), i))[:5]
        assert index[row].tolist() == order
        np.testing.assert_array_equal(distance[row], (squared[row, order].double() / (2 * h * w)).sqrt())
    assert index[0, :2].tolist() == [7, 31] and distance[0, :2].tolist() == [0, 0]


def test_neighbours_refuse_what_cannot_be_compared():
    source = ArraySource(torch.zeros(3, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(UsageError, match="4 neighbours are not possible in 3 images; give 1 to 3"):
        explore.neighbours(source.images, source, 4)
    with pytest.raises(DataError, match="the samples are 1×2×2 .* and the training images 1×4×4"):
        explore.neighbours(source.images[:, :, :2, :2], source)
    with pytest.raises(UsageError, match=r"crop \(2, 0, 3, 4\) .* does not lie within images of 4×4"):
        explore.neighbours(source.images, source, 1, (2, 0, 3, 4))


def halves(images):
    return Features(images.to(torch.float32).mean(3).flatten(1))


def test_neighbours_in_features_are_those_of_the_features(tmp_path, monkeypatch):
    """Rows' means: an image and its mirror image are the same to them, and far from each other in pixels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    extractor = Extractor("rows", "FD-rows", "0" * 64, "none", None, 1, {"pool": 4}, halves)
    train = torch.randint(0, 256, (300, 1, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = torch.cat([train[[7]].flip(3), train[[250]].flip(3), 255 - train[:5]])
    index, distance = explore.neighbours_in(extractor, samples, ArraySource(train), 3)
    expected = torch.cdist(halves(samples).pool.to(F64), halves(train).pool.to(F64)).sort(1)
    assert torch.equal(index, expected.indices[:, :3]) and index[:2, 0].tolist() == [7, 250]
    np.testing.assert_allclose(distance, expected.values[:, :3], rtol=1e-9, atol=1e-5)
    assert not torch.equal(index, explore.neighbours(samples, ArraySource(train), 3).indices)


def test_neighbours_in_features_refuse_what_cannot_be_compared():
    extractor = Extractor("rows", "FD-rows", "0" * 64, "none", (4, 4), 1, {"pool": 4}, halves)
    source = ArraySource(torch.zeros(3, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(UsageError, match="4 neighbours are not possible in 3 images; give 1 to 3"):
        explore.neighbours_in(extractor, source.images, source, 4)
    with pytest.raises(UsageError, match="images of 4×5 cannot be seen by rows, which takes 4×4"):
        explore.neighbours_in(extractor, torch.zeros(1, 1, 4, 5, dtype=torch.uint8), source)


def test_langevin_has_the_moments_that_its_recursion_predicts():
    process, step, repeats = Linear(1000), 0.3, 20
    times = torch.tensor([1.0, 0.4, 0.2, 0.1], dtype=F64)

    def variance_at(t):
        return process.alpha(t).square() * VARIANCE + process.sigma(t).square()

    def score(x, t):
        return -x / variance_at(t).reshape(-1, 1, 1, 1).float()

    x = explore.langevin(score, process, Key(0).rows(50), (1, 20, 20), times, repeats, step)
    expected = 1.0
    for t in times:
        size = float(step * process.sigma(t).square())
        for _ in range(repeats):
            expected = (1 - size / 2 / float(variance_at(t))) ** 2 * expected + size
    assert float(x.mean()) == pytest.approx(0, abs=0.01)
    assert float(x.var()) == pytest.approx(expected, rel=0.04)
    assert expected == pytest.approx(float(variance_at(times[-1])), rel=0.1)  # it has nearly arrived


def test_a_grid_of_rows_keeps_its_columns(tmp_path):
    explore.write_grid(torch.zeros(2, 5, 1, 8, 8, dtype=torch.uint8), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == ((5 * 9 + 1) * 7, (2 * 9 + 1) * 7)
    assert [explore.enlarged(width) for width in (8, 28, 32, 56, 256)] == [7, 2, 2, 1, 1]


def test_the_noise_of_a_mixture_is_its_own_wherever_it_stands():
    pictures = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given = {"at": (0.5,), "seed": 3}
    eleven = explore.interpolate(gaussian(), *pictures, **given)
    three = explore.interpolate(gaussian(), *pictures, lambdas=(0.5, 0, 1), **given)
    assert torch.equal(three[0, 0], eleven[0, 5]) and torch.equal(three[0, 1:], eleven[0, [0, 10]])
    twice = explore.interpolate(gaussian(), pictures[0], pictures[0], lambdas=(0.3, 0.7), **given)
    assert not torch.equal(twice[0, 0], twice[0, 1])  # the same x_t, each with noise of its own


def test_a_deterministic_solver_makes_a_morph():
    """For Gaussian data DDIM is linear in x_t, so that the middle of a morph is the mean of its ends."""
    pictures = torch.randint(96, 160, (2, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given = {"at": (0.3,), "lambdas": (0.0, 0.5, 1.0)}
    first, middle, last = explore.interpolate(gaussian(), *pictures, **given, solver="ddim")[0].double()
    assert ((first + last) / 2 - middle).abs().max() <= 1
    first, middle, last = explore.interpolate(gaussian(), *pictures, **given, solver="ancestral")[0].double()
    assert ((first + last) / 2 - middle).abs().max() > 5


def test_every_figure_takes_a_solver():
    toy = gaussian(20)
    images, _ = explore.progressive(toy, 2, slots=1, solver="ddim")
    assert torch.equal(images[:, -1], toy.sample(2, solver="ddim"))
    with pytest.raises(UsageError, match="^solver ddim adds no noise, so that all images that share a latent are"):
        explore.shared(toy, 3, at=(0.5,), solver="ddim")
    branches, _ = explore.shared(toy, 3, at=(0.5,), solver=DDIM(eta=0.5))
    assert not (explore.shared(toy, 3, at=(0.5,))[0] == branches).all()


def test_a_latent_may_be_shared_between_two_points_of_the_table():
    """The network is told that time; of a model that knows steps of 1/T alone it is moved to one."""
    toy = gaussian(50)
    assert explore.shared(toy, 2, at=[0.503], steps=10)[1].tolist() == [0.503]
    learned = replace(toy, config=replace(toy.config, variance=Learned()))
    assert explore._place(learned, 0.503, 0.0) == 0.5 and explore._place(toy, 0.001, 0.0) == 0.02
