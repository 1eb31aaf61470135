"""Metrics on laws whose scores are known, and beside the functions of other tools on the same features."""

import math

import numpy as np
import pytest
import torch
from prdc import compute_prdc

from tests.quality.fidelity import (
    distance_of_fidelity,
    distance_of_pytorch_fid,
    distance_of_torchmetrics,
    kernel_of_fidelity,
    precision_of_fidelity,
    score_of_fidelity,
    statistics_of_fidelity,
)
from undiffuse.errors import NotFiniteError, UsageError
from undiffuse.key import Key
from undiffuse.quality.metric.base import METRICS, Features, Gathered, Moments, Rows, compute
from undiffuse.quality.metric.density_coverage import DensityCoverage, density_coverage
from undiffuse.quality.metric.distances import nearest, radii
from undiffuse.quality.metric.frechet import (
    Frechet,
    FrechetInfinity,
    frechet_distance,
    frechet_of_rows,
    root,
)
from undiffuse.quality.metric.inception_score import InceptionScore, inception_score
from undiffuse.quality.metric.kernel import Kernel, kernel_distance, kernel_distances, kernel_error
from undiffuse.quality.metric.precision_recall import PrecisionRecall, precision_recall

F64 = torch.float64
NAMES = {
    *("frechet", "frechet-infinity", "spatial-frechet", "inception-score", "kernel", "precision-recall"),
    "density-coverage",
}


def normal(name, n, d):
    return Key(0).fold(name).rows(n).normal(d).to(F64)


def some(name, n=300, d=40, shift=0.0):
    """Correlated features of the size of real ones: positive, of unequal spread."""
    mixed = normal(name, n, d) @ normal("mixing", d, d) / d**0.5
    return (mixed + shift).abs() * torch.linspace(0.2, 1.5, d, dtype=F64)


def moments(rows):
    made = Moments()
    made.update(rows, torch.arange(len(rows)))
    return made


def gathered(rows, metrics, is_reference=False, batch=64):
    made = Gathered(metrics, is_reference)
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        made.update(Features(part, part, part), torch.arange(first, first + len(part)))
    return made


def measured(metric, x, y):
    return compute(metric, gathered(x, [metric]), gathered(y, [metric], True))


def test_the_table_has_these_metrics():
    assert set(METRICS.classes) == NAMES
    for cls in METRICS.classes.values():
        assert set(cls.labels) == set(cls.better) and set(cls.better.values()) <= {"lower", "higher"}


# Fréchet distance


def test_the_distance_of_gaussians_is_the_closed_form():
    """Diagonal covariances: Σ (μ − μ')² + (σ − σ')²; rotated together it is the same."""
    d = 12
    a, b = torch.linspace(0.1, 2, d, dtype=F64), torch.linspace(1.5, 0.0, d, dtype=F64)  # the last one is singular
    mean = torch.linspace(-1, 1, d, dtype=F64)
    turn = torch.linalg.qr(normal("turn", d, d)).Q
    truth = float(mean.square().sum() + (a - b).square().sum())
    found = frechet_distance(
        torch.zeros(d, dtype=F64), turn @ a.square().diag() @ turn.T, turn @ mean, turn @ b.square().diag() @ turn.T
    )
    assert found == pytest.approx(truth, rel=1e-6)
    assert frechet_distance(mean, a.square().diag(), mean, a.square().diag()) == pytest.approx(0, abs=1e-12)


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")  # pytorch-fid's, of scipy's root
@pytest.mark.parametrize("n, d", [(300, 40), (30, 64), (500, 128)])
def test_the_distance_is_that_of_the_other_tools(n, d):
    x, y = some("x", n, d), some("y", n + 50, d, 0.1)
    ours = measured(Frechet(), x, y)["fd"]
    one, other = (statistics_of_fidelity(z) for z in (x, y))
    fidelity = distance_of_fidelity(one, other, False)["frechet_inception_distance"]
    assert ours == pytest.approx(fidelity, rel=1e-6)
    arrays = [(z.numpy().mean(0), np.cov(z.numpy(), rowvar=False)) for z in (x, y)]
    if n > d:  # its root of a singular product is a warning and another number
        assert ours == pytest.approx(distance_of_pytorch_fid(*arrays[0], *arrays[1]), rel=1e-6)
    tensors = [torch.from_numpy(np.asarray(array)) for pair in arrays for array in pair]
    assert ours == pytest.approx(float(distance_of_torchmetrics(*tensors)), rel=1e-6)
    biased = frechet_distance(tensors[0], tensors[1] * (n - 1) / n, tensors[2], tensors[3])
    assert abs(biased / ours - 1) > 1e-5  # a covariance of n would be seen


