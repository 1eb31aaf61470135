"""Folders and zips: what is read, in which order, and which classes and splits follow from the names."""

import os
import re
import zipfile

import pytest
from PIL import Image

from undiffuse.data.passed import counts
from undiffuse.data.source import open_raw, open_source
from undiffuse.errors import DataError


def fill(root, names):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), i).save(path, "PNG")


def zipped(root, target, prefix=""):
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, prefix + path.relative_to(root).as_posix())
    return target


@pytest.fixture(params=["folder", "zip"])
def packed(request, tmp_path):
    """`packed(names)` puts pictures there, as a folder or as a zip; each has its number as colour."""

    def pack(names):
        fill(tmp_path / "set", names)
        return tmp_path / "set" if request.param == "folder" else zipped(tmp_path / "set", tmp_path / "set.zip")

    return pack


def levels(source):
    return [int(source[i].image[0, 0, 0]) for i in range(len(source))]


def test_everything_below_is_read_sorted_by_name(packed):
    source = open_raw(packed(["b.png", "a/z/y.png", "a/x.PNG", "c.bmp"]))
    assert source.names == ("a/x.PNG", "a/z/y.png", "b.png", "c.bmp")
    assert levels(source) == [2, 1, 0, 3]
    assert source.classes is None


def test_hidden_and_other_files_are_passed_over(packed):
    names = ["a.png", ".b.png", ".cache/c.png", "__MACOSX/d.png", "e.txt", "f.npz", "g.pdf"]
    assert open_raw(packed(names)).names == ("a.png",)


def test_class_folders_give_labels(packed):
    source = open_source(packed(["dog/1.png", "cat/1.png", "dog/x/2.png"]))
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, 1]


def test_classes_are_below_the_common_folder(packed):
    source = open_source(packed(["all/pets/dog/1.png", "all/pets/cat/1.png"]))
    assert source.classes == ("cat", "dog")


@pytest.mark.parametrize("names", [["a/1.png", "a/2.png"], ["a/1.png", "b/1.png", "c.png", "d.png"]])
def test_no_labels_where_there_is_one_folder_or_much_lies_in_none(packed, names):
    assert open_source(packed(names)).labels is None


def test_splits(packed):
    path = packed(["train/cat/1.png", "train/dog/2.png", "test/dog/3.png", "train/ant/4.png"])
    train, test = open_source(path), open_source(path, split="test")
    assert train.classes == test.classes == ("ant", "cat", "dog")
    assert train.labels.tolist() == [0, 1, 2]
    assert test.labels.tolist() == [2]
    assert test.images.flatten().unique().tolist() == [2]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_other_names_of_the_held_out_split(packed, name):
    """As in ImageNet; what is in neither is passed over."""
    path = packed(["train/cat/1.png", "train/dog/2.png", f"{name}/dog/3.png", "4.png"])
    train, held_out = open_source(path), open_source(path, split="test")
    assert train.classes == held_out.classes == ("cat", "dog")
    assert train.images.flatten().unique().tolist() == [0, 1]
    assert held_out.images.flatten().unique().tolist() == [2]


def test_of_test_and_validation_neither_is_trained_on(packed):
    both = packed(["train/1.png", "val/2.png", "test/3.png"])
    assert open_source(both).images.flatten().unique().tolist() == [0]
    assert open_source(both, split="test").images.flatten().unique().tolist() == [2]


def test_no_test_split(packed):
    path = packed(["cat/1.png", "dog/2.png"])
    with pytest.raises(DataError, match=f'^{path} has no test split; give .* a folder with "train" and "test"$'):
        open_source(path, split="test")


def test_an_empty_folder(packed):
    path = packed(["a.txt", "b.csv"])
    with pytest.raises(DataError, match=rf"^{path} has no images: 2 files, none with the ending of a picture"):
        open_source(path)


def test_a_folder_with_nothing_in_it(tmp_path):
    with pytest.raises(DataError, match="has no images: 0 files, .* Give the folder that holds them$"):
        open_source(tmp_path)


def test_one_picture(tmp_path):
    fill(tmp_path, ["a.png", "b.png"])
    source = open_raw(tmp_path / "b.png")
    assert levels(source) == [1]
    assert source.name(0) == "b.png"


