"""The loop: exact resume, real signals, budgets, and what stops it."""

import json
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import warm
from undiffuse.config import parse, plain
from undiffuse.data.source import ArraySource
from undiffuse.diffusion.objective import Loss, Objective
from undiffuse.errors import Corrupt, DataError, NotFiniteError, Preempted, UsageError
from undiffuse.machine import store
from undiffuse.machine.log import read_rows
from undiffuse.model.load import averaged, load
from undiffuse.model.recipe import Recipe, learning_rate
from undiffuse.training import look, loop
from undiffuse.training.resume import refuse_changes
from undiffuse.training.trainer import Trainer

SMALL = {
    "data": {"flip": True},
    "process": {"name": "linear", "steps": 20, "beta_end": 0.3},
    "network": {"name": "unet", "channels": 8, "multipliers": [1], "blocks": 1, "attention": [], "dropout": 0.2},
    "train": {"steps": 6, "batch": 8, "warmup": 2, "lr": 1e-2, "ema": 0.9, "save_every": 2, "sample_every": 0,
              "log_every": 1, "held_out": 16, "held_out_every": 3},
}  # fmt: skip


def recipe(**sections) -> Recipe:
    merged = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in SMALL.keys() | sections.keys()}
    return parse(Recipe, merged, "test")


def run(recipe: Recipe, data: ArraySource, out: Path, **fields):
    return loop.train(recipe, data, out, say=lambda text: None, show_progress=False, **fields)


def state(out: Path, step: int) -> dict[str, torch.Tensor]:
    tensors, _ = store.Run(out).load(step)
    return {f"{part}/{name}": tensor for part, named in tensors.items() for name, tensor in named.items()}


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys() and len(one) > 50
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize(("precision", "optimizer"), [("float32", "adam"), ("bf16", "adam"), ("float32", "muon")])
def test_resume_is_exact(tmp_path, data, precision, optimizer):
    chosen = recipe(train={"precision": precision, "optimizer": optimizer})
    run(chosen, data, tmp_path / "whole")
    for last in (1, 3, 4, 6):
        run(chosen, data, tmp_path / "parts", budget=loop.Budget(steps=last))
    assert_equal(state(tmp_path / "whole", 6), state(tmp_path / "parts", 6))
    rows = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    whole = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows if "loss" in r] == [r["loss"] for r in whole if "loss" in r]


@pytest.mark.slow
def test_profiles_are_snapshot_and_resumed_exactly(tmp_path, data):
    chosen = recipe(train={"ema_profiles": [0.05, 0.1], "ema_snapshot_every": 2})
    run(chosen, data, tmp_path / "whole")
    for last in (2, 3, 6):
        run(chosen, data, tmp_path / "parts", budget=loop.Budget(steps=last))
    whole, parts = ({path.name: path.read_bytes() for path in (tmp_path / name / "ema").iterdir()} for name in
                    ("whole", "parts"))  # fmt: skip
    assert sorted(whole) == [f"step-00000000{step}-{s}.safetensors" for step in (2, 4, 6) for s in ("0.05", "0.1")]
    assert parts.keys() - whole.keys() == {f"step-000000003-{s}.safetensors" for s in ("0.05", "0.1")}  # an end
    assert {name: parts[name] for name in whole} == whole
    kept = state(tmp_path / "parts", 6)
    assert_equal(state(tmp_path / "whole", 6), kept)
    snapshot = load(tmp_path / "whole" / "ema" / "step-000000006-0.1.safetensors").denoiser.network
    rebuilt = averaged(tmp_path / "whole", 0.1).denoiser.network
    for (name, one), (_, other) in zip(snapshot.named_parameters(), rebuilt.named_parameters(), strict=True):
        assert torch.equal(one, kept[f"profiles/0.1/{name}"].half().float()) and torch.allclose(one, other, rtol=1e-6)
    assert "ema" not in [
        path.name for path in (run(recipe(), data, tmp_path / "plain"), tmp_path / "plain")[1].iterdir()
    ]


