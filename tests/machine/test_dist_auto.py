"""A run of several processes that was chosen automatically, or that ends by itself, goes on."""

import json
from pathlib import Path

import pytest

from tests.machine.test_dist import finish, start
from undiffuse.machine.store import Run

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
