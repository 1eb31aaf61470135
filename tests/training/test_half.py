"""float16 and the scale of its loss, driven on the CPU, on which a run is refused: it is exact there and slow."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.machine.test_dist import finish, losses, preset, start
from tests.training.test_loop import assert_equal, recipe, run, state
from tests.training.test_step import Odd
from undiffuse.errors import NotFiniteError, UsageError
from undiffuse.machine import device, store
from undiffuse.machine.log import read_rows
from undiffuse.model.recipe import learning_rate
from undiffuse.training import loop, scale
from undiffuse.training.auto import resolved
from undiffuse.training.scale import LossScale
from undiffuse.training.trainer import Trainer

HUGE = 2.0**40  # gradients of this network overflow from about 2^18 on: float16 ends at 65,504
PLAIN = {"dropout": 0.0}


@pytest.fixture
def here(monkeypatch):
    """As if the CPU were a card, for whoever asks whether float16 is for it."""
    monkeypatch.setattr(device, "has_float16", lambda where: True)


def made(data, objective=None, precision="float16", **train) -> Trainer:
    chosen = recipe(network=PLAIN, data={"flip": False}, train={"precision": precision, **train})
    chosen = chosen if objective is None else replace(chosen, objective=objective)
    return Trainer(chosen, chosen.model((1, 8, 8)), data)


def flat(one: Trainer, part: str) -> torch.Tensor:
    return torch.cat([tensor.flatten().float() for tensor in one.tensors()[part].values()])


def test_the_scale_moves_as_torch_moves_its_own(monkeypatch):
    """Through overflows, growth, and an overflow that starts the count anew; every number of it after every step."""
    monkeypatch.setattr(scale, "INTERVAL", 3)
    theirs, ours = torch.amp.GradScaler("cpu", growth_interval=3), LossScale(on=True)
    weight = nn.Parameter(torch.ones(2))
    adam = torch.optim.SGD([weight], lr=1.0)
    for finite in (1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1):
        adam.zero_grad()
        theirs.scale((weight * (1.0 if finite else float("inf"))).sum()).backward()
        theirs.step(adam)
        theirs.update()
        ours.passed() if finite else ours.overflowed()
        state = theirs.state_dict()
        assert (ours.scale, ours.good) == (state["scale"], state["_growth_tracker"])


def test_it_begins_as_torch_begins():
    state, ours = torch.amp.GradScaler("cpu").state_dict(), LossScale(on=True)
    assert (ours.scale, scale.INTERVAL, ours.good) == (state["scale"], state["growth_interval"], 0)
    assert (state["growth_factor"], state["backoff_factor"]) == (2.0, 0.5)


def test_it_grows_no_further_than_float32():
    one = LossScale(on=True)
    one.scale, one.good = 2.0**127, scale.INTERVAL - 1
    one.passed()
    assert one.scale == 2.0**127 and one.tensors()["scale"].isfinite()


@pytest.mark.parametrize("where", ["cpu", "mps"])
def test_float16_is_refused_where_it_is_not_for(data, where):
    chosen = recipe(train={"precision": "float16"})
    said = f"train.precision = float16 is for cards .cuda., and this is {where}; give float32, bf16 or auto"
    with pytest.raises(UsageError, match=said):
        Trainer(chosen, chosen.model((1, 8, 8)), data, where)


def test_it_is_refused_before_anything_is_written(tmp_path, data):
    with pytest.raises(UsageError, match="float16 is for cards"):
        run(recipe(train={"precision": "float16"}), data, tmp_path / "run")
    assert not (tmp_path / "run").exists() and UsageError.exit_code == 2


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("where", ["cpu", "mps", "cuda"])
def test_what_auto_chooses(monkeypatch, native, where):
    monkeypatch.setattr(device, "native_bf16", lambda there: native)

    def become(then):
        return resolved(recipe(), then, torch.device(where), recipe().model((1, 8, 8)), print).train.precision

    chosen = become(None)
    assert chosen == ("bf16" if native else "float16" if where == "cuda" else "float32")
    assert become({"precision": "float16"}) == "float16"


@pytest.mark.parametrize("fields", [{}, {"micro_batch": 3}, {"exact_shards": 4}], ids=str)
def test_a_step_is_that_of_float32(here, data, fields):
    """Its norm, what is left of it by the clip, and where the weights go: at any scale that does not overflow."""
    exact = made(data, precision="float32", clip_norm=0.5, warmup=0, **fields)
    norm = exact.update(6)["grad_norm"]
    assert norm > 1
    for start_at in (1.0, 256.0, 2.0**16):
        half = made(data, clip_norm=0.5, warmup=0, **fields)
        half.scale.scale = start_at
        told = half.update(6)
        assert told["grad_norm"] == pytest.approx(norm, rel=2e-3)
        assert (told["skipped"], told["loss_scale"]) == (0.0, start_at)
        gradient, other = (torch.cat([w.grad.flatten() for w in one.weights]) for one in (half, exact))
        assert float(gradient.norm()) == pytest.approx(0.5, rel=1e-4)
        assert (gradient - other).norm() < 5e-3 * other.norm()


def test_products_are_float16_and_norms_what_they_are_in_bf16(here, data):
    """The type in which each layer answers, by autocast of either."""
    seen = {}
    for name, half in (("bf16", torch.bfloat16), ("float16", torch.float16)):
        one, types = made(data, precision=name), []
        for layer in one.denoiser.network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear, nn.GroupNorm)):
                layer.register_forward_hook(
                    lambda layer, given, out, types=types, half=half: types.append(
                        (type(layer).__name__, out.dtype == half, out.dtype == torch.float32)
                    )
                )
        one.update(6)
        seen[name] = types
        assert {each for each in types if each[0] != "GroupNorm"} == {("Conv2d", True, False), ("Linear", True, False)}
    assert seen["float16"] == seen["bf16"]


def test_small_gradients_are_lost_without_a_scale_and_not_with_it(here, data):
    """Those that float16 rounds to 0: fewer with the scale that it begins with than with none."""
    counts = []
    for start_at in (1.0, 2.0**16):
        one = made(data)
        one.scale.scale = start_at
        one.update(6)
        counts.append(sum(int((weight.grad == 0).sum()) for weight in one.weights))
    assert counts[1] < counts[0]


def test_a_step_that_overflows_changes_nothing_but_the_step_and_the_scale(here, data):
    one = made(data, warmup=2, ema_profiles=[0.1], decay="cosine")
    assert one.update(100)["skipped"] == 0
    before = {part: flat(one, part).clone() for part in ("model", "ema", "adam", "profiles")}
    one.scale.scale, one.scale.good = HUGE, 7
    told = one.update(100)
    assert (told["skipped"], told["loss_scale"], one.scale.good) == (1.0, HUGE / 2, 0)
    assert 0.5 < told["loss"] < 2 and "grad_norm" not in told  # it was the gradient that overflowed
    assert all(torch.equal(flat(one, part), old) for part, old in before.items())
    assert one.step == 2 and told["lr"] == learning_rate(one.recipe.train, 1, 100)
    steps = 0
    while one.update(100)["skipped"]:
        steps += 1
    assert 5 < steps < 40 and one.scale.scale == HUGE / 2 ** (steps + 1)
    assert not torch.equal(flat(one, "model"), before["model"])


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_no_scale_helps_ends_the_run_after_sixteen(here, data, kind):
    one = made(data, Odd(kind))
    for step in range(16):
        told = one.update(100)
        assert told["skipped"] == 1.0 and told["loss_scale"] == 2.0 ** (15 - step)
        assert ("loss" in told) == (kind == "gradient")
    for _ in range(2):  # the same state replays it
        with pytest.raises(NotFiniteError, match="step 16: .*, and their scale cannot fall below 1, so the"):
            one.update(100)
    assert one.step == 16 and not one.optimizer.state


def test_in_other_precisions_nothing_is_skipped_or_told(data):
    one = made(data, Odd("gradient"), precision="float32")
    with pytest.raises(NotFiniteError, match="the gradient norm nan, so the weights"):
        one.update(6)
    assert not made(data, precision="float32").update(6).keys() & {"skipped", "loss_scale"}
    assert "scale" not in one.tensors()


@pytest.mark.slow
def test_a_resume_is_exact_with_overflows_and_growth_on_both_sides(tmp_path, data, here, monkeypatch):
    """The scale doubles after two good steps, so it is too large again and again."""
    monkeypatch.setattr(scale, "START", 2.0**18)
    monkeypatch.setattr(scale, "INTERVAL", 2)
    chosen, said = recipe(train={"precision": "float16", "steps": 16, "log_every": 1}), []
    run(chosen, data, tmp_path / "whole")
    for last in (1, 8, 11, 16):
        loop.train(
            chosen, data, tmp_path / "parts", budget=loop.Budget(steps=last), say=said.append, show_progress=False
        )
    whole, parts = ([row for row in read_rows(tmp_path / name / "log.jsonl") if "lr" in row] for name in
                    ("whole", "parts"))  # fmt: skip
    keys = ("step", "skipped", "loss_scale", "loss", "grad_norm", "lr")
    assert [[row.get(key) for key in keys] for row in whole] == [[row.get(key) for key in keys] for row in parts]
    skipped = [int(row["skipped"]) for row in whole]
    assert 0 < sum(skipped[:8]) < 8 and 0 < sum(skipped[8:]) < 8, skipped
    assert_equal(state(tmp_path / "whole", 16), kept := state(tmp_path / "parts", 16))
    assert float(kept["scale/scale"]) == whole[-1]["loss_scale"] and "scale/good" in kept
    at = skipped.index(1) + 1
    scaled = f"{whole[at - 1]['loss_scale']:g}"
    line = f"step {at}: float16 overflowed in 1 of 1 steps, which were skipped; the loss is scaled by {scaled} from"
    assert sum(text.startswith(line) for text in said) == 1
    assert sum("overflowed" in text for text in said) == sum(skipped)


def test_a_line_of_the_log_says_how_many_were_skipped(tmp_path, data, here, monkeypatch):
    monkeypatch.setattr(scale, "START", HUGE)
    run(recipe(train={"precision": "float16", "log_every": 4, "steps": 8}), data, tmp_path)
    first, *_ = [row for row in read_rows(tmp_path / "log.jsonl") if "lr" in row]
    assert (first["step"], first["skipped"], first["loss_scale"]) == (4, 1.0, HUGE * 15 / 64)
    assert "grad_norm" not in first and first["loss"] < 3


def test_a_run_that_no_scale_helps_is_saved_and_told_what_to_do(tmp_path, data, here):
    chosen = replace(recipe(train={"precision": "float16", "steps": 40, "save_every": 100}), objective=Odd("gradient"))
    for _ in range(2):
        with pytest.raises(NotFiniteError, match="step 16: .* fall below 1, .*or with --set train.precision=float32"):
            run(chosen, data, tmp_path)
        assert store.Run(tmp_path).steps() == [16]


CARD = """
from undiffuse.machine import device
from undiffuse.training import scale, trainer
device.has_float16 = lambda where: True
scale.START, scale.INTERVAL = 2.0**18, 2
real = trainer.Trainer.loss
def loss(self, batch, part):
    loss, t = real(self, batch, part)
    return (loss / (batch.rows[part] != 6).float() if self.step == 9 else loss), t
