"""Kill −9, power loss, a failing and a full disk, each at every single change that a save makes."""

import errno
import os
import resource
import shutil
import signal
import warnings

import pytest
import torch

from undiffuse.errors import Error, StorageError
from undiffuse.machine import disk
from undiffuse.machine.store import LEFTOVER, Run


def state(step):
    return {
        "model": {"w": torch.full((2, 3), float(step)), "b": torch.tensor(step)},
        "adam": {"m": torch.arange(4.0) * step},
    }


def silent(text):
    pass


def save(run, *steps):
    for step in steps:
        run.save(step, state(step), {"step": step})


def assert_holds(run, step):
    tensors, meta = run.load(step)
    assert meta == {"step": step}
    for name, part in state(step).items():
        assert part.keys() == tensors[name].keys()
        assert all(torch.equal(part[key], tensors[name][key]) for key in part)


def good(run):
    return [step for step in run.steps() if run._is_good(step)]


def leftovers(run):
    return [path.name for path in run.path.rglob("*") if LEFTOVER.fullmatch(path.name)]


def fork(body):
    """Runs `body` in a child; returns its wait status. The child ends there, whatever happens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and threads that the child does not use
        child = os.fork()
    if child == 0:
        try:
            os._exit(body() or 0)
        except Error as error:
            os._exit(error.exit_code)
        finally:
            os._exit(99)
    return os.waitpid(child, 0)[1]


@pytest.fixture
def small_writes(monkeypatch):
    """Files of a few hundred bytes are then written in several pieces, and so can be torn."""
    monkeypatch.setattr(disk, "CHUNK", 150)


@pytest.fixture
def no_sync(monkeypatch):
    """A kill does not reach what the system holds, so waiting for the disk would only make the tests slow."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


@pytest.fixture
def worn(tmp_path, small_writes, no_sync):
    """A run with all that a save may meet: a damaged newest step, leftovers of a kill, and a stranger's folder."""
    run = Run(tmp_path / "worn")
    with run.lock():
        save(run, 1, 2, 3, 4)
    (run.folder(4) / "meta.json").write_bytes(b"torn")
    (run.path / ".tmp-0123456789ab-step-000000007").mkdir()
    (run.path / ".tmp-0123456789ab-step-000000007" / "model.safetensors").write_bytes(b"half")
    (run.path / ".trash-0123456789ab-step-000000000").mkdir()
    (run.path / "step-5-of-mine").mkdir()
    (run.path / "step-5-of-mine" / "notes.txt").write_text("keep me")
    return run


def life(run, report):
    """What a trainer does between two deaths; `report` is told of each step once it is committed."""
    with run.lock():
        assert run.latest(silent) == 3
        for step in (4, 5):
            save(run, step)
            report(step)
        run.retain(2)


def test_kill_9_at_every_change(worn, tmp_path):
    """Row 2: at 100 % of the crash points the newest committed checkpoint loads, and the next run is not hindered."""
    point = 0
    while True:
        run = Run(tmp_path / f"at-{point}")
        shutil.copytree(worn.path, run.path)
        reader, writer = os.pipe()

        def body(run=run, writer=writer, left=point):
            def hook(change, path, detail=None):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

            disk.hook = hook
            life(run, lambda step: os.write(writer, bytes([step])))

        status = fork(body)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            committed = max(pipe.read(), default=3)
        newest = run.latest(silent)
        assert newest is not None and newest >= committed, point
        assert_holds(run, newest)
        assert len(good(run)) >= 2, point
        with run.lock():
            assert leftovers(run) == []
            save(run, newest + 1)
            run.retain(2)
        assert_holds(run, newest + 1)
        assert good(run)[-2:] == [newest, newest + 1]
        assert (run.path / "step-5-of-mine" / "notes.txt").read_text() == "keep me"
        shutil.rmtree(run.path)
        if not os.WIFSIGNALED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        point += 1
    assert os.WEXITSTATUS(status) == 0 and committed == 5
    assert point > 60  # as many kills as there are changes, so all of them were reached


