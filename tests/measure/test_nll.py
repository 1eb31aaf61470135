"""Measuring with a folder: what is kept is what was asked for, however often and in whichever order it is asked."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from undiffuse.config import plain
from undiffuse.data.source import ArraySource, open_source
from undiffuse.diffusion.likelihood import Terms
from undiffuse.diffusion.parameterisation import X0, Eps
from undiffuse.diffusion.process import Jsd, Linear
from undiffuse.diffusion.reverse import FixedLarge, Learned
from undiffuse.errors import Corrupt, UsageError
from undiffuse.measure import nll
from undiffuse.measure.nll import Nll, table, terms_of
from undiffuse.model.model import Model
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.unet import UNet


def model(**changes) -> Model:
    """A narrow network with weights of size 1, which says something else of each image."""
    fields = {"process": Linear(12, 1e-3, 0.5), "parameterisation": Eps(), "variance": FixedLarge()} | changes
    config = ModelConfig((1, 8, 8), network=UNet(8, (1, 1), 1, ()), **fields)
    torch.manual_seed(0)
    denoiser = config.build(clip=True).eval().requires_grad_(False)
    for weight in denoiser.network.parameters():
        weight.copy_(0.1 * torch.randn_like(weight) + weight)
    return Model(config, denoiser, {})


@pytest.fixture(scope="module")
def toy() -> Model:
    return model()


@pytest.fixture(scope="module")
def source() -> ArraySource:
    return ArraySource(
        torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    )


@pytest.mark.slow
def test_another_number_of_images_in_the_same_folder_is_measured_as_if_alone(toy, source, tmp_path):
    """A longer query after a shorter one and the other way round, on both sides of a batch's border."""
    for count in (5, 6, 2, 7):
        kept = terms_of(toy, source, Nll(count, batch=3), tmp_path)
        alone = terms_of(toy, source, Nll(count, batch=3))
        assert kept.summary()["images"] == count
        for name in ("prior", "bits", "mse", "index"):
            # Convolutions may differ in the last bit from batch to batch.
            np.testing.assert_allclose(getattr(kept, name), getattr(alone, name), rtol=1e-4, atol=1e-6)
        assert json.loads((tmp_path / "summary.json").read_text())["images"] == count


def test_an_image_s_terms_do_not_depend_on_the_size_of_a_batch(toy, source):
    """Its noise is keyed by its number in the set, not by its place in a batch."""
    for draws in (None, 4):
        three, seven = (terms_of(toy, source, Nll(draws=draws, batch=batch)) for batch in (3, 7))
        for name in ("prior", "bits", "mse", "index"):
            np.testing.assert_allclose(getattr(three, name), getattr(seven, name), rtol=1e-4, atol=1e-6)


def test_a_finished_batch_is_not_measured_again_and_is_counted(toy, source, tmp_path):
    counted: list[int] = []
    terms_of(toy, source, Nll(6, batch=3), tmp_path)
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    query = Nll(4, batch=3)
    terms_of(toy, source, query, tmp_path, counted.append)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")} == stamps
    assert sum(counted) == nll.evaluations(toy, source, query) == 48


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_damaged_part_is_named(toy, source, tmp_path, keep):
    terms_of(toy, source, Nll(2), tmp_path)
    part = tmp_path / "part-00000000.npz"
    part.write_bytes(part.read_bytes()[:keep])
    with pytest.raises(Corrupt, match=r"part-00000000.npz is damaged; delete it, and the same command measures"):
        terms_of(toy, source, Nll(2), tmp_path)


def test_every_changed_byte_of_a_part_is_seen_or_harmless(toy, source, tmp_path):
    terms = terms_of(toy, source, Nll(2, draws=2), tmp_path)
    part = tmp_path / "part-00000000.npz"
    whole = part.read_bytes()
    for i in range(0, len(whole), 37):
        part.write_bytes(whole[:i] + bytes([whole[i] ^ 0x40]) + whole[i + 1 :])
        try:
            assert np.array_equal(terms_of(toy, source, Nll(2, draws=2), tmp_path).bits, terms.bits)
        except Corrupt as error:
            assert str(part) in str(error)


@pytest.mark.parametrize("text", ["[1]", "3", "null", "{", ""])
def test_a_query_that_is_no_object_is_damaged(toy, source, tmp_path, text):
    (tmp_path / "query.json").write_text(text)
    with pytest.raises(Corrupt, match=r"query\.json is damaged: it is not "):
        terms_of(toy, source, Nll(2), tmp_path)