trainer.Trainer.loss = loss
from undiffuse.cli import main as cli
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"exact_shards": 2}], ids=str)
def test_all_processes_skip_alike(tmp_path, fields):
    """Also where one of them alone has the example that overflows, as in step 9; and across a resume."""
    name = preset(tmp_path, precision="float16", steps=12, lr=1e-3, **fields)
    for out, processes, lives in (("alone", 1, ("12",)), ("both", 2, ("7", "12"))):
        for last in lives:
            words = ["train", "digits", "--preset", name, "--out", str(tmp_path / out), "--steps", last]
            ended = finish(start(processes, *words, script=CARD))
            assert [code for code, _, _ in ended] == [0] * processes, ended
    alone, both = ([row for row in read_rows(tmp_path / out / "log.jsonl") if "lr" in row] for out in ("alone", "both"))
    assert [[row[key] for key in ("step", "skipped", "loss_scale")] for row in alone] == [
        [row[key] for key in ("step", "skipped", "loss_scale")] for row in both
    ]
    assert alone[9]["skipped"] == 1 and "loss" not in alone[9] and 0 < sum(row["skipped"] for row in alone) < 10
    if fields:
        assert_equal(state(tmp_path / "alone", 12), state(tmp_path / "both", 12))
        assert losses(tmp_path / "alone") == losses(tmp_path / "both")
    assert json.loads(json.dumps(alone)) == alone
