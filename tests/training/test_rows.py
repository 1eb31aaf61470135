"""What a run writes down and keeps on its way: each number and each file by what it should be."""

import json

import pytest

from tests.training.test_loop import recipe, run
from undiffuse.key import Key
from undiffuse.machine.log import read_rows
from undiffuse.machine.store import Run
from undiffuse.training import look, loop
from undiffuse.training.trainer import Trainer


@pytest.fixture
def known(monkeypatch):
    """Steps that do nothing, take two seconds each, and whose loss is their number; only odd ones say `loss_q1`."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])

    def update(self, last, *vote):
        now[0] += 2.0
        self.step += 1
        odd = {"loss_q1": 10.0 * self.step} if self.step % 2 else {}
        return {"loss": float(self.step), "grad_norm": 1.0, "lr": 0.5, **odd}

    monkeypatch.setattr(Trainer, "update", update)


def test_a_row_is_the_mean_of_the_steps_since_the_last_one(tmp_path, data, known):
    """Of those that say the number at all; the last row has what is left over."""
    run(recipe(train={"log_every": 4, "steps": 6, "save_every": 100}), data, tmp_path)
    rows = [row for row in read_rows(tmp_path / "log.jsonl") if "loss" in row]
    speed = {"grad_norm": 1.0, "lr": 0.5, "images_per_second": 4.0}  # eight images in two seconds
    assert rows == [
        {"step": 4, "images": 32, "loss": 2.5, "loss_q1": 20.0, **speed},
        {"step": 6, "images": 48, "loss": 5.5, "loss_q1": 50.0, **speed},
    ]


def test_files_come_when_they_are_due_and_at_the_end(tmp_path, data, known, monkeypatch):
    drawn: list[int] = []
    monkeypatch.setattr(look, "save_grids", lambda trainer, *rest: drawn.append(trainer.step))
    every = {"save_every": 3, "keep": 9, "sample_every": 4, "held_out_every": 5, "ema_snapshot_every": 2}
    run(recipe(train={"steps": 7, "ema_profiles": [0.1], **every}), data, tmp_path, held_out=data)
    assert Run(tmp_path).steps() == [3, 6, 7] and drawn == [4, 7]
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl") if "held_out" in row] == [5, 7]
    assert sorted(path.name for path in (tmp_path / "ema").iterdir()) == [
        f"step-00000000{step}-0.1.safetensors" for step in (2, 4, 6, 7)
    ]


def test_the_loss_of_step_0_is_remembered_by_every_checkpoint(tmp_path, data):
    """That of a fresh network, whose answer is nearly 0: the mean square of the noise on the first 16 images."""
    for steps in (2, 4):
        run(recipe(train={"precision": "float32"}), data, tmp_path, budget=loop.Budget(steps=steps))
    expected = float(Key(0).fold("health").rows(16).fold("eps").normal(1, 8, 8).square().mean())
    for step in (2, 4):
        health = Run(tmp_path).load(step, only=())[1]["health"]
        assert health["first"] == pytest.approx(expected, rel=1e-4) and health["good"]
    assert health["loss"] != pytest.approx(health["average_loss"], rel=1e-6)


def test_what_is_measured_where_a_budget_ends_is_no_lowest_loss(tmp_path, data, known, monkeypatch):
    """An unbroken run would not have looked there, and a run in parts ends as an unbroken one does."""
    monkeypatch.setattr(look, "held_out_loss", lambda trainer, *rest: 0.5 if trainer.step == 3 else 5.0 - trainer.step)
    chosen = recipe(train={"patience": 0.5, "held_out_every": 2, "steps": 6})
    run(chosen, data, tmp_path, held_out=data, budget=loop.Budget(steps=3))
    assert Run(tmp_path).load(3, only=())[1]["held_out"] == {"loss": 3.0, "step": 2, "measured": 2}
    run(chosen, data, tmp_path, held_out=data)
    assert Run(tmp_path).load(6, only=())[1]["held_out"] == {"loss": -1.0, "step": 6, "measured": 6}


def test_a_run_says_what_it_is(tmp_path, data, known):
    run(recipe(data={"labels": True}, train={"steps": 1}), data, tmp_path)
    meta = Run(tmp_path).load(1, only=())[1]
    assert (meta["step"], meta["images"], meta["last_step"]) == (1, 8, 1)
    assert (meta["model"]["image"], meta["model"]["classes"]) == ([1, 8, 8], 10)
    kept = json.loads((tmp_path / "data.json").read_text())
    assert (kept["images"], kept["fingerprint"], kept["skipped"]) == (64, data.fingerprint(), [])
