"""Packing: in parallel as in one process, after a kill as without one, and only what may be left out is left out."""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.data import pack as packing
from undiffuse.data.format.folder import Pictures
from undiffuse.data.format.packed import PackedSource
from undiffuse.data.pack import open_data, pack
from undiffuse.data.picture import Reading
from undiffuse.data.source import ArraySource, First, Wanted, open_source
from undiffuse.errors import DataError, Locked, StorageError, UsageError
from undiffuse.machine import disk
from undiffuse.machine.disk import cache_folder
from undiffuse.machine.store import Run


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Seven pictures of two classes; four shards of two each."""
    monkeypatch.setattr(packing, "SHARD", 2 * 48)
    for i in range(7):
        path = tmp_path / "set" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)).save(path)
    return tmp_path / "set"


@pytest.fixture
def no_sync(monkeypatch):
    """A kill does not reach what the system holds, so waiting for the disk would only make the tests slow."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def test_it_is_what_is_in_memory(pictures, tmp_path):
    packed, memory = pack(pictures, tmp_path / "out", size=3, channels=1), open_source(pictures, size=3, channels=1)
    assert packed.fingerprint() == memory.fingerprint()
    assert packed.classes == ("a", "b") and packed.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert packed.path == tmp_path / "out"


def test_the_same_again_writes_nothing(pictures, tmp_path, monkeypatch):
    pack(pictures, tmp_path / "out")
    monkeypatch.setattr(disk, "hook", lambda *change: pytest.fail(f"the disk was changed: {change}"))
    assert len(pack(pictures, tmp_path / "out")) == 7


def kill_at(change, pictures, out):
    """Packs in a process that is killed before that change to the disk; the signal that ended it, 0 if none did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and threads that the child does not use
        child = os.fork()
    if child == 0:
        count = 0

        def hook(*_):
            nonlocal count
            count += 1
            if count > change:
                os.kill(os.getpid(), signal.SIGKILL)

        disk.hook = hook
        try:
            pack(pictures, out)
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def test_killed_at_any_change_it_goes_on_to_the_same_bytes(pictures, tmp_path, no_sync):
    pictures = pictures / "a"  # two shards
    pack(pictures, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    change = kept = 0
    while kill_at(change, pictures, out := tmp_path / str(change)):
        kept += (out / "00000.json").exists() and not (out / "packed.json").exists()
        pack(pictures, out)
        assert contents(out) == expected
        shutil.rmtree(out)
        change += 1
    assert change > 25 and kept > 10  # each shard and each mark takes five changes


def test_finished_shards_are_kept(pictures, tmp_path, no_sync, monkeypatch):
    changes = []
    monkeypatch.setattr(disk, "hook", lambda what, path, *_: changes.append(f"{what} {path.name}"))
    pack(pictures, tmp_path / "whole")
    assert kill_at(30, pictures, tmp_path / "out") == signal.SIGKILL
    done = {path.stem for path in (tmp_path / "out").glob("*.json")} - {"packing"}
    assert 0 < len(done) < 4
    changes.clear()
    pack(pictures, tmp_path / "out")
    created = {change[-9:-4] for change in changes if change.startswith("create") and change.endswith(".bin")}
    assert created == {"00000", "00001", "00002", "00003"} - done


SCRIPT = """
import os, sys
from pathlib import Path
from undiffuse.machine import log
from undiffuse.data import pack
if __name__ == "__main__":
    log.Progress.advance = lambda *_: os.kill(os.getpid(), 9)
    pack.SHARD = 2 * 48
    pack.pack(sys.argv[1], Path(sys.argv[2]), workers=2)
