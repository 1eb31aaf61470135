"""Tar shards: examples by their place in the files, labels beside them, and damage named."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_passed import KEPT, as_tar
from undiffuse.data.pack import pack
from undiffuse.data.passed import counts
from undiffuse.data.picture import Reading
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
    (shards / "set-train-1.tar").rename(shards / "set-test-0.tar")
    assert levels(open_raw(shards, "test")) == [2, 3]
    because = "(train is trained on, test is held out)"
    assert counts(open_raw(shards).passed) == {f".tar of validation {because}": 1, ".txt": 2}


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
    message = "has no pictures in its tar files; expected members like 1.jpg: 1 file passed over: 1 .txt$"
    for path in (tmp_path / "set", tmp_path / "set/a.tar"):
        with pytest.raises(DataError, match=f"^{path} {message}"):
            open_raw(path)


def test_shards_or_the_pictures_beside_them_whichever_are_more(shards):
    (shards / "a.png").write_bytes(png(77))
    (shards / "notes").mkdir()
    (shards / "notes" / "b.PNG").write_bytes(png(78))
    source = open_raw(shards)
    assert levels(source) == list(range(6))
    assert counts(source.passed) == {
        ".png (beside the data)": 2,
        ".txt": 6,
    }
    for i in range(6):
        (shards / f"{i}.png").write_bytes(png(50 + i))
    source = open_raw(shards)
    assert levels(source) == [50, 51, 52, 53, 54, 55, 77, 78]
    assert counts(source.passed) == {".tar (give the file itself to read it)": 3}


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


COMPRESSED = {"a.tar.gz": "w:gz", "a.TGZ": "w:gz", "a.tar.bz2": "w:bz2", "a.tar.xz": "w:xz", "gzipped.tar": "w:gz"}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_archives_of_pictures(tmp_path, name):
    members = {f"pets/{kind}/{i}.png": png(i) for i, kind in enumerate(("cat", "dog", "cat"))}
    source = open_raw(as_tar(tmp_path, members, name, COMPRESSED[name]))
    assert levels(source) == [0, 1, 2] and source.labels == (0, 1, 0) and source.classes == ("cat", "dog")
    assert source.name(1) == f"{name}/pets/dog/1.png"
    assert pack(tmp_path / name, tmp_path / "out").fingerprint() == open_source(tmp_path / name).fingerprint()


def test_what_a_compressed_archive_may_unpack_to(tmp_path, monkeypatch):
    path = as_tar(tmp_path, {"1.png": png(1), "2.png": bytes(2000)}, "a.tgz", "w:gz")
    monkeypatch.setattr("undiffuse.data.format.tars.MOST", 1500)
    message = "a.tgz unpacks to more than 1500 bytes, which have to be in memory because it is compressed; unpack it"
    with pytest.raises(DataError, match=message):
        open_raw(path)


def test_a_compressed_archive_that_is_cut(tmp_path):
    path = as_tar(tmp_path, {f"{i}.png": np.random.default_rng(i).bytes(900) for i in range(9)}, "a.tgz", "w:gz")
    data = path.read_bytes()
    for length in (20, 500, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match="a.tgz cannot be read as a tar archive: "):
            open_raw(path)
    path.write_bytes(data[:3000] + bytes([data[3000] ^ 1]) + data[3001:])  # found by the checksum
    with pytest.raises(DataError, match="a.tgz cannot be read as a tar archive: "):
        open_raw(path)


def several(fields, count=4):
    return {f"x/{i:03}.{field}": png(10 * i + k) for i in range(count) for k, field in enumerate(fields)}


WHICH = {
    "two": (("input.png", "mask.png"), "input, mask", "mask", [1, 11, 21, 31]),
    "one without a name": (("png", "mask.png"), "mask, png", "png", [0, 10, 20, 30]),
    "by ending": (("jpg", "png"), "jpg, png", "jpg", [0, 10, 20, 30]),
    "with dots": (("rgb.left.png", "rgb.right.png"), "rgb.left, rgb.right", "rgb.right", [1, 11, 21, 31]),
    "in full": (("a.png", "b.png", "c.png"), "a, b, c", "b.png", [1, 11, 21, 31]),
    "all": (("a.png", "b.png"), "a, b", "all", [0, 1, 10, 11, 20, 21, 30, 31]),
}


@pytest.mark.parametrize("case", WHICH)
def test_which_of_several_pictures(tmp_path, case):
    fields, names, wanted, expected = WHICH[case]
    path = shard(tmp_path / "a.tar", several(fields) | {f"x/{i:03}.cls": b"1" for i in range(4)})
    first = names.split(", ")[0]
    with pytest.raises(DataError) as refused:
        open_raw(path)
    assert str(refused.value) == (
        f"{path} has several pictures in each example: {names}; choose one with --set data.picture={first}, "
        f"or --picture {first} for `undiffuse data`, or all to read all of them"
    )
    source = open_raw(path, reading=Reading(picture=wanted))
    assert levels(source) == expected and source.labels == (1,) * len(expected)
    others = set(names.split(", ")) - {wanted.removesuffix(".png") if case == "in full" else wanted}
    left = {} if wanted == "all" else {f"{name} (data.picture={wanted})": 4 for name in others}
    assert counts(source.passed) == left
    with pytest.raises(DataError, match=f'a.tar has no picture "depth"; give one of {names} as data.picture$'):
        open_raw(path, reading=Reading(picture="depth"))


ONE = {
    "numbers": {f"photo.{i:03}.png": png(i) for i in range(4)},
    "a number and a date": {f"2021.{i}.05.png": png(i) for i in range(4)},
    "two endings": {f"{i}.jpg.png": png(i) for i in range(4)},
    "in folders": {f"{i}/a.png": png(i) for i in range(4)},
}


@pytest.mark.parametrize("case", ONE)
def test_one_picture_an_example(tmp_path, case):
    path = shard(tmp_path / "a.tar", ONE[case])
    assert levels(open_raw(path)) == levels(open_raw(path, reading=Reading(picture="mask"))) == [0, 1, 2, 3]


PAIRS = {
    "dots": ("{}.input.png", "{}.mask.png"), "underscores": ("{}_input.png", "{}_mask.png"),
    "hyphens": ("img-{}-input.png", "img-{}-mask.png"), "one without a name": ("{}.png", "{}_mask.png"),
    "in folders of classes": ("cat/{}_input.png", "cat/{}_mask.png"),
}  # fmt: skip


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("case", PAIRS)
def test_pairs_are_asked_about_however_they_are_kept(tmp_path, kept, case):
    path = KEPT[kept](tmp_path, {name.format(i): png(i) for i in range(4) for name in PAIRS[case]})
    with pytest.raises(DataError, match="has several pictures in each example: (input, mask|mask, png); choose one"):
        open_raw(path)
    source = open_raw(path, reading=Reading(picture="mask"))
    assert len(source) == 4 and all("mask" in source.name(i) for i in range(4))
    assert sum(counts(source.passed).values()) == 4
    assert len(open_raw(path, reading=Reading(picture="all"))) == 8


PEOPLE = {
    "screenshots": [f"Screenshot 2021-01-01 at 12.30.{i} PM.png" for i in (10, 11)],
    "screenshots of two days": [f"Screenshot 2021-01-0{d} at 1{d}.30.{i} PM.png" for d in (1, 2) for i in (d, 5 + d)],
    "persons": ["Mr. Smith 1.png", "Mr. Jones.png", "Dr. Who.png"],
    "exports": [f"img{i}_jpg.rf.{i}c0ffee.png" for i in range(4)],
    "counted": [f"cat_{i}.png" for i in range(4)],
    "frames": [f"scene{i}_frame{j}.png" for i in range(2) for j in range(2)],
    "two endings": ["a.png", "b.png", "c.jpg", "d.jpg", "d.png"],
    "one mask": ["a.png", "a.mask.png", "b.png", "c.png"],
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("case", PEOPLE)
def test_names_as_people_write_them_are_no_examples(tmp_path, kept, case):
    path = KEPT[kept](tmp_path, {name: png(i) for i, name in enumerate(PEOPLE[case])})
    assert sorted(levels(open_raw(path))) == list(range(len(PEOPLE[case])))


def test_what_is_printed_can_be_pasted(tmp_path):
    fields = ("left eye.png", "right eye.png")
    with pytest.raises(DataError, match="choose one with --set data.picture='left eye', or --picture 'left eye' for"):
        open_raw(shard(tmp_path / "a.tar", several(fields)))


LABELLED = {
    "numbers": ["img.000", "img.001", "img.002"], "dates": ["2021.01.05", "2021.01.06", "2021.02.05"],
    "persons": ["Mr. Smith 1", "Mr. Jones", "Mr. Smith 2"], "times": ["at 12.30.10 PM", "at 12.30.11 PM", "at 1.30 PM"],
    "in folders": ["a/1", "b/1", "a/2.x"], "plain": ["1", "2", "3"],
}  # fmt: skip


@pytest.mark.parametrize("case", LABELLED)
@pytest.mark.parametrize("form", ["{}.cls", "{}.json"])
def test_labels_by_the_names_of_their_pictures(tmp_path, case, form):
    members = {}
    for i, stem in enumerate(LABELLED[case]):
        label = f"{2 - i}" if form == "{}.cls" else f'{{"label": {2 - i}}}'
        members |= {f"{stem}.png": png(i), form.format(stem): label.encode()}
    source = open_raw(shard(tmp_path / "a.tar", members))
    assert dict(zip(levels(source), source.labels, strict=True)) == {0: 2, 1: 1, 2: 0} and source.passed == ()


def test_labels_of_an_example(tmp_path):
    """For all its pictures, by a field of their own, and beside a JSON without one."""
    frames = {f"{clip}.{i}.png": png(i) for clip in "ab" for i in range(2)}
    path = shard(tmp_path / "a.tar", frames | {"a.cls": b"1", "b.cls": b"0", "a.json": b"{}", "b.json": b"{}"})
    assert open_raw(path).labels == (1, 1, 0, 0)
    path = shard(tmp_path / "b.tar", {"1.png": png(1), "2.png": png(2), "1.kind.cls": b"1", "2.kind.cls": b"0"})
    assert open_raw(path).labels == (1, 0)
    pairs = {f"{i}_{kind}.png": png(i) for i in range(3) for kind in ("in", "out")}
    path = shard(tmp_path / "c.tar", pairs | {f"{i}.cls": str(2 - i).encode() for i in range(3)})
    assert open_raw(path, reading=Reading(picture="in")).labels == (2, 1, 0)


def test_classes_by_folder_in_several_shards(tmp_path):
    for k in range(2):
        shard(tmp_path / "set" / f"{k}.tar", {f"{kind}/{k}.png": png(k) for kind in ("10", "9")})
    source = open_raw(tmp_path / "set")
    assert source.classes == ("9", "10") and source.labels == (1, 0, 1, 0)


def test_splits_and_hidden_members_in_one_archive(tmp_path):
    names = ["./Train/a/1.png", "./Train/b/2.png", "./Val/a/3.png", "./Train/a/._1.png", "PaxHeader/x.txt"]
    path = shard(tmp_path / "a.tar", {name: png(i) for i, name in enumerate(names)})
    assert levels(open_raw(path)) == [0, 1] and levels(open_raw(path, "test")) == [2]
    assert open_raw(path, "test").classes == ("a", "b")


def test_shards_beside_folders_of_the_splits(tmp_path):
    """A preview and notes in the folder of each split."""
    for split in ("Train", "Dev"):
        shard(tmp_path / "set" / split / "0.TAR", {"1.png": png(len(split)), "2.png": png(9)})
        (tmp_path / "set" / split / "preview.jpg").write_bytes(png(0))
    (tmp_path / "set" / "readme.txt").touch()
    source = open_raw(tmp_path / "set")
    assert levels(source) == [5, 9] and levels(open_raw(tmp_path / "set", "test")) == [3, 9]
    assert counts(source.passed) == {".jpg (beside the data)": 2, ".txt": 1}
