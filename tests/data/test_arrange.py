"""Splits, classes and their order: what follows from names and from files of labels, whatever keeps the files."""

import pytest

from tests.data.test_passed import KEPT, PNG, as_folder, as_tar, as_zip, fill
from undiffuse.data import listing
from undiffuse.data.arrange import arrange
from undiffuse.data.passed import counts, line
from undiffuse.data.source import open_raw
from undiffuse.errors import DataError


def pictures(*names):
    return {name: PNG for name in names}


def classes_of(source):
    """The class of each picture by the last part of its name, and all classes in order."""
    if source.labels is None:
        return None, source.classes
    numbers = {source.name(i).rpartition("/")[2]: source.classes[label] for i, label in enumerate(source.labels)}
    return numbers, source.classes


COUNTED = pictures(*(f"{i}/{i}.png" for i in range(12)))
CLASSES = {
    "counted": (COUNTED, tuple(map(str, range(12)))),
    "counted words": (pictures("c 10/1.png", "c 9/2.png", "C 1/3.png"), ("C 1", "c 9", "c 10")),
    "capitals": (pictures("b/1.png", "A/2.png", "a/3.png"), ("A", "a", "b")),
    "a stray": (pictures("a/1.png", "b/2.png", "c.png"), ("a", "b")),
    "as many strays as in a class": (pictures("a/1.png", "b/2.png", "b/4.png", "c.png"), ("a", "b")),
    "below": (pictures("x/y/a/1.png", "x/y/b/2.png", "x/z.png"), ("a", "b")),
    "of a system": (pictures("a/1.png", "b/2.png", "__MACOSX/a/1.png", ".c/3.png"), ("a", "b")),
    "without pictures": (pictures("a/1.png", "b/2.png") | {"notes/c.txt": b""}, ("a", "b")),
    "one": (pictures("a/1.png", "a/2.png"), None),
    "many strays": (pictures("a/1.png", "b/2.png", "c.png", "d.png"), None),
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("case", CLASSES)
def test_class_folders(tmp_path, kept, case):
    files, expected = CLASSES[case]
    source = open_raw(KEPT[kept](tmp_path, files))
    found, classes = classes_of(source)
    assert classes == expected
    if expected is not None:
        told = {name.rpartition("/")[2]: name.split("/")[-2] for name in files if name.count("/")}
        assert found.items() <= told.items() and len(found) == len(source)


def test_why_there_are_no_labels_is_told(tmp_path):
    source = open_raw(as_folder(tmp_path, pictures("a/1.png", "b/2.png", "c.png", "d.png")))
    assert counts(source.passed) == {"classes because 2 pictures lie in no folder of a class": 2}


PAIRS = {
    "train": ("train", "test"), "capitals": ("Train", "TEST"), "training": ("training", "testing"),
    "valid": ("train", "Valid"), "dev": ("TRAIN", "dev"), "eval": ("train", "eval"), "val": ("Training", "val"),
    "evaluation": ("train", "Evaluation"), "validation": ("train", "validation"), "t10k": ("train", "t10k"),
    "set": ("Training Set", "Test Set"), "year": ("train2017", "val2017"), "images": ("train_images", "test-images"),
    "prefix": ("seg_train", "seg_test"), "number": ("train", "test1"), "below": ("data/x/train", "data/x/test"),
}  # fmt: skip


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("case", PAIRS)
def test_names_of_splits(tmp_path, kept, case):
    train, test = PAIRS[case]
    path = KEPT[kept](tmp_path, pictures(f"{train}/cat/1.png", f"{train}/dog/2.png", f"{test}/dog/3.png"))
    assert classes_of(open_raw(path)) == ({"1.png": "cat", "2.png": "dog"}, ("cat", "dog"))
    assert classes_of(open_raw(path, "test")) == ({"3.png": "dog"}, ("cat", "dog"))


@pytest.mark.parametrize("order", [("test", "val", "dev"), ("val", "eval"), ("t10k", "validation"), ("valid", "dev")])
def test_of_several_held_out_splits_one_is_taken_and_the_others_are_told(tmp_path, order):
    path = as_folder(tmp_path, pictures("train/1.png", *(f"{name}/{name}.png" for name in order)))
    held = open_raw(path, "test")
    assert held.names == (f"{order[0]}/{order[0]}.png",)
    used = f"(train/ is trained on, {order[0]}/ is held out)"
    assert counts(open_raw(path).passed) == {f"in {name}/ {used}": 1 for name in order[1:]}


NONE = {  # folders that are classes, because they are no pair of splits
    "train alone": ("train", "bus"), "two of training": ("train", "training"), "test alone": ("test", "rest"),
    "words": ("trains", "tests run"), "two prefixes": ("a_train", "b_test"),
}  # fmt: skip


@pytest.mark.parametrize("case", NONE)
def test_classes_that_look_like_splits(tmp_path, case):
    names = NONE[case]
    source = open_raw(as_folder(tmp_path, pictures(*(f"{name}/1.png" for name in names))))
    assert set(source.classes) == set(names)


def test_held_out_splits_alone_are_not_trained_on(tmp_path):
    path = as_folder(tmp_path, pictures("val/1.png", "test/2.png"))
    message = "has no train split, only test/, val/; give one of these folders itself, or --split test for test/$"
    with pytest.raises(DataError, match=f"^{path} {message}"):
        open_raw(path)
    assert open_raw(path, "test").names == ("test/2.png",)


KINDS = {
    "letters": (["trainA", "trainB", "testA", "testB"], "trainA/, trainB/", "trainA/"),
    "words": (["train_hr", "train_lr", "test_hr", "test_lr"], "train_hr/, train_lr/", "train_hr/"),
    "before": (["x-train", "y-train", "x-val", "y-val"], "x-train/, y-train/", "x-train/"),
    "below": (["a/trainA", "a/trainB", "a/valA", "a/valB"], "trainA/, trainB/", "a/trainA/"),
}  # fmt: skip


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("case", KINDS)
def test_training_splits_of_several_kinds_are_asked_about(tmp_path, kept, case):
    folders, kinds, first = KINDS[case]
    path = KEPT[kept](tmp_path, pictures(*(f"{folder}/{folder[-1]}.png" for folder in folders)))
    for split in ("train", "test"):
        with pytest.raises(DataError) as refused:
            open_raw(path, split)
        assert str(refused.value) == (
            f"{path} has several training splits: {kinds}; give one of these folders itself, such as {first}"
        )


def test_one_kind_or_a_plain_pair_beside_others_is_taken(tmp_path):
    path = as_folder(tmp_path / "one", pictures("train_hr/1.png", "test_hr/2.png"))
    assert (open_raw(path).names, open_raw(path, "test").names) == (("train_hr/1.png",), ("test_hr/2.png",))
    path = as_folder(tmp_path / "plain", pictures("train/1.png", "test/2.png", "train_masks/3.png", "test_masks/4.png"))
    assert (open_raw(path).names, open_raw(path, "test").names) == (("train/1.png",), ("test/2.png",))
    used = "(train/ is trained on, test/ is held out)"
    assert counts(open_raw(path).passed) == {f"in test_masks/ {used}": 1, f"in train_masks/ {used}": 1}


@pytest.mark.parametrize("folders", [["dev", "holdout", "test", "val"], ["dev", "extra", "test"], ["held_out", "test"]])
def test_held_out_splits_beside_other_folders_are_not_trained_on(tmp_path, folders):
    path = as_folder(tmp_path, pictures(*(f"{folder}/1.png" for folder in folders)))
    only = ", ".join(f"{folder}/" for folder in folders)
    with pytest.raises(DataError) as refused:
        open_raw(path)
    assert str(refused.value) == (
        f"{path} has no train split, only {only}; give one of these folders itself, or --split test for test/"
    )
    assert open_raw(path, "test").names == ("test/1.png",)


def test_a_line_for_what_looks_like_a_split_and_is_read(tmp_path):
    path = as_folder(tmp_path / "a", pictures("cat/1.png", "test_hr/2.png", "test_hr/3.png", "trainer/4.png"))
    assert line(open_raw(path).passed) == "looks like a split but is read with the rest: test_hr/ (2)"
    assert counts(open_raw(path).passed) == {"splits test_hr/": 2}
    path = as_folder(tmp_path / "b", pictures("train_0.png", "test_0.png", "cat.png"))
    expected = 'looks like a split but is read with the rest: files named "test" (1), files named "train" (1)'
    assert line(open_raw(path).passed) == expected and len(open_raw(path)) == 3
    for k, names in enumerate(
        [("train/1.png", "bus/2.png"), ("steam train.png", "cat.png"), ("tests/1.png", "b/2.png")]
    ):
        assert open_raw(as_folder(tmp_path / str(k), pictures(*names))).passed == ()


FLAT = {
    "before": ["train_0.png", "train_1.png", "test_0.png", "val_0.png"],
    "after": ["0-Train.png", "1-Train.png", "0-Test.png", "0-Val.png"],
    "counted": ["train0.png", "train1.png", "test0.png", "val0.png"],
    "below": ["x/train.0.png", "x/train.1.png", "x/test.0.png", "x/val.0.png"],
}  # fmt: skip


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("case", FLAT)
def test_splits_by_the_names_of_files(tmp_path, kept, case):
    path = KEPT[kept](tmp_path, pictures(*FLAT[case]))
    train, test = open_raw(path), open_raw(path, "test")
    assert [len(train), len(test)] == [2, 1] and "test" in test.name(0).rpartition("/")[2].lower()
    used = 'files named "train" are trained on, files named "test" are held out'
    assert counts(train.passed) == {f'in files named "val" ({used})': 1} and train.labels is None


def test_splits_by_the_names_of_files_in_class_folders(tmp_path):
    names = [f"{kind}/{split}_{kind}.png" for kind in ("cat", "dog") for split in ("train", "test")]
    path = as_folder(tmp_path, pictures(*names))
    assert classes_of(open_raw(path)) == ({"train_cat.png": "cat", "train_dog.png": "dog"}, ("cat", "dog"))
    assert classes_of(open_raw(path, "test")) == ({"test_cat.png": "cat", "test_dog.png": "dog"}, ("cat", "dog"))


IN_EACH = {
    "one folder more": (["dogs/extra/5.png"], "in extra/"), "a picture in a class": (["dogs/5.png"], "in dogs/"),
    "a stray": (["5.png"], "beside the splits"), "another folder": (["misc/5.png"], "in misc/"),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_EACH)
def test_a_split_in_each_class_and_what_lies_beside(tmp_path, case):
    names = [f"{kind}/{split}/{kind}.png" for kind in ("cats", "dogs") for split in ("Train", "Val")]
    more, where = IN_EACH[case]
    path = as_folder(tmp_path, pictures(*names, *more))
    assert (len(open_raw(path)), len(open_raw(path, "test"))) == (2, 2)
    assert open_raw(path).classes == open_raw(path, "test").classes == ("cats", "dogs")
    assert counts(open_raw(path).passed) == {f"{where} (Train/ is trained on, Val/ is held out)": 1}


def test_a_class_without_a_test_split(tmp_path):
    names = ["cats/Train/1.png", "cats/Val/2.png", "dogs/Train/3.png", "dogs/Val/4.png", "fox/Train/5.png"]
    path = as_folder(tmp_path, pictures(*names))
    assert open_raw(path).classes == ("cats", "dogs", "fox")
    assert open_raw(path, "test").labels == (0, 1)


@pytest.mark.parametrize("kept", KEPT)
def test_what_is_never_a_class(tmp_path, kept):
    """Folders without pictures, and those that only the test split has."""
    files = pictures("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/c/4.png", "train/d/._1.png")
    path = KEPT[kept](tmp_path, files | {"train/e/notes.txt": b"", "train/f/1.json": b"{}", "notes/x.txt": b""})
    assert open_raw(path).classes == open_raw(path, "test").classes == ("a", "b")
    assert "in c/ (no class of the training split)" in counts(open_raw(path, "test").passed)


def test_a_split_in_each_class(tmp_path):
    path = as_folder(tmp_path, pictures("cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png"))
    assert classes_of(open_raw(path)) == ({"1.png": "cat", "3.png": "dog"}, ("cat", "dog"))
    assert classes_of(open_raw(path, "test")) == ({"2.png": "cat", "4.png": "dog"}, ("cat", "dog"))


@pytest.mark.parametrize("kept", KEPT)
def test_classes_are_those_that_are_trained_on(tmp_path, kept):
    names = ["train/a/1.png", "train/b/2.png", "train/3.png", "test/b/4.png", "test/wolf/5.png", "test/6.png"]
    path = KEPT[kept](tmp_path, pictures(*names))
    train, test = open_raw(path), open_raw(path, "test")
    assert classes_of(train) == ({"1.png": "a", "2.png": "b"}, ("a", "b"))
    assert classes_of(test) == ({"4.png": "b"}, ("a", "b"))
    assert counts(train.passed) == {"in no folder of a class": 1}
    assert counts(test.passed) == {"in no folder of a class": 1, "in wolf/ (no class of the training split)": 1}


def test_a_test_split_without_classes(tmp_path):
    path = as_folder(tmp_path, pictures("train/a/1.png", "train/b/2.png", "test/3.png"))
    assert open_raw(path).classes == ("a", "b")
    assert classes_of(open_raw(path, "test")) == (None, None) and len(open_raw(path, "test")) == 1


MADE = {
    "dots": ["./cat/1.png", "./dog/2.png", "./__MACOSX/cat/3.png", "./.hidden/4.png"],
    "backslashes": ["cat\\1.png", "dog\\2.png", "__MACOSX\\cat\\3.png", "dog\\Thumbs.db"],
    "roots": ["/cat/1.png", "//dog/2.png"],
}


@pytest.mark.parametrize("make", [as_zip, as_tar])
@pytest.mark.parametrize("case", MADE)
def test_whatever_made_the_archive(tmp_path, make, case):
    source = open_raw(make(tmp_path, pictures(*MADE[case])))
    assert classes_of(source) == ({"1.png": "cat", "2.png": "dog"}, ("cat", "dog")) and source.passed == ()
    assert [source[i].label for i in range(2)] == [0, 1]


@pytest.mark.parametrize("name", ["SET.ZIP", "Set.Zip"])
def test_endings_without_regard_to_case(tmp_path, name):
    as_zip(tmp_path, pictures("1.PNG", "2.Png")).rename(tmp_path / name)
    assert len(open_raw(tmp_path / name)) == 2
    as_tar(tmp_path, pictures("1.PNG"), "SET.TAR")
    assert len(open_raw(tmp_path / "SET.TAR")) == 1


def test_a_path_goes_before_a_name(tmp_path, monkeypatch):
    fill(tmp_path / "digits", pictures("a.png"))
    monkeypatch.chdir(tmp_path)
    assert len(open_raw("digits")) == 1
    monkeypatch.chdir(tmp_path / "digits")
    assert len(open_raw("digits")) == 1500


def test_as_people_count():
    names = ["x10", "x9", "X1", "x01", "y", "10", "9", "é", "", "x1b2", "x1b10"]
    assert sorted(names, key=listing.counting) == ["", "9", "10", "X1", "x01", "x1b2", "x1b10", "x9", "x10", "y", "é"]
    assert arrange("x", ["10/a", "9/a", "١/a"], "train").classes == ("9", "10", "١")
