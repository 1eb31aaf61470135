"""Importance-sampled t: its probabilities by hand, an estimator without bias, and the table of the last losses."""

import pytest
import torch

from tests.diffusion.test_objective import Wave, images
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.density import Importance, Uniform
from undiffuse.diffusion.importance import Drawn, Seen
from undiffuse.diffusion.objective import Hybrid, MinSnr, Simple, Vlb, by_quartile, quartile_sums
from undiffuse.diffusion.parameterisation import Eps
from undiffuse.diffusion.process import Linear
from undiffuse.diffusion.reverse import FixedLarge, LearnedRange
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.model.recipe import load_recipe
from undiffuse.network.base import NOTHING

F64 = torch.float64
FOUR = Linear(4, beta_start=0.1, beta_end=0.5)


def full(losses: list[list[float]], uniform: float = 0.0) -> Seen:
    """What has been seen where the losses of step n are losses[n − 1], in that order."""
    seen = Seen(Simple(Importance(history=len(losses[0]), uniform=uniform)), Linear(len(losses)))
    for row in zip(*losses, strict=True):
        seen.observe(torch.arange(1, len(losses) + 1, dtype=F64) / len(losses), torch.tensor(row))
    return seen


def test_the_probabilities_are_the_roots_of_second_moments():
    """√mean(3², 4²·…) by hand: rows of second moment 1, 4, 9, 16 are as 1 : 2 : 3 : 4."""
    losses = [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [0.0, 32**0.5]]
    p = full(losses).density().p
    torch.testing.assert_close(p, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64), rtol=1e-7, atol=0)
    mixed = full(losses, uniform=0.2).density().p
    torch.testing.assert_close(mixed, 0.8 * p + 0.05, rtol=1e-12, atol=0)


def test_it_draws_with_these_probabilities_and_weighs_by_them():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    density, keys = Drawn(p), Key(3).rows(20_000)
    t = density.t(FOUR, keys)
    counts = (t * 4).round().long().bincount(minlength=5)[1:]
    assert float(((counts - 20_000 * p) ** 2 / (20_000 * p)).sum()) < 16.3  # χ² with 3 degrees of freedom, p = 0.001
    weight = density.weight(FOUR, torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=F64))
    assert weight.tolist() == pytest.approx([2.5, 1.25, 1 / 1.2, 0.625], rel=1e-12)
    assert torch.equal(density.t(FOUR, keys[50:60]), t[50:60])
    assert Uniform().weight(FOUR, t) is None


def test_it_is_uniform_until_there_are_enough_losses_of_each_step():
    seen = Seen(Simple(Importance(history=2)), FOUR)
    t, keys = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=F64), Key(0).rows(64)
    seen.observe(t, torch.ones(4))
    seen.observe(t[:3], torch.ones(3))
    assert torch.equal(seen.density().t(FOUR, keys), Uniform().t(FOUR, keys)) and seen.density() == Importance(2)
    seen.observe(t[3:], torch.ones(1))
    assert seen.density().p.tolist() == [0.25] * 4


def test_only_the_last_losses_of_each_step_count():
    seen = full([[1.0, 1.0, 1.0], [5.0, 6.0, 7.0]])
    seen.observe(torch.tensor([1.0, 0.5, 1.0], dtype=F64), torch.tensor([8.0, 2.0, 9.0]))
    assert sorted(seen.losses[1].tolist()) == [7, 8, 9] and sorted(seen.losses[0].tolist()) == [1, 1, 2]
    seen.observe(torch.full((4,), 0.5, dtype=F64), torch.tensor([3.0, 4.0, 5.0, 6.0]))  # more than fit, in one batch
    assert sorted(seen.losses[0].tolist()) == [4, 5, 6]


@pytest.mark.parametrize(
    "objective",
    [Simple(Importance()), MinSnr(density=Importance()), Vlb(Importance()), Hybrid(density=Importance())],
    ids=lambda each: type(each).__name__,
)
def test_the_mean_is_that_of_uniform_t(objective):
    """E_p[L_t/(T p_t)] = E[L_t]: within four standard errors, where the mean without the factor is far from it."""
    learned = isinstance(objective, Hybrid)
    model = Denoiser(Wave(2 if learned else 1), FOUR, Eps(), LearnedRange() if learned else FixedLarge(), clip=False)
    x_0 = images(1, channels=1, size=4).expand(8000, -1, -1, -1)
    seen = Seen(objective, FOUR)
    seen.losses.copy_(torch.tensor([1.0, 2.0, 6.0, 20.0])[:, None])
    seen.count.fill_(10)
    with torch.no_grad():
        plain = objective(model, x_0, NOTHING, Key(1).rows(8000))
        loss = seen.applied(objective)(model, x_0, NOTHING, Key(2).rows(8000))
    weight = seen.density().weight(FOUR, loss.t).float()
    error = ((plain.per_example.var() + loss.per_example.var()) / 8000).sqrt()
    assert abs(loss.per_example.mean() - plain.per_example.mean()) < 4 * error
    if isinstance(objective, Simple):
        assert abs((loss.per_example / weight).mean() - plain.per_example.mean()) > 5 * error
        assert torch.equal(loss.per_example, weight * loss.terms["simple"])


def test_a_quarter_counts_an_example_by_its_weight():
    """So the loss of a quarter is a mean over its t, each as often, though they are drawn otherwise."""
    t = torch.tensor([0.1, 0.2, 0.9], dtype=F64)
    loss, weight = torch.tensor([2.0, 4.0, 5.0]), torch.tensor([0.5, 1.5, 3.0])
    sums = quartile_sums(weight * loss, t, weight)
    assert by_quartile(sums) == {"loss_q1": pytest.approx((1 + 6) / 2), "loss_q4": pytest.approx(5.0)}
    assert float(sums[0].sum()) == 22


def test_nothing_is_kept_for_other_densities():
    seen = Seen(Simple(Uniform()), Linear())
    assert not seen.on and seen.density() is None and seen.losses.numel() == 0
    objective = Simple(Uniform())
    assert seen.applied(objective) is objective


def test_it_is_a_setting():
    words = ["objective.name=vlb", "objective.density.name=importance", "objective.density.history=3"]
    assert load_recipe("digits", words).objective == Vlb(Importance(history=3))
    with pytest.raises(UsageError, match='"history" input should be greater than or equal to 1, given 0'):
        load_recipe("digits", ["objective.density.name=importance", "objective.density.history=0"])