def test_no_snapshot_is_lost_between_it_and_its_checkpoint(tmp_path, data, monkeypatch):
    def killed(*arguments, **also):
        raise KeyboardInterrupt

    chosen = recipe(train={"ema_profiles": [0.1], "ema_snapshot_every": 2})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.Run, "retain", killed)  # the first thing after a save
        run(chosen, data, tmp_path)
    assert store.Run(tmp_path).latest() == 2
    run(chosen, data, tmp_path)
    assert len(list((tmp_path / "ema").iterdir())) == 3


def test_a_run_tells_its_sinks(tmp_path, data):
    """What TensorBoard shows is log.jsonl, and a sink may come and go: it is no setting of the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = recipe(process={"steps": 4}, train={"sample_every": 6})
    run(chosen, data, tmp_path, budget=loop.Budget(steps=2))
    run(chosen, data, tmp_path, held_out=data, logs=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = [row for row in read_rows(tmp_path / "log.jsonl") if row["step"] > 2]
    for name in ("loss", "grad_norm", "lr", "held_out"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
    assert [event.step for event in events.Images("samples")] == [6]


def test_the_state_depends_on_the_seed(tmp_path, data):
    run(recipe(), data, tmp_path / "a", budget=loop.Budget(steps=2))
    run(recipe(train={"seed": 1}), data, tmp_path / "b", budget=loop.Budget(steps=2))
    a, b = state(tmp_path / "a", 2), state(tmp_path / "b", 2)
    assert not torch.equal(a["ema/conv_in.weight"], b["ema/conv_in.weight"])


def test_micro_batches_add_up_to_the_batch(data):
    gradients = []
    for size in (8, 3):
        chosen = recipe(network={"dropout": 0.0}, train={"micro_batch": size, "clip_norm": 1e9})
        trainer = Trainer(chosen, chosen.model((1, 8, 8)), data)
        trainer.update(6)
        gradients.append(torch.cat([weight.grad.flatten() for weight in trainer.weights]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_warm_up_starts_at_zero_and_cosine_ends_there(data):
    config = recipe(train={"lr": 2e-4, "warmup": 5000}).train
    rates = [learning_rate(config, step, 800_000) for step in (0, 1, 2500, 5000, 700_000)]
    assert rates == pytest.approx([0, 4e-8, 1e-4, 2e-4, 2e-4], rel=1e-12)
    cosine = replace(config, decay="cosine")
    rates = [learning_rate(cosine, step, 10_000) for step in (2500, 5000, 7500, 10_000)]
    assert rates == pytest.approx([1e-4, 2e-4, 1e-4, 0], abs=1e-12)


def test_the_first_update_has_rate_zero_and_the_average_follows(tmp_path, data):
    trainer = Trainer(recipe(), recipe().model((1, 8, 8)), data)
    before = [weight.detach().clone() for weight in trainer.weights]
    assert trainer.update(6)["lr"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.weights, strict=True))
    trainer.update(6)
    last = trainer.names.index("conv_out.weight")  # the gradients of the others are next to nothing yet
    assert not torch.equal(before[last], trainer.weights[last])
    expected = torch.lerp(before[last], trainer.weights[last].detach(), 1 - 0.9)
    assert torch.allclose(trainer.ema.shadow[last], expected, rtol=1e-6, atol=1e-9)


def test_the_gradient_that_is_clipped_is_that_of_the_batch(data):
    """One clip of the mean gradient, not one per micro-batch: with a tiny bound its norm is exactly the bound."""
    chosen = recipe(train={"clip_norm": 1e-3, "micro_batch": 2})
    trainer = Trainer(chosen, chosen.model((1, 8, 8)), data)
    trainer.update(6)
    norm = torch.linalg.vector_norm(torch.stack([weight.grad.norm() for weight in trainer.weights]))
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("budget, steps", [(loop.Budget(images=17), 3), (loop.Budget(steps=4, images=16), 2)])
def test_budgets(tmp_path, data, budget, steps):
    model = run(recipe(), data, tmp_path, budget=budget)
    assert model.meta["step"] == steps and model.meta["images"] == 8 * steps
    assert store.Run(tmp_path).latest() == steps


@pytest.mark.slow
def test_a_resume_from_the_checkpoint_before_a_damaged_one_is_exact(tmp_path, data, capsys):
    run(recipe(), data, tmp_path / "whole")
    run(recipe(), data, tmp_path / "hurt", budget=loop.Budget(steps=4))
    file = tmp_path / "hurt" / "step-000000004" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    run(recipe(), data, tmp_path / "hurt")
    assert "step 4 is passed over" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "hurt").glob(".bad-*")]
    assert_equal(state(tmp_path / "whole", 6), state(tmp_path / "hurt", 6))
    log = [
        json.loads(line)["step"]
        for line in (tmp_path / "hurt" / "log.jsonl").read_text().splitlines()
        if "loss" in line
    ]
    assert log == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_another_end_of_a_falling_rate_is_marked(tmp_path, data, capsys):
    falling = recipe(train={"decay": "cosine"})
    run(falling, data, tmp_path / "run", budget=loop.Budget(steps=2))
    run(falling, data, tmp_path / "run")
    assert "resumed with other last step 2 -> 6: the numbers may differ" in capsys.readouterr().err
    run(falling, data, tmp_path / "same", budget=loop.Budget(minutes=1e-9))
    run(falling, data, tmp_path / "same")
    assert "resumed with other" not in capsys.readouterr().err
    run(falling, data, tmp_path / "whole")
    assert_equal(state(tmp_path / "whole", 6), state(tmp_path / "same", 6))


def test_other_data_is_refused_unless_it_is_accepted(tmp_path, data):
    run(recipe(), data, tmp_path, budget=loop.Budget(steps=2))
    turned = data.subset(torch.arange(len(data) - 1, -1, -1))
    with pytest.raises(UsageError, match="64 images as before, but not the same ones in the same order"):
        run(recipe(), turned, tmp_path)
    with pytest.raises(UsageError, match="64 images before, 63 now"):
        run(recipe(), data.subset(slice(63)), tmp_path)
    assert run(recipe(), turned, tmp_path, accept_data=True).meta["step"] == 6
    assert run(recipe(), turned, tmp_path).meta["step"] == 6  # it is the run's data from then on
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(Corrupt, match=r"data\.json is damaged: it does not say which data"):
        run(recipe(), turned, tmp_path)


def test_a_budget_of_minutes_stops_soon(tmp_path, data):
    assert run(recipe(train={"steps": 10**6}), data, tmp_path, budget=loop.Budget(minutes=0.001)).meta["step"] < 200


def test_a_run_leaves_what_the_other_commands_need(tmp_path, data):
    trained = run(recipe(process={"steps": 4}, train={"sample_every": 6}), data, tmp_path, held_out=data)
    assert (tmp_path / "config.toml").exists() and (tmp_path / "data.json").exists()
    assert (tmp_path / "samples" / "step-000000006.png").stat().st_size > 500
    assert store.Run(tmp_path).steps() == [4, 6]  # two are kept
    loaded = load(tmp_path)
    assert torch.equal(loaded.sample(3, seed=5), trained.sample(3, seed=5))
    assert loaded.meta["images"] == 48
    held = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if "held_out" in line]
    assert [row["step"] for row in held] == [3, 6] and all(0 < row["held_out"] < 3 for row in held)
    assert load(tmp_path / "step-000000004").meta["step"] == 4


def test_of_a_held_out_split_only_what_is_measured_is_read(tmp_path):
    """Spread over it, because pictures often lie in the order of their classes."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(10):
            Image.new("L", (8, 8), 20 * i).save(tmp_path / split / f"{i}.png")
    (tmp_path / "test" / "1.png").write_bytes(b"")
    held = look.held_out_split(str(tmp_path), recipe(train={"held_out": 5}), (1, 8, 8))
    assert held.images[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160]
    for count, chosen in ((2, [0, 80]), (9, [0, 40, 80, 120, 160])):
        fresh = recipe(train={"held_out": count})
        trainer = Trainer(fresh, fresh.model((1, 8, 8)), held)
        assert look.held_out_images(trainer, held).images[:, 0, 0, 0].tolist() == chosen
    assert look.held_out_split(str(tmp_path), recipe(train={"held_out": 0}), (1, 8, 8)) is None
    turned = look.held_out_split(str(tmp_path), recipe(train={"held_out": 5}), (3, 4, 6))
    assert turned.image_shape == (3, 4, 6)  # of the training images, whatever its own
    (tmp_path / "four").mkdir()
    for split in ("train", "test"):
        np.savez(tmp_path / "four" / f"{split}.npz", images=np.zeros((3, 8, 8, 4), np.uint8))
    four = look.held_out_split(str(tmp_path / "four"), recipe(train={"held_out": 5}), (4, 8, 8))
    assert four.image_shape == (4, 8, 8)


