"""A run of several processes that was chosen automatically, or that ends by itself, goes on."""

import json
from pathlib import Path

import pytest

from tests.cli.toy import run_of_digits
from tests.machine.test_dist import finish, start, wait_for_steps
from tests.training.test_loop import assert_equal, state
from undiffuse.machine.store import Run
from undiffuse.model.load import load

SETTINGS = ["network.channels=8", "process.steps=4", "train.sample_every=0", "train.batch=8", "train.held_out=4"]
WORDS = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.mark.slow
def test_a_chosen_run_goes_on_where_only_process_0_sees_its_folder(tmp_path):
    for steps in ("1", "2"):
        words = ["train", "digits", "--device", "cpu", "--steps", steps, *WORDS, "--out"]
        ended = finish(start(2, more={rank: [*words, str(tmp_path / f"disk-{rank}")] for rank in (0, 1)}))
        assert [code for code, _, _ in ended] == [0, 0], ended
        assert ("auto: " in ended[0][2]) == (steps == "1") and "auto: " not in ended[1][2]
    assert Run(tmp_path / "disk-0").latest() == 2 and not Run(tmp_path / "disk-1").steps()


@pytest.mark.slow
def test_what_process_0_measures_ends_all(tmp_path):
    """With a rate of nearly 0 the loss never falls below that of the first measurement by more than rounding."""
    out = tmp_path / "run"
    ending = ["train.patience=0.5", "train.held_out_every=1", "train.lr=1e-30", "data.hold_out=0.01"]
    words = ["train", "digits", "--device", "cpu", "--steps", "30", "--out", str(out), *WORDS]
    words += [word for setting in ending for word in ("--set", setting)]
    for _ in range(2):
        ended = finish(start(2, *words))
        assert [code for code, _, _ in ended] == [0, 0], ended
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    held = [row["step"] for row in rows if "held_out" in row]
    assert held == list(range(1, 7)) and Run(out).latest() == 6
    assert "is finished already, at step 6" in ended[0][2]
    assert (Path(out) / "best.safetensors").exists()


@pytest.mark.slow
def test_a_distillation_by_two_processes_that_is_killed_is_that_of_one(tmp_path, monkeypatch):
    """To the bit, by sums in a fixed order; process 0 alone fits the grid, and tells the bounds."""
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    teacher = run_of_digits(tmp_path / "teacher", 2, "parameterisation.name=v")
    settings = ["batch=8", "exact_shards=2", "save_every=1", "log_every=1", "sample_every=0", "held_out=0", "steps=40"]
    words = [word for each in settings for word in ("--set", f"train.{each}")]
    words = ["distill", str(teacher), "digits", "--steps", "2", "--device", "cpu", *words, "--out"]
    assert [code for code, _, _ in finish(start(1, *words, str(tmp_path / "alone")))] == [0]
    running = start(2, *words, str(tmp_path / "other"))
    wait_for_steps(tmp_path / "other", running, 2)
    for process in running:
        process.kill()
    finish(running)
    before = Run(tmp_path / "other").latest()
    assert before is not None and before < 40
    ended = finish(start(2, *words, str(tmp_path / "other")))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "resuming" in ended[0][2] and ended[1][1:] == ("", ""), ended
    assert_equal(state(tmp_path / "alone", 40), state(tmp_path / "other", 40))
    assert load(tmp_path / "other").config.bounds == load(tmp_path / "alone").config.bounds
