"""Several real processes over gloo: the same numbers as one, exactly where that is promised, and a clean end of all."""

import json
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import warm
from tests.training.test_loop import assert_equal, recipe, state
from undiffuse.config import to_toml
from undiffuse.data.loader import Loader
from undiffuse.data.source import open_source
from undiffuse.errors import Stalled, UsageError
from undiffuse.machine import dist, store
from undiffuse.training.plan import shares


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(
    processes: int, *arguments: str, more: dict[int, list[str]] | None = None, script: str = warm.COMMAND
) -> list[warm.Process]:
    """The same command once for each process, or `more`'s, with what torchrun would put into the environment."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    return [
        warm.Process(
            script, *(more or {}).get(rank, arguments), env={**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(processes)
    ]


def finish(running: list[warm.Process]) -> list[tuple[int, str, str]]:
    ended = [process.communicate(timeout=240) for process in running]
    return [(process.wait(), out, err) for process, (out, err) in zip(running, ended, strict=True)]


def preset(folder: Path, **train) -> str:
    chosen = recipe(train={"precision": "float32", "held_out": 0, **train})
    path = folder / f"{abs(hash(str(train)))}.toml"
    path.write_text(to_toml(chosen))
    return str(path)


def fit(processes: int, out: Path, name: str, *more: str) -> list[tuple[int, str, str]]:
    return finish(start(processes, "train", "digits", "--preset", name, "--out", str(out), *more))


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lives",
    [[(1, "2"), (2, "4"), (4, "6")], pytest.param([(4, "6")], marks=pytest.mark.long)],
    ids=["one then two then four", "four"],
)
def test_exact_shards_give_the_same_bits_for_every_number_of_processes(tmp_path, lives):
    """Also across a resume: begun by one, gone on with by two, finished by four."""
    name = preset(tmp_path, exact_shards=4, steps=6)
    for out, processes, last in (("alone", 1, "6"), *(("other", *life) for life in lives)):
        ended = fit(processes, tmp_path / out, name, "--steps", last)
        assert [code for code, _, _ in ended] == [0] * processes, ended
        assert [bool(out) for _, out, _ in ended] == [True] + [False] * (processes - 1)  # process 0 alone speaks
    assert_equal(state(tmp_path / "alone", 6), state(tmp_path / "other", 6))
    assert losses(tmp_path / "other") == losses(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_other_numbers_of_processes_differ_by_rounding_alone(tmp_path, processes):
    """Same examples, same noise: the first loss agrees to 1e-6, and after 60 steps to 1e-4, in float32."""
    name = preset(tmp_path, steps=60, save_every=60, lr=1e-3)
    no_dropout = tmp_path / "plain.toml"
    no_dropout.write_text(Path(name).read_text().replace("dropout = 0.2", "dropout = 0.0"))
    for number, out in ((1, "alone"), (processes, "many")):
        assert [code for code, _, _ in fit(number, tmp_path / out, str(no_dropout))] == [0] * number
    alone, many = losses(tmp_path / "alone"), losses(tmp_path / "many")
    assert len(alone) == 60
    assert many[0] == pytest.approx(alone[0], rel=1e-6)
    assert many == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_a_resume_with_other_processes_is_marked(tmp_path):
    name = preset(tmp_path, steps=6)
    assert fit(1, tmp_path / "run", name, "--steps", "3")[0][0] == 0
    ended = fit(2, tmp_path / "run", name)
    assert ended[0][0] == 0 and "resumed with other micro_batch 8 -> 4, processes 1 -> 2" in ended[0][2]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["exact"] for row in rows if "exact" in row] == [False]


@pytest.mark.slow
def test_one_killed_process_ends_the_others_and_the_run_goes_on(tmp_path):
    name = preset(tmp_path, steps=100_000, save_every=5)
    running = start(2, "train", "digits", "--preset", name, "--out", str(tmp_path / "run"))
    wait_for_steps(tmp_path / "run", running, 7)
    running[1].kill()
    ended = finish(running)
    assert ended[1][0] == -signal.SIGKILL
    assert ended[0][0] == Stalled.exit_code and "process 0 of 2 lost another one" in ended[0][2], ended[0][2]
    step = store.Run(tmp_path / "run").latest()
    assert step is not None and step >= 5
    assert [code for code, _, _ in fit(2, tmp_path / "run", name, "--steps", str(step + 3))] == [0, 0]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    name = preset(tmp_path, steps=100_000, save_every=100_000)
    running = start(2, "train", "digits", "--preset", name, "--out", str(tmp_path / "run"))
    wait_for_steps(tmp_path / "run", running, 4)
    running[1].send_signal(signal.SIGTERM)
    ended = finish(running)
    assert [code for code, _, _ in ended] == [143, 143]
    step = store.Run(tmp_path / "run").latest()
    assert f"stopped after step {step}" in ended[0][2] and f"SIGTERM: stopped after step {step}" in ended[1][2]


@pytest.mark.slow
def test_a_signal_to_one_process_of_a_profile_ends_that_one_alone(tmp_path):
    """The profile is written all the same, and process 0 comes to its end."""
    words = ["train", "digits", "--preset", preset(tmp_path, steps=100), "--out", str(tmp_path / "run"), "--profile"]
    running = start(2, *words, script=f"from undiffuse.training import profile\nprofile.STEPS = 4\n{warm.COMMAND}")
    while not (tmp_path / "run" / "config.toml").exists():
        assert all(process.poll() is None for process in running)
        time.sleep(0.02)
    running[1].send_signal(signal.SIGTERM)
    ended = finish(running)
    assert [code for code, _, _ in ended] == [0, 143], ended
    assert "SIGTERM: stopped after the profile" in ended[1][2] and (tmp_path / "run" / "profile.json").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_before_the_update(tmp_path):
    name = preset(tmp_path, lr=1e30, save_every=100)
    ended = fit(2, tmp_path / "run", name)
    assert [code for code, _, _ in ended] == [3, 3], ended
    assert all("so the weights were not updated; examples [" in err for _, _, err in ended)
    run = store.Run(tmp_path / "run")
    (step,) = run.steps()
    assert f"step {step}: the loss is" in ended[0][2]
    assert all(tensor.isfinite().all() for file in run.load(step)[0].values() for tensor in file.values())
    assert [code for code, _, _ in fit(2, tmp_path / "run", name)] == [3, 3]  # the same command replays the step
    assert run.steps() == [step]


@pytest.mark.slow
def test_processes_with_other_settings_are_refused(tmp_path):
    """Also such as give it another network, which would break the first sum."""
    words = ("train", "digits", "--out", str(tmp_path / "run"), "--preset", preset(tmp_path))
    for other in ("train.lr=1e-4", "network.channels=16", "train.precision='auto'", "train.exact_shards=4"):
        ended = finish(start(2, *words, more={1: [*words, "--set", other]}))
        assert [code for code, _, _ in ended] == [2, 2], (other, ended)
        assert all("the 2 processes do not have the same settings" in err for _, _, err in ended)
    ended = finish(start(2, *words, more={1: [*words, "--set", "data.channels=3"]}))
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert all("the 2 processes do not have the same data" in err for _, _, err in ended)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_layout_of_the_weights_is_shared_and_summed_exactly(tmp_path):
    name = preset(tmp_path, exact_shards=2, channels_last=True, steps=4, lr=1e-3)
    assert fit(1, tmp_path / "1", name)[0][0] == 0
    for processes, last in ((2, "2"), (1, "3"), (2, "4")):
        ended = fit(processes, tmp_path / "mixed", name, "--steps", last)
        assert [code for code, _, _ in ended] == [0] * processes, ended
    assert_equal(state(tmp_path / "1", 4), state(tmp_path / "mixed", 4))


BAD_ROW = """
from undiffuse.cli import main as cli
from undiffuse.training import trainer
real = trainer.Trainer.loss
def loss(self, batch, part):
    loss, t = real(self, batch, part)
    return (loss / (batch.rows[part] != 6).float() if self.step == 3 else loss), t
