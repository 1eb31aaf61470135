"""Files of statistics: ours, those of pytorch-fid and EDM, ADM's batches, and what is none."""

import re

import numpy as np
import pytest
import torch

from tests import waves
from tests.quality.fidelity import fid_score
from undiffuse.errors import Corrupt, UsageError
from undiffuse.quality import statistics
from undiffuse.quality.metric.base import Moments
from undiffuse.quality.metric.frechet import frechet_distance
from undiffuse.quality.statistics import Statistics

RNG = np.random.default_rng(0)
ROWS, OTHERS = RNG.normal(size=(40, 6)), RNG.normal(1, 2, size=(50, 6))
SAID = {
    "extractor": "tests.waves:Waves", "sha256": "0" * 64, "resize": "none", "data": "digits, train",
    "fingerprint": "f" * 64, "images": "8×8 grey",
}  # fmt: skip
CPU = torch.device("cpu")


def moments(rows: np.ndarray) -> Moments:
    made = Moments()
    made.update(torch.from_numpy(rows), torch.arange(len(rows)))
    return made


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.npz"
    statistics.write(path, Statistics({"pool": moments(ROWS), "spatial": moments(ROWS[:, :4])}, SAID))
    return path


def test_what_is_written_is_read_back(own):
    found = statistics.read(own)
    assert found.said == SAID and found.n == 40
    for part, rows in (("pool", ROWS), ("spatial", ROWS[:, :4])):
        assert found.moments[part].n == 40
        np.testing.assert_allclose(found.moments[part].mean.numpy(), rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.moments[part].covariance.numpy(), np.cov(rows.T), rtol=1e-12)
    found.check(waves.Waves().open(CPU), "own.npz")


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")  # pytorch-fid's, of scipy's root
def test_pytorch_fid_reads_ours_and_has_the_same_number(own, tmp_path):
    np.savez(tmp_path / "theirs.npz", mu=OTHERS.mean(0), sigma=np.cov(OTHERS.T))
    one, other = (
        fid_score.compute_statistics_of_path(str(path), None, 1, 1, "cpu") for path in (own, tmp_path / "theirs.npz")
    )
    theirs = fid_score.calculate_frechet_distance(*one, *other)
    ours = [statistics.read(path).moments["pool"] for path in (own, tmp_path / "theirs.npz")]
    assert frechet_distance(ours[0].mean, ours[0].covariance, ours[1].mean, ours[1].covariance) == pytest.approx(
        theirs, rel=1e-9
    )
    half = ours[1].covariance / 2  # what another scale of the covariance would give is another number
    assert frechet_distance(ours[0].mean, ours[0].covariance, ours[1].mean, half) != pytest.approx(theirs, rel=1e-2)


def test_a_file_of_another_tool_says_nothing_and_belongs_to_fid(tmp_path):
    np.savez(tmp_path / "a.npz", mu=ROWS.mean(0), sigma=np.cov(ROWS.T))
    found = statistics.read(tmp_path / "a.npz")
    assert found.said == {} and found.n is None
    np.testing.assert_allclose(found.moments["pool"].covariance.numpy(), np.cov(ROWS.T), rtol=1e-12)
    found.check(waves.Fid().open(CPU), "a.npz")
    with pytest.raises(UsageError, match=r"a.npz does not say whose features .* tests.waves:Waves cannot be compared"):
        found.check(waves.Waves().open(CPU), "a.npz")


def test_a_reference_batch_of_adm_has_both(tmp_path):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    arrays = {"mu": ROWS.mean(0), "sigma": np.cov(ROWS.T), "mu_s": ROWS.mean(0)[:4], "sigma_s": np.cov(ROWS[:, :4].T)}
    np.savez(tmp_path / "adm.npz", arr_0=images, **arrays)
    assert statistics.is_statistics(tmp_path / "adm.npz") and statistics.has_images(tmp_path / "adm.npz")
    found = statistics.read(tmp_path / "adm.npz")
    np.testing.assert_allclose(found.moments["spatial"].covariance.numpy(), np.cov(ROWS[:, :4].T), rtol=1e-12)
    np.savez(tmp_path / "images.npz", arr_0=images)
    assert not statistics.is_statistics(tmp_path / "images.npz")


@pytest.mark.parametrize(
    "key, other", [("extractor", "inception"), ("sha256", "1" * 64), ("resize", "tf1")], ids=lambda each: each[:9]
)
def test_statistics_of_other_features_are_refused_with_both_sides(key, other):
    given = Statistics({"pool": moments(ROWS)}, SAID | {key: other})
    text = f"x.npz has the statistics of {key} {other[:16]}, and these features are of {key} {SAID[key][:16]}"
    with pytest.raises(UsageError, match=re.escape(text)):
        given.check(waves.Waves().open(CPU), "x.npz")


def test_statistics_of_another_number_of_features_are_refused():
    given = Statistics({"pool": moments(ROWS[:, :5])}, SAID)
    with pytest.raises(UsageError, match=r"x.npz has statistics of 5 pool features, and tests.waves:Waves has 6"):
        given.check(waves.Waves().open(CPU), "x.npz")


BAD = {
    "nan": ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "mu or sigma holds NaN or infinity"),
    "shapes": ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu of \[3\] and sigma of \[4, 4\] are no mean"),
    "flat": ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, r"mu of \[1, 3\]"),
    "words": ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "cannot be read as statistics"),
    "objects": ({"mu": np.array([{}], object), "sigma": np.eye(1)}, "cannot be read as statistics"),
    "one sigma": ({"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(3)}, "cannot be read as statistics"),
    "spatial only": ({"mu_s": np.zeros(3), "sigma_s": np.eye(3)}, "has no mu"),
    "empty": ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu of \[0\]"),
    "negative": ({"mu": np.zeros(2), "sigma": np.diag([1.0, -1.0])}, "is no covariance"),
    "not symmetric": ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])}, "is no covariance"),
    "n": ({"mu": np.zeros(2), "sigma": np.eye(2), "n": np.array(1)}, "n = 1"),
    "newer": ({"mu": np.zeros(2), "sigma": np.eye(2), "format": np.array(9)}, "has format 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_makes_no_sense_is_named_with_the_reason(tmp_path, name):
    arrays, why = BAD[name]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UsageError if name == "newer" else Corrupt, match=why) as error:
        statistics.read(tmp_path / "bad.npz")
    assert "bad.npz" in str(error.value) and "\n" not in str(error.value)


def test_what_is_cut_or_huge_is_refused(tmp_path, own, monkeypatch):
    (tmp_path / "cut.npz").write_bytes(own.read_bytes()[:300])
    assert not statistics.is_statistics(tmp_path / "cut.npz")  # so the formats of data say what it is
    with pytest.raises(Corrupt, match=r"cut.npz cannot be read as statistics"):
        statistics.read(tmp_path / "cut.npz")
    monkeypatch.setattr(statistics, "LIMIT", 100)
    with pytest.raises(Corrupt, match=r"own.npz is larger than any statistics"):
        statistics.read(own)
