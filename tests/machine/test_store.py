"""What a checkpoint is, who may write it, what is kept, and that damage in any bit is seen."""

import os
import signal
import socket
import time

import pytest
import torch

from undiffuse.errors import Corrupt, Locked, StorageError, UsageError
from undiffuse.machine import disk, store, tensorfile
from undiffuse.machine.store import Run, locate
from undiffuse.machine.tensorfile import read_weights, write_weights


def state(step):
    return {"model": {"w": torch.full((2,), float(step))}}


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """What sync is good for is asked in reliability/test_crash.py; here it would only be slow."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


@pytest.fixture
def run(tmp_path):
    """Steps 100, 200 and 300."""
    run = Run(tmp_path / "run")
    with run.lock():
        for step in (100, 200, 300):
            run.save(step, state(step), {"step": step})
    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip(path, byte=-1, bit=0):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def test_tensors_and_meta_come_back_bit_for_bit(tmp_path):
    given = {
        "model": {
            "strided": torch.arange(12.0).reshape(3, 4).T,
            "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "bfloat16": torch.tensor([1.0, -0.0, float("nan"), 3e38]).bfloat16(),
            "expanded": torch.ones(1, 2).expand(3, 2),
            "parameter": torch.nn.Parameter(torch.randn(2)),
        },
        "adam": {"step/a.b": torch.tensor(7.0), "empty": torch.zeros(0, 3), "flag": torch.tensor([True, False])},
        "nothing": {},
    }
    meta = {"format": 1, "name": "ümläut", "image": [1, 28, 28], "loss": 0.1 + 0.2, "none": None, "clip": 1e308}
    run = Run(tmp_path / "run")
    with run.lock():
        folder = run.save(7, given, meta)
    assert folder == run.path / "step-000000007"
    assert names(folder) == [
        "adam.safetensors",
        "manifest.json",
        "meta.json",
        "model.safetensors",
        "nothing.safetensors",
    ]
    loaded, found = Run(run.path).load(7)
    assert found == meta and loaded.keys() == given.keys()
    for name, part in given.items():
        assert part.keys() == loaded[name].keys()
        for key, tensor in part.items():
            other = loaded[name][key]
            assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
            assert (
                tensor.detach().contiguous().numpy(force=True).tobytes() == other.numpy().tobytes()
                if (tensor.dtype != torch.bfloat16)
                else torch.equal(tensor.view(torch.int16), other.view(torch.int16))
            )
    loaded["adam"]["step/a.b"].add_(1)  # memory of its own, to be trained on


def test_every_file_of_a_checkpoint_is_synced_then_its_folder_then_the_run_s(run, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    with run.lock():
        folder = run.save(400, {**state(400), "ema": state(400)["model"]}, {})
    order = [run.path, *(folder / f"{name}.safetensors" for name in ("model", "ema")), folder / "meta.json",
             folder / "manifest.json", folder, run.path]  # fmt: skip
    assert synced == [path.stat().st_ino for path in order]


def test_only_some_files_can_be_asked_for(tmp_path):
    run = Run(tmp_path / "run")
    with run.lock():
        run.save(1, {"model": {"w": torch.ones(2)}, "adam": {"m": torch.ones(2)}}, {"a": 1})
    (run.folder(1) / "adam.safetensors").unlink()
    tensors, meta = run.load(1, only=("model",))
    assert list(tensors) == ["model"] and meta == {"a": 1}
    with pytest.raises(Corrupt, match=r"adam\.safetensors cannot be read"):
        run.load(1)


def test_reading_creates_nothing(tmp_path):
    run = Run(tmp_path / "run")
    assert run.steps() == [] and run.latest() is None
    with pytest.raises(UsageError, match="run holds no checkpoint; give a run folder, or one checkpoint in it"):
        locate(run.path)
    assert names(tmp_path) == []


def test_a_path_means_a_checkpoint_or_the_newest(run, monkeypatch):
    def found(path):
        there, step = locate(path)
        return there.load(step)[1]["step"]

    assert found(run.path) == 300
    assert found(run.folder(100)) == 100
    monkeypatch.chdir(run.folder(200))
    assert found(run.path.__class__(".")) == 200
    (run.path / "best").symlink_to(run.folder(100))
    assert found(run.path / "best") == 100


def test_writing_needs_the_lock(run):
    with pytest.raises(AssertionError, match="save needs the lock"):
        run.save(400, state(400), {})
    with pytest.raises(AssertionError, match="retain needs the lock"):
        run.retain(2)
    assert run.steps() == [100, 200, 300]


def test_order_is_by_number_and_not_by_clock(run):
    """Row 23."""
    with run.lock():
        run.save(1_000_000_000, state(1), {})
        run.save(20_000_000_000, state(2), {})
    for year, step in ((1970, 20_000_000_000), (2096, 100)):
        seconds = (year - 1970) * 31_557_600
        for path in (run.folder(step), *run.folder(step).iterdir()):
            os.utime(path, (seconds, seconds))
    assert run.steps() == [100, 200, 300, 1_000_000_000, 20_000_000_000]
    assert run.latest() == 20_000_000_000


def test_names_that_are_not_ours_are_not_steps(run):
    for name in ("step-400", "step-0000000500", "step-000000600x", ".bad-0123456789ab-step-000000700"):
        (run.path / name).mkdir()
    (run.path / "step-000000800").write_bytes(b"a file")
    assert run.steps() == [100, 200, 300]
    with run.lock():
        run.save(800, state(800), {})
    assert run.latest() == 800
    assert [path.read_bytes() for path in run.path.glob(".bad-*-step-000000800")] == [b"a file"]


def test_a_good_checkpoint_is_never_replaced(run):
    before = (run.folder(300) / "model.safetensors").read_bytes()
    with run.lock():
        assert run.save(300, state(-1), {}) == run.folder(300)
    assert (run.folder(300) / "model.safetensors").read_bytes() == before


def test_a_damaged_one_is_set_aside_and_replaced(run):
    """Row 7."""
    flip(run.folder(300) / "model.safetensors")
    damaged = (run.folder(300) / "model.safetensors").read_bytes()
    with run.lock():
        assert run.latest(lambda text: None) == 200
        run.save(300, state(300), {"again": True})
    assert run.load(300)[1] == {"again": True}
    (aside,) = run.path.glob(".bad-*")
    assert (aside / "model.safetensors").read_bytes() == damaged


def test_every_bit_and_every_length_of_every_file(run):
    """Row 6. Whatever differs from what was written is found, and the file named."""
    cases = 0
    for path in sorted(run.folder(300).iterdir()):
        whole = path.read_bytes()
        bits = [
            whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :] for i in range(len(whole)) for bit in range(8)
        ]
        for data in [*bits, *(whole[:length] for length in range(len(whole))), whole + b"\0", whole + b"\n"]:
            path.write_bytes(data)
            with pytest.raises(Corrupt, match=f"{path} is damaged"):
                run.verify(300)
            cases += 1
        with pytest.raises(Corrupt):
            run.load(300)
        path.unlink()
        with pytest.raises(Corrupt, match=f"{path} cannot be read: No such file or directory; restore it from a copy"):
            run.verify(300)
        path.write_bytes(whole)
    run.verify(300)
    assert cases > 4000


@pytest.mark.parametrize("name", ["manifest.json", "meta.json", "model.safetensors"])
def test_the_one_before_takes_its_place(run, name):
    flip(run.folder(300) / name)
    told = []
    assert run.latest(told.append) == 200
    assert len(told) == 1 and told[0].startswith(f"step 300 is passed over: {run.folder(300) / name} is damaged")


def test_none_good_is_no_fresh_start(run, capsys):
    for step in run.steps():
        flip(run.folder(step) / "meta.json")
    with pytest.raises(
        Corrupt, match=r"no checkpoint in .*run is good\. .*step-000000300/meta\.json is damaged"
    ) as caught:
        run.latest()
    assert caught.value.exit_code == 5
    assert capsys.readouterr().err.count("is passed over") == 3


def test_a_checkpoint_under_another_name(run):
    run.folder(300).rename(run.folder(400))
    with pytest.raises(Corrupt, match=r"step-000000400/manifest\.json is damaged: it belongs to step 300"):
        run.verify(400)


def test_a_newer_format_is_refused_and_not_passed_over(run, tmp_path, monkeypatch):
    for module in (store, tensorfile):
        monkeypatch.setattr(module, "FORMAT", 2)
    with run.lock():
        run.save(400, state(400), {})
    write_weights(tmp_path / "a.safetensors", state(1)["model"], {})
    monkeypatch.undo()
    message = "has format 2, and this undiffuse reads up to 1; upgrade undiffuse"
    with pytest.raises(UsageError, match=message):
        run.latest()
    with run.lock(), pytest.raises(UsageError, match=message):
        run.save(400, state(400), {})
    with pytest.raises(UsageError, match=message):
        read_weights(tmp_path / "a.safetensors")
    assert names(run.path) == ["lock", *(f"step-000000{step}" for step in (100, 200, 300, 400))]


@pytest.mark.parametrize(
    ("keep", "also", "left"),
    [
        (0, None, [400, 500]),
        (2, None, [400, 500]),
        (3, None, [300, 400, 500]),
        (9, None, [100, 200, 300, 400, 500]),
        (2, 100, [100, 400, 500]),
        (2, 500, [400, 500]),  # one of the newest is no reason to keep one more
        (3, 400, [300, 400, 500]),
    ],
)
def test_retention_keeps_the_newest_and_one_more(run, keep, also, left):
    with run.lock():
        for step in (400, 500):
            run.save(step, state(step), {})
        run.retain(keep, also)
    assert run.steps() == left
    assert names(run.path) == ["lock", *(f"step-{step:09d}" for step in run.steps())]


def test_retention_counts_good_ones_only(run):
    """Row 9: the newest two that are verified stay, however many damaged ones are newer."""
    with run.lock():
        for step in (400, 500):
            run.save(step, state(step), {})
        flip(run.folder(500) / "meta.json")
        flip(run.folder(300) / "meta.json")
        run.retain(2)
    assert run.steps() == [200, 300, 400, 500]


def test_what_is_not_ours_is_never_deleted(run):
    for place in (run.path, run.folder(100), run.path / "step-50", run.path / ".tmp-mine", run.path / ".trash-x"):
        place.mkdir(exist_ok=True)
        (place / "notes.txt").write_text("keep")
    before = set(run.path.rglob("notes.txt"))
    with run.lock():
        for step in (400, 500):
            run.save(step, state(step), {})
        run.retain(2)
    assert run.steps() == [100, 400, 500]
    assert set(run.path.rglob("notes.txt")) == before and len(before) == 5


def test_leftovers_are_swept_under_the_lock_only(run):
    for folder, name in ((".", "config.toml"), ("samples", "a.png"), ("ema", "step-000000500-0.1.safetensors")):
        (run.path / folder).mkdir(exist_ok=True)
        (run.path / folder / f".tmp-0123456789ab-{name}").write_bytes(b"half")
    before = names(run.path)
    assert run.latest() == 300 and names(run.path) == before
    with run.lock():
        assert names(run.path) == ["ema", "lock", "samples", *(f"step-000000{step}" for step in (100, 200, 300))]
        assert names(run.path / "samples") == names(run.path / "ema") == []


def test_a_second_writer_is_told_who_the_first_is(run):
    """Row 22."""
    with run.lock():
        started = time.monotonic()
        expected = (
            f"run is in use by process {os.getpid()} on {socket.gethostname()}; wait for its end, or give another"
        )
        with pytest.raises(Locked, match=expected) as caught:
            with Run(run.path).lock():
                pytest.fail("two writers")
        assert caught.value.exit_code == 7 and time.monotonic() - started < 1
        assert Run(run.path).latest() == 300  # readers may read
        run.save(400, state(400), {})
    with Run(run.path).lock() as other:
        other.save(500, state(500), {})
    assert run.latest() == 500


def test_a_failed_start_lets_go(run, monkeypatch):
    (run.path / ".tmp-0123456789ab-a").write_bytes(b"half")

    def hook(change, path, detail=None):
        if change == "unlink":
            raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "hook", hook)
        with pytest.raises(StorageError, match="lock cannot be written: Read-only file system"):
            with run.lock():
                pytest.fail("locked")
    with run.lock():
        pass


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_holder_lets_go_even_if_its_worker_lives(run):
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        with run.lock():
            worker = os.fork()
            if worker == 0:
                assert not run._held
                signal.pause()
            os.write(writer, worker.to_bytes(4, "little"))
            signal.pause()
    worker = int.from_bytes(os.read(reader, 4), "little")
    time.sleep(0.1)
    with pytest.raises(Locked, match=f"in use by process {holder} on"):
        with run.lock():
            pytest.fail("two writers")
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    try:
        os.kill(worker, 0)  # it lives
        with run.lock():
            run.save(400, state(400), {})
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reader)
        os.close(writer)
