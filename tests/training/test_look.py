"""What ends a run by itself, what it is that is sampled then, and what is looked at on the way."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.test_loop import assert_equal, recipe, run, state
from undiffuse.config import plain
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.grid import KarrasFew
from undiffuse.diffusion.sampler.unipc import Unipc
from undiffuse.errors import Preempted, UsageError
from undiffuse.key import Key
from undiffuse.machine import log, store
from undiffuse.machine.log import read_rows
from undiffuse.machine.sink import Nowhere
from undiffuse.machine.watch import Flag
from undiffuse.model.load import load
from undiffuse.model.model import Model, to_float, to_uint8
from undiffuse.network.base import NOTHING
from undiffuse.training import look, loop
from undiffuse.training.look import Lowest
from undiffuse.training.trainer import Trainer


def test_the_lowest_loss_ends_a_run_after_half_as_many_steps_again():
    lowest = Lowest()
    for step, loss in ((100, 3.0), (200, 2.0), (1000, 1.0)):
        assert lowest.note(step, loss) and not lowest.is_over(0.5, 100)
    for step in range(1100, 1500, 100):
        assert not lowest.note(step, 1.0) and not lowest.is_over(0.5, 100)
    assert not lowest.note(1500, 1.5) and lowest.is_over(0.5, 100)
    assert plain(lowest) == {"loss": 1.0, "step": 1000, "measured": 1500}
    assert not lowest.is_over(0.0, 100) and not lowest.is_over(0.6, 100)


def test_no_run_ends_before_five_measurements_without_a_lower_one():
    lowest = Lowest()
    lowest.note(10, 1.0)
    lowest.note(50, 2.0)
    assert not lowest.is_over(0.5, 10)
    lowest.note(60, 2.0)
    assert lowest.is_over(0.5, 10)


LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 4.0, 10: 4.0, 12: 4.0, 14: 4.0, 16: 1.0}
PATIENT = {"patience": 0.5, "held_out_every": 2, "steps": 40, "save_every": 4, "sample_every": 0, "ema_ramp": True}


@pytest.fixture
def losses(monkeypatch):
    """Held-out losses that are known, one a step."""
    asked: list[int] = []

    def loss(trainer, images, check=None):
        asked.append(trainer.step)
        return LOSSES[trainer.step]

    monkeypatch.setattr(look, "held_out_loss", loss)
    return asked


def test_a_run_ends_by_its_held_out_loss_and_the_best_is_what_is_sampled(tmp_path, data, losses):
    chosen, said = recipe(train=PATIENT), []
    arguments = {"held_out": data, "show_progress": False, "say": said.append}
    loop.train(chosen, data, tmp_path, **arguments)
    assert said[-1] == (
        "finished at step 14: the held-out loss was lowest, 3, at step 4, and has not fallen since; the average of "
        "that step is what is sampled"
    )
    assert losses == [2, 4, 6, 8, 10, 12, 14]
    best, last = load(tmp_path), load(tmp_path / "step-000000014")
    assert best.meta["step"] == 4 and best.meta["held_out"] == 3.0 and last.meta["step"] == 14
    expected = run(recipe(train={**PATIENT, "patience": 0.0}), data, tmp_path / "four", budget=loop.Budget(steps=4))
    for one, two in zip(best.denoiser.parameters(), expected.denoiser.parameters(), strict=True):
        assert torch.equal(one, two)
    assert load(tmp_path, weights="average").meta["step"] == 14
    killed = tmp_path / "killed"  # before its first checkpoint
    killed.mkdir()
    (killed / "best.safetensors").write_bytes((tmp_path / "best.safetensors").read_bytes())
    assert load(killed).meta["step"] == 4
    loop.train(chosen, data, tmp_path, **arguments)
    assert said[-1] == f"{tmp_path} is finished already, at step 14" and losses[-1] == 14


def test_a_signal_at_the_held_out_loss_that_ends_the_run_changes_nothing(tmp_path, data, losses, monkeypatch):
    chosen = recipe(train={**PATIENT, "save_every": 100})
    run(chosen, data, tmp_path / "whole", held_out=data)
    real = Trainer.update

    def update(self, last, *vote):
        found = real(self, last, *vote)
        if self.step == 14 and not losses.count(99):
            losses.append(99)
            flags[-1].name = "SIGTERM"
        return found

    flags: list[Flag] = []
    monkeypatch.setattr(Flag, "__init__", lambda self: flags.append(self) or setattr(self, "name", None))
    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(Preempted, match="stopped after step 14"):
        run(chosen, data, tmp_path / "parts", held_out=data)
    assert losses[-2:] == [99, 14]  # what may end the run is measured all the same
    run(chosen, data, tmp_path / "parts", held_out=data)
    assert losses[-1] == 14 and losses.count(14) == 2
    assert_equal(state(tmp_path / "whole", 14), state(tmp_path / "parts", 14))
    rows = [read_rows(tmp_path / name / "log.jsonl") for name in ("whole", "parts")]
    whole, parts = ([row for row in part if "held_out" in row] for part in rows)
    assert whole == parts and whole[-1] == {"step": 14, "held_out": 4.0}


def test_raw_weights_are_loaded_where_there_are_some(tmp_path, data):
    run(recipe(), data, tmp_path / "run")
    tensors, _ = store.Run(tmp_path / "run").load(6)
    for weights, part in (("raw", "model"), ("average", "ema"), (None, "ema")):
        for place in ("run", "run/step-000000006"):
            network = load(tmp_path / place, weights=weights).denoiser.network
            assert all(torch.equal(tensor, tensors[part][name]) for name, tensor in network.named_parameters())
    for name, message in (
        ("best", "has no best.safetensors; it is kept in the folder of a run with train.patience"),
        ("rav", 'weights "rav" is not known. Did you mean "raw"?'),
    ):
        with pytest.raises(UsageError, match=message):
            load(tmp_path / "run", weights=name)
    with pytest.raises(UsageError, match="holds one set of weights; --weights raw needs a training run"):
        load("fashion-mnist", weights="raw")


def test_no_previews_where_none_are_wanted_and_as_many_checkpoints_as_asked(tmp_path, data):
    run(recipe(train={"sample_every": 0, "save_every": 1, "keep": 4}), data, tmp_path)
    assert not (tmp_path / "samples").exists()
    assert store.Run(tmp_path).steps() == [3, 4, 5, 6]
    with pytest.raises(UsageError, match='"train.keep" input should be greater than or equal to 2, given 1'):
        recipe(train={"keep": 1})


def test_few_held_out_images_are_seen_with_many_noises(data):
    chosen = recipe()
    trainer = Trainer(chosen, chosen.model((1, 8, 8)), data)
    one = look.held_out_loss(trainer, look.Held(data.images[:1], NOTHING))
    assert one == pytest.approx(1.0, abs=4 * (2 / 64 / look.TERMS) ** 0.5)  # a fresh network: the mean of eps²
    assert one != look.held_out_loss(trainer, look.Held(data.images[1:2].clone(), NOTHING)) or trainer.step == 0


def trained(data, **train) -> Trainer:
    """Two steps of 0.01, after which the average is another network than the last one; with dropout."""
    sections = {"process": {"steps": 4}, "objective": {"name": "vlb"}}
    chosen = recipe(**sections, train={"precision": "float32", "warmup": 0, "ema": 0.5, **train})
    one = Trainer(chosen, chosen.model((1, 8, 8)), data)
    for _ in range(2):
        one.update(6)
    return one


def by_hand(one: Trainer, weights: list[torch.Tensor], clip: bool) -> Denoiser:
    denoiser = one.config.build(clip).eval().requires_grad_(False)
    denoiser.network.load_state_dict(dict(zip(one.names, weights, strict=True)))
    return denoiser


@pytest.mark.parametrize("micro", [8, 3])
def test_the_held_out_loss_is_the_objective_of_the_average_on_each_image(data, monkeypatch, micro):
    """Without dropout and clipping; row r sees image r mod 5, of so many that 18 losses are at least averaged."""
    monkeypatch.setattr(look, "TERMS", 18)
    one, images, rows = trained(data, micro_batch=micro), data.images[:5], torch.arange(5 * 4)
    keys, x_0 = Key(0).fold("held out").rows(rows), to_float(images[rows % 5])
    for weights, clip, same in (
        (one.ema.shadow, False, True),
        (one.ema.shadow, True, False),
        (one.weights, False, False),
    ):
        expected = one.recipe.objective(by_hand(one, weights, clip), x_0, NOTHING, keys).per_example.mean()
        assert (look.held_out_loss(one, look.Held(images, NOTHING)) == pytest.approx(float(expected), rel=1e-5)) is same


def test_previews_are_of_the_average_and_of_the_weights_from_the_same_noise(tmp_path, data):
    """64 deterministic samples each, eight a row, from noise that is not keyed by the step."""
    one = trained(data)
    look.save_grids(one, tmp_path, Nowhere(), lambda n: None)
    noise = Key(0).fold("preview").rows(64)
    for name, weights in (("step-000000002.png", one.ema.shadow), ("step-000000002-raw.png", one.weights)):
        model = Model(one.config, by_hand(one, weights, clip=True), {})
        x = model.chain(noise, KarrasFew().times(one.recipe.process, 4), Unipc(order=2))
        with Image.open(tmp_path / name) as picture:
            sheet = torch.from_numpy(np.array(picture))[1:, 1:].reshape(8, 9, 8, 9)[:, :8, :, :8]
        found = sheet.transpose(1, 2).reshape(64, 1, 8, 8)
        assert (found.int() - to_uint8(x).int()).abs().max() <= 1  # a value at a half may be rounded either way


def test_the_time_of_previews_is_not_that_of_steps(tmp_path, data, monkeypatch, capsys):
    """A clock that only previews and steps move: 2 s a step, 10 s a step of a preview."""
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    real, ticks = Trainer.update, []

    def update(self, last, *vote):
        now[0] += 2.0
        return real(self, last, *vote)

    def grids(trainer, folder, lines, tick):
        for _ in range(3):
            now[0] += 10.0
            tick(1)
            ticks.append(1)

    monkeypatch.setattr(Trainer, "update", update)
    monkeypatch.setattr(look, "save_grids", grids)
    chosen = recipe(train={"sample_every": 2, "micro_batch": 8})
    loop.train(chosen, data, tmp_path, say=lambda text: None)
    lines = capsys.readouterr().err.splitlines()
    assert len(ticks) == 9
    assert lines[-1].startswith("training 6/6 (100 %), 0.5/s, 12 s, loss")
    first = next(line for line in lines if "preview" in line)
    two_grids = f"preview 1/{2 * 10 * 4}"  # of 10 steps and four batches of 16
    assert re.sub(", loss.*;", ";", first) == f"training 2/6 (33 %), 0.5/s, 8 s left; {two_grids}"
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {row["images_per_second"] for row in rows if "loss" in row} == {4.0}


def test_patience_that_comes_later_does_not_name_an_average_that_was_not_kept(tmp_path, data, losses):
    run(recipe(train={**PATIENT, "patience": 0.0, "steps": 8}), data, tmp_path, held_out=data)
    model = run(recipe(train={**PATIENT, "steps": 40}), data, tmp_path, held_out=data, budget=loop.Budget(steps=10))
    assert model.meta["ended"] == "steps"
    assert load(tmp_path).meta["step"] == load(tmp_path, weights="best").meta["step"] == 10


def test_a_profile_keeps_what_the_run_knows(tmp_path, data, losses, monkeypatch):
    from undiffuse.training import profile

    monkeypatch.setattr(profile, "WARM_UP", 1)
    monkeypatch.setattr(profile, "STEPS", 4)
    chosen = recipe(train={**PATIENT, "keep": 3, "save_every": 2})
    run(chosen, data, tmp_path, held_out=data, budget=loop.Budget(steps=8))
    before = store.Run(tmp_path).load(8, only=())[1]
    run(chosen, data, tmp_path, held_out=data, budget=loop.Budget(steps=8), profile=True)
    after = store.Run(tmp_path).load(13, only=())[1]
    assert store.Run(tmp_path).steps() == [6, 8, 13]
    assert after["held_out"] == before["held_out"] == {"loss": 3.0, "step": 4, "measured": 8}
    assert after["health"]["first"] == before["health"]["first"] and after["last_step"] == 8


def test_weights_that_give_no_picture_do_not_end_a_run(tmp_path, data, capsys):
    chosen = recipe()
    trainer = Trainer(chosen, chosen.model((1, 8, 8)), data)
    with torch.no_grad():
        for shadow in trainer.ema.shadow:
            shadow.copy_(shadow.sign() * 1e30)
    look.save_grids(trainer, tmp_path, look.sink.Nowhere(), lambda n: None)
    assert "no preview at step 0: the chain ended in values that are not finite" in " ".join(
        capsys.readouterr().err.split()
    )
    assert list(tmp_path.iterdir()) == []
