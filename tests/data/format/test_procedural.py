"""The closed forms against other ways to the same numbers: autograd, dense matrices, counts, enumeration."""

import math

import mpmath
import numpy as np
import pytest
import torch

from undiffuse.data.format import procedural
from undiffuse.data.format.procedural import PROCEDURAL, Gaussian, ImageMixture, Law, PixelMixture, Rule, Shapes
from undiffuse.data.picture import Reading
from undiffuse.data.source import open_raw, open_source
from undiffuse.errors import UsageError
from undiffuse.key import Key

LAWS = [Gaussian(), PixelMixture(), ImageMixture(), Gaussian((3, 2, 4), -0.2, 0.1, 0.9)]
NOISE = [(1.0, 0.0), (0.8, 0.6), (0.1, 0.99)]


def test_the_sets_are_found():
    assert {f"procedural:{name}" for name in PROCEDURAL.classes} == set(Rule.names)
    assert set(PROCEDURAL.classes) == {"gaussian", "pixel-mixture", "image-mixture", "shapes"}


def normal(x, mean, variance):
    return -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance))


def log_density(law, x, alpha, sigma):
    """Of one image under the noised law, from its definition."""
    if isinstance(law, Gaussian):
        d = x.numel()
        one, each = torch.ones(d, d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
        covariance = law.std**2 * ((1 - law.correlation) * each + law.correlation * one)
        covariance = alpha**2 * covariance + sigma**2 * each
        mean = torch.full((d,), alpha * law.mean, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(mean, covariance).log_prob(x.flatten())
    each = [
        normal(x, alpha * mean, (alpha * std) ** 2 + sigma**2) for mean, std in zip(law.means, law.stds, strict=True)
    ]
    each = each if isinstance(law, PixelMixture) else [terms.sum() for terms in each]
    weighted = [math.log(weight) + terms for weight, terms in zip(law.weights, each, strict=True)]
    return torch.stack(weighted).logsumexp(0).sum()


@pytest.mark.parametrize("alpha, sigma", NOISE)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_score_is_the_gradient_of_the_log_density(law, alpha, sigma):
    x = 0.5 * Key(1).rows(3).normal(*law.shape).double()
    x.requires_grad_()
    total = sum(log_density(law, image, alpha, sigma) for image in x)
    (gradient,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(law.score(x.detach(), alpha, sigma), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_samples_have_the_moments_of_the_law(law):
    count = 4000
    x = law.source(count, Key(2)).images.double() / 127.5 - 1
    if isinstance(law, Gaussian):
        mean, variance, correlation = law.mean, law.std**2, law.correlation
    else:
        mean = sum(w * m for w, m in zip(law.weights, law.means, strict=True))
        square = sum(w * (m**2 + s**2) for w, m, s in zip(law.weights, law.means, law.stds, strict=True))
        variance = square - mean**2
        between = sum(w * (m - mean) ** 2 for w, m in zip(law.weights, law.means, strict=True))
        correlation = between / variance if isinstance(law, ImageMixture) else 0.0
    d = x[0].numel()
    flat = x.flatten(1) - mean
    # The mean of all values varies as one draw does, the more the more they go together.
    error = math.sqrt(variance * (correlation + (1 - correlation) / d) / count)
    assert abs(float(flat.mean())) < 5 * error
    assert float(flat.square().mean()) == pytest.approx(variance, rel=0.08)
    pairs = (flat.sum(1) ** 2 - flat.square().sum(1)) / (d * (d - 1))
    assert abs(float(pairs.mean()) - correlation * variance) < 5 * float(pairs.std()) / math.sqrt(count)


@pytest.mark.parametrize("mean, std", [(0.0, 0.2), (0.9, 0.3), (-0.9, 0.3), (-0.999, 0.004), (0.3, 1e-4), (0.5, 3.0)])
def test_level_probabilities(mean, std):
    p = procedural.level_probabilities(mean, std)
    assert float(p.sum()) == pytest.approx(1, abs=1e-14)
    with mpmath.workdps(30):
        for k in (0, 1, 2, 100, 127, 128, 166, 200, 254, 255):
            low = -mpmath.inf if k == 0 else (k - mpmath.mpf(1) / 2) / 127.5 - 1
            high = mpmath.inf if k == 255 else (k + mpmath.mpf(1) / 2) / 127.5 - 1
            # Differences of tails, so that a mass of 1e-200 is right to its own digits.
            side = 1 if low + high < 2 * mean else -1
            near, far = (side * (edge - mean) / std for edge in ((high, low) if side > 0 else (low, high)))
            exact = mpmath.erfc(-near / mpmath.sqrt(2)) / 2 - mpmath.erfc(-far / mpmath.sqrt(2)) / 2
            assert float(p[k]) == pytest.approx(float(exact), rel=1e-9, abs=1e-290)


def test_the_entropy_of_a_pixel_mixture_is_what_a_perfect_code_spends():
    law = PixelMixture()
    levels = law.source(8000, Key(3)).images.long()
    bits = -law.probabilities()[levels].log2()
    error = float(bits.std()) / math.sqrt(bits.numel())
    assert abs(float(bits.mean()) - law.entropy_bits_per_dim()) < 5 * error
    assert error < 0.003


def test_the_entropy_of_an_image_mixture_is_what_a_perfect_code_spends():
    law = ImageMixture()
    levels = law.source(4000, Key(4)).images.long()
    each = [
        procedural.level_probabilities(*pair).log()[levels].sum((1, 2, 3))
        for pair in zip(law.means, law.stds, strict=True)
    ]
    joint = torch.stack([math.log(w) + terms for w, terms in zip(law.weights, each, strict=True)]).logsumexp(0)
    bits = -joint / math.log(2) / 64
    error = float(bits.std()) / math.sqrt(len(bits))
    assert abs(float(bits.mean()) - law.entropy_bits_per_dim()) < 5 * error
    assert error < 0.01


def test_the_entropy_of_an_image_mixture_by_enumeration():
    """Two values, all 65,536 images."""
    law = ImageMixture((1, 1, 2), (0.25, 0.75), (-0.6, 0.6), (0.05, 0.08))
    p, q = (procedural.level_probabilities(*pair) for pair in zip(law.means, law.stds, strict=True))
    joint = 0.25 * p[:, None] * p + 0.75 * q[:, None] * q
    assert law.entropy_bits_per_dim() == pytest.approx(procedural.entropy_bits(joint) / 2, abs=1e-6)


def test_the_bound_of_what_is_left_open_holds():
    law = ImageMixture((1, 1, 2), (0.25, 0.75), (-0.6, 0.6), (0.15, 0.15))
    p, q = (procedural.level_probabilities(*pair) for pair in zip(law.means, law.stds, strict=True))
    first, second = 0.25 * p[:, None] * p, 0.75 * q[:, None] * q
    left_open = sum(procedural.entropy_bits(part) for part in (first, second)) - procedural.entropy_bits(first + second)
    assert 1e-10 < left_open <= law.open_bits() < 2e-6


@pytest.mark.parametrize("std", [2 / 127.5, 0.1, 0.18])
@pytest.mark.parametrize("mean", [0.0, 0.1 / 127.5])
def test_the_entropy_of_a_gaussian_without_correlation_is_that_of_one_value(mean, std):
    exact = procedural.entropy_bits(procedural.level_probabilities(mean, std))
    assert Gaussian(mean=mean, std=std, correlation=0.0).entropy_bits_per_dim() == pytest.approx(exact, abs=1e-6)


def test_the_entropy_of_a_correlated_gaussian_by_summation():
    """Two values: the joint probability of each pair of levels is a square of the plane."""
    law = Gaussian((1, 1, 2), 0.0, 0.03, 0.6)
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(6))
    covariance = law.std**2 * torch.tensor([[1, 0.6], [0.6, 1]], dtype=torch.float64)
    normal_2d = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance)
    near = levels[levels.abs() < 7 * law.std]
    grid = torch.cartesian_prod(near, near)
    inside = torch.cartesian_prod(nodes, nodes) / 2 / 127.5
    density = normal_2d.log_prob(grid[:, None] + inside).exp()
    masses = density @ torch.outer(weights, weights).flatten() / 4 / 127.5**2
    assert float(masses.sum()) == pytest.approx(1, abs=1e-9)
    assert law.entropy_bits_per_dim() == pytest.approx(procedural.entropy_bits(masses) / 2, abs=1e-6)


BAD = {
    "correlation": (
        lambda: Gaussian(correlation=1.0),
        r"correlation 1.0 is not possible; give a correlation in \[0, 1\)",
    ),
    "narrow": (lambda: Gaussian(std=0.01), "at least two levels"),
    "tails": (lambda: Gaussian(std=0.3), r"leaves \[-1, 1\]; give a smaller std"),
    "weights": (lambda: PixelMixture(weights=(0.3, 0.6)), r"weights above 0 with sum 1; got \(0.3, 0.6\)"),
    "lengths": (lambda: PixelMixture(means=(0.1,)), "one mean and std a weight"),
    "std": (lambda: PixelMixture(stds=(0.1, 0.0)), r"standard deviations above 0; got \(0.1, 0.0\)"),
    "overlap": (lambda: ImageMixture(means=(0.0, 0.01)), "overlap too much for a known entropy; move the means apart"),
    "shapes": (lambda: Shapes(4), "shapes of 4 pixels cannot be told apart; give a size of at least 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_laws_without_a_closed_form_are_refused(case):
    make, message = BAD[case]
    with pytest.raises(UsageError, match=message):
        make()


def test_a_row_is_what_it_is_alone():
    for law in (*LAWS, Shapes(8)):
        images, _ = law.draw(Key(5).rows(6))
        alone, _ = law.draw(Key(5).rows(torch.tensor([4])))
        assert torch.equal(images[4:5], alone), law


def test_shapes_are_of_each_kind_in_colour_and_inside():
    images, kinds = Shapes().draw(Key(6).rows(400))
    assert images.shape == (400, 3, 32, 32)
    assert int(kinds.bincount(minlength=4).min()) > 60  # 100 expected, standard deviation 8.7
    ground = images[:, :, :1, :1]
    drawn = (images != ground).any(1).flatten(1).double().mean(1)
    assert bool(((drawn > 0.02) & (drawn < 0.6)).all())
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=2)
    assert float((border == ground[..., 0]).double().mean()) > 0.95
    # A disc of radius r covers pi r^2, a square in it 2 r^2, a triangle 3 sqrt(3)/4 r^2, a ring pi r^2 (1 - 0.36).
    area = torch.stack([drawn[kinds == kind].mean() for kind in range(4)])
    expected = torch.tensor([math.pi, 2, 0.75 * math.sqrt(3), 0.64 * math.pi], dtype=torch.float64)
    torch.testing.assert_close(area / area[0], expected / expected[0], rtol=0.25, atol=0)


def test_a_range_is_refused():
    with pytest.raises(UsageError, match="^data.range is not for procedural:shapes, whose levels are made; leave it"):
        open_raw("procedural:shapes", reading=Reading(range=(0, 1)))


def test_by_name():
    train, test = open_source("procedural:shapes"), open_source("procedural:shapes", split="test")
    assert (len(train), len(test)) == (8192, 1024)
    assert not torch.equal(train.images[:8], test.images[:8])
    assert train.classes == Shapes.classes
    with pytest.raises(
        UsageError, match=r'procedural set "shape" is not known. Did you mean "shapes"\? Known: gaussian'
    ):
        open_source("procedural:shape")


def test_every_law_is_tested_here():
    assert {type(law) for law in LAWS} == {cls for cls in PROCEDURAL.classes.values() if issubclass(cls, Law)}
