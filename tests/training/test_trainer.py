"""One step, however it is run: recomputed, in parts, prefetched, or stopped; and what is said and measured about it."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from tests.training.test_loop import Breaks, assert_equal, recipe, run, state
from undiffuse.data.loader import Loader, Prefetched
from undiffuse.data.source import ArraySource
from undiffuse.errors import MemoryExhausted, NotFiniteError, UsageError
from undiffuse.machine import device, store
from undiffuse.model.load import load
from undiffuse.model.model import Model
from undiffuse.model.recipe import FREE, TrainConfig, load_recipe
from undiffuse.training import loop
from undiffuse.training.plan import forward_flops
from undiffuse.training.resume import refuse_changes
from undiffuse.training.trainer import Trainer

FLOAT = {"precision": "float32"}


def made(data, **train_fields) -> Trainer:
    chosen = recipe(train={**FLOAT, **train_fields})
    return Trainer(chosen, chosen.model((1, 8, 8)), data)


def gradient(one: Trainer) -> torch.Tensor:
    one.update(6)
    return torch.cat([weight.grad.flatten() for weight in one.weights])


def test_recomputed_activations_give_the_same_bits(data):
    """Dropout too is drawn again as it was."""
    assert torch.equal(gradient(made(data)), gradient(made(data, recompute=True)))


def test_channels_last_is_the_same_network(data):
    plain, last = gradient(made(data)), gradient(made(data, channels_last=True))
    assert (plain - last).norm() < 1e-5 * plain.norm()


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"exact_shards": 4}], ids=str)
def test_channels_last_is_trained_the_same_and_resumed_exactly(tmp_path, data, fields):
    """Fused Adam takes the layout of a weight for that of its gradient and moments, whatever it is."""
    chosen = recipe(train={**FLOAT, "channels_last": True, "lr": 1e-3, **fields})
    run(chosen, data, tmp_path / "whole")
    run(chosen, data, tmp_path / "parts", budget=loop.Budget(steps=3))
    run(chosen, data, tmp_path / "parts")
    assert_equal(state(tmp_path / "whole", 6), state(tmp_path / "parts", 6))
    plain, last = made(data, lr=1e-3, **fields), made(data, lr=1e-3, channels_last=True, **fields)
    assert any(not weight.is_contiguous() for weight in last.weights)
    begun = torch.cat([weight.detach().flatten() for weight in plain.weights])
    for one in (plain, last):
        for _ in range(4):
            one.update(10)
    moved, other = (torch.cat([w.detach().flatten() for w in one.weights]) - begun for one in (plain, last))
    assert (moved - other).norm() < 0.01 * moved.norm()


def test_exact_shards_are_the_sum_of_micro_batches(data):
    """Not the same bits, because the sum is taken elsewhere; but the same gradient."""
    shards, parts = gradient(made(data, exact_shards=4)), gradient(made(data, micro_batch=2))
    assert (shards - parts).norm() < 1e-5 * parts.norm()


def test_the_loss_by_quartile_of_t_averages_to_the_loss(data):
    one = made(data)
    row = one.update(6)
    batch = one.batches.at(0)
    t = one.key.fold("noise", 0).rows(batch.rows).fold("t").integers(20) + 1
    counts = (4 * t / 20).long().clamp(max=3).bincount(minlength=4)
    means = [row.get(f"loss_q{i}", 0.0) for i in (1, 2, 3, 4)]
    assert sum(n * mean for n, mean in zip(counts.tolist(), means, strict=True)) / 8 == pytest.approx(row["loss"])
    assert [f"loss_q{i}" in row for i in (1, 2, 3, 4)] == [bool(n) for n in counts]


def test_a_batch_fetched_ahead_is_the_batch(data):
    loader, rows = Loader(data, 8, flip=True), torch.arange(2, 6)
    ahead = Prefetched(loader, rows)
    for step in (0, 1, 2, 7, 3, 4):
        batch, expected = ahead.at(step), loader.batch(step, rows)
        assert torch.equal(batch.image, expected.image) and torch.equal(batch.index, expected.index)
        assert batch.rows.tolist() == [2, 3, 4, 5]
    assert any(thread.name.startswith("undiffuse-data") for thread in threading.enumerate())


def test_images_are_pinned_by_the_thread_that_reads_them(monkeypatch):
    """Without a card nothing can be, so that it is only seen who asks, and of what."""
    asked = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda self: asked.append((self.shape, threading.current_thread().name)) or self
    )
    loader = Loader(ArraySource(torch.zeros(4, 1, 2, 2, dtype=torch.uint8)), 2)
    Prefetched(loader, torch.arange(2)).at(0)
    assert not asked
    Prefetched(loader, torch.arange(2), pin=True).at(0)
    shape, name = asked[0]
    assert shape == (2, 1, 2, 2) and name.startswith("undiffuse-data")


def test_fetching_ahead_takes_no_processor_from_the_step():
    """A second team of OpenMP threads made a step of a small network half as slow again."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ahead = Prefetched(Loader(ArraySource(torch.zeros(4, 1, 2, 2, dtype=torch.uint8)), 2), torch.arange(2))
        assert ahead._thread.submit(torch.get_num_threads).result() == 1
        with ThreadPoolExecutor(1) as other:
            assert (torch.get_num_threads(), other.submit(torch.get_num_threads).result()) == (2, 2)
    finally:
        torch.set_num_threads(before)