def test_failure_at_every_change_of_a_save(worn, tmp_path, monkeypatch):
    """Row 5: never swallowed, exit 4, the older checkpoints as they were, our own bytes freed."""
    point, real = 0, disk.hook
    while True:
        run = Run(tmp_path / f"at-{point}")
        shutil.copytree(worn.path, run.path)
        with run.lock():
            before = {path: path.read_bytes() for step in (1, 2, 3) for path in run.folder(step).iterdir()}
            left = point

            def hook(change, path, detail=None):
                nonlocal left
                left -= 1
                if left == -1:
                    raise OSError(errno.EIO, "Input/output error")

            monkeypatch.setattr(disk, "hook", hook)
            try:
                save(run, 4)
                break
            except StorageError as error:
                assert error.exit_code == 4
                assert "step-000000004 cannot be written: Input/output error" in str(error)
            finally:
                monkeypatch.setattr(disk, "hook", real)
            assert left < 0
            assert leftovers(run) == []
            assert before == {path: path.read_bytes() for path in before}
            save(run, 4)
            assert_holds(run, 4)
        shutil.rmtree(run.path)
        point += 1
    assert point > 20 and left >= 0


class Node:
    """A file or folder twice: as programs see it, and as it would be after a power cut."""

    def __init__(self, empty):
        self.live, self.durable = empty, empty.copy() if isinstance(empty, dict) else empty

    def sync(self):
        self.durable = self.live.copy() if isinstance(self.live, dict) else self.live


class Platter:
    """What is on a disk that was given these changes: data and names that were not synced may be lost."""

    def __init__(self, root, changes):
        self.root, self.nodes = root, Node({})
        for change in changes:
            self.apply(*change)

    def find(self, path):
        node = self.nodes
        for part in path.relative_to(self.root).parts:
            node = node.live[part]
        return node

    def apply(self, change, path, detail):
        if change in ("mkdir", "create"):
            self.find(path.parent).live[path.name] = Node({} if change == "mkdir" else b"")
        elif change == "write":
            self.find(path).live += detail
        elif change == "sync":
            self.find(path).sync()
        elif change != "returned":
            node = self.find(path.parent).live.pop(path.name)
            if change == "rename":
                self.find(detail.parent).live[detail.name] = node

    def folders(self, node=None):
        """All folders, below each other."""
        node = node or self.nodes
        below = [child for child in node.live.values() if isinstance(child.live, dict)]
        return [node, *(each for child in below for each in self.folders(child))]

    def left(self, durable, node=None):
        """What is left: of data what was synced, of names the durable ones in these folders, in others the live ones.

        The system may write out the names of any folder before it is asked to, and of none.
        """
        node = node or self.nodes
        if not isinstance(node.live, dict):
            return node.durable
        names = node.durable if node in durable else node.live
        return {name: self.left(durable, child) for name, child in sorted(names.items())}

    def outcomes(self):
        """What may be left, each once: all names durable or all live, and any one folder unlike the others."""
        every = self.folders()
        choices = [
            every,
            [],
            *([one] for one in every),
            *([each for each in every if each is not one] for one in every),
        ]
        return {repr(tree): tree for tree in map(self.left, choices)}


def put(place, tree):
    """Makes a real folder of it."""
    place.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            put(place / name, content)
        else:
            (place / name).write_bytes(content)


def recorded(tmp_path, monkeypatch):
    """The changes of a run of four saves; ("returned", path, step) stands where each save had returned."""
    changes = []

    def hook(change, path, detail=None):
        if path.name != "lock":
            changes.append((change, path, bytes(detail) if isinstance(detail, memoryview) else detail))

    monkeypatch.setattr(disk, "hook", hook)
    run = Run(tmp_path / "disk" / "run")
    (tmp_path / "disk").mkdir()
    with run.lock():
        for step in (1, 2, 3, 4):
            save(run, step)
            changes.append(("returned", run.path, step))
            run.retain(2)
    return changes