def test_every_file_carries_the_format_and_a_newer_one_is_refused_as_such(toy, source, tmp_path):
    terms_of(toy, source, Nll(2), tmp_path)
    for name in ("query.json", "summary.json"):
        assert json.loads((tmp_path / name).read_text())["format"] == 1
    for name in ("part-00000000.npz", "terms.npz"):
        with np.load(tmp_path / name) as arrays:
            columns = dict(arrays)
        assert columns.pop("format") == 1
        np.savez(tmp_path / name, format=np.array(2), **columns)
    with pytest.raises(UsageError, match=r"part-00000000\.npz has format 2, and this undiffuse reads up to 1; upgrade"):
        terms_of(toy, source, Nll(2), tmp_path)
    query = json.loads((tmp_path / "query.json").read_text())
    (tmp_path / "query.json").write_text(json.dumps(query | {"format": 7}))
    with pytest.raises(UsageError, match=r"query\.json has format 7, and this undiffuse reads up to 1"):
        terms_of(toy, source, Nll(2), tmp_path)


@pytest.mark.parametrize(
    "name, other", [("draws", 2), ("draws", None), ("steps", 6), ("seed", 1), ("batch", 7), ("grid", "karras")]
)
def test_another_query_is_another_measurement(toy, source, tmp_path, name, other):
    query = Nll(2, draws=3)
    terms_of(toy, source, query, tmp_path)
    with pytest.raises(
        UsageError, match=rf"holds another measurement \(other {name}\); give the same settings or anot"
    ):
        terms_of(toy, source, replace(query, **{name: other}), tmp_path)
    before = json.loads((tmp_path / "query.json").read_text())
    del before["grid"]  # a folder of a version that knew no grids
    (tmp_path / "query.json").write_text(json.dumps(before))
    terms_of(toy, source, replace(query, images=3), tmp_path)  # how many of the first images is no other question


def test_other_data_and_other_weights_are_another_measurement(toy, source, tmp_path):
    terms_of(toy, source, Nll(2, draws=2), tmp_path)
    with pytest.raises(UsageError, match=r"other data\)"):
        terms_of(toy, ArraySource(255 - source.images), Nll(2, draws=2), tmp_path)
    turned = model()
    next(turned.denoiser.network.parameters()).mul_(-1)
    with pytest.raises(UsageError, match=r"other model\)"):
        terms_of(turned, source, Nll(2, draws=2), tmp_path)


def test_evaluate_asks_what_it_is_asked(toy, source):
    expected = terms_of(toy, source, Nll(3, draws=2, steps=5, seed=4)).summary()
    found = nll.nll(toy, source, images=3, draws=2, steps=5, seed=4)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["bits_per_dim"] != nll.nll(toy, source, images=3, draws=2, steps=5)["bits_per_dim"]
    expected = terms_of(toy, source, Nll(3, steps=5, seed=4, grid="karras")).summary()
    found = nll.nll(toy, source, images=3, draws=None, steps=5, seed=4, grid="karras")
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert nll.nll(toy, source, images=3)["bits_per_dim"] == pytest.approx(
        terms_of(toy, source, Nll(3, draws=8)).summary()["bits_per_dim"]
    )


@pytest.mark.parametrize("given, split", [({}, "test"), ({"split": "train"}, "train")])
def test_data_that_is_named_is_measured_on_the_split_asked_for(toy, given, split):
    found = nll.nll(toy, "digits", images=2, draws=2, **given)
    expected = terms_of(toy, open_source("digits", split=split), Nll(2, draws=2)).summary()
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_the_files_of_a_whole_chain_hold_its_terms(toy, source, tmp_path):
    terms = terms_of(replace(toy, meta={"step": 77, "images": 5}), source, Nll(3), tmp_path)
    rows = [line.split("\t") for line in (tmp_path / "terms.tsv").read_text().splitlines()]
    assert rows[0] == ["step", "t", "bits_per_dim", "mse"] and len(rows) == 13
    assert [float(row[3]) for row in rows[1:]] == pytest.approx(terms.mse.mean(0), abs=1e-7)
    rows = [line.split("\t") for line in (tmp_path / "rate-distortion.tsv").read_text().splitlines()]
    assert rows[0] == ["step", "rate", "rmse"]
    for row, point in zip(rows[1:], terms.rate_distortion(), strict=True):
        assert [float(each) for each in row] == pytest.approx([point["step"], point["rate"], point["rmse"]], abs=1e-4)
    kept = json.loads((tmp_path / "summary.json").read_text())
    assert kept["model"] == 77 and kept["bits_per_dim"] == pytest.approx(terms.totals().mean())


