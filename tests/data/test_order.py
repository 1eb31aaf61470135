"""The order is a permutation in each epoch, for each length, and no permutation is favoured."""

import math
from collections import Counter

import pytest
import torch

from undiffuse.data.order import order
from undiffuse.errors import UsageError

LENGTHS = [*range(1, 40), 63, 64, 65, 99, 100, 101, 999, 1000, 1024, 4097]


@pytest.mark.parametrize("length", LENGTHS)
def test_each_epoch_holds_each_example_once(length):
    walk = order(5, length, torch.arange(3 * length))
    for epoch in walk.reshape(3, length):
        assert torch.equal(epoch.sort().values, torch.arange(length))


def test_epochs_and_seeds_differ():
    first, second = order(5, 1000, torch.arange(2000)).reshape(2, 1000)
    other = order(6, 1000, torch.arange(1000))
    # Two random permutations share one value in expectation, and 10 with probability 1e-7.
    assert int((first == second).sum()) < 10
    assert int((first == other).sum()) < 10


def test_a_position_is_independent_of_what_is_asked_with_it():
    positions = torch.tensor([7, 120, 3, 99, 100, 7, 12_345_678_901])
    alone = torch.cat([order(1, 100, position[None]) for position in positions])
    assert torch.equal(order(1, 100, positions), alone)


def test_golden_order():
    """A run that was begun with an older version must go on in the same order."""
    assert order(0, 10, torch.arange(20)).tolist() == [1, 9, 7, 5, 4, 8, 3, 2, 6, 0, 2, 8, 0, 4, 3, 9, 1, 5, 6, 7]
    assert order(2**40, 10**8, torch.tensor([0, 10**8 - 1, 10**8])).tolist() == [33404757, 15698036, 24710504]


@pytest.mark.parametrize("length, epochs", [(3, 900), (4, 1200)])
def test_every_permutation_is_as_likely(length, epochs):
    walk = order(1, length, torch.arange(length * epochs)).reshape(epochs, length)
    counts = Counter(map(tuple, walk.tolist()))
    expected = epochs / math.factorial(length)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == math.factorial(length)
    # The mean of chi square is the degrees of freedom; 5 standard deviations above is never seen by chance.
    freedom = math.factorial(length) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_neighbours_are_not_kept_together():
    walk = order(2, 60_000, torch.arange(60_000)).double()
    correlation = torch.corrcoef(torch.stack([walk[:-1], walk[1:]]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(60_000)


def test_bad_arguments():
    with pytest.raises(UsageError, match="order of 0 examples .* give length >= 1"):
        order(0, 0, torch.arange(1))
    with pytest.raises(UsageError, match="positions >= 0"):
        order(0, 5, torch.tensor([-1]))
