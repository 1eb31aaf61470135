"""Tar shards: examples by their place in the files, labels beside them, and damage named."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.data.pack import pack
from undiffuse.data.source import open_raw, open_source
from undiffuse.errors import DataError


def png(level, size=(4, 4)):
    data = io.BytesIO()
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(data, "PNG")
    return data.getvalue()


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def levels(source):
    return [int(source[i].image[0, 0, 0]) for i in range(len(source))]


@pytest.fixture
def shards(tmp_path):
    """Three shards with two labelled pictures each, of levels 0 to 5."""
    for k in range(3):
        members = {}
        for i in (2 * k, 2 * k + 1):
            members |= {f"x/{i:03}.png": png(i), f"x/{i:03}.cls": str(i % 2).encode(), f"x/{i:03}.txt": b"a caption"}
        shard(tmp_path / "set" / f"set-{k:02}.tar", members)
    return tmp_path / "set"


def test_a_folder_of_shards(shards):
    source = open_raw(shards)
    assert levels(source) == list(range(6))
    assert source.labels == (0, 1, 0, 1, 0, 1) and source.classes == ("0", "1")
    assert source.name(4) == "set-02.tar/x/004.png"
    assert int(source[3].image[0, 0, 0]) == 3  # any of them, in any order


def test_one_shard_and_a_range_of_them(shards):
    assert levels(open_raw(shards / "set-01.tar")) == [2, 3]
    assert levels(open_raw(shards / "set-{01..02}.tar")) == [2, 3, 4, 5]
    with pytest.raises(
        DataError, match=r"set-\{01\.\.04\}.tar names 4 files, and .*set-03.tar is missing; give the range"
    ):
        open_raw(shards / "set-{01..04}.tar")
    with pytest.raises(DataError, match="is neither a path nor a named set"):
        open_raw(shards / "set-{07..09}.tar")
    with pytest.raises(DataError, match="set-01.tar has no test split; give the path of the test images"):
        open_raw(shards / "set-01.tar", "test")


def test_splits(shards, tmp_path):
    for split, k in (("train", 0), ("test", 2)):
        (tmp_path / "both" / split).mkdir(parents=True)
        (shards / f"set-0{k}.tar").rename(tmp_path / "both" / split / "a.tar")
    assert levels(open_raw(tmp_path / "both")) == [0, 1]
    assert levels(open_raw(tmp_path / "both", "test")) == [4, 5]


def test_splits_by_the_names_of_the_shards(shards):
    for k, name in enumerate(("set-train-0.tar", "set-train-1.tar", "set-validation-0.tar")):
        (shards / f"set-0{k}.tar").rename(shards / name)
    assert levels(open_raw(shards)) == [0, 1, 2, 3]
    assert levels(open_raw(shards, "test")) == [4, 5]


def test_shards_of_one_name_in_several_folders(shards):
    for k in range(2):
        (shards / f"part-{k}").mkdir()
        (shards / f"set-0{k}.tar").rename(shards / f"part-{k}" / "0.tar")
    source = open_raw(shards / "part-{0..1}" / "0.tar")
    assert levels(source) == [0, 1, 2, 3]
    assert source.name(3) == f"{shards}/part-1/0.tar/x/003.png"


def test_labels_in_json(tmp_path):
    members = {}
    for i, key in enumerate(("label", "cls", "label")):
        members |= {f"{i}.jpg.png": png(i), f"{i}.json": json.dumps({key: 2 - i, "width": 4}).encode()}
    assert open_raw(shard(tmp_path / "a.tar", members)).labels == (2, 1, 0)


@pytest.mark.parametrize("text", ["{}", "[]", '{"label": "cat"}', '{"label": true}'])
def test_json_without_a_number_is_no_label(tmp_path, text):
    source = open_raw(shard(tmp_path / "a.tar", {"1.png": png(1), "1.json": text.encode()}))
    assert (source.labels, source.classes) == (None, None)


BAD = {
    "a word": ({"1.png": png(1), "1.cls": b"cat"}, r"a.tar/1.cls holds b'cat'; expected the number of a class"),
    "a fraction": ({"1.png": png(1), "1.cls": b"1.5"}, r"a.tar/1.cls holds b'1.5'; expected the number of a class"),
    "no json": ({"1.png": png(1), "1.json": b"{"}, r"a.tar/1.json holds b'\{'; expected the number of a class"),
    "negative": ({"1.png": png(1), "1.cls": b"-1"}, r"a.tar has labels from -1 to -1; expected 0 to 99999"),
    "some": (
        {"1.png": png(1), "2.png": png(1), "1.cls": b"0"},
        r"a.tar has a label for 1 of 2 pictures, none for a.tar/2.png; give all or none",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_labels_that_are_none(tmp_path, case):
    members, message = BAD[case]
    with pytest.raises(DataError, match=message):
        open_raw(shard(tmp_path / "a.tar", members))


def test_no_pictures(tmp_path):
    shard(tmp_path / "set/a.tar", {"1.txt": b"text"})
    with pytest.raises(
        DataError, match="set has no pictures in the tar files of its train split; expected members like"
    ):
        open_raw(tmp_path / "set")
    with pytest.raises(DataError, match="a.tar has no data_batch_1.bin"):  # one tar without pictures may be CIFAR-10
        open_raw(tmp_path / "set/a.tar")


def test_tar_files_beside_pictures_are_not_looked_into(shards):
    (shards / "a.png").write_bytes(png(77))
    assert levels(open_raw(shards)) == [77]


def test_a_damaged_picture_is_listed_with_its_shard(tmp_path):
    shard(tmp_path / "set/a.tar", {"1.png": png(1), "2.png": png(2)[:40]})
    with pytest.raises(DataError, match=r"^1 of 2 images cannot be read: a.tar/2.png \("):
        open_source(tmp_path / "set")
    assert open_source(tmp_path / "set", skip_bad=True).skipped == ("a.tar/2.png",)


def test_mixed_sizes(tmp_path):
    shard(tmp_path / "set/a.tar", {"1.png": png(1), "2.png": png(2, (6, 5))})
    with pytest.raises(DataError, match=r"^images differ in size: a.tar/1.png is 4x4, a.tar/2.png is 5x6 \(width x"):
        open_source(tmp_path / "set")


def test_a_shard_that_is_cut_anywhere_is_refused(tmp_path):
    path = shard(tmp_path / "set/a.tar", {f"{i}.png": png(i) for i in range(3)})
    data = path.read_bytes()
    end = len(data.rstrip(b"\0"))
    for length in range(0, end, 200):
        path.write_bytes(data[:length])
        with pytest.raises(
            DataError, match=r"a.tar (cannot be read as a tar archive|has no end mark after \d+ bytes; it)"
        ):
            open_raw(path.parent)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = shard(tmp_path / "set/a.tar", {"1.png": png(1), "2.png": png(2)})
    data = bytearray(path.read_bytes())
    data[data.index(b"2.png") + 150] ^= 1  # in the checksum of the second header
    path.write_bytes(data)
    with pytest.raises(DataError, match=re.escape("a.tar has no end mark after 1024 bytes; it is cut or damaged")):
        open_raw(path.parent)


def test_it_can_be_packed(shards, tmp_path):
    packed, memory = pack(shards, tmp_path / "out"), open_source(shards)
    assert packed.fingerprint() == memory.fingerprint()
    assert torch.equal(packed.labels, memory.labels)
