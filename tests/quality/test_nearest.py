"""The nearest of a large set, found in parts, against the plain way; and the unit that a distance counts in."""

import pytest
import torch

from undiffuse.key import Key
from undiffuse.quality import nearest as module
from undiffuse.quality.nearest import around, near, nearest, pixels, points

CPU, F64 = torch.device("cpu"), torch.float64


def normal(name, n, d=6):
    return Key(0).fold(name).rows(n).normal(d)


def levels(name, n, shape=(2, 3, 5)):
    return (Key(0).fold(name).rows(n).uniform(*shape) * 256).to(torch.uint8)


@pytest.mark.parametrize("values, distances", [(1, 1), (70, 50), (1 << 25, 1 << 24)])
def test_the_nearest_are_those_of_the_plain_way_whatever_the_parts(monkeypatch, values, distances):
    monkeypatch.setattr(module, "VALUES", values)
    monkeypatch.setattr(module, "DISTANCES", distances)
    x, y = normal("x", 17), normal("y", 40)
    skip = torch.where(torch.arange(17) % 3 == 0, -1, torch.cdist(x, y).argmin(1))
    plain = torch.cdist(x.to(F64), y.to(F64))
    rows = torch.arange(17)[skip >= 0]
    plain[rows, skip[rows]] = torch.inf
    done = []
    distance, number = nearest(points(x), points(y), 4, skip, done.append)
    expected, order = plain.sort(1)
    assert torch.equal(number, order[:, :4]) and sum(done) == 40
    torch.testing.assert_close(distance, expected[:, :4], rtol=1e-5, atol=0)
    torch.testing.assert_close(distance[:, 0], expected[:, 0], rtol=1e-14, atol=0)


def test_a_copy_is_at_distance_zero_though_rounding_would_hide_it():
    y = normal("y", 30, 64) + 1000
    x = y[[3, 7]].clone()
    x[1, 0] += 0.01
    assert float(module.squared(x, y).gather(1, torch.tensor([[3], [7]]))[1]) != pytest.approx(1e-4, rel=0.5)
    distance, number = nearest(points(x), points(y))
    assert number[:, 0].tolist() == [3, 7]
    torch.testing.assert_close(distance[:, 0], (x.to(F64) - y[[3, 7]].to(F64)).norm(dim=1), rtol=1e-12, atol=0)


def test_pixels_are_exact():
    x, y = levels("x", 5), levels("y", 60)
    squared = (x[:, None].long() - y.long()).square().flatten(2).sum(2)
    distance, number = nearest(pixels(5, lambda i: x[i], CPU), pixels(60, lambda i: y[i], CPU), 3)
    assert torch.equal(distance.square().round().long(), squared.sort(1).values[:, :3])
    assert torch.equal(squared.gather(1, number), squared.sort(1).values[:, :3])


@pytest.mark.parametrize("is_apart", [True, False])
def test_a_distance_counts_in_those_around_the_training_image(is_apart):
    """By loops, and for training images as if each had been held out alone."""
    training, k = normal("training", 30), 5
    x, skip = (normal("x", 8), None) if is_apart else (training[3:11], torch.arange(3, 11))
    found = near(points(x), points(training), skip, k)
    for i in range(8):
        left = [j for j in range(30) if skip is None or j != int(skip[i])]
        distance = {j: float((x[i] - training[j]).double().norm()) for j in left}
        best = min(distance, key=lambda j: distance[j])
        others = sorted(float((training[best] - training[j]).double().norm()) for j in left if j != best)[:k]
        assert int(found.number[i]) == best
        assert float(found.ratio[i]) == pytest.approx(distance[best] * k / sum(others), rel=1e-5)


def test_identical_training_images_have_no_unit():
    training = torch.zeros(5, 3)
    found = near(points(torch.tensor([[0.0, 0, 0], [0, 1, 0]])), points(training), None, 4)
    assert found.ratio.tolist() == [0, torch.inf]


def test_of_few_training_images_all_others_are_around():
    assert [around(n, is_apart=True) for n in (1, 2, 51, 60_000)] == [0, 1, 50, 50]
    assert [around(n, is_apart=False) for n in (2, 3, 52, 60_000)] == [0, 1, 50, 50]
