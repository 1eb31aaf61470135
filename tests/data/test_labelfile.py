"""Files that say the classes of pictures: what is read of them, and what is told."""

import json

import pytest

from tests.data.test_arrange import classes_of, pictures
from tests.data.test_passed import KEPT, as_folder, as_zip, fill
from undiffuse.data.pack import open_data
from undiffuse.data.passed import counts
from undiffuse.data.source import open_raw
from undiffuse.errors import DataError

STYLEGAN = pictures("00000/img00000000.png", "00000/img00000001.png", "00001/img00000002.png")
PAIRED = [[name, number] for name, number in zip(STYLEGAN, (10, 2, 2), strict=True)]


@pytest.mark.parametrize("kept", KEPT)
def test_labels_of_stylegan(tmp_path, kept):
    path = KEPT[kept](tmp_path, STYLEGAN | {"dataset.json": json.dumps({"labels": PAIRED}).encode()})
    source = open_raw(path)
    assert (source.labels, source.classes) == ((10, 2, 2), tuple(map(str, range(11)))) and source.passed == ()


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("labels", [None, [], [[name, [0.5, 1.0]] for name in STYLEGAN]])
def test_stylegan_without_classes(tmp_path, kept, labels):
    """Its folders are no classes: they hold a thousand pictures each."""
    source = open_raw(KEPT[kept](tmp_path, STYLEGAN | {"dataset.json": json.dumps({"labels": labels}).encode()}))
    assert (source.labels, source.classes, len(source)) == (None, None, 3)


def test_other_labels_are_packed_anew(tmp_path, monkeypatch):
    """The pictures and the names of the classes are the same, so only the labels can tell."""
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    path = as_folder(tmp_path, STYLEGAN)
    for numbers in ([1, 0, 1], [0, 1, 1]):
        pairs = [[name, number] for name, number in zip(STYLEGAN, numbers, strict=True)]
        (path / "dataset.json").write_text(json.dumps({"labels": pairs}))
        assert open_data(path, use_cache=True).labels.tolist() == numbers


@pytest.mark.parametrize("text", [b"[1, 2]", b'{"info": {}}'])
def test_another_json_of_that_name(tmp_path, text):
    source = open_raw(as_folder(tmp_path, STYLEGAN | {"dataset.json": text}))
    assert source.classes == ("00000", "00001") and counts(source.passed) == {".json": 1}


FORMS = {  # labels as they are written, the classes that they are, what is told
    "whole floats": ([1.0, 0.0, 2.0], (1, 0, 2), {}),
    "words": (["dog", "cat", "dog"], (1, 0, 1), {}),
    "numbers as words": (["1", "0", "1.0"], (1, 0, 1), {}),
    "vectors": ([[0.5, 1.0]] * 3, None, {"labels of dataset.json (no whole number and no word)": 3}),
    "fractions": ([0.5, 0.25, 1.5], None, {"labels of dataset.json (no whole number and no word)": 3}),
}  # fmt: skip


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("case", FORMS)
def test_forms_of_labels(tmp_path, kept, case):
    values, labels, told = FORMS[case]
    text = json.dumps({"labels": [list(pair) for pair in zip(STYLEGAN, values, strict=True)]})
    source = open_raw(KEPT[kept](tmp_path, STYLEGAN | {"dataset.json": text.encode()}))
    assert source.labels == labels and counts(source.passed) == told and len(source) == 3


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("text, what", [
    (json.dumps({"labels": dict(PAIRED)}), "an object"), (json.dumps({"labels": [1, 2, 3]}), "no such list"),
])  # fmt: skip
def test_labels_that_are_no_list_of_pairs_are_told_and_folders_are_no_classes(tmp_path, kept, text, what):
    source = open_raw(KEPT[kept](tmp_path, STYLEGAN | {"dataset.json": text.encode()}))
    assert (source.labels, source.classes, len(source)) == (None, None, 3)
    assert counts(source.passed) == {f'dataset.json (its labels are {what}; expected ["a.png", 3], …)': 1}


def test_pictures_that_a_file_of_labels_does_not_name(tmp_path):
    path = as_zip(tmp_path, STYLEGAN | {"dataset.json": json.dumps({"labels": [*PAIRED[1:], ["x.png", 0]]}).encode()})
    source = open_raw(path)
    assert source.labels == (2, 2)
    assert counts(source.passed) == {"without a label in dataset.json": 1, "rows of dataset.json without a picture": 1}
    fill(tmp_path / "none", STYLEGAN | {"dataset.json": b'{"labels": [["x.png", 0]]}'})
    with pytest.raises(DataError, match="none: dataset.json names none of the 3 pictures; correct or remove it$"):
        open_raw(tmp_path / "none")


