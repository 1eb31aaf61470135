"""Which scores share a row, who is the best of it, and what is said of those that do not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from undiffuse.measure.evaluate import Query, evaluate
from undiffuse.view import ranking
from undiffuse.view.results import Evaluation

ROW = {"features": "efflite0", "score": "FD-EffLite0", "key": "fd", "better": "lower", "value": 10.0, "real": 4.0}
FEATURES = {"extractor": "efflite0", "sha256": "5" * 64, "resize": "pil", "device": "cpu", "metrics": {"frechet": {}}}
PROTOCOL = {"n": 1000, "images": "8×8 grey", "reference": {"fingerprint": "ab", "split": "train"}, "seed": 0}


def measured(value: float = 10.0, sd: float | None = None, features=None, **changed) -> Evaluation:
    row = ROW | {"value": value} | ({} if sd is None else {"sd": sd})
    said = PROTOCOL | {"features": [FEATURES | (features or {})]} | changed
    return Evaluation(Path("eval"), [row], [], said)


def table(*evaluations: Evaluation):
    names = [f"{letter}: x" for letter in "ABC"[: len(evaluations)]]
    section = ranking.section([[each] for each in evaluations], names)
    assert section is not None
    return section.text, section.tables[0]


def test_the_same_protocol_shares_a_row_and_the_best_is_strong():
    text, found = table(measured(10.0), measured(8.0), measured(9.0))
    assert found.rows == (("FD-EffLite0", "10", "8", "9", "4", "lower"),)
    assert (found.strong, text) == (frozenset({(0, 2)}), "")


def test_where_more_is_better_the_greatest_is_the_best():
    low, high = measured(0.2), measured(0.4)
    for each in (low, high):
        each.scores[0]["better"] = "higher"
    assert table(low, high)[1].strong == {(0, 2)}


@pytest.mark.parametrize(("sd", "strong"), [(0.5, {(0, 2)}), (2.0, set())])
def test_a_lead_within_the_spread_is_none(sd, strong):
    assert table(measured(10.0, sd), measured(8.0, sd))[1].strong == strong


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n": 500}, "n is 1000 for A and 500 for B"),
        ({"features": {"sha256": "6" * 64}}, "extractor sha256 is 55555555… for A and 66666666… for B"),
        ({"features": {"resize": "torch"}}, "extractor resize is pil for A and torch for B"),
        ({"features": {"metrics": {"frechet": {"mean": 1}}}}, "metric mean is – for A and 1 for B"),
        ({"reference": {"fingerprint": "cd", "split": "train"}}, "reference is ab for A and cd for B"),
        ({"reference": {"fingerprint": "ab", "split": "test"}}, "reference split is train for A and test for B"),
        ({"images": "9×9 grey"}, "images is 8×8 grey for A and 9×9 grey for B"),
    ],
)
def test_another_protocol_is_a_row_of_its_own_with_both_sides_named(changed, said):
    text, found = table(measured(10.0), measured(8.0, **changed))
    assert [row[1:3] for row in found.rows] == [("10", "–"), ("–", "8")]
    assert found.strong == frozenset()
    assert text == f"Not ranked in one row, because the protocols differ: {said}."
    assert len({row[0] for row in found.rows}) == 2


@pytest.mark.parametrize("changed", [{"date": "2020-01-01"}, {"batch": 7}, {"features": {"device": "cuda"}}])
def test_what_does_not_decide_a_score_may_differ(changed):
    assert len(table(measured(), measured(**changed))[1].rows) == 1


def test_nothing_measured_is_no_table():
    assert ranking.section([[], []], ["A: x", "B: y"]) is None


def test_the_protocols_are_shown_once_where_they_are_the_same():
    found = ranking.protocols([[measured(date="2026-01-01")], [measured(n=500, date="2026-01-01")]], ["A: x", "B: y"])
    assert found.tables[0].header == ("what differs", "A: x", "B: y")
    assert found.tables[0].rows == (("n", "1000", "500"),)
    same = {card.title: dict(card.rows) for card in found.listings}
    assert same["The same for all: protocol"]["date"] == "2026-01-01"
    assert same["The same for all: features"]["efflite0: sha256"] == "5" * 64
    assert ranking.protocols([[measured()], [measured()]], ["A: x", "B: y"]).tables == ()


def test_what_eval_writes_is_understood(tmp_path):
    """Each score of a real evaluation is tied to its extractor, its metric and its reference."""
    images = torch.arange(24 * 28 * 28).remainder(251).to(torch.uint8).reshape(24, 1, 28, 28)
    query = Query(("classifier-28",), ("kernel", "precision-recall"))
    evaluate(images, "fashion-mnist-sample", query, n=24, out=tmp_path / "eval", device="cpu")
    found = Evaluation.read(tmp_path / "eval")
    said = {row["key"]: ranking.terms(found, row) for row in found.scores}
    (features,) = found.protocol["features"]
    for each in said.values():
        assert (each["n"], each["extractor sha256"]) == ("24", features["sha256"])
        assert each["reference"] == found.protocol["reference"]["fingerprint"]
    assert said["kd"]["metric subsets"] == str(features["metrics"]["kernel"]["subsets"])
    assert said["recall"]["metric k"] == str(features["metrics"]["precision-recall"]["k"])
    assert "metric k" not in said["kd"]
    assert len(table(found, found)[1].rows) == len(said)


def test_two_evaluations_of_one_model_are_rows_of_their_own_by_their_folders():
    """They may differ in the chain alone, which is no reason to rank one against the other."""
    few, many = measured(20.0), replace(measured(10.0), path=Path("eval-2steps"))
    section = ranking.section([[few, many], [measured(15.0)]], ["A: x", "B: x"])
    assert section is not None and section.text == ""
    assert [row[:3] for row in section.tables[0].rows] == [
        ("FD-EffLite0 (in eval)", "20", "15"),
        ("FD-EffLite0 (in eval-2steps)", "10", "–"),
    ]
    assert section.tables[0].strong == {(0, 2)}