def test_links_are_followed_and_loops_end(tmp_path):
    fill(tmp_path, ["set/a/1.png", "other/2.png"])
    (tmp_path / "set/b").symlink_to(tmp_path / "other")
    (tmp_path / "set/a/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/a/broken.png").symlink_to(tmp_path / "gone.png")
    source = open_raw(tmp_path / "set")
    assert source.names == ("a/1.png", "a/broken.png", "b/2.png")
    with pytest.raises(DataError, match="^a/broken.png: No such file or directory$"):
        source[1]


AGAIN = {  # links, and what is told of them
    "a split": ({"set/test": "set/train"}, ["train/1.png"], ["test"]),
    "before in the order": ({"set/a": "set/train"}, ["train/1.png"], ["a"]),
    "two links": ({"set/dir": "other", "set/dir2": "other"}, ["dir/2.png", "train/1.png"], ["dir2"]),
    "a link into another": ({"set/a": "other", "set/b": "other/x"}, ["a/2.png", "a/x/3.png", "train/1.png"], ["b"]),
    "a loop": ({"set/train/up": "set"}, ["train/1.png"], ["train/up"]),
    "hidden": ({"set/.old": "set/train"}, ["train/1.png"], []),
}  # fmt: skip


@pytest.mark.parametrize("case", AGAIN)
def test_each_real_folder_is_read_once_and_other_links_to_it_are_told(tmp_path, case):
    links, names, told = AGAIN[case]
    fill(tmp_path, ["set/train/1.png", "other/2.png", *(["other/x/3.png"] if "other/x" in links.values() else [])])
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    source = open_raw(tmp_path / "set")
    assert list(source.names) == names
    expected = {f"folders {name}/ (a link to a folder that is read already)": 1 for name in told}
    assert counts(source.passed) == expected


def test_names_that_are_not_utf8_are_printed_with_escapes(tmp_path):
    os.makedirs(tmp_path / "set")
    with open(os.fsencode(tmp_path / "set") + b"/\xff.png", "wb"):
        pass
    with pytest.raises(DataError, match=re.escape(r"cannot be read: \xff.png (not a picture")):
        open_source(tmp_path / "set")
    assert len(open_raw(tmp_path / "set").fingerprint()) == 64


def test_a_damaged_zip(tmp_path):
    fill(tmp_path / "set", ["a.png", "b.png"])
    path = zipped(tmp_path / "set", tmp_path / "set.zip")
    data = bytearray(path.read_bytes())
    data[60] ^= 255  # inside a.png: its checksum fails
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"^1 of 2 images cannot be read: a.png \(Bad CRC-32"):
        open_source(path)
    path.write_bytes(data[:100])
    with pytest.raises(DataError, match=r"set.zip cannot be read as a zip: File is not a zip file"):
        open_source(path)


@pytest.mark.parametrize("at, value, message", [(6, 84, "zip file version 8.4"), (46, 255, "'utf-8' codec can't")])
def test_a_zip_that_zipfile_has_errors_of_its_own_for(tmp_path, at, value, message):
    """The version that is needed, and a name that is said to be UTF-8, in the directory at the end."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("\xe9.png", b"")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + at] = value
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"^.*set.zip cannot be read as a zip: {message}"):
        open_source(path)


def test_room_is_not_taken_for_what_a_zip_only_claims(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", bytes(100))
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02")
    data[start + 20 : start + 24] = (3 * 10**9).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"a.png \(is said to have 3000000000 bytes in a zip of {len(data)}\)"):
        open_source(path)


def test_a_damaged_lzma_zip(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", bytes(range(256)) * 4)
    whole = path.read_bytes()
    for at in range(39, 80):  # behind the name: the properties of the compression, and the stream
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.raises(DataError, match="^1 of 1 images cannot be read: a.png "):
            open_source(path)


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    fill(tmp_path / "set", ["a.png"])
    path = zipped(tmp_path / "set", tmp_path / "set.zip")
    monkeypatch.setattr("undiffuse.data.picture.MAX_BYTES", 10)
    with pytest.raises(DataError, match=r"a.png \(unpacks to more than 10 bytes\)"):
        open_source(path)