TABLES = {
    "csv": ("metadata.csv", "file_name,label\n1.png,dog\n2.png,cat\n"),
    "other columns": ("metadata.csv", "width,file_name,label,text\n4,1.png,dog,\"a, b\"\n4,2.png,cat,\n"),
    "windows": ("metadata.csv", "\ufefffile_name,label\r\n1.png,dog\r\n2.png,cat\r\n"),
    "jsonl": ("metadata.jsonl", '{"file_name": "1.png", "label": "dog"}\n{"file_name": "2.png", "label": "cat"}\n'),
    "capitals": ("Metadata.CSV", "file_name,label\n1.png,dog\n2.png,cat\n"),
}  # fmt: skip


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("case", TABLES)
def test_labels_of_hugging_face(tmp_path, kept, case):
    name, text = TABLES[case]
    source = open_raw(KEPT[kept](tmp_path, pictures("1.png", "2.png") | {name: text.encode()}))
    assert classes_of(source) == ({"1.png": "dog", "2.png": "cat"}, ("cat", "dog")) and source.passed == ()


def test_a_table_in_each_split_and_numbers(tmp_path):
    tables = {"train": "file_name,label\n1.png,9\n2.png,10\n", "test": "file_name,label\n3.png,9\n"}
    files = pictures("train/1.png", "train/2.png", "test/3.png")
    path = as_folder(tmp_path, files | {f"{split}/metadata.csv": text.encode() for split, text in tables.items()})
    names = tuple(map(str, range(11)))
    assert classes_of(open_raw(path)) == ({"1.png": "9", "2.png": "10"}, names)
    assert classes_of(open_raw(path, "test")) == ({"3.png": "9"}, names)


@pytest.mark.parametrize("name, text", [
    ("metadata.csv", "file_name,label\n1.png,1.0\n2.png,0.0\n"),  # as pandas writes numbers where some were missing
    ("metadata.jsonl", '{"file_name": "1.png", "label": 1.0}\n{"file_name": "2.png", "label": 0}\n'),
])  # fmt: skip
def test_whole_floats_in_tables(tmp_path, name, text):
    source = open_raw(as_folder(tmp_path, pictures("1.png", "2.png") | {name: text.encode()}))
    assert (source.labels, source.classes) == ((1, 0), ("0", "1"))


def test_fractions_in_a_table_are_told_and_are_no_classes(tmp_path):
    text = b"file_name,label\n1.png,1\n2.png,1.5\n3.png,0\n"
    source = open_raw(as_folder(tmp_path, pictures("1.png", "2.png", "3.png") | {"metadata.csv": text}))
    assert (source.labels, source.classes) == ((1, 0), ("0", "1"))
    assert "labels of metadata.csv (no whole number and no word)" in counts(source.passed)


@pytest.mark.parametrize("label, what", [("-1", "labels from -1 to 0"), ("9" * 5000, None)])
def test_numbers_in_a_table_that_no_class_has(tmp_path, label, what):
    files = pictures("1.png", "2.png") | {"metadata.csv": f"file_name,label\n1.png,{label}\n2.png,0\n".encode()}
    if what is None:  # too long for a number, so a word
        assert label in open_raw(as_folder(tmp_path, files)).classes
        return
    with pytest.raises(DataError, match=what):
        open_raw(as_folder(tmp_path, files))


def test_a_table_without_classes_changes_nothing(tmp_path):
    files = pictures("a/1.png", "b/2.png") | {"metadata.csv": b"file_name,text\na/1.png,hello\n"}
    source = open_raw(as_folder(tmp_path, files))
    assert source.classes == ("a", "b") and counts(source.passed) == {".csv": 1}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("dataset.json", "{", "dataset.json is damaged: it is not JSON; repair or remove it"),
        ("metadata.jsonl", "{\n", "metadata.jsonl is damaged: Expecting property name"),
        ("metadata.csv", "file_name,label\n1.png,\xff", "metadata.csv is damaged: 'utf-8' codec can't decode"),
        ("dataset.json", '{"labels": [["1.png", -1]]}', "dataset.json has labels from -1 to -1; expected 0 to 99999"),
    ],
)
def test_damaged_files_of_labels(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        open_raw(as_folder(tmp_path, pictures("1.png") | {name: text.encode("latin-1")}))