@pytest.mark.parametrize(
    "changed, what",
    [
        ({"clip": False}, "clip"),
        ({"variance": "fixed-small"}, "variance"),
    ],
)
def test_another_clip_or_variance_is_another_measurement(toy, source, tmp_path, changed, what):
    terms_of(toy, source, Nll(2), tmp_path)
    with pytest.raises(UsageError, match=rf"holds another measurement \(other {what}\)"):
        terms_of(toy.variant(**changed), source, Nll(2), tmp_path)
    with pytest.raises(UsageError, match=r"holds another measurement \(other model\)"):
        terms_of(model(parameterisation=X0()), source, Nll(2), tmp_path)
    assert "variance" in plain(toy.config)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"images": 0}, "images = 0 is not possible; give 1 or more"),
        ({"batch": 0}, "batch = 0 is not possible; give 1 or more"),
        ({"batch": -2}, "batch = -2 is not possible"),
        ({"steps": 0}, "steps = 0 is not possible; this model takes 1 to 12"),
        ({"steps": -4}, "steps = -4 is not possible; this model takes 1 to 12"),
        ({"steps": 13}, "steps = 13 is not possible; this model takes 1 to 12"),
        ({"draws": 0}, "0 draws an image are not possible; give 1 to 12"),
        ({"draws": 13}, "13 draws an image are not possible; give 1 to 12"),
        ({"grid": "karas"}, 'grid "karas" is not known. Did you mean "karras"'),
    ],
)
def test_what_has_no_meaning_is_refused_and_leaves_nothing(toy, source, tmp_path, fields, message):
    with pytest.raises(UsageError, match=message):
        terms_of(toy, source, Nll(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_bound_leaves_nothing(source, tmp_path):
    with pytest.raises(UsageError, match="x0 or v"):
        terms_of(model(process=Jsd(12)), source, Nll(2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(toy, source, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match=r"out is a file; give the name of a folder"):
        terms_of(toy, source, Nll(2), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, range(1, 13)),
        ({"steps": 5}, [1, 2, 5, 7, 10, 12]),  # the decoder stands at 1/T, whether the grid goes there or not
        ({"steps": 5, "grid": "even"}, [1, 2, 5, 7, 10, 12]),
        ({"steps": 5, "grid": "karras"}, [1, 1.662996, 4.693464, 8.936784, 12]),  # by the formula, between the points
    ],
)
def test_the_terms_stand_at_the_times_that_were_measured(toy, source, tmp_path, fields, expected):
    terms = terms_of(toy, source, Nll(3, **fields), tmp_path)
    rows = [line.split("\t") for line in (tmp_path / "terms.tsv").read_text().splitlines()[1:]]
    assert [12 * float(row[1]) for row in rows] == pytest.approx(list(expected), abs=2e-5)
    assert [float(row[2]) for row in rows] == pytest.approx(terms.bits.mean(0), abs=1e-7)


@pytest.mark.parametrize(
    "steps, expected",
    [(1, [1]), (3, [3, 2, 1]), (10, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]), (1000, [1000, 900, 800, 700, 600, 500, 400, 300,
                                                                             200, 100])],
)  # fmt: skip
def test_the_table_has_each_step_once(steps, expected):
    rng = np.random.default_rng(0)
    terms = Terms(rng.random(2), rng.random((2, steps)), rng.random((2, steps)), np.tile(np.arange(steps), (2, 1)),
                  np.ones(steps))  # fmt: skip
    assert [row["step"] for row in table(terms)] == expected
    assert table(terms)[0] == terms.rate_distortion()[-1]


def test_a_learned_variance_is_measured_as_learned():
    toy = model(variance=Learned())
    with pytest.raises(UsageError, match=r"variance fixed-large is not possible: this model says its own \(learned\)"):
        toy.variant(variance="fixed-large")
    assert toy.variant(variance="learned").config == toy.config