def test_fine_tuning_begins_with_the_other_weights(tmp_path, data):
    first = run(recipe(), data, tmp_path / "first")
    run(recipe(train={"steps": 1}), data, tmp_path / "second", init=first)
    tuned = state(tmp_path / "second", 1)  # the first update has rate 0
    assert all(torch.equal(tuned[f"model/{n}"], w) for n, w in first.denoiser.network.state_dict().items())
    wide = recipe(network={"channels": 16})
    with pytest.raises(UsageError, match="another function: network.channels is 8 there and 16 here"):
        run(wide, data, tmp_path / "third", init=first)


def test_what_cannot_be_sampled_can_be_trained(tmp_path, data, capsys):
    other = {"process": {"name": "jsd", "steps": 20}, "train": {**SMALL["train"], "sample_every": 6}}
    model = loop.train(parse(Recipe, {**SMALL, **other}, "test"), data, tmp_path, show_progress=False)
    assert model.meta["step"] == 6 and not (tmp_path / "samples").exists()
    assert "no preview at step 6: eps" in capsys.readouterr().err
    with pytest.raises(UsageError, match="x0 or v"):
        model.sample(1)


def test_changed_settings_are_refused_with_a_diff(tmp_path, data):
    run(recipe(), data, tmp_path, budget=loop.Budget(steps=2))
    with pytest.raises(UsageError, match=r"other settings \(train.lr: 0.01 -> 0.02\); give the old ones"):
        run(recipe(train={"lr": 2e-2}), data, tmp_path)
    with pytest.raises(UsageError, match=r"process.steps: 20 -> 30"):
        run(recipe(process={"steps": 30}), data, tmp_path)
    run(recipe(train={"save_every": 3, "log_every": 2}), data, tmp_path)  # how often to look is free
    assert store.Run(tmp_path).latest() == 6