@pytest.mark.parametrize("n, d", [(300, 40), (30, 64)])
def test_the_distance_of_rows_is_that_of_their_moments(n, d):
    x, y = some("x", n, d), moments(some("y", 400, d, 0.1))
    whole = moments(x)
    truth = frechet_distance(whole.mean, whole.covariance, y.mean, y.covariance)
    assert frechet_of_rows(x, y.mean, root(y.covariance)) == pytest.approx(truth, rel=1e-6)


def test_the_extrapolated_distance_is_that_of_the_law():
    """Samples of the reference's own law: the distance is all bias, the limit nothing."""
    d, n = 20, 1000
    reference = Moments.of(10**9, torch.zeros(d, dtype=F64), torch.eye(d, dtype=F64))
    draws = [normal(f"law {i}", n, d) for i in range(8)]
    found = [FrechetInfinity().compute(_rows(rows), reference) for rows in draws]
    finite = np.mean([frechet_of_rows(rows, reference.mean, reference.covariance) for rows in draws])
    limits = [each["fd_infinity"] for each in found]
    bias = np.mean([each["fd_infinity_bias"] for each in found])
    # To first order in 1/n: d for the mean, d (d + 1)/4 for the covariance.
    first_order = (d + d * (d + 1) / 4) / n
    assert finite == pytest.approx(first_order, rel=0.1) and bias == pytest.approx(first_order, rel=0.2)
    assert abs(np.mean(limits)) < 3 * np.std(limits, ddof=1) / len(limits) ** 0.5 < 0.2 * finite
    assert all(0 < each["fd_infinity_se"] < 0.5 * finite for each in found)


def _rows(values):
    made = Rows()
    made.update(values, torch.arange(len(values)))
    return made


# Kernel distance


@pytest.mark.parametrize(
    "spec, message",
    [
        ("precision-recall,most=4", "most = 4 is not possible with k = 3; give 5 or more"),
        ("density-coverage,most=3", "most = 3 is not possible with k = 5; give 7 or more"),
        ("frechet-infinity,points=2", "points = 2 is too few to fit a line and its error; give 3 or more"),
        ("kernel,size=1", "size = 1 is too few for a mean over pairs; give 2 or more"),
    ],
)
def test_options_that_have_no_score_are_refused(spec, message):
    with pytest.raises(UsageError, match=message):
        METRICS.build(spec)


def test_the_kernel_distance_is_that_of_torch_fidelity_on_its_subsets():
    x, y = some("x", 200), some("y", 260, shift=0.1)
    theirs = kernel_of_fidelity(x, y, kid_subsets=7, kid_subset_size=50, rng_seed=3, verbose=False)
    draw = np.random.RandomState(3)
    pairs = [(draw.choice(200, 50, replace=False), draw.choice(260, 50, replace=False)) for _ in range(7)]
    subsets = [torch.from_numpy(np.stack(side)) for side in zip(*pairs, strict=True)]
    ours = kernel_distances(x, y, *subsets).tolist()
    assert kernel_distances(x, y, *(side[:1] for side in subsets)).tolist() == pytest.approx(ours[:1])  # not made once
    assert np.mean(ours) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert np.std(ours) == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)
    assert kernel_distance(x[:50], y[:51]) != pytest.approx(ours[0], rel=1e-3)


