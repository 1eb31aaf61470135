"""What is read back from the folders of eval and nll, and what becomes of it on a page."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.diffusion.likelihood import Terms
from undiffuse.diffusion.process import Linear
from undiffuse.errors import Corrupt, UsageError
from undiffuse.measure import nll
from undiffuse.measure.memorise import FILE, Memorisation, Space
from undiffuse.quality.nearer import rate
from undiffuse.view import results
from undiffuse.view.results import Bound, Evaluation

FOUND = {
    "format": 1,
    "scores": [{"features": "f", "score": "FD-f", "key": "fd", "value": 3.14159265, "better": "lower", "real": 1.5,
                "real_n": 50, "sd": 0.25, "each": [3.0, 3.3]}],
    "notes": ["few samples"],
    "protocol": {"n": 100, "features": [{"extractor": "f", "sha256": "a" * 64}], "model": {"sha256": "b"}},
}  # fmt: skip


def folder(path, found):
    path.mkdir()
    (path / "summary.json").write_text(found if isinstance(found, str) else json.dumps(found))
    return path


def test_scores_stand_with_floor_spread_and_protocol(tmp_path):
    found = Evaluation.read(folder(tmp_path / "eval", FOUND))
    section = results.scores(found)
    assert section.text == "few samples" and found.weights == "b"
    assert section.tables[0].header == ("score", "samples", "50 real images", "better")
    assert section.tables[0].rows == (("FD-f", "3.1416 ± 0.25", "1.5", "lower"),)
    assert ("sha256", "a" * 64) in [row for card in section.listings for row in card.rows]


def test_memorisation_stands_with_its_sentence_its_rates_and_its_worst_pairs(tmp_path):
    found = rate(torch.linspace(0, 1, 200), torch.linspace(0.3, 1.3, 99))
    space = Space("pixels", (found,), 1000, 50, ((3, 7, 0.5),))
    whole = Memorisation((space,), "99 held-out images", 1000, torch.zeros(16, 1, 3, 3, dtype=torch.uint8))
    path = folder(tmp_path / "eval", FOUND | {"memorisation": whole.plain()})
    section = results.memorisation(Evaluation.read(path))
    assert section.text.startswith(whole.sentence()) and "closest 1 % of 99 held-out images" in section.text
    assert section.tables[0].rows[0][:3] == ("pixels", "200", "30 %") and section.figures == ()
    assert " ".join(section.tables[0].header) == "in samples nearer 95 % new images p"
    Image.new("L", (9, 7)).save(path / FILE)
    assert results.memorisation(Evaluation.read(path)).figures[0].content.size == (9, 7)
    (path / FILE).write_bytes(b"no picture")
    with pytest.raises(Corrupt, match="memorised.png is damaged; delete it"):
        results.memorisation(Evaluation.read(path))
    assert results.memorisation(Evaluation.read(folder(tmp_path / "other", FOUND))) is None


def test_scores_along_the_chain_stand_as_plots_and_the_last_are_the_scores(tmp_path):
    row = FOUND["scores"][0]
    points = [{"step": 50 * k, "t": 1 - k / 2, "scores": [row | {"value": 8.0 / k}]} for k in (1, 2)]
    shared = {name: FOUND[name] for name in ("format", "notes", "protocol")}
    path = folder(tmp_path / "along", shared | {"points": points})
    found = Evaluation.read(path)
    assert [row["value"] for row in found.scores] == [4.0]
    section = results.along(found)
    assert len(section.gallery) == 1 and section.gallery[0].content.startswith("<svg")
    assert results.along(Evaluation.read(folder(tmp_path / "eval", FOUND))) is None


BAD = {
    "is no folder; give the --out folder of `undiffuse eval`": None,
    "has no summary.json; give the --out folder": "",
    "is not finished, it has no summary.json; give the command that began it again": "query",
    "is damaged": "[1",
    "it is not a JSON object": "[1]",
    "has no scores; give the --out folder of `undiffuse eval`": '{"format": 1, "bits_per_dim": 3}',
    "": '{"format": 99, "scores": [], "notes": [], "protocol": {}}',
}


@pytest.mark.parametrize("said", BAD)
def test_a_folder_that_is_none_is_one_line(tmp_path, said):
    path, text = tmp_path / "eval", BAD[said]
    if text is not None:
        path.mkdir()
    if text == "query":
        (path / "query.json").write_text("{}")
    elif text:
        (path / "summary.json").write_text(text)
    with pytest.raises((UsageError, Corrupt)) as raised:
        Evaluation.read(path)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_scores_are_no_bits(tmp_path):
    with pytest.raises(UsageError, match="has no bits/dim; give the --out folder of `undiffuse nll`"):
        Bound.read(folder(tmp_path / "nll", FOUND))


def test_terms_stand_at_the_times_that_their_steps_start_from():
    process, (n, k) = Linear(20), (3, 20)
    bits = np.arange(n * k, dtype=float).reshape(n, k)
    index = np.tile(np.arange(k), (n, 1))
    terms = Terms(np.zeros(n), bits, np.full((n, k), 4.0), index, np.ones(k))
    lines = results.time_lines(terms, {}, process)
    assert lines is not None
    np.testing.assert_allclose(lines[0][0], np.arange(1, k + 1) / 20)
    np.testing.assert_allclose(lines[0][1], bits.mean(0))
    np.testing.assert_allclose(lines[1][1], 255.0)
    assert results.time_lines(terms, {"steps": 5}, process) is None  # of a chain that is not this one


def test_times_of_another_grid_are_read_as_nll_writes_them():
    """Its name with them, because a name does not say where its times are."""
    process, k = Linear(20), 4
    times = nll.Nll(steps=k, grid="karras").times(process)
    terms = Terms(np.zeros(2), np.ones((2, k)), np.ones((2, k)), np.tile(np.arange(k), (2, 1)), np.ones(k))
    lines = results.time_lines(terms, {"steps": k, "grid": ["karras", *times.tolist()]}, process)
    assert lines is not None
    np.testing.assert_allclose(lines[0][0], times[1:].numpy())


def test_stratified_terms_of_many_steps_are_means_of_bins():
    process = Linear(1000)
    index = np.random.default_rng(0).integers(0, 1000, (50, 40))
    t = (index + 1) / 1000
    terms = Terms(np.zeros(50), 2 * t, t, index, np.full(40, 25.0))
    lines = results.time_lines(terms, {"draws": 40}, process)
    assert lines is not None and len(lines[0][0]) <= results.BINS
    np.testing.assert_allclose(lines[0][1], 2 * np.array(lines[0][0]), rtol=1e-9)
    np.testing.assert_allclose(lines[1][1], 127.5 * np.sqrt(lines[0][0]), rtol=1e-9)
