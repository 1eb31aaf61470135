"""Checkpoints that are known to be good, and the advice after a loss that is not finite: followed, it trains."""

import shlex

import pytest
import torch

from tests.training.test_loop import recipe, run
from undiffuse.errors import Corrupt
from undiffuse.key import Key
from undiffuse.machine.store import Run
from undiffuse.training import health, loop
from undiffuse.training.trainer import Trainer


@pytest.fixture
def trainer(data):
    chosen = recipe(train={"precision": "float32"})
    return Trainer(chosen, chosen.model((1, 8, 8)), data)


def test_a_fresh_network_and_one_that_has_learned_are_good(trainer):
    first = health.fixed_loss(trainer, averaged=False)
    assert first == pytest.approx(1, abs=0.1)  # zeros against noise of variance 1
    for _ in range(3):
        trainer.update(6)
    found = health.examine(trainer, first)
    assert found["good"] and found["first"] == first and found["loss"] != found["average_loss"]


LIMITS = [
    (1.0, (10.0, 1.0), True),
    (1.0, (10.1, 1.0), False),
    (1.0, (1.0, 10.1), False),
    (1e-6, (0.1, 0.1), True),  # as after fine-tuning: a loss that was next to nothing may rise to 0.1
    (1e-6, (0.11, 0.1), False),
    (1.0, (float("nan"), 1.0), False),
]


@pytest.mark.parametrize("first, losses, good", LIMITS)
def test_ten_times_the_first_loss_is_lost(trainer, monkeypatch, first, losses, good):
    monkeypatch.setattr(health, "fixed_loss", lambda trainer, averaged: losses[averaged])
    trainer.step = 3
    found = health.examine(trainer, first)
    assert found["good"] is good and found["first"] == first
    trainer.step = 0
    assert health.examine(trainer, first)["first"] == losses[0] or losses[0] != losses[0]


@pytest.mark.parametrize("step", [0, 3])
def test_the_batch_and_its_noise_are_the_same_at_every_step(trainer, step):
    """Of a fresh network, whose answer is nearly 0, the loss is the mean square of the noise."""
    trainer.step = step
    expected = float(Key(0).fold("health").rows(16).fold("eps").normal(1, 8, 8).square().mean())
    assert health.fixed_loss(trainer, averaged=True) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("part", ["model", "ema", "adam"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_bad(trainer, part, value):
    trainer.update(6)
    next(t for t in trainer.tensors()[part].values() if t.numel() > 1).view(-1)[0] = value
    assert not health.examine(trainer, 1.0)["good"]


@pytest.mark.parametrize("averaged", [False, True])
def test_weights_that_are_finite_but_lost_are_bad(trainer, averaged):
    trainer.update(6)
    weights = trainer.ema.shadow if averaged else trainer.weights
    with torch.no_grad():
        for weight in weights:
            weight.add_(3.0)
    found = health.examine(trainer, 1.0)
    assert not found["good"]
    assert found["average_loss" if averaged else "loss"] > health.LOST > found["loss" if averaged else "average_loss"]


def test_the_newest_good_one_is_named_and_kept(tmp_path, data):
    run(recipe(train={"save_every": 1, "steps": 3, "keep": 3, "precision": "float32"}), data, tmp_path)
    folder = Run(tmp_path)
    assert folder.steps() == [1, 2, 3] and health.known_good(folder) == 3 and health.known_good(folder, before=3) == 2
    with folder.lock():
        for step in (4, 5, 6):
            tensors, meta = folder.load(3)
            folder.save(step, tensors, {**meta, "health": {"good": False}})
        assert health.known_good(folder) == 3
        folder.retain(2, also=health.known_good(folder))
    assert folder.steps() == [3, 5, 6]
    (folder.folder(3) / "meta.json").write_text("{}")
    with pytest.raises(Corrupt):
        folder.verify(3)
    assert health.known_good(folder) is None


def advice(err: str) -> list[str]:
    """The command at the end of the message."""
    return shlex.split(err.strip().splitlines()[-1].rpartition(": undiffuse ")[2])


SMALL = ["network.channels=8", "process.steps=20", "train.sample_every=0", "train.save_every=1", "data.size=8"]


def lose(folder: Run) -> None:
    """Makes the last checkpoint one whose weights are lost, and finite."""
    tensors, meta = folder.load(3)
    for tensor in tensors["model"].values():
        tensor.mul_(1e30)
    with folder.lock():
        folder.save(4, tensors, {**meta, "step": 4, "health": {"good": False}})


@pytest.mark.slow
@pytest.mark.parametrize("lr, warmup, good", [("1e30", 0, None), ("1e30", 2, 1), ("0.0005", 0, 3)])
def test_the_advice_is_followed_to_the_letter_and_trains(call, tmp_path, lr, warmup, good):
    """Lost at once; after a step of rate 0; after three good ones."""
    out = tmp_path / "a run"
    settings = [*SMALL, f"train.lr={lr}", f"train.warmup={warmup}"]
    words = ["train", "digits", "--out", out, "--steps", "12", "--device", "cpu"]
    words += [word for setting in settings for word in ("--set", setting)]
    if good == 3:
        assert call(*words, "--steps", "3")[0] == 0
        lose(Run(out))
    code, _, err = call(*words)
    assert code == 3 and "the same command replays it" in err
    command = advice(err)
    assert command[:2] == ["train", "digits"] and command[-2:] == ["--out", f"{out}-2"]
    if good is None:
        assert "--init" not in command and "To go on, start a new run with a lower learning rate" in err
    else:
        assert command[command.index("--init") + 1] == f"{out}/step-{good:09d}"
        assert f"start a new run from {out}/step-{good:09d}, which is known to be good" in err
    code, _, err = call(*command)
    assert code == 0, err
    assert health.known_good(Run(tmp_path / "a run-2")) == 12


def test_what_cannot_work_together_is_said_before_step_0(tmp_path, data, capsys):
    chosen = recipe(train={"ema": 0.9999, "warmup": 100, "decay": "cosine"})
    run(chosen, data, tmp_path, budget=loop.Budget(minutes=1e-9))
    ema, warmup, decay = capsys.readouterr().err.splitlines()[:3]
    assert ema == (
        "warning: train.ema = 0.9999 is long for 6 steps: the untrained weights would still be 100% of the average at "
        "the end; set train.ema=0.464 or less, or train more steps"
    )
    assert "train.warmup = 100 is not over at the last step, 6" in warmup and warmup.endswith("set train.warmup=0")
    assert "the learning rate falls until step 6, which --minutes may not let it reach" in decay
