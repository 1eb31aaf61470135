"""The average of the weights against its closed form."""

import pytest
import torch
from torch import nn

from undiffuse.average import Ema


def weights(*values: float) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((2, 3), value)) for value in values]


def move(parameters: list[nn.Parameter], *values: float) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.fill_(value)


def test_it_starts_as_a_copy_of_its_own():
    given = weights(1.0, -2.0)
    ema = Ema(given, 0.9)
    move(given, 7.0, 7.0)
    assert [shadow.unique().tolist() for shadow in ema.shadow] == [[1.0], [-2.0]]
    assert not any(shadow.requires_grad for shadow in ema.shadow)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_it_is_the_weighted_sum_of_all_that_was_seen(decay):
    """decay^n w_0 + (1 − decay) Σ decay^(n−k) w_k."""
    given, history = weights(1.0, -2.0), [(1.0, -2.0)]
    ema = Ema(given, decay)
    for step in range(20):
        history.append((float(step % 7), -3.0 + step))
        move(given, *history[-1])
        ema.update(given, step)
    for i, shadow in enumerate(ema.shadow):
        seen = [values[i] for values in history]
        rest = sum(decay ** (20 - k) * seen[k] for k in range(1, 21))
        expected = decay**20 * seen[0] + (1 - decay) * rest
        torch.testing.assert_close(shadow, torch.full((2, 3), expected), rtol=1e-6, atol=1e-6)


def test_the_first_weights_are_forgotten_at_the_decay_s_own_pace():
    """As in the authors' code there is no debiasing: 0.9999^5000 = 0.61 of the start is left after 5000 steps."""
    given = weights(1.0)
    ema = Ema(given, 0.9999)
    move(given, 0.0)
    for step in range(5000):
        ema.update(given, step)
    assert ema.shadow[0][0, 0].item() == pytest.approx(0.9999**5000, rel=1e-4)


def test_a_ramp_limits_the_decay():
    """(1 + n)/(10 + n) after n updates: 0.1, 2/11, 3/12, …, until the decay asked for."""
    given = weights(1.0)
    ema, expected = Ema(given, 0.5, ramp=True), 1.0
    move(given, 0.0)
    for step in range(30):
        ema.update(given, step)
        expected *= min(0.5, (1 + step) / (10 + step))
        assert ema.shadow[0][0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_the_weights_stay_as_they_are():
    given = weights(3.0)
    Ema(given, 0.5).update(given, 0)
    assert given[0].requires_grad and given[0].grad is None and given[0].unique().tolist() == [3.0]