def test_the_kernel_distance_by_hand():
    """One feature, two images a side: k(a, b) = (ab + 1)³."""
    x, y = torch.tensor([[1.0], [2.0]], dtype=F64), torch.tensor([[0.0], [-1.0]], dtype=F64)
    within, other = 3**3 + 1, (1 + 1 + 0 + (-1) ** 3) / 4
    assert kernel_distance(x, y) == pytest.approx(within - 2 * other)


def test_the_kernel_distance_of_equal_laws_is_nothing_and_of_others_the_closed_form():
    metric = Kernel(subsets=40, size=200)
    equal = [measured(metric, normal(f"a{i}", 400, 8), normal(f"b{i}", 400, 8))["kd"] for i in range(8)]
    error = np.std(equal, ddof=1) / len(equal) ** 0.5
    assert abs(np.mean(equal)) < 3 * error
    # x = e_1 always, y = 0 always: 2³ ... (1/d + 1)³ + 1 − 2.
    x, y = torch.zeros(20, 4, dtype=F64), torch.zeros(20, 4, dtype=F64)
    x[:, 0] = 1
    assert kernel_distance(x, y) == pytest.approx(1.25**3 + 1 - 2)


def test_subsets_are_stated_and_no_larger_than_a_set():
    x, y = some("x", 120), some("y", 150)
    found = measured(Kernel(subsets=5), x, y)
    assert found["kd_subset"] == 120 and found["kd_sd"] > 0
    assert measured(Kernel(subsets=5, seed=1), x, y)["kd"] != found["kd"]
    whole = measured(Kernel(subsets=5), x, y[:120])
    assert whole == {"kd": kernel_distance(x, y[:120]), "kd_se": kernel_error(x, y[:120]), "kd_subset": 120.0}


def test_the_error_of_the_kernel_distance_is_its_spread_over_draws():
    for shift in (0.0, 1.0):
        draws = [(normal(f"one {i}", 200, 6), normal(f"two {i}", 240, 6) + shift) for i in range(30)]
        spread = np.std([kernel_distance(*draw) for draw in draws], ddof=1)
        errors = [kernel_error(*draw) for draw in draws]
        # 30 draws know their spread to 13 %; without a shift the distance is degenerate, and a jackknife too wide.
        assert 0.7 < np.mean(errors) / spread < (1.5 if shift else 2.5)


def test_the_error_of_the_kernel_distance_is_that_of_sets_without_a_part():
    x, y = some("x", 45), some("y", 61, shift=0.1)
    numbers = [torch.arange(len(rows)) for rows in (x, y)]
    each = [kernel_distance(x[numbers[0] % 20 != group], y[numbers[1] % 20 != group]) for group in range(20)]
    assert kernel_error(x, y) == pytest.approx(np.sqrt(19 * np.var(each)), rel=1e-6)


# Inception score