trainer.Trainer.loss = loss
cli.main()
"""


@pytest.mark.slow
def test_an_example_of_one_process_is_named_by_all(tmp_path):
    """Row 6 of the batch of step 3, which process 1 has, is not finite: both name it, and what replays it."""
    name = preset(tmp_path, save_every=100)
    words = ["train", "digits", "--preset", name, "--out", str(tmp_path / "run")]
    ended = finish(start(2, *words, script=BAD_ROW))
    assert [code for code, _, _ in ended] == [3, 3], ended
    whole = recipe()
    index = Loader(open_source("digits"), whole.train.batch, whole.train.seed).batch(3).index[6]
    for _, _, err in ended:
        assert "step 3: the loss is inf and the gradient norm" in err and f"examples [{index}]." in err
        assert "the same command replays it" in err
        again = f"undiffuse train digits --preset {name} --set train.lr=0.0002 --out {tmp_path / 'run-2'}"
        assert err.splitlines()[-1].endswith(f": {again}")
    assert store.Run(tmp_path / "run").steps() == [3]


SLOW_SAVE = """
import time
from undiffuse.cli import main as cli
from undiffuse.machine import store
real = store.Run.save
def save(self, *what):
    time.sleep(2)
    return real(self, *what)
store.Run.save = save
cli.main()
"""
TORCHRUN = """
import os
from torch.distributed import run
os.setsid()
run.main()
"""


@pytest.mark.slow
def test_a_signal_to_torchrun_and_all_its_processes_saves(tmp_path):
    """As service managers send it: the processes get it twice, and torchrun ends process 0 once the other has ended."""
    (tmp_path / "slow.py").write_text(SLOW_SAVE)
    name = preset(tmp_path, steps=100_000, save_every=100_000)
    launch = ["--standalone", "--nproc-per-node", "2", str(tmp_path / "slow.py")]
    words = ["train", "digits", "--preset", name, "--out", str(tmp_path / "run")]
    running = warm.Process(TORCHRUN, *launch, *words, env={"PYTHONPATH": os.getcwd()})
    wait_for_steps(tmp_path / "run", [running], 4)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    assert len(children) >= 2
    for process in (*children, running.pid):
        os.kill(int(process), signal.SIGTERM)
    _, errors = running.communicate(timeout=120)
    step = store.Run(tmp_path / "run").latest()
    assert step is not None and f"SIGTERM: stopped after step {step}, which is saved" in errors, errors


SLOW_LOOK = """
import datetime, time
from undiffuse.cli import main as cli
from undiffuse.machine import dist
from undiffuse.training import trainer
dist.PATIENCE = datetime.timedelta(seconds=6)
dist.joined.__wrapped__.__defaults__ = (dist.PATIENCE,)
real = trainer.Model.chain
def chain(self, *what, progress):
    return real(self, *what, progress=lambda n: (time.sleep(0.03 * (self.meta["step"] == 2)), progress(n)))