def broken_promises(tmp_path, changes):
    """Cuts the power after each change; where a checkpoint is then damaged, or the newest older than was promised."""
    broken = []
    for cut in range(len(changes) + 1):
        promised = max((step for change, _, step in changes[:cut] if change == "returned"), default=0)
        for number, tree in enumerate(Platter(tmp_path / "disk", changes[:cut]).outcomes().values()):
            put(place := tmp_path / f"{cut}-{number}", tree)
            run = Run(place / "run")
            if good(run) != run.steps() or max(run.steps(), default=0) < promised:
                broken.append((cut, number))
            shutil.rmtree(place)
    return broken


def test_power_loss_after_every_change(tmp_path, monkeypatch, small_writes, no_sync):
    """Row 3: no committed checkpoint fails to verify, and what `save` returned for is never lost."""
    changes = recorded(tmp_path, monkeypatch)
    assert len(changes) > 100 and {"rename", "unlink", "rmdir"} <= {change for change, *_ in changes}
    assert broken_promises(tmp_path, changes) == []


SYNCS = {
    "of files": lambda folder, after: not folder,
    "of folders": lambda folder, after: folder,
    "between a rename to trash and a removal": lambda folder, after: after == "unlink",
}


@pytest.mark.parametrize("kind", SYNCS)
def test_the_power_loss_test_can_fail(tmp_path, monkeypatch, small_writes, no_sync, kind):
    """No kind of sync is superfluous."""
    changes = recorded(tmp_path, monkeypatch)
    folders = {path for change, path, _ in changes if change == "mkdir"} | {tmp_path / "disk"}
    after = [change for change, *_ in changes[1:]] + ["end"]
    kept = [
        each
        for each, then in zip(changes, after, strict=True)
        if each[0] != "sync" or not SYNCS[kind](each[1] in folders, then)
    ]
    assert len(kept) < len(changes)
    assert broken_promises(tmp_path, kept) != []


def test_a_file_that_may_not_grow(tmp_path):
    """Row 4 without root: the limit on the size of a file stands for a disk that fills in mid-write."""
    run = Run(tmp_path / "run")
    large = torch.zeros(2**18)  # here and not in the child: a fork has none of torch's threads, and would wait for them
    with run.lock():
        save(run, 1, 2)

    def body():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        with run.lock():
            run.save(3, {"model": {"w": large}}, {"step": 3})

    assert os.WEXITSTATUS(fork(body)) == StorageError.exit_code == 4
    assert leftovers(run) == [] and run.latest() == 2
    assert_holds(run, 2)


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    run, changes = Run(tmp_path / "run"), []
    with run.lock():
        monkeypatch.setattr(disk, "hook", lambda *change: changes.append(change))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 4_300_000))
        message = r"the disk is too full; 4\.400 MB needed, 4\.300 MB free"
        with pytest.raises(StorageError, match=message):
            run.save(1, {"model": {"w": torch.zeros(10**6)}}, {})
        assert changes == []
        run.save(1, {"model": {"w": torch.zeros(970_000)}}, {})
        assert changes != []


def test_a_folder_that_vanished_is_a_storage_error(tmp_path):
    run = Run(tmp_path / "run")
    with run.lock():
        shutil.rmtree(run.path)
        with pytest.raises(StorageError, match="cannot be written: No such file or directory. Give another place"):
            save(run, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_run_should_be(tmp_path):
    (tmp_path / "run").write_bytes(b"")
    with pytest.raises(StorageError, match=r"lock cannot be written: .*(File exists|Not a directory)"):
        with Run(tmp_path / "run").lock():
            pass
    with pytest.raises(StorageError, match="cannot be read: Not a directory"):
        Run(tmp_path / "run").latest()