def test_the_inception_score_is_that_of_torch_fidelity():
    logits = 3 * normal("logits", 205, 30)
    theirs = score_of_fidelity(logits, splits=10, shuffle=False)
    found = measured(InceptionScore(), logits, logits)
    assert found["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert found["is_sd"] == pytest.approx(theirs["inception_score_std"], rel=1e-9)
    assert found["is"] != pytest.approx(measured(InceptionScore(splits=5), logits, logits)["is"], rel=1e-3)


def test_the_inception_score_of_sure_and_even_classes_is_their_number():
    logits = torch.eye(5, dtype=F64).repeat(20, 1) * 1000
    assert inception_score(logits, 10).tolist() == pytest.approx([5.0] * 10)
    assert inception_score(torch.zeros(40, 7, dtype=F64), 4).tolist() == pytest.approx([1.0] * 4)


# Neighbourhoods


def test_precision_and_recall_are_those_of_torch_fidelity():
    x, y = some("x", 150), some("y", 170, shift=0.3)
    theirs = precision_of_fidelity(x, y, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False, verbose=False)
    found = measured(PrecisionRecall(), x, y)
    assert found["precision"] == pytest.approx(float(theirs["precision"]), abs=1e-6)  # a mean in float32
    assert found["recall"] == pytest.approx(float(theirs["recall"]), abs=1e-6)
    assert 0 < found["precision"] != found["recall"] < 1
    assert measured(PrecisionRecall(k=2), x, y)["precision"] < found["precision"] - 1e-3


def test_density_and_coverage_are_those_of_prdc(capsys):
    x, y = some("x", 150), some("y", 170, shift=0.3)
    theirs = compute_prdc(y.numpy(), x.numpy(), nearest_k=5)
    capsys.readouterr()
    found = measured(DensityCoverage(), x, y)
    assert found["density"] == pytest.approx(theirs["density"], rel=1e-9)
    assert found["coverage"] == pytest.approx(theirs["coverage"], rel=1e-9)
    assert precision_recall(x, y, 5) == pytest.approx((theirs["precision"], theirs["recall"]))
    assert 0 < found["coverage"] < 1
    assert density_coverage(x, y, 4) != pytest.approx((theirs["density"], theirs["coverage"]))


def test_nearest_by_hand(monkeypatch):
    from undiffuse.quality.metric import distances

    x, y = torch.tensor([[0.0, 0], [5, 0]], dtype=F64), torch.tensor([[0.0, 3], [0, 1], [4, 0]], dtype=F64)
    for block in (1 << 24, 1):
        monkeypatch.setattr(distances, "BLOCK", block)
        found, index = nearest(x, y, 2)
        assert found.tolist() == [[1, 3], [1, pytest.approx(26**0.5)]] and index.tolist() == [[1, 0], [2, 1]]
        assert nearest(x, y, 1, torch.tensor([1, 2]))[1].tolist() == [[0], [1]]
        assert radii(y, 1).tolist() == [2, 2, pytest.approx(17**0.5)]


def modes(name, count, n=600):
    """A ring of clusters in four dimensions."""
    angle = 2 * math.pi * (torch.arange(n) % count) / 8
    centre = torch.stack([angle.cos(), angle.sin(), torch.zeros(n), torch.zeros(n)], 1).to(F64)
    return 4 * centre + 0.5 * normal(name, n, 4)


def test_dropped_modes_move_recall_and_coverage_only():
    real, same, fewer = modes("real", 8), modes("same", 8), modes("fewer", 3)
    whole, part = (
        {**measured(PrecisionRecall(), z, real), **measured(DensityCoverage(), z, real)} for z in (same, fewer)
    )
    assert abs(part["precision"] - whole["precision"]) < 0.05 and abs(part["density"] - whole["density"]) < 0.15
    assert whole["recall"] > 0.85 > 0.5 > part["recall"] and whole["coverage"] > 0.85 > 0.5 > part["coverage"]


def test_noise_moves_precision_and_density():
    real, same = modes("real", 8), modes("same", 8)
    noisy = torch.cat([same[:300], same[300:] + 6 * normal("noise", 300, 4)])
    whole, part = (
        {**measured(PrecisionRecall(), z, real), **measured(DensityCoverage(), z, real)} for z in (same, noisy)
    )
    assert whole["precision"] > 0.9 > 0.75 > part["precision"] and part["density"] < 0.75 < whole["density"]
    assert part["recall"] > 0.9 and part["coverage"] > 0.85


def test_at_most_so_many_images_are_compared_and_evenly():
    x, y = some("x", 200), some("y", 300, shift=0.3)
    found = measured(PrecisionRecall(most=100), x, y)
    assert found == measured(PrecisionRecall(), x[::2], y[::3])


# What is kept


def test_moments_are_numpys_whatever_the_parts():
    x = some("x", 251, 9) * 1e3 + 1e5
    parts, left, right = Moments(), Moments(), Moments()
    for first in range(0, 251, 40):
        rows, index = x[first : first + 40], torch.arange(first, min(251, first + 40))
        parts.update(rows, index)
        (left if first % 80 else right).update(rows, index)
    left.merge(right)
    left.merge(Moments())
    truth = np.cov(x.numpy(), rowvar=False)
    for made in (parts, left, moments(x), Moments.of_tensors(left.tensors())):
        assert made.n == 251
        np.testing.assert_allclose(made.mean.numpy(), x.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(made.covariance.numpy(), truth, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_parts_of_several_processes_are_one_set(name):
    """In whatever order and however divided: equal to one pass."""
    metric, x, y = METRICS.build(name), some("x", 210), some("y", 230, shift=0.1)
    truth = measured(metric, x, y)
    sides = []
    for rows, is_reference in ((x, False), (y, True)):
        ranks = [Gathered([metric], is_reference) for _ in range(3)]
        for k, first in enumerate(range(0, len(rows), 16)):
            part = rows[first : first + 16]
            ranks[(2 * k) % 3].update(Features(part, part, part), torch.arange(first, first + len(part)))
        held = iter(ranks)
        merged = next(held)
        for other in held:
            merged.merge(other)
        sides.append(merged)
    found = compute(metric, *sides)
    assert found.keys() == truth.keys()
    assert all(found[key] == pytest.approx(truth[key], rel=1e-6, abs=1e-12) for key in truth)


def test_of_very_many_images_some_are_kept_evenly_and_in_order():
    made, other = Rows(most=10), Rows(most=10)
    values = torch.arange(35, dtype=torch.float32)[:, None]
    for first in range(0, 35, 5):
        (other if first % 10 else made).update(values[first : first + 5], torch.arange(first, first + 5))
    made.merge(other)
    assert made.every == 4 and made.index().tolist() == list(range(0, 35, 4))
    assert made.rows()[:, 0].tolist() == list(range(0, 35, 4))
    again = Rows.of_tensors(made.tensors())
    assert again.every == 4 and again.index().tolist() == made.index().tolist()


# Bad input


def test_features_that_are_not_finite_are_refused_with_the_number_of_the_image():
    rows = some("x", 20)
    rows[13, 4] = torch.nan
    made = Gathered([Frechet()])
    with pytest.raises(NotFiniteError, match="^the pool features of image 113 are not finite, so no distance can be"):
        made.update(Features(rows), torch.arange(100, 120))


FEW = [
    (METRICS.build(name), name, least)
    for name, least in [
        *(("frechet", 2), ("frechet-infinity", 50), ("kernel", 4), ("precision-recall", 4), ("density-coverage", 6)),
        ("inception-score", 10),
    ]
] + [
    (PrecisionRecall(k=9), "precision-recall", 10),
    (DensityCoverage(k=1), "density-coverage", 2),
    (InceptionScore(splits=20), "inception-score", 20),
]


@pytest.mark.parametrize("metric, name, least", FEW, ids=str)
def test_too_few_images_are_refused(metric, name, least):
    x = some("x", 60)
    with pytest.raises(UsageError) as caught:
        measured(metric, x[: least - 1], x)
    given = "1 sample is" if least == 2 else f"{least - 1} samples are"
    assert str(caught.value) == (f"{given} too few for {name}, which needs {least}; give more, or leave it out")
    if metric.compares:
        with pytest.raises(UsageError, match=f"^{given.replace('sample', 'reference image')} too few for {name}"):
            measured(metric, x, x[: least - 1])
    assert all(math.isfinite(value) for value in measured(metric, x[:least], x).values())


def test_a_part_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="^these features have no logits; choose other --features, or leave this"):
        Gathered([InceptionScore()]).update(Features(some("x", 4)), torch.arange(4))