class Small:
    """Stands in for a device that holds `images` of a micro-batch."""

    def __init__(self, images: int):
        self.images, self.tried = images, []

    def __call__(self, one: Trainer, batch, part: slice):
        self.tried.append(part.stop - part.start)
        if part.stop - part.start > self.images:
            raise torch.OutOfMemoryError("not enough")
        return self.real(one, batch, part)

    real = staticmethod(Trainer.loss)


@pytest.mark.slow
def test_an_automatic_micro_batch_is_found_before_step_0_and_kept(tmp_path, data, monkeypatch):
    chosen, said = recipe(train={**FLOAT, "micro_batch": "auto"}), []
    small = Small(3)
    monkeypatch.setattr(Trainer, "loss", lambda self, batch, part: small(self, batch, part))
    arguments = {"show_progress": False, "say": said.append}
    loop.train(chosen, data, tmp_path / "auto", budget=loop.Budget(steps=2), **arguments)
    assert small.tried[:3] == [8, 4, 2] and set(small.tried[3:]) == {2}
    assert "micro-batches of 2 images fit into memory" in said
    small.images = 8
    loop.train(chosen, data, tmp_path / "auto", **arguments)  # what was found stands, though more would fit now
    assert set(small.tried[3:]) == {2}
    run(recipe(train={**FLOAT, "micro_batch": 2}), data, tmp_path / "set")
    assert_equal(state(tmp_path / "auto", 6), state(tmp_path / "set", 6))
    small.images = 0
    with pytest.raises(MemoryExhausted, match="not even a micro-batch of one image fits"):
        loop.train(chosen, data, tmp_path / "none", **arguments)


def test_out_of_memory_in_a_run_says_what_to_set(tmp_path, data, monkeypatch):
    def fails(self, batch, part):
        if self.step == 3:
            raise torch.OutOfMemoryError("not enough")
        return Small.real(self, batch, part)

    monkeypatch.setattr(Trainer, "loss", fails)
    with pytest.raises(
        MemoryExhausted, match=r"at step 3 with micro-batches of 8, when [\d.]+ GB .*--set train.micro_batch=4"
    ):
        run(recipe(train=FLOAT), data, tmp_path)
    assert store.Run(tmp_path).latest() == 2
    assert MemoryExhausted.exit_code == 6