"""


@pytest.mark.slow
def test_worker_processes_write_the_same_and_end_with_a_killed_parent(pictures, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(pictures), str(tmp_path / "out")]
    paths = os.pathsep.join(filter(None, sys.path))
    # The workers hold the pipe too, so to read it to its end is to wait for the last of them.
    killed = subprocess.run(command, capture_output=True, timeout=120, env={**os.environ, "PYTHONPATH": paths})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any((tmp_path / "out").glob("0*.json")) and not (tmp_path / "out/packed.json").exists()
    pack(pictures, tmp_path / "out", workers=2)
    pack(pictures, tmp_path / "serial")
    assert contents(tmp_path / "out") == contents(tmp_path / "serial")


def test_data_that_changes_meanwhile(pictures, tmp_path):
    job = packing.Job(str(pictures), "train", Reading(), Wanted(None, None), "")
    plan = packing.Plan(job, First("a/0.png", (3, 4, 4), True), 8, 2)
    with pytest.raises(DataError, match="set has changed while it was packed; leave it as it is, and pack it again$"):
        packing._work(plan, tmp_path, 0)


def test_more_classes_than_can_be_named(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 1, 1), np.uint8), labels=[0, 99_999])
    with pytest.raises(DataError, match="a.npz has 100000 classes, more than a packed folder can name; merge some$"):
        pack(tmp_path / "a.npz", tmp_path / "out")


def damage(pictures):
    (pictures / "a/2.png").write_bytes((pictures / "a/2.png").read_bytes()[:60])
    (pictures / "b/3.png").write_bytes(b"")


def test_bad_pictures_are_listed_and_then_left_out_without_decoding_anew(pictures, tmp_path, monkeypatch):
    damage(pictures)
    with pytest.raises(
        DataError, match=r"^2 of 7 images cannot be read: a/2.png \(.+\), b/3.png \(not a picture .*skip-bad"
    ):
        pack(pictures, tmp_path / "out")
    assert not (tmp_path / "out/packed.json").exists()
    monkeypatch.setattr(packing, "_write", lambda *_: pytest.fail("a shard was decoded again"))
    packed = pack(pictures, tmp_path / "out", skip_bad=True)
    memory = open_source(pictures, skip_bad=True)
    assert packed.skipped == memory.skipped == ("a/2.png", "b/3.png")
    assert packed.fingerprint() == memory.fingerprint()
    assert packed.manifest.skipped[1] == ("b/3.png", "not a picture in a known format")
    assert open_source(tmp_path / "out").labels.tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(DataError, match="^2 of 7 images cannot be read"):
        pack(pictures, tmp_path / "out")


def test_what_is_left_out_is_known_when_packed_anew(pictures, tmp_path):
    damage(pictures)
    pack(pictures, tmp_path / "out", skip_bad=True)
    small = pack(tmp_path / "out", tmp_path / "small", size=2)
    assert small.skipped == unified(tmp_path / "out", 2).skipped == ("a/2.png", "b/3.png")
    assert small.fingerprint() == unified(tmp_path / "out", 2).fingerprint()


def unified(path, size):
    return open_source(path, size=size)


def test_a_shard_of_bad_pictures_only(pictures, tmp_path):
    for i in (0, 2):
        (pictures / f"a/{i}.png").write_bytes(b"")
    packed = pack(pictures, tmp_path / "out", skip_bad=True)
    assert [len(part) for part in packed.images] == [0, 2, 2, 1]
    assert torch.equal(packed.gather(torch.arange(5))[0], open_source(pictures, skip_bad=True).images)


def test_pictures_of_mixed_sizes(pictures, tmp_path):
    Image.new("RGB", (9, 5)).save(pictures / "b/7.png")
    with pytest.raises(DataError, match=r"^images differ in size: a/0.png is 4x4, b/7.png is 9x5 .* --size 8$"):
        pack(pictures, tmp_path / "out")
    with pytest.raises(DataError, match="^8 of 8 images cannot be read"):
        for path in pictures.rglob("*.png"):
            path.write_bytes(b"")
        pack(pictures, tmp_path / "none", skip_bad=True)


def test_a_folder_with_something_else_in_it(pictures, tmp_path):
    with pytest.raises(UsageError, match="^.*other is not empty and holds no packed data; give a new folder$"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "a.txt").touch()
        pack(pictures, tmp_path / "other")
    pack(pictures, tmp_path / "out")
    message = "^.*out holds other data, or the same in another shape; give another folder, or remove it$"
    for data, options in ((pictures, {"size": 3}), (pictures, {"reading": Reading("red")}), (pictures / "a", {})):
        with pytest.raises(UsageError, match=message):
            pack(data, tmp_path / "out", **options)
    (tmp_path / "out/packed.json").unlink()
    (tmp_path / "out/packing.json").write_text('{"key": "another"}')
    with pytest.raises(UsageError, match=message):
        pack(pictures, tmp_path / "out")
    with pytest.raises(UsageError, match="^0 workers are not possible; give at least 1$"):
        pack(pictures, tmp_path / "out", workers=0)


def test_two_at_a_time(tmp_path):
    with Run(tmp_path / "out").lock(), pytest.raises(Locked, match="out is in use by process"):
        pack("digits", tmp_path / "out")


def test_a_full_disk_is_said_before_anything_is_decoded(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 100))
    with pytest.raises(
        StorageError, match="packed.json cannot be written: the disk is too full; 0.000 MB needed, 0.000"
    ):
        pack(pictures, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin"))


def test_data_is_packed_in_the_cache_when_it_is_large(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    assert isinstance(open_data(pictures), ArraySource)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(packing, "LARGE", 7 * 48 - 1)
    packed = open_data(pictures)
    assert isinstance(packed, PackedSource) and packed.path.parent == tmp_path / "cache/packed"
    assert packed.path.name == packed.manifest.key
    assert open_data(pictures).path == packed.path
    assert (
        len({open_data(pictures, **options).path for options in ({"size": 4}, {"reading": Reading("black")}, {})}) == 3
    )
    assert isinstance(open_data(pictures, use_cache=False), ArraySource)
    assert isinstance(open_data(packed.path), PackedSource)
    assert isinstance(open_data(packed.path, size=2, use_cache=False), ArraySource)


def test_many_small_pictures_are_large_too(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    for many, kind in ((7, ArraySource), (6, PackedSource)):
        monkeypatch.setattr(packing, "MANY", many)
        assert isinstance(open_data(pictures), kind)


def test_of_processes_that_want_the_same_one_packs_and_the_others_wait(pictures, tmp_path, monkeypatch, capsys):
    """As the processes of torchrun do, which all begin at once."""
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    done = open_data(pictures, use_cache=True)
    shutil.copytree(done.path, tmp_path / "whole")
    shutil.rmtree(done.path)
    with ThreadPoolExecutor(1) as other:
        with Run(done.path).lock():
            waiting = other.submit(open_data, pictures, use_cache=True, show_progress=True)
            time.sleep(1)
            assert not waiting.done()
            shutil.copytree(tmp_path / "whole", done.path, dirs_exist_ok=True)  # this process has packed it
            monkeypatch.setattr(packing, "_build", lambda *_: pytest.fail("it was packed twice"))
        assert waiting.result(timeout=60).fingerprint() == done.fingerprint()
    assert capsys.readouterr().err.count("waiting for another process that packs this data") == 1


def test_an_array_is_packed_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(packing, "LARGE", 0)
    assert isinstance(open_data("digits"), ArraySource)
    assert open_data("digits", use_cache=True).fingerprint() == open_data("digits").fingerprint()


def test_other_content_is_another_entry(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    first = open_data(pictures, use_cache=True)
    damage(pictures)
    second = open_data(pictures, skip_bad=True, use_cache=True)
    assert first.path != second.path and first.verify() is None
    with pytest.raises(DataError, match="^2 of 7 images cannot be read"):
        open_data(pictures, use_cache=True)


def test_files_that_were_not_written_since_are_not_read_to_find_the_cache(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    first = open_data(pictures, use_cache=True)
    assert not (tmp_path / "cache/fingerprints").exists()  # the pictures are too young to be trusted
    monkeypatch.setattr(packing, "RACY", -(10**12))
    assert open_data(pictures, use_cache=True).path == first.path
    with monkeypatch.context() as patch:
        patch.setattr(Pictures, "fingerprint", lambda self: pytest.fail("all of it was read"))
        assert open_data(pictures, use_cache=True).path == first.path
    picture = pictures / "a/0.png"
    picture.write_bytes((pictures / "b/1.png").read_bytes())
    assert open_data(pictures, use_cache=True).path != first.path
    shutil.copy2(pictures / "a/2.png", picture)  # an older time is another time
    assert len(list((tmp_path / "cache/packed").iterdir())) == 2
    open_data(pictures, use_cache=True)
    assert len(list((tmp_path / "cache/packed").iterdir())) == 3


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("UNDIFFUSE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert str(cache_folder()) == "/home/me/.cache/undiffuse"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_folder()) == "/xdg/undiffuse"
    monkeypatch.setenv("UNDIFFUSE_CACHE", "/mine")
    assert str(cache_folder()) == "/mine"


def test_no_home(monkeypatch):
    for name in ("UNDIFFUSE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(packing.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(UsageError, match="^there is no home folder to keep things in; set UNDIFFUSE_CACHE to a"):
        cache_folder()


def test_a_class_whose_folder_is_no_utf8_has_a_name_that_can_be_kept(tmp_path):
    for folder in (b"caf\xe9", b"dog"):
        os.makedirs(os.path.join(os.fsencode(tmp_path / "set"), folder))
        Image.new("L", (4, 4), folder[0]).save(
            os.path.join(os.fsencode(tmp_path / "set"), folder, b"1.png").decode("utf-8", "surrogateescape")
        )
    packed = pack(tmp_path / "set", tmp_path / "packed")
    assert packed.classes == (r"caf\xe9", "dog") and open_source(tmp_path / "packed").classes == packed.classes
    assert packed.every_label().tolist() == [0, 1]
