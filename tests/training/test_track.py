"""On track: a band is claimed for runs like those that were measured, and for no others."""

import json
from pathlib import Path

import pytest

from tests.training.test_loop import recipe, run
from undiffuse.config import parse, plain, to_toml
from undiffuse.errors import UsageError
from undiffuse.machine.log import read_rows
from undiffuse.model.recipe import ALIKE, Recipe, TrainConfig, learning_rate, load_recipe, presets
from undiffuse.training import loop, track
from undiffuse.training.auto import recipe_of

BENCH = Path(__file__).parent.parent.parent / "bench"


def expecting(data, whole=6, bands=((3, 0.0, 100.0), (6, 0.0, 1e-6)), fingerprint=None, **train) -> Recipe:
    curve = {"steps": whole, "data": fingerprint or data.fingerprint(), "held_out": [list(band) for band in bands]}
    return recipe(expected={"curve": [curve]}, train=train)


def said_of(chosen, data, out, **fields) -> list[str]:
    said: list[str] = []
    loop.train(chosen, data, out, held_out=data, say=said.append, show_progress=False, **fields)
    return [line for line in said if line.startswith("held-out loss")]


def test_a_run_says_where_it_is(tmp_path, data):
    lines = said_of(expecting(data), data, tmp_path)
    losses = {row["step"]: row for row in read_rows(tmp_path / "log.jsonl") if "held_out" in row}
    assert lines == [
        f"held-out loss {losses[3]['held_out']:.4f} at step 3: on track (0–100 expected of this preset)",
        f"held-out loss {losses[6]['held_out']:.4f} at step 6: off track, too high (0–1e-06 expected of this preset)",
    ]
    assert losses[3]["expected"] == [0.0, 100.0]


def test_the_words_for_each_side_of_the_band():
    band = (0.177, 0.182)
    assert track.said(0.1793, 1000, band) == (
        "held-out loss 0.1793 at step 1,000: on track (0.177–0.182 expected of this preset)"
    )
    assert ": off track, too high (" in track.said(0.19, 1000, band)
    assert ": lower than expected (" in track.said(0.17, 1000, band)
    assert ": off track (" in track.said(float("nan"), 1000, band)


def test_nothing_is_claimed_of_other_data_or_of_a_run_that_did_not_begin_untrained(tmp_path, data):
    assert said_of(expecting(data, fingerprint="0" * 64), data, tmp_path / "other") == []
    model = run(recipe(), data, tmp_path / "first")
    assert said_of(expecting(data), data, tmp_path / "tuned", budget=loop.Budget(steps=3), init=model) == []
    assert said_of(expecting(data), data, tmp_path / "tuned") == []  # nor when it goes on
    assert len(said_of(expecting(data), data, tmp_path / "new", budget=loop.Budget(steps=3))) == 1
    assert len(said_of(expecting(data), data, tmp_path / "new")) == 1


def test_a_learning_rate_that_was_another_on_the_way_ends_the_claims(tmp_path, data):
    chosen = expecting(data, decay="cosine")
    assert len(said_of(chosen, data, tmp_path, budget=loop.Budget(steps=3))) == 0  # whose rate is 0 at step 3
    assert said_of(chosen, data, tmp_path) == []  # at step 6 the rate is that of the curve, and was not before
    assert said_of(chosen, data, tmp_path, budget=loop.Budget(steps=6)) == []


def test_a_curve_holds_where_the_learning_rate_is_that_of_its_runs(data):
    def band(last: int, step: int, decay: str = "cosine"):
        train = {"decay": decay, "warmup": 200, "steps": 31_400}
        chosen = expecting(data, 1000, [(100, 1.0, 2.0), (300, 3.0, 4.0), (1000, 5.0, 6.0)], **train)
        return track.track(chosen, last, data.fingerprint()).band(step)

    assert band(1000, 100) == band(31_400, 100) == (1.0, 2.0)  # while it rises
    assert band(1000, 300) == (3.0, 4.0) and band(31_400, 300) is None and band(1010, 300) == (3.0, 4.0)
    assert band(1000, 1000) == (5.0, 6.0) and band(31_400, 1000) is None and band(1000, 999) is None
    assert band(31_400, 1000, "constant") == (5.0, 6.0)
    train = TrainConfig(decay="cosine", warmup=200)
    assert learning_rate(train, 300, 1010) == pytest.approx(learning_rate(train, 300, 1000), rel=track.SAME)