@pytest.mark.slow
def test_auto_precision_is_what_the_processor_has_and_stays_so(tmp_path, data, monkeypatch):
    for native, name in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(device, "native_bf16", lambda where, native=native: native)
        run(recipe(), data, tmp_path / name, budget=loop.Budget(steps=2))
        assert load(tmp_path / name).meta["recipe"]["train"]["precision"] == name
    monkeypatch.setattr(device, "native_bf16", lambda where: True)
    assert run(recipe(), data, tmp_path / "float32").meta["recipe"]["train"]["precision"] == "float32"


def test_previews_take_no_more_images_at_once_than_a_step_has_room_for(tmp_path, data, monkeypatch):
    real, sizes = Model.chain, []
    monkeypatch.setattr(
        Model, "chain", lambda self, keys, *a, **b: sizes.append(len(keys.rows)) or real(self, keys, *a, **b)
    )
    run(recipe(process={"steps": 4}, train={"micro_batch": 5, "steps": 1, "sample_every": 6}), data, tmp_path)
    assert sizes == [*[10] * 6, 4] * 2


def test_the_plan_is_said_before_step_0_and_once(tmp_path, data):
    said = []
    chosen = recipe(train={**FLOAT, "micro_batch": 3})
    for steps in (2, 4):
        loop.train(chosen, data, tmp_path, budget=loop.Budget(steps=steps), say=said.append, show_progress=False)
    (line,) = [line for line in said if line.startswith("batch ")]
    assert line.startswith("batch 8 = 1 process × 3 micro-batches of 3, float32; 2 steps see 16 images, 0.25 epochs.")
    assert f"resuming {tmp_path} at step 2" in said


def test_flops_of_the_paper_s_network():
    """36.3 GFLOP to train on one CIFAR-10 image by its convolutions and linear layers, a third of it forward.

    Besides those there are q k and its product with v, 2 (hw)² c each: five times at 16×16 and once at 4×4.
    """
    attention = 4 * (5 * 256**2 + 16**2) * 256
    flops = forward_flops(load_recipe("cifar10").model((3, 32, 32)))
    assert 3 * (flops - attention) == pytest.approx(36.3e9, rel=1e-3)


def test_a_loss_that_is_not_finite_is_saved_before_and_replayed(tmp_path, data, monkeypatch):
    chosen = replace(recipe(train=FLOAT), objective=Breaks())
    run(chosen, data, tmp_path, budget=loop.Budget(steps=3))
    monkeypatch.setattr(Breaks, "now", True)
    for _ in range(2):  # the same command replays it
        with pytest.raises(NotFiniteError, match="step 3: the loss is inf") as raised:
            run(chosen, data, tmp_path)
    assert "The state before this step is saved, and the same command replays it. To go on," in str(raised.value)
    assert raised.value.good == str(tmp_path / "step-000000002") and raised.value.lr == 2e-4
    named = json.loads(str(raised.value).partition("examples ")[2].partition("]")[0] + "]")
    assert sorted(named) == sorted(made(data).batches.at(3).index.tolist())
    assert store.Run(tmp_path).latest() == 3
    assert all(tensor.isfinite().all() for tensor in state(tmp_path, 3).values())
    monkeypatch.setattr(Breaks, "now", False)
    assert run(chosen, data, tmp_path).meta["step"] == 6


def test_another_environment_is_marked(tmp_path, data, capsys, monkeypatch):
    run(recipe(train=FLOAT), data, tmp_path, budget=loop.Budget(steps=2))
    real = Trainer.environment
    monkeypatch.setattr(Trainer, "environment", lambda self: {**real(self), "torch": "9.9", "threads": 64})
    run(recipe(train=FLOAT), data, tmp_path)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "resumed" in line]
    assert f"torch {torch.__version__} -> 9.9" in line and "-> 64" in line and "the numbers may differ" in line
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("exact") is False] == [2]


