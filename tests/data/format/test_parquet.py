"""Parquet as Hugging Face serves it: one file, or the clone of a data set."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.format.test_arrow import FEATURES, IMAGE, png
from tests.data.test_passed import fill
from undiffuse.data.pack import pack
from undiffuse.data.passed import counts
from undiffuse.data.picture import Reading
from undiffuse.data.source import open_raw, open_source
from undiffuse.errors import DataError, UsageError


def written(path, levels, labels=None, features=FEATURES, per_group=2, column="img"):
    """What `Dataset.to_parquet` writes: the types of the columns in the metadata of the schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(level), "path": f"{level}.png"} for level in levels]
    columns = {"caption": pa.array(["…"] * len(levels)), column: pa.array(cells, IMAGE)}
    if labels is not None:
        columns["fine"] = pa.array(labels, pa.int64())
    table = pa.table(columns)
    if features is not None:
        known = {name: kind for name, kind in features.items() if name in columns}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": known}})})
    pq.write_table(table, path, row_group_size=per_group)
    return path


def levels(source):
    return [int(source[i].image[0, 0, 0]) for i in range(len(source))]


def test_one_file(tmp_path):
    source = open_raw(written(tmp_path / "a.PARQUET", [5, 6, 7, 8, 9], [2, 0, 1, 2, 0]))
    assert [int(source[i].image[0, 0, 0]) for i in (4, 0, 3, 1, 2)] == [9, 5, 8, 6, 7]  # over groups of two rows
    assert (source.labels, source.classes) == ((2, 0, 1, 2, 0), ("ant", "bee", "cow"))
    assert source.name(3) == "row 3"
    with pytest.raises(DataError, match="a.PARQUET has no test split; give the path of the test images"):
        open_raw(tmp_path / "a.PARQUET", "test")


