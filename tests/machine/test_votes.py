"""Several processes and what one of them meets: a vote before the card is waited for, one kind of error in all."""

import json
import os
import sys
import time

import pytest
import torch

from tests.machine.test_dist import finish, fit, preset, start
from tests.training.test_loop import recipe
from undiffuse.errors import Corrupt, NotFiniteError, Stalled
from undiffuse.machine import dist, store
from undiffuse.training.trainer import Trainer


@pytest.fixture
def order(data, monkeypatch):
    """A trainer, and what its updates do: clip, vote, wait for the device, step."""
    chosen, done = recipe(train={"precision": "float32"}), []
    trainer = Trainer(chosen, chosen.model(data.image_shape), data)

    def noted(what, real):
        return lambda *each: done.append(what) or real(*each)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted("clip", torch.nn.utils.clip_grad_norm_))
    monkeypatch.setattr(torch.Tensor, "cpu", noted("wait", torch.Tensor.cpu))
    monkeypatch.setattr(trainer.optimizer, "step", noted("step", trainer.optimizer.step))
    return trainer, done


def test_the_vote_stands_between_what_is_queued_and_the_first_wait(order):
    trainer, done = order
    trainer.update(6, lambda: done.append("vote"))
    assert done[done.index("clip") :] == ["clip", "vote", "wait", "step"]  # times, before, are on the CPU anyway


def test_a_step_whose_vote_fails_neither_waits_nor_changes_anything(order, monkeypatch):
    """Also where nobody says what to vote on."""
    trainer, done = order
    before = [weight.detach().clone() for weight in trainer.weights]

    def votes(*own):
        raise RuntimeError("gloo: connection closed by peer")

    monkeypatch.setattr(dist, "votes", votes)
    with pytest.raises(Stalled, match="process 0 of 1 lost another one"), dist.lost():
        trainer.update(6)
    assert done[-1] == "clip" and trainer.step == 0
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.weights, strict=True))


def joined_on(monkeypatch, backend: str) -> list[str]:
    """As if processes were joined on that backend; what is done with the group."""
    done: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "backend", lambda: backend)
    monkeypatch.setattr(dist.group, "init_process_group", lambda backend, **how: done.append(backend))
    monkeypatch.setattr(dist.group, "new_group", lambda **how: None)
    monkeypatch.setattr(dist.group, "destroy_process_group", lambda: done.append("destroyed"))
    return done


@pytest.mark.parametrize("backend, after", [("gloo", ["destroyed"]), ("cpu:gloo,cuda:nccl", [])])
def test_a_group_with_nccl_is_destroyed_only_where_all_went_well(monkeypatch, backend, after):
    done = joined_on(monkeypatch, backend)
    with pytest.raises(Stalled), dist.joined():
        raise RuntimeError("NCCL: unhandled system error")
    assert done == [backend, *after]
    with dist.joined():
        pass
    assert done[-1] == "destroyed"


@pytest.mark.parametrize("is_left", [True, False])
def test_where_a_group_is_left_the_process_ends_at_once_with_all_that_it_said(monkeypatch, is_left):
    ended = []
    monkeypatch.setattr(dist.group, "is_initialized", lambda: is_left)
    monkeypatch.setattr(sys.stdout, "flush", lambda: ended.append("out"))
    monkeypatch.setattr(sys.stderr, "flush", lambda: ended.append("err"))
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(SystemExit) as left:
        dist.end(Stalled.exit_code)
    assert left.value.code == 8 and ended == (["out", "err", 8] if is_left else [])


CARD = """
import os, time, torch
from undiffuse.cli import main as cli
from undiffuse.machine import dist
init, clip, steps = dist.group.init_process_group, torch.nn.utils.clip_grad_norm_, []
dist.backend = lambda: "cpu:gloo,cuda:nccl"
dist.group.init_process_group = lambda backend, **how: init("gloo", **how)
dist.group.destroy_process_group = lambda: time.sleep(1000)
def clipped(*each):
    steps.append(clip(*each))
    if len(steps) == 4 and dist.rank() == 1:
        os._exit(9)
    if len(steps) == 4:
        torch.Tensor.cpu = lambda values: time.sleep(1000)
    return steps[-1]
torch.nn.utils.clip_grad_norm_ = clipped
cli.main()
"""


@pytest.mark.slow
def test_a_process_that_is_gone_ends_one_whose_card_would_wait_for_ever(tmp_path):
    """A pretended card: what is queued waits for the other, and so does the end of the group."""
    name = preset(tmp_path, save_every=1)
    running = start(2, "train", "digits", "--preset", name, "--out", str(tmp_path / "run"), script=CARD)
    running[1].wait(timeout=120)
    since = time.monotonic()
    ended = finish(running)
    assert time.monotonic() - since < 30
    assert [code for code, _, _ in ended] == [Stalled.exit_code, 9], ended
    said = [line for line in ended[0][2].splitlines() if line.startswith("undiffuse: ")]
    assert len(said) == 1 and "process 0 of 2 lost another one" in said[0], ended[0][2]
    run = store.Run(tmp_path / "run")
    assert run.latest() == 3 and run.load(3)[1]["health"]["good"]
    rows = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]
    assert [code for code, _, _ in fit(2, tmp_path / "run", name, "--steps", "4")] == [0, 0]


ALIKE = """
import sys
from undiffuse import errors
from undiffuse.cli import main as cli
from undiffuse.machine import dist
def run(*_, **__):
    with dist.joined():
        assert dist.votes(dist.rank() == 2, False) == [True, False]
        with dist.alike():
            pass
        with dist.alike():
            for kind, text, rank in (("NotFiniteError", "image 5 is no number", 1), ("Corrupt", "a part is cut", 2)):
                if dist.rank() == rank:
                    raise getattr(errors, kind)(text)
cli.app = run
cli.main()
"""


@pytest.mark.slow
def test_an_error_of_one_process_is_raised_by_all_alike():
    """Of two errors that of the first process which has one."""
    ended = finish(start(3, script=ALIKE))
    assert [(code, err) for code, _, err in ended] == [(3, "undiffuse: image 5 is no number\n")] * 3


NAN = """
import numpy as np
from undiffuse.cli import main as cli
from undiffuse.quality import gather
real = gather.on_cpu
def on_cpu(features):
    found = real(features)
    if len(found.pool) == 3:
        found.pool.numpy()[1] = np.nan
    return found
gather.on_cpu = on_cpu
cli.main()
"""


@pytest.mark.slow
def test_features_of_one_process_that_are_not_finite_end_all_with_code_3(tmp_path):
    """The last of two batches, which is the second process's, has three images."""
    words = ["fashion-mnist", "fashion-mnist-sample", "--features", "classifier-28", "--metric", "frechet", "--steps=2"]
    ended = finish(start(2, "eval", *words, "-n", "11", "--batch", "8", "--device", "cpu", script=NAN))
    assert [code for code, _, _ in ended] == [NotFiniteError.exit_code] * 2, ended
    said = [err.splitlines()[-1] for _, _, err in ended]
    assert said[0] == said[1] and "image 9" in said[0]


def test_alone_an_error_is_its_own():
    with pytest.raises(Corrupt) as raised, dist.alike():
        raise Corrupt("a part is cut")
    assert str(raised.value) == "a part is cut" and dist.votes(True, False) == [True, False]