OTHER = {
    "batch": 4, "lr": 2e-2, "warmup": 1, "decay": "cosine", "betas": [0.8, 0.9], "clip_norm": 2.0, "ema": 0.8,
    "ema_ramp": True, "precision": "bf16", "drop_label": 0.2, "seed": 3, "micro_batch": 4, "exact_shards": 2,
    "recompute": True, "channels_last": True, "compile": True, "deterministic": True, "ema_profiles": [0.1],
    "ema_snapshot_every": 7, "optimizer": "muon",
}  # fmt: skip


def test_every_critical_field_is_refused_with_a_diff_and_every_free_one_is_not(tmp_path, data):
    """Field by field, so that a new one has to be put on one side or the other."""
    base = {**FLOAT, "ema_snapshot_every": 5}
    run(recipe(train=base), data, tmp_path, budget=loop.Budget(steps=1))
    fields = set(TrainConfig.__dataclass_fields__)
    assert fields == OTHER.keys() | FREE and not OTHER.keys() & FREE
    saved = store.Run(tmp_path).load(1)[1]
    for name in sorted(fields):
        other = OTHER.get(name, "mine" if name == "eval_features" else 3)
        changed = recipe(train={**base, name: other})
        now = {**saved, "recipe": loop.plain(changed)}
        if name in FREE:
            refuse_changes(saved, now)
        else:
            with pytest.raises(UsageError, match=rf"train\.{name}: .* -> "):
                refuse_changes(saved, now)


@pytest.mark.slow
def test_a_profile_accounts_for_the_step(tmp_path, data):
    said = []
    chosen = recipe(train={**FLOAT, "steps": 100})
    model = loop.train(chosen, data, tmp_path, say=said.append, show_progress=False, profile=True)
    assert model.meta["step"] == 25
    found = json.loads((tmp_path / "profile.json").read_text())
    parts = found["parts"]
    assert set(parts) == {"data", "noise", "forward", "backward", "clip", "optimizer", "ema", "rest", "checkpoint"}
    of_the_step = [part["ms"] for name, part in parts.items() if name != "checkpoint"]
    assert sum(of_the_step) == pytest.approx(found["milliseconds_per_step"], rel=1e-3)
    assert all(parts[name]["ms"] > 0 for name in parts if name != "rest") and found["peak_memory_mb"] > 50
    own = found["operators_ms"]
    assert len(own) == 10 and "convolution_backward" in own and sum(own.values()) < found["milliseconds_per_step"]
    assert list(own.values()) == sorted(own.values(), reverse=True)
    assert "GFLOP/s" in said[-1] and "backward" in said[-1] and "longest operators, ms a step: " in said[-1]
    assert store.Run(tmp_path).latest() == 25


def test_labels_that_are_asked_for_must_be_there(data):
    chosen = recipe(data={"labels": True})
    bare = replace(data, labels=None, classes=None)
    with pytest.raises(UsageError, match="data.labels is on, but this data has no labels"):
        Trainer(chosen, chosen.model((1, 8, 8)), bare)


def test_labels_where_there_are_any_are_said_to_be_on_or_off(tmp_path, data):
    """A checkpoint says which it was, and the run goes on as it began."""
    chosen = recipe(data={"labels": "auto"}, train={"precision": "float32"})
    for name, source, on in (("with", data, True), ("bare", replace(data, labels=None, classes=None), False)):
        for last in (2, 3):
            loop.train(chosen, source, tmp_path / name, budget=loop.Budget(steps=last), say=lambda text: None)
        _, meta = store.Run(tmp_path / name).load(3)
        assert meta["recipe"]["data"]["labels"] is on
        assert ("classes" in meta) is on and (meta["model"].get("classes") == 10) is on


@pytest.mark.parametrize("fields", [{"steps": 0}, {"images": -1}, {"minutes": 0.0}])
def test_an_empty_budget_is_refused(fields):
    (name,) = fields
    with pytest.raises(UsageError, match=f"{name} is not possible; give more than 0, or leave it out"):
        loop.Budget(**fields)
