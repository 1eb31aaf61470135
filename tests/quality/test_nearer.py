"""How many are nearer than the closest 1 %: the exact law, and intervals that hold what they promise on known laws."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from undiffuse.key import Key
from undiffuse.quality.nearer import beta_binomial, binomial, rate

F64 = torch.float64


def drawn(name, n, dimensions=10.0):
    """Distances of points in so many dimensions from the middle of a ball: P(r < t) = t^dimensions."""
    return Key(0).fold(name).rows(n).uniform(1)[:, 0].to(F64) ** (1 / dimensions)


def test_the_law_of_equals_is_that_of_all_orders():
    n, m, k = 3, 4, 2
    found = np.zeros(n + 1)
    orders = list(combinations(range(n + m), m))  # the places of the held-out values among all
    for places in orders:
        found[places[k - 1] - (k - 1)] += 1 / len(orders)
    np.testing.assert_allclose(beta_binomial(n, k, m), found, rtol=1e-12)
    np.testing.assert_allclose(float(beta_binomial(50_000, 500, 50_000).sum()), 1, rtol=1e-9)
    np.testing.assert_allclose(binomial(3)(0.25), [27 / 64, 27 / 64, 9 / 64, 1 / 64], rtol=1e-12)


def test_with_a_threshold_that_is_known_the_interval_is_clopper_and_pearsons():
    """Of 20 in 1,000: where P(Binomial(1000, p) ≥ 20) and P(… ≤ 20) are 2.5 %."""
    samples = torch.cat([torch.full((20,), 0.2), torch.full((980,), 0.9)])
    held_out = torch.cat([torch.full((1000,), 0.5), torch.full((99_000,), 0.7)])
    found = rate(samples, held_out)
    assert (found.nearer, found.n, found.held_out, found.rate) == (20, 1000, 100_000, 0.02)
    np.testing.assert_allclose([found.low, found.high], [0.0122583, 0.0307200], rtol=1e-5)


@pytest.mark.parametrize("m, k, expected", [(19, 1, 1 / 20), (99, 1, 0.01), (249, 2, 2 / 250), (2000, 20, 20 / 2001)])
def test_the_threshold_is_the_order_statistic_nearest_to_one_per_cent(m, k, expected):
    held_out = torch.arange(1, m + 1, dtype=F64)[torch.randperm(m, generator=torch.Generator().manual_seed(0))]
    found = rate(torch.tensor([0.5, k, k + 0.5, m + 1.0], dtype=F64), held_out)
    assert found.threshold == k and found.nearer == 1  # those that are as near do not count
    np.testing.assert_allclose(found.expected, expected, rtol=1e-12)


def test_the_closest_one_in_a_thousand():
    held_out = torch.arange(1, 10_000, dtype=F64)
    found = rate(torch.tensor([9.5, 10.5], dtype=F64), held_out, 0.001)
    assert found.threshold == 10 and found.nearer == 1 and found.expected == 0.001


@pytest.mark.parametrize("m", [60, 400])
@pytest.mark.parametrize("copies", [0.0, 0.2])
def test_the_interval_covers_the_true_rate(m, copies):
    """Over 100 sets; without the threshold's own error the interval would cover far less often."""
    n, times = 500, 100
    inside, plain, more = 0, 0, 0
    for i in range(times):
        held_out, samples = drawn(f"held-out {m} {i}", m), drawn(f"samples {m} {copies} {i}", n)
        is_copy = drawn(f"copies {m} {i}", n, 1) < copies
        found = rate(torch.where(is_copy, 0.1 * samples, samples), held_out)
        true = copies + (1 - copies) * found.expected  # 0.1 r is always below the threshold, but for 10⁻⁸
        inside += found.low <= true <= found.high
        width = 1.96 * math.sqrt(max(found.rate * (1 - found.rate), 1 / n) / n)
        plain += abs(found.rate - true) <= width
        more += found.is_more
    assert inside >= 0.95 * times - 3 * math.sqrt(0.05 * 0.95 * times)
    assert (plain < 0.8 * times) if copies == 0 else (more == times)
    if copies == 0:
        assert more <= 0.025 * times + 3 * math.sqrt(0.025 * times)


def test_copies_of_all_and_none_near():
    held_out = drawn("held-out", 50)
    found = rate(torch.zeros(300), held_out)
    assert found.rate == found.high == 1 and found.low > 0.98 and found.is_more and found.p < 1e-50
    found = rate(torch.full((300,), 2.0), held_out)
    assert found.rate == found.low == 0 and found.p == pytest.approx(1) and not found.is_more


@pytest.mark.parametrize("zeros", [1, 3, 12])
def test_held_out_copies_do_not_hide_copies(zeros):
    """Held-out images that are training images too are at distance 0, and no sample can be nearer."""
    held_out = torch.cat([torch.zeros(zeros, dtype=F64), 1 + drawn("held out", 400 - zeros)])
    found = rate(torch.cat([torch.zeros(50, dtype=F64), 1.5 + drawn("new", 50)]), held_out)
    k = max(4, zeros + 1)
    assert found.expected == k / 401 and 0 < found.threshold == float(held_out.sort().values[k - 1])
    assert found.is_more and found.nearer == 50 and found.low > found.expected_high
    assert not rate(1 + drawn("other", 300), held_out).is_more
    assert rate(torch.zeros(5), torch.zeros(9)).threshold == 0