def test_a_setting_that_is_younger_than_the_run_had_its_default(data):
    now = {"model": {}, "recipe": plain(recipe())}
    saved = {"model": {}, "recipe": {**now["recipe"], "train": dict(now["recipe"]["train"])}}
    del saved["recipe"]["train"]["ema_profiles"]
    refuse_changes(saved, now)
    now["recipe"]["train"] = {**now["recipe"]["train"], "ema_profiles": [0.05]}
    with pytest.raises(UsageError, match=r"train.ema_profiles: \[\] -> \[0.05\]"):
        refuse_changes(saved, now)


def test_another_list_of_what_is_left_out_is_refused(tmp_path, data):
    some = replace(data, skipped=("a.png", "b.png"))
    run(recipe(), some, tmp_path, budget=loop.Budget(steps=2))
    assert json.loads((tmp_path / "data.json").read_bytes())["skipped"] == ["a.png", "b.png"]
    message = (
        r"^other images are left out than when this run began \(b.png, c.png\); give the same data, or another --out$"
    )
    with pytest.raises(UsageError, match=message):
        run(recipe(), replace(data, skipped=("a.png", "c.png")), tmp_path)
    run(recipe(), some, tmp_path, budget=loop.Budget(steps=3))


def test_a_run_from_before_there_was_a_list_goes_on(tmp_path, data):
    run(recipe(), data, tmp_path, budget=loop.Budget(steps=2))
    before = json.loads((tmp_path / "data.json").read_bytes())
    del before["skipped"]
    (tmp_path / "data.json").write_text(json.dumps(before))
    assert run(recipe(), data, tmp_path, budget=loop.Budget(steps=3)).meta["step"] == 3


