"""A run that chooses t by its losses: its table is state, resumed exactly and the same in every process."""

import json

import pytest
import torch

from tests.machine.test_dist import fit
from tests.training.test_loop import assert_equal, recipe, run, state
from undiffuse.config import to_toml
from undiffuse.errors import NotFiniteError
from undiffuse.machine import store
from undiffuse.training import loop
from undiffuse.training.trainer import Trainer

SEEN = {"objective": {"name": "simple", "density": {"name": "importance", "history": 2}}, "process": {"steps": 4}}


@pytest.fixture
def chosen():
    return recipe(**SEEN, train={"precision": "float32", "lr": 1e-3, "batch": 16})


def test_resume_is_exact_with_the_table(tmp_path, data, chosen):
    """Warm from the second step on, so that each of the last steps takes its t by losses from before the break."""
    run(chosen, data, tmp_path / "whole")
    for last in (3, 6):
        run(chosen, data, tmp_path / "parts", budget=loop.Budget(steps=last))
    whole, parts = state(tmp_path / "whole", 6), state(tmp_path / "parts", 6)
    assert_equal(whole, parts)
    assert int(whole["seen/count"].sum()) == 6 * 16 and whole["seen/losses"].shape == (4, 2)
    early = state(tmp_path / "parts", 4)
    assert int(early["seen/count"].min()) >= 2 and not torch.equal(early["seen/losses"], whole["seen/losses"])


def test_the_table_is_what_decides(tmp_path, data, chosen):
    """Another table, the same keys: another loss. So what a checkpoint left out would not go unnoticed."""
    one, two = (Trainer(chosen, chosen.model((1, 8, 8)), data) for _ in range(2))
    two.seen.losses.copy_(torch.tensor([9.0, 1.0, 1.0, 1.0])[:, None])
    two.seen.count.fill_(2)
    batch = one.batches.at(0)
    (_, t), (weighted, chosen_t) = (each.loss(batch, slice(0, 16)) for each in (one, two))
    assert int((chosen_t == 0.25).sum()) > 8 > int((t == 0.25).sum())
    again, _ = two.loss(batch, slice(0, 16))
    assert torch.equal(weighted, again)


def test_what_is_noted_is_the_loss_without_its_factor(data, chosen):
    one = Trainer(chosen, chosen.model((1, 8, 8)), data)
    one.seen.losses.copy_(torch.tensor([9.0, 1.0, 1.0, 1.0])[:, None])
    one.seen.count.fill_(2)
    torch.manual_seed(one.key.fold("dropout", 0, 0).integer())
    weighted, t = (each.detach() for each in one.loss(one.batches.at(0), slice(0, 16)))
    noted = (weighted / one.seen.density().weight(chosen.process, t)).float()
    before = one.seen.losses.clone()
    row = one.update(6)
    assert len(noted[t == 0.25]) > 2
    for step in range(4):
        expected = before[step].tolist()
        for k, each in enumerate(noted[t == (step + 1) / 4].tolist()):
            expected[k % 2] = each
        assert one.seen.losses[step].tolist() == pytest.approx(expected, rel=1e-6)
    assert row["loss"] == pytest.approx(float(weighted.mean()), rel=1e-6)
    assert row["loss_q2"] == pytest.approx(float(noted[t == 0.25].mean()), rel=1e-5)  # ¼ is in the second quarter


def test_a_step_that_is_refused_leaves_the_table(data, chosen):
    one = Trainer(chosen, chosen.model((1, 8, 8)), data)
    with torch.no_grad():
        one.weights[0].fill_(float("nan"))
    with pytest.raises(NotFiniteError):
        one.update(6)
    assert int(one.seen.count.sum()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("shards", [None, 2])
def test_two_processes_have_one_table(tmp_path, chosen, shards):
    """To the bit what one has with exact shards; else as the rounding of gradients leaves it."""
    shard = {} if shards is None else {"exact_shards": shards}
    path = tmp_path / "preset.toml"
    path.write_text(
        to_toml(
            recipe(
                **SEEN,
                network={"dropout": 0.0},
                train={"precision": "float32", "lr": 1e-3, "batch": 16, "held_out": 0, **shard},
            )
        )
    )
    for processes, out in ((1, "one"), (2, "two")):
        ended = fit(processes, tmp_path / out, str(path), "--steps", "3")
        assert [code for code, _, _ in ended] == [0] * processes, ended
    for out, last in (("one", "6"), ("two", "6")):  # each goes on with the other's number
        ended = fit(2 if out == "one" else 1, tmp_path / out, str(path), "--steps", last)
        assert all(code == 0 for code, _, _ in ended), ended
    one, two = state(tmp_path / "one", 6), state(tmp_path / "two", 6)
    assert torch.equal(one["seen/count"], two["seen/count"]) and int(one["seen/count"].sum()) == 6 * 16
    if shards:
        assert_equal(one, two)
    torch.testing.assert_close(one["seen/losses"], two["seen/losses"], rtol=1e-4, atol=0)
    rows = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "loss" in row]) == 6 and store.Run(tmp_path / "two").latest() == 6