def test_settings_that_change_what_is_learnt_take_the_curve_away():
    def has(*settings: str) -> bool:
        return "curve" in load_recipe("fashion-mnist", settings).expected

    alike = ["seed=1", "steps=1000", "precision=float32", "eval_every=10", "held_out_every=100", "micro_batch=16"]
    assert has() and has(*(f"train.{setting}" for setting in alike)) and has("train.lr=3e-3")
    for setting in ("train.lr=1e-3", "train.batch=32", "network.dropout=0.1", "data.flip=true", "train.held_out=100"):
        assert not has(setting), setting
    assert "measured_in" in load_recipe("fashion-mnist", ["train.lr=1e-3"]).expected
    saved = plain(load_recipe("fashion-mnist"))
    assert "curve" in recipe_of(saved, ["train.seed=3"]).expected
    assert "curve" not in recipe_of(saved, ["train.warmup=3"]).expected
    assert {"held_out", "lr", "batch", "decay", "ema", "warmup"}.isdisjoint(ALIKE)


def test_a_preset_based_on_another_has_no_curve_of_it(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "fashion-mnist"\n[train]\nlr = 1e-3\n')
    assert "curve" not in load_recipe(path).expected and load_recipe(path).expected["parameters"] == 1_198_148
    path.write_text(to_toml(load_recipe("fashion-mnist")))
    assert load_recipe(path).expected == load_recipe("fashion-mnist").expected


@pytest.mark.parametrize("curve, said", [
    (3, "expected.curve of this recipe is no list of tables"),
    ([{"steps": 3, "data": "", "held_out": [[1, 2]]}], "expected.curve: "),
    ([{"steps": 3, "data": "", "held_out": [], "fd": 1}], 'expected.curve has no field "fd"'),
])  # fmt: skip
def test_a_bad_curve_is_refused_in_a_line(tmp_path, data, curve, said):
    with pytest.raises(UsageError) as error:
        run(recipe(expected={"curve": curve}), data, tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_curves_of_the_presets_are_those_of_the_files():
    found = {name: load_recipe(name) for name in presets()}
    known = [name for name, recipe in found.items() if "curve" in recipe.expected]
    assert known == ["emoji-32", "fashion-mnist", "fashion-mnist-likelihood"]
    for name in known:
        measured = json.loads((BENCH / f"curve-{name}.json").read_text())
        (curve,) = (parse(track.Curve, each, "") for each in found[name].expected["curve"])
        assert curve.steps == measured["steps"] == found[name].train.steps
        assert [list(band) for band in curve.held_out] == [[row["step"], *row["band"]] for row in measured["rows"]]
        for row in measured["rows"]:
            (loss,), (low, high) = row["held_out"], row["band"]
            assert (low, high) == pytest.approx((0.99 * loss, 1.01 * loss), abs=1e-4)
        # The run behind them had the preset's learning rate there, and well before: else they would blame a right run.
        own, shipped = (BENCH / f"{what}-{name}.log.jsonl" for what in ("curve", "shipped"))
        train, rates = found[name].train, [row for row in read_rows(own if own.exists() else shipped) if "lr" in row]
        for step, *_ in curve.held_out:
            near = [row for row in rates if max(step - train.steps / 4, 500) <= row["step"] <= step]
            expected = [learning_rate(train, row["step"], train.steps) for row in near]
            assert near and [row["lr"] for row in near] == pytest.approx(expected, abs=0.02 * train.lr), step


@pytest.mark.data
@pytest.mark.parametrize("name", ["fashion-mnist", "fashion-mnist-likelihood"])
def test_the_curves_of_fashion_mnist_are_of_the_data_of_that_name(name):
    from undiffuse.data.pack import open_data

    curve = load_recipe(name).expected["curve"][0]
    assert open_data("fashion-mnist", None, 1).fingerprint() == curve["data"]
