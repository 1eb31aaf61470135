"""Files that are whole or absent, errors that say what was needed, and JSON that cannot hurt."""

import os
import shutil
import time
import tracemalloc

import pytest

from undiffuse.errors import Corrupt, StorageError, UsageError
from undiffuse.machine import disk
from undiffuse.machine.disk import beside, read_json, write_atomic, write_json, write_new


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail_at(monkeypatch, change, error):
    """From now on the first change of that kind fails; returns the list of changes that were made."""
    changes = []

    def hook(name, path, detail=None):
        changes.append(name)
        if changes.count(change) == 1 and name == change:
            raise error

    monkeypatch.setattr(disk, "hook", hook)
    return changes


def test_a_file_is_written_in_its_new_folder_and_replaced(tmp_path):
    path = tmp_path / "new" / "folder" / "a.png"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two" and names(path.parent) == ["a.png"]


def test_the_name_comes_after_the_bytes_are_durable(tmp_path, monkeypatch):
    changes = fail_at(monkeypatch, "none", OSError())
    write_atomic(tmp_path / "a", b"x")
    assert changes == ["create", "write", "sync", "rename", "sync"]


def inode(path):
    return path.stat().st_ino


@pytest.mark.parametrize("write", [write_atomic, write_new])
def test_what_the_system_is_asked_to_sync_is_the_file_and_then_its_folder(tmp_path, monkeypatch, write):
    """By the inodes that `os.fsync` is given, in order; a new folder makes the one above it be synced first."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    write(tmp_path / "new" / "folder" / "a", b"x")
    new = tmp_path / "new"
    assert synced == [inode(tmp_path), inode(new), inode(new / "folder" / "a"), inode(new / "folder")]


def test_large_data_are_written_in_pieces_and_short_writes_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "CHUNK", 7)
    data = bytes(range(256))
    write_atomic(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == data


@pytest.mark.parametrize("change", ["create", "write", "sync", "rename"])
def test_any_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, change):
    write_atomic(tmp_path / "a", b"old")
    changes = fail_at(monkeypatch, change, OSError(28, "No space left on device"))
    with pytest.raises(
        StorageError, match=r"/a cannot be written: No space left on device; 0\.003 MB needed"
    ) as caught:
        write_atomic(tmp_path / "a", bytes(3000))
    assert caught.value.exit_code == 4
    assert changes.count(change) == 1
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_new_file_is_never_written_over_another(tmp_path, monkeypatch):
    changes = fail_at(monkeypatch, "none", OSError())
    write_new(tmp_path / "new" / "a", b"one")
    assert changes[-6:] == ["create", "write", "sync", "link", "unlink", "sync"]
    with pytest.raises(UsageError, match="^.*/new/a is there already; give a new folder, or remove it$"):
        write_new(tmp_path / "new" / "a", b"two")
    assert (tmp_path / "new" / "a").read_bytes() == b"one" and names(tmp_path / "new") == ["a"]


def test_a_new_file_on_a_disk_without_links(tmp_path, monkeypatch):
    fail_at(monkeypatch, "link", OSError(1, "Operation not permitted"))
    write_new(tmp_path / "a", b"one")
    fail_at(monkeypatch, "link", OSError(1, "Operation not permitted"))
    with pytest.raises(UsageError, match="/a is there already"):
        write_new(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one" and names(tmp_path) == ["a"]


def test_an_interrupt_passes_and_leaves_nothing(tmp_path, monkeypatch):
    fail_at(monkeypatch, "sync", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", b"new")
    assert names(tmp_path) == []


def test_the_first_failure_is_the_one_that_is_told(tmp_path, monkeypatch):
    def hook(name, path, detail=None):
        if name in ("sync", "unlink"):
            raise OSError(5, f"Input/output error in {name}")

    monkeypatch.setattr(disk, "hook", hook)
    with pytest.raises(StorageError, match="error in sync"):
        write_atomic(tmp_path / "a", b"new")


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"file/a\.png cannot be written: .*(Not a directory|File exists)"):
        write_atomic(tmp_path / "file" / "a.png", b"x")


def test_the_message_names_what_is_free(tmp_path, monkeypatch):
    fail_at(monkeypatch, "create", OSError(28, "No space left on device"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 10**10, 1_500_000))
    with pytest.raises(StorageError, match=r"2\.000 MB needed, 1\.500 MB free\. Free space or give another folder"):
        write_atomic(tmp_path / "a", bytes(2_000_000))


@pytest.mark.parametrize(("code", "raises"), [(22, False), (5, True)])
def test_only_a_file_system_without_folder_sync_may_refuse_it(tmp_path, monkeypatch, code, raises):
    real = os.fsync

    def fsync(number):
        if os.fstat(number).st_mode & 0o040000:
            raise OSError(code, "no")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    if raises:
        with pytest.raises(StorageError, match="cannot be written: no"):
            write_atomic(tmp_path / "a", b"x")
    else:
        write_atomic(tmp_path / "a", b"x")
        assert (tmp_path / "a").read_bytes() == b"x"


def test_temporary_names_are_never_shared(tmp_path):
    first, second = (beside(tmp_path / "a", "tmp") for _ in range(2))
    assert first != second and first.parent == tmp_path
    assert first.name.startswith(".tmp-") and first.name.endswith("-a")


def test_a_link_is_removed_and_not_followed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(b"x")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "link").symlink_to(tmp_path / "kept")
    disk.remove(tmp_path / "gone")
    assert names(tmp_path) == ["kept"] and names(tmp_path / "kept") == ["file"]


def test_json_comes_back(tmp_path):
    value = {"format": 1, "text": "ümläut", "list": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "a.json", {"loss": float("nan"), "by": [float("inf"), -float("inf"), 1.5]})
    assert "NaN" not in (tmp_path / "a.json").read_text() and "Infinity" not in (tmp_path / "a.json").read_text()
    assert read_json(tmp_path / "a.json") == {"loss": None, "by": [None, None, 1.5]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged: it is not JSON"),
        (b'{"a": 1', "is damaged: it is not JSON"),
        (b"\x80\x04\x95", "is damaged: it is not JSON"),
        (b"[" * 1_000_000, "is damaged: it is not JSON"),
        (b"1" * 10_000, "is damaged: it is not JSON"),
        (b" " * 2**20 + b"1", "is longer than the 1048576 bytes that such a file may have"),
    ],
)
def test_what_is_not_json_is_corrupt(tmp_path, data, message):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(Corrupt, match=rf"a\.json {message}"):
        read_json(tmp_path / "a.json")


def test_the_longest_json_that_is_written_is_read_back(tmp_path):
    value = "a" * (disk.SMALL - 3)  # two quotes and a newline
    write_json(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").stat().st_size == disk.SMALL and read_json(tmp_path / "a.json") == value
    with pytest.raises(AssertionError, match="1048577 bytes of JSON would not be read back"):
        write_json(tmp_path / "b.json", value + "a")


def test_a_file_that_is_created_was_not_there(tmp_path):
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        disk.create(tmp_path / "a", b"yours")
    assert (tmp_path / "a").read_bytes() == b"mine"


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(Corrupt, match=r"a\.json cannot be read: No such file or directory; restore it from a copy"):
        read_json(tmp_path / "a.json")
    with pytest.raises(Corrupt, match="cannot be read: Is a directory"):
        read_json(tmp_path)


def test_a_huge_file_costs_neither_time_nor_memory(tmp_path):
    with open(tmp_path / "bomb.json", "wb") as file:
        file.write(b"[")
        file.truncate(2**40)
    started = time.monotonic()
    tracemalloc.start()
    with pytest.raises(Corrupt, match="is longer than"):
        read_json(tmp_path / "bomb.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - started < 1 and peak < 4 * 2**20


@pytest.mark.parametrize("name", ["n" * 255, "ö" * 127], ids=["bytes", "two bytes"])
def test_a_name_as_long_as_a_disk_takes_is_written(tmp_path, name):
    disk.write_atomic(tmp_path / name, b"all")
    assert (tmp_path / name).read_bytes() == b"all" and len(list(tmp_path.iterdir())) == 1
