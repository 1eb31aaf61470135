"""A step of the chain: its two Gaussians against the process, its order, and the scale of what is left."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from tests.codec.plans import gaussian, gaussian_images, gaussian_plan
from undiffuse.codec import stream
from undiffuse.codec.chain import Chain, Order, at_knots, hats, wanted_scales
from undiffuse.codec.plan import KNOTS, SCALES
from undiffuse.codec.stream import Codec
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import Cosine, Edm, Linear, Straight
from undiffuse.key import Key
from undiffuse.model.model import to_float

SHAPE = (1, 12, 12)
MODEL = gaussian(SHAPE)
PLAN = gaussian_plan(MODEL)


@pytest.mark.parametrize("process", [Cosine(), Linear(), Straight(), Edm()], ids=lambda each: type(each).__name__)
def test_the_means_differ_by_the_rise_of_the_snr(process):
    """c²/β̃ = SNR_s − SNR_t, in every frame: what the costs of the tables rest on."""
    t, s = torch.tensor([0.9, 0.5, 0.3], dtype=F64), torch.tensor([0.8, 0.1, 0.29], dtype=F64)
    _, c = process.posterior_coefficients(t, s)
    rise = process.logsnr(s).exp() - process.logsnr(t).exp()
    torch.testing.assert_close(c.square() / process.small_variance(t, s), rise, rtol=1e-9, atol=0)


def test_what_is_searched_for_is_the_likelihood_of_q_over_that_of_p():
    """2⟨w₁, z⟩ − ⟨w₂, z²⟩ differs from 2 log q/p of two candidates by what it does not depend on."""
    truth, scales = to_float(gaussian_images(3)), [0, 5, -4]
    tables = replace(PLAN, shape=(tuple(0.4 + 0.1 * k for k in range(KNOTS)),) * PLAN.steps)
    chain = Chain(MODEL, tables, Key(0).rows(3), SHAPE)
    for number in (0, 3):
        x_0 = chain.estimate(number)
        step = chain.step(number, x_0, scales)
        times = [torch.full((3,), tables.times[n], dtype=F64) for n in (number, number + 1)]
        q_mean, small = MODEL.process.posterior(chain.x, truth, *times)
        q = Normal(q_mean.double(), small.sqrt()[:, None, None, None])
        p_mean, _ = MODEL.process.posterior(chain.x, x_0, *times)
        b, c = MODEL.process.posterior_coefficients(*times)
        h = np.interp(x_0.double(), np.linspace(-1, 1, KNOTS), tables.shape[number])
        v = tables.square[number] * 2.0 ** (torch.tensor(scales, dtype=F64) / 4)
        spread = (small + c.square() * v)[:, None, None, None]
        spread = (spread + (c.square() * v)[:, None, None, None] * (torch.from_numpy(h) - 1)).sqrt()
        p = Normal(p_mean.double(), spread)
        torch.testing.assert_close(step.mean.double(), p.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.spread.double(), p.stddev, rtol=1e-5, atol=0)
        linear, squares = (each.double() for each in step.weights(truth))
        found = []
        for seed in (1, 2):
            z = Key(seed).rows(3).normal(*SHAPE).double()
            at = p.mean + p.stddev * z
            exact = 2 * (q.log_prob(at) - p.log_prob(at)).flatten(1).sum(1)
            found.append(exact - (2 * linear * z.flatten(1) - squares * z.flatten(1).square()).sum(1))
        assert exact.abs().min() > 10
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0.02)
        chain.move(step, Key(3).rows(3).normal(144))


def test_values_between_knots_are_between_those_of_the_knots():
    h = tuple(0.1 + (k - 5) ** 2 for k in range(KNOTS))
    x = torch.linspace(-1.2, 1.2, 241, dtype=F64)
    expected = np.interp(x.numpy(), np.linspace(-1, 1, KNOTS), h)
    torch.testing.assert_close(at_knots(h, x), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    below, share = hats(x)
    assert below.min() == 0 and below.max() == KNOTS - 2 and share.min() >= 0 and share.max() <= 1


def test_each_step_has_an_order_and_signs_of_its_own_and_they_are_undone():
    keys, x = Key(5).rows(3), torch.randn(3, 200, dtype=F64)
    orders = [Order.of(keys, step, 200) for step in range(3)]
    for order in orders:
        assert order.places.sort(1).values.eq(torch.arange(200)).all() and set(order.signs.unique().tolist()) == {-1, 1}
        torch.testing.assert_close(order.back(order.along(x)), x, rtol=0, atol=0)
        assert abs(float(order.signs.mean())) < 0.15
    rows = [order.places[i] for order in orders for i in range(3)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(rows, 2))
    assert torch.equal(Order.of(keys[1:2], 0, 200).places[0], orders[0].places[1])  # of its own key alone


def test_the_scale_is_that_of_the_residual():
    """In quarters of an octave of its mean square, over that of the tables."""
    x_0 = torch.zeros(4, *SHAPE)
    by = [0.5, 1.0, 2.0, 2**1.25]
    truth = torch.stack([torch.full(SHAPE, (PLAN.square[2] * each) ** 0.5) for each in by])
    assert wanted_scales(PLAN, 2, x_0, truth) == [-4, 0, 4, 5]
    tilted = replace(PLAN, shape=(tuple(2.0 if k == 6 else 0.9 for k in range(KNOTS)),) * PLAN.steps)
    assert wanted_scales(tilted, 2, x_0, truth) == [-8, -4, 0, 1]  # h is 2 where x̂_0 is 0
    assert wanted_scales(PLAN, 2, x_0, x_0)[0] < -SCALES  # nothing is left; what is sent is held within the tables


@pytest.mark.parametrize("batch", [4, 7])
def test_groups_make_the_same_file_alone_as_together(monkeypatch, batch):
    """The last one has fewer images; and of a file that is cut off some groups have a step more than others."""
    codec, images = Codec(MODEL, PLAN), gaussian_images(11)
    alone = codec.encode(images, group=2)
    cuts = range(len(alone) // 3, len(alone), len(alone) // 7)
    apart = [codec.decode(alone[:cut]) for cut in cuts]
    assert len(apart[0].chains) > 1
    monkeypatch.setattr(stream, "BATCH", batch)
    assert codec.encode(images, group=2) == alone
    assert len(codec.decode(alone).chains) > 1
    for cut, one in zip(cuts, apart, strict=True):
        other = codec.decode(alone[:cut])
        assert len(other.chains) >= len(one.chains)
        assert torch.equal(other.mean(), one.mean()) and torch.equal(other.drawn(), one.drawn())