LAYOUTS = {
    "data": ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000.parquet"),
    "a configuration": ("plain/train-00000.parquet", "plain/train-00001.parquet", "plain/test-00000.parquet"),
    "folders": ("default/train/0000.parquet", "default/train/0001.parquet", "default/validation/0000.parquet"),
    "flat": ("train_a.parquet", "train_b.parquet", "dev.parquet"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_clone(tmp_path, case):
    for i, name in enumerate(LAYOUTS[case]):
        written(tmp_path / "set" / name, [3 * i, 3 * i + 1, 3 * i + 2], [0, 1, i])
    fill(tmp_path / "set", {"README.md": b"", ".gitattributes": b"", ".git/config": b"", "assets/a.png": png(1)})
    train, test = open_raw(tmp_path / "set"), open_raw(tmp_path / "set", "test")
    assert levels(train) == [0, 1, 2, 3, 4, 5] and train.labels == (0, 1, 0, 0, 1, 1)
    assert levels(test) == [6, 7, 8] and test.classes == ("ant", "bee", "cow")
    assert counts(train.passed) == {".md": 1, ".png (beside the data)": 1}


def test_without_splits_and_with_a_third(tmp_path):
    for i, name in enumerate(("part-0.parquet", "part-1.parquet")):
        written(tmp_path / "set" / name, [i])
    assert levels(open_raw(tmp_path / "set")) == [0, 1] and open_raw(tmp_path / "set").classes is None
    with pytest.raises(DataError, match="set has no test split"):
        open_raw(tmp_path / "set", "test")
    for i, name in enumerate(("train-0.parquet", "test-0.parquet", "unsupervised-0.parquet")):
        written(tmp_path / "three" / name, [i])
    assert levels(open_raw(tmp_path / "three")) == [0]
    assert counts(open_raw(tmp_path / "three").passed) == {".parquet (give the file itself to read it)": 1}
    written(tmp_path / "three" / "validation-0.parquet", [4])
    assert counts(open_raw(tmp_path / "three").passed) == {
        ".parquet (give the file itself to read it)": 1,
        ".parquet of validation (train is trained on, test is held out)": 1,
    }


def test_several_sets_in_one_clone(tmp_path):
    for name in ("large", "small"):
        written(tmp_path / "set" / name / "train-0.parquet", [1])
    with pytest.raises(DataError, match="set has several data sets: large, small; give the folder of one of them$"):
        open_raw(tmp_path / "set")
    assert len(open_raw(tmp_path / "set/small")) == 1


def test_without_types_in_the_metadata(tmp_path):
    path = written(tmp_path / "a.parquet", [1, 2], features=None)
    assert levels(open_raw(path)) == [1, 2] and open_raw(path).classes is None
    table = pa.table({"picture": [png(4), png(5)], "Label": pa.array([1, 0], pa.int32()), "size": [4, 4]})
    pq.write_table(table, tmp_path / "b.parquet")
    source = open_raw(tmp_path / "b.parquet")
    assert levels(source) == [4, 5] and (source.labels, source.classes) == ((1, 0), ("0", "1"))


COLUMNS = {  # values, labels, classes, what is told
    "words": (["c 10", "c 9", "c 10"], (1, 0, 1), ("c 9", "c 10"), {}),
    "categories": (pa.array(["dog", "cat", "dog"]).dictionary_encode(), (1, 0, 1), ("cat", "dog"), {}),
    "numbers": ([2, 0, 1], (2, 0, 1), ("0", "1", "2"), {}),
    "whole floats": ([1.0, 0.0, 1.0], (1, 0, 1), ("0", "1"), {}),
    "fractions": ([0.5, 0.0, 1.0], None, None, {'columns "label" (neither whole numbers nor words)': 1}),
    "lists": ([[0], [1], [0, 1]], None, None, {'columns "label" (neither whole numbers nor words)': 1}),
}  # fmt: skip


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("case", COLUMNS)
def test_labels_in_a_column_of_that_name(tmp_path, case, typed):
    values, labels, classes, told = COLUMNS[case]
    table = pa.table({"image": pa.array([{"bytes": png(k), "path": ""} for k in range(3)], IMAGE), "label": values}
                     if typed else {"image": [png(k) for k in range(3)], "label": values})  # fmt: skip
    if typed:
        known = {"image": {"_type": "Image"}, "label": {"dtype": "string", "_type": "Value"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": known}})})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_raw(tmp_path / "a.parquet")
    assert (source.labels, source.classes) == (labels, classes) and counts(source.passed) == told


def test_words_for_some_rows(tmp_path):
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": ["cat", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet has a label for 1 of 2 rows; give all or none$"):
        open_raw(tmp_path / "a.parquet")


def test_which_of_several_columns(tmp_path):
    cells = {name: pa.array([{"bytes": png(level), "path": ""}], IMAGE) for name, level in (("image", 1), ("mask", 2))}
    pq.write_table(pa.table(cells), tmp_path / "a.parquet")
    message = "has several columns of pictures: image, mask; choose one with --set data.picture=image"
    with pytest.raises(DataError, match=message):
        open_raw(tmp_path / "a.parquet")
    assert levels(open_raw(tmp_path / "a.parquet", reading=Reading(picture="mask"))) == [2]
    with pytest.raises(DataError, match='has no picture "masks"; give one of image, mask as data.picture$'):
        open_raw(tmp_path / "a.parquet", reading=Reading(picture="masks"))


def test_it_can_be_packed_by_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("undiffuse.data.pack.SHARD", 4 * 4 * 3 * 2)
    path = written(tmp_path / "a.parquet", range(6), [0, 1, 2, 0, 1, 2])
    packed = pack(path, tmp_path / "packed", workers=2)
    assert len(packed.images) == 3 and packed.fingerprint() == open_source(path).fingerprint()


def test_damaged_files(tmp_path):
    path = written(tmp_path / "a.parquet", range(9), range(3) and [0] * 9)
    data = path.read_bytes()
    for length in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=f"^{path}: it cannot be read as parquet: "):
            open_raw(path)
    at = data.index(b"IDAT")
    path.write_bytes(data[:at] + b"xxxx" + data[at + 4 :])
    with pytest.raises(DataError, match=r"of 9 images cannot be read: row "):
        open_source(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(
        DataError, match="a.parquet is a pointer of Git LFS and not the data; fetch it with: git lfs pull$"
    ):
        open_raw(path)


def test_no_pictures_and_no_extra(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet has the columns text, n; expected one of type Image$"):
        open_raw(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r'^this data needs pyarrow.parquet; .* pip install "undiffuse\[arrow\]"$'):
        open_raw(tmp_path / "a.parquet")