@dataclass(frozen=True)
class Breaks(Objective):
    """Like a loss that overflows at one step."""

    def __call__(self, denoiser, x_0, cond, keys):
        output = denoiser(x_0, torch.full((len(x_0),), 0.5, dtype=torch.float64)).output
        loss = output.square().flatten(1).mean(1) * (float("inf") if Breaks.now else 1.0)
        return Loss(loss, {}, torch.zeros(len(x_0)))

    now = False


def test_a_loss_that_is_not_finite_stops_before_the_update(data, monkeypatch):
    chosen = replace(recipe(), objective=Breaks())
    trainer = Trainer(chosen, chosen.model((1, 8, 8)), data)
    trainer.update(6)
    trainer.update(6)
    before = {name: t.clone() for part in trainer.tensors().values() for name, t in part.items()}
    monkeypatch.setattr(Breaks, "now", True)
    with pytest.raises(NotFiniteError, match="step 2: the loss is .* weights were not updated; examples"):
        trainer.update(6)
    after = {name: t for part in trainer.tensors().values() for name, t in part.items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert NotFiniteError.exit_code == 3


def test_a_size_that_the_strides_do_not_divide(tmp_path, data):
    with pytest.raises(
        DataError, match="images of 8×8 do not fit this network, whose strides divide by 16; use --size 16"
    ):
        run(recipe(network={"multipliers": [1, 1, 1, 1, 1]}), data, tmp_path)
    assert not (tmp_path / "lock").exists()


@pytest.mark.slow
def test_labels_train_a_conditional_model(tmp_path, data):
    model = run(
        recipe(data={"labels": True}, train={"drop_label": 0.5, "steps": 20, "sample_every": 20}), data, tmp_path
    )
    assert model.config.classes == 10
    assert not torch.equal(model.sample(2, label=3), model.sample(2, label=4))
    with pytest.raises(UsageError, match="label 10 is not possible. This model knows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"):
        model.sample(2, label=10)


def start(out: Path) -> warm.Process:
    words = ["train", "digits", "--preset", str(out.parent / "small.toml"), "--out", str(out)]
    return warm.Process(warm.COMMAND, *words)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.long)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, name):
    from undiffuse.config import to_toml

    (tmp_path / "small.toml").write_text(to_toml(recipe(train={"steps": 120, "save_every": 1000, "held_out": 0})))
    process = start(tmp_path / "stopped")
    log = tmp_path / "stopped" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 5):
        assert process.poll() is None and time.monotonic() < deadline, process.said()
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == Preempted.exit_code == 143
    assert f"{name}: stopped after step" in errors and "the same command goes on" in errors
    stopped = store.Run(tmp_path / "stopped").latest()
    assert 5 <= stopped < 120
    for out in ("stopped", "whole"):
        process = start(tmp_path / out)
        process.communicate(timeout=240)
        assert process.returncode == 0
    assert_equal(state(tmp_path / "stopped", 120), state(tmp_path / "whole", 120))


def test_classes_without_a_picture_are_told(tmp_path, data, capsys):
    few = ArraySource(data.images[:20], data.labels[:20] % 3 + 2, tuple("abcdefg"))
    run(recipe(data={"labels": True}, train={"steps": 1, "sample_every": 0, "held_out": 0}), few, tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "classes without a training picture, which cannot be drawn: 0 a, 1 b, 5 f, 6 g" in said