trainer.Model.chain = chain
cli.main()
"""


@pytest.mark.slow
def test_previews_may_take_longer_than_a_sum_waits(tmp_path):
    """Two grids of 8 parts of 20 steps of 0.03 s, where a process is given up after 6 s."""
    name = preset(tmp_path, steps=3, held_out=16)
    words = ["train", "digits", "--preset", name, "--out", str(tmp_path / "run"), "--set", "train.sample_every=2"]
    ended = finish(start(2, *words, script=SLOW_LOOK))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert (tmp_path / "run" / "samples" / "step-000000002.png").exists()
    assert "held_out" in (tmp_path / "run" / "log.jsonl").read_text()


HANG = """
import time
from undiffuse.cli import main as cli
from undiffuse.machine import dist, watch
from undiffuse.training import trainer
watch.PATIENCE = 3.0
real = trainer.Trainer.update
def update(self, last, *vote):
    while self.step == 3 and dist.rank() == 1:
        time.sleep(1)
    return real(self, last, *vote)
trainer.Trainer.update = update
cli.main()
"""


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run(tmp_path):
    """By the watchdog of process 0, which waits for it in a sum; torchrun then ends the one that hangs."""
    words = ["train", "digits", "--preset", preset(tmp_path, save_every=1), "--out", str(tmp_path / "run")]
    running = start(2, *words, script=HANG)
    try:
        _, err = running[0].communicate(timeout=120)
        assert running[0].returncode == Stalled.exit_code and "nothing has moved for" in err, err
        assert running[1].poll() is None  # it did hang
        assert store.Run(tmp_path / "run").latest() == 3 and (tmp_path / "run" / "stacks-0.txt").exists()
    finally:
        running[1].kill()
        finish(running[1:])


@pytest.mark.slow
def test_what_process_0_refuses_ends_all(tmp_path):
    name = preset(tmp_path, steps=4)
    with store.Run(tmp_path / "run").lock():
        ended = fit(2, tmp_path / "run", name)
    assert [code for code, _, _ in ended] == [7, 8]
    assert "is in use by process" in ended[0][2] and "process 0 could not begin" in ended[1][2]
    ended = fit(3, tmp_path / "other", name)
    assert [code for code, _, _ in ended] == [2] * 3
    assert "a batch of 8 images cannot be divided over 3 processes; 1, 2, 4, 8 of them would do" in ended[0][2]


@pytest.mark.slow
def test_drawing_and_measuring_are_divided_and_give_the_same(tmp_path):
    """The same batches, in turns: so the same bits, whoever works on which."""
    name = preset(tmp_path, steps=2)
    fit(1, tmp_path / "run", name)
    for processes in (1, 3):
        out = tmp_path / str(processes)
        drawn = finish(start(processes, "sample", str(tmp_path / "run"), "-n", "7", "--batch", "2", "--out", str(out)))
        assert [code for code, _, _ in drawn] == [0] * processes, drawn
        for more in ([], ["--draws", "3"], ["--ode", "--tolerance", "0.01"]):
            words = ["nll", str(tmp_path / "run"), "digits", "-n", "7", "--batch", "2", *more, "--json"]
            folder = ["--out", str(out / f"nll{len(more)}")]
            measured = finish(start(processes, *words, *folder))
            assert [code for code, _, _ in measured] == [0] * processes, measured
            assert [bool(text) for _, text, _ in measured] == [True] + [False] * (processes - 1)
            (out / f"{len(more)}.json").write_text(json.dumps({**json.loads(measured[0][1]), "out": None}))
    places = ["--out", str(tmp_path / "few"), "--npz", str(tmp_path / "x.npz")]
    few = finish(start(3, "sample", str(tmp_path / "run"), "-n", "7", *places))  # in batches that each has one of
    assert [code for code, _, _ in few] == [0] * 3 and len(np.load(tmp_path / "x.npz")["arr_0"]) == 7, few
    assert len(list((tmp_path / "few").glob("*.png"))) == 8
    alone, together = tmp_path / "1", tmp_path / "3"
    pictures = sorted(path.name for path in alone.glob("*.png"))
    assert len(pictures) == 8  # and their grid
    for file in [*pictures, "0.json", "2.json", "3.json", "nll0/terms.tsv"]:
        assert (alone / file).read_bytes() == (together / file).read_bytes(), file


def wait_for_steps(out: Path, running: Sequence[warm.Process], lines: int) -> None:
    log, deadline = out / "log.jsonl", time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n") >= lines):
        assert all(process.poll() is None for process in running) and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("processes, fields, expected", [
    (1, {}, (8, 8)), (2, {}, (4, 4)), (4, {"micro_batch": 8}, (2, 2)), (2, {"micro_batch": 3}, (4, 3)),
    (2, {"exact_shards": 4}, (4, 2)), (1, {"exact_shards": 8}, (8, 1)),
])  # fmt: skip
def test_shares(monkeypatch, processes, fields, expected):
    monkeypatch.setattr(dist, "size", lambda: processes)
    assert shares(recipe(train=fields).train) == expected


@pytest.mark.parametrize("processes, fields, text", [
    (3, {}, "8 images cannot be divided over 3 processes; 1, 2, 4, 8 of them would do"),
    (4, {"exact_shards": 2}, "8 images in 2 exact shards cannot be divided over 4 processes; 1, 2 of them would do"),
    (1, {"exact_shards": 3}, "8 images cannot be divided into 3 exact shards; set a train.batch of which 3"),
    (2, {"exact_shards": 4, "micro_batch": 4}, "exact_shards = 4 makes micro-batches of 2; leave train.micro_batch"),
])  # fmt: skip
def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch, processes, fields, text):
    monkeypatch.setattr(dist, "size", lambda: processes)
    with pytest.raises(UsageError, match=text):
        shares(recipe(train=fields).train)


def test_alone_nothing_is_joined():
    assert (dist.rank(), dist.size(), dist.decide(7)) == (0, 1, 7)
    with dist.joined():
        assert not torch.distributed.is_initialized()
    parts = [torch.tensor([1e8]), torch.tensor([-1e8]), torch.tensor([1.0])]
    assert dist.ordered_total(parts).item() == 1.0  # one after the other, from the left
    assert dist.ordered_total([parts[0], parts[2], parts[1]]).item() == 0.0


def test_only_a_broken_connection_is_turned_into_a_line():
    with pytest.raises(
        Stalled, match="lost another one .gloo: connection closed by peer.; the last checkpoint is good"
    ):
        with dist.lost():
            raise RuntimeError("gloo: connection closed by peer\nmore")
    with pytest.raises(RuntimeError, match="shapes"), dist.lost():
        raise RuntimeError("shapes do not fit")
