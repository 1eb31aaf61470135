"""LSUN's LMDB: the pictures in the order of their keys, and a file that is cut named before it ends the process."""

import io
import sys

import lmdb
import numpy as np
import pytest
from PIL import Image

from undiffuse.data.pack import pack
from undiffuse.data.passed import counts
from undiffuse.data.source import open_raw, open_source
from undiffuse.errors import DataError, UsageError


def webp(level, size=(8, 8)):
    data = io.BytesIO()
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(data, "WEBP", lossless=True)
    return data.getvalue()


def database(path, entries):
    with lmdb.open(str(path), map_size=2**22) as environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return path


@pytest.fixture
def rooms(tmp_path):
    """Five pictures; the keys are stored in another order, and one is no UTF-8."""
    keys = [b"0c", b"0a", b"0e", b"0b", b"0d\xff"]
    return database(tmp_path / "bedroom_train_lmdb", {key: webp(key[1]) for key in keys})


def test_pictures_in_the_order_of_the_keys(rooms):
    source = open_raw(rooms)
    assert [chr(source[i].image[0, 0, 0]) for i in (4, 0, 1, 2, 3)] == list("eabcd")
    assert source.name(3) == "0d\\xff" and source.labels is None
    assert open_raw(rooms / "data.mdb").fingerprint() == source.fingerprint()  # while the other is in use
    with pytest.raises(DataError, match="bedroom_train_lmdb has no test split; give the path of the test images"):
        open_raw(rooms, "test")


def test_the_held_out_split_is_the_other_database(rooms):
    database(rooms.with_name("bedroom_val_lmdb"), {b"k": webp(7)})
    assert [len(open_raw(rooms, split)) for split in ("train", "test")] == [5, 1]
    assert int(open_raw(rooms, "test")[0].image[0, 0, 0]) == 7
    with pytest.raises(DataError, match="bedroom_val_lmdb has no test split"):
        open_raw(rooms.with_name("bedroom_val_lmdb"), "test")


def test_from_inside_its_folder(rooms, monkeypatch):
    database(rooms.with_name("bedroom_val_lmdb"), {b"k": webp(7)})
    monkeypatch.chdir(rooms)
    for spec in (".", "data.mdb"):
        assert [len(open_raw(spec, split)) for split in ("train", "test")] == [5, 1]


def test_it_can_be_packed(rooms, tmp_path):
    assert pack(rooms, tmp_path / "out").fingerprint() == open_source(rooms).fingerprint()


def test_keys_that_are_no_pictures(tmp_path):
    keys = [b"a.png", b"b.png", b"num-samples", b"__len__", b".DS_Store", b"__MACOSX/._a.png", b"x/Thumbs.db"]
    path = database(tmp_path / "set", {key: webp(1) if key.endswith(b".png") else b"2" for key in keys})
    (path / "notes.txt").touch()
    source = open_raw(path)
    assert source.names == ("a.png", "b.png")
    assert counts(source.passed) == {"keys that hold numbers": 2, ".txt": 1}


def test_an_empty_one(tmp_path):
    with pytest.raises(DataError, match="empty has no images in its train split; expected at least one"):
        open_raw(database(tmp_path / "empty", {}))


def test_a_damaged_picture_and_mixed_sizes(tmp_path):
    path = database(tmp_path / "a", {b"1": webp(1), b"2": webp(2)[:30], b"3": webp(3, (9, 4))})
    with pytest.raises(DataError, match=r"^images differ in size: 1 is 8x8, 3 is 4x9"):
        open_source(path, skip_bad=True)
    with pytest.raises(DataError, match=r"^1 of 3 images cannot be read: 2 \("):
        open_source(path, size=4)
    assert open_source(path, size=4, skip_bad=True).skipped == ("2",)


def test_a_file_that_is_cut(rooms):
    path = rooms / "data.mdb"
    data = path.read_bytes()
    for length in (0, 100, 5000, 8192, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"data.mdb has \d+ bytes, not \d+; it is cut|cannot be read as an LMDB: "):
            open_raw(rooms)
    path.write_bytes(b"\1" * len(data))
    with pytest.raises(DataError, match="bedroom_train_lmdb cannot be read as an LMDB: .*not an LMDB file"):
        open_raw(rooms)


def test_without_the_extra(rooms, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UsageError, match=r'^this data needs lmdb; install the extra: pip install "undiffuse\[lmdb\]"$'):
        open_raw(rooms)
