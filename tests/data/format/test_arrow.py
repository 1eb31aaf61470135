"""Folders of `save_to_disk`: the column of pictures, the names of the classes, and damage named."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from undiffuse.data.pack import pack
from undiffuse.data.source import open_raw, open_source
from undiffuse.errors import Corrupt, DataError, UsageError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {
    "caption": {"dtype": "string", "_type": "Value"},
    "img": {"_type": "Image"},
    "fine": {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"},
}


def png(level, size=(4, 4)):
    data = io.BytesIO()
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(data, "PNG")
    return data.getvalue()


def saved(path, cells, labels, features=FEATURES):
    """What `Dataset.save_to_disk` writes, with two rows in each file."""
    path.mkdir(parents=True)
    files = []
    for first in range(0, max(1, len(cells)), 2):
        rows = slice(first, first + 2)
        columns = {"img": pa.array(cells[rows], IMAGE), "fine": pa.array(labels[rows], pa.int64())}
        table = pa.table({"caption": pa.array(["…"] * len(cells[rows]), pa.string()), **columns})
        files.append({"filename": f"data-{first // 2:05}.arrow"})
        with (
            pa.OSFile(str(path / files[-1]["filename"]), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table)
    (path / "dataset_info.json").write_text(json.dumps({"features": features}))
    (path / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    return path


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "set", [{"bytes": png(i), "path": f"{i}.png"} for i in range(5)], [2, 0, 1, 2, 0])


def test_pictures_and_classes(folder):
    source = open_raw(folder)
    assert [int(source[i].image[0, 0, 0]) for i in (4, 0, 1, 2, 3)] == [4, 0, 1, 2, 3]
    assert source.labels == (2, 0, 1, 2, 0) and source.classes == ("ant", "bee", "cow")
    with pytest.raises(DataError, match="set has no test split; give the path of the test images"):
        open_raw(folder, "test")


def test_it_can_be_packed(folder, tmp_path):
    assert pack(folder, tmp_path / "out").fingerprint() == open_source(folder).fingerprint()


def test_splits(folder, tmp_path):
    folder.rename(tmp_path / "dict-train")
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict-train").rename(tmp_path / "dict/train")
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": ["train"]}')
    assert len(open_raw(tmp_path / "dict")) == 5
    with pytest.raises(DataError, match="dict has no test split; expected the folder .*dict/test with state.json$"):
        open_raw(tmp_path / "dict", "test")


def test_labels(tmp_path):
    cells = [{"bytes": png(0)}] * 2
    assert open_raw(saved(tmp_path / "none", cells, [-1, None])).classes is None
    with pytest.raises(DataError, match="some has a label for 1 of 2 rows; give all or none"):
        open_raw(saved(tmp_path / "some", cells, [0, None]))
    with pytest.raises(DataError, match="large has labels up to 100000; expected 0 to 99999"):
        open_raw(saved(tmp_path / "large", cells, [0, 100_000]))
    unnamed = {"img": {"_type": "Image"}, "fine": {"_type": "ClassLabel"}}
    assert open_raw(saved(tmp_path / "unnamed", cells, [0, 1], unnamed)).classes == ("0", "1")
    only = {"img": {"_type": "Image"}, "fine": {"dtype": "int64", "_type": "Value"}}
    assert open_raw(saved(tmp_path / "only", cells, [0, 1], only)).labels is None


def test_an_empty_one_and_one_without_pictures(tmp_path):
    with pytest.raises(DataError, match="empty has no images in its train split; expected at least one"):
        open_raw(saved(tmp_path / "empty", [], []))
    with pytest.raises(DataError, match="text has the columns caption; expected one of type Image"):
        open_raw(saved(tmp_path / "text", [], [], {"caption": FEATURES["caption"]}))


def test_bad_pictures_and_mixed_sizes(tmp_path):
    cells = [{"bytes": png(1)}, {"bytes": None, "path": "gone.png"}, None, {"bytes": b""}, {"bytes": png(2, (3, 6))}]
    path = saved(tmp_path / "set", cells, [0] * 5)
    with pytest.raises(
        DataError, match=r"^3 of 5 images cannot be read: row 1 \(it holds no bytes but the path gone.png;"
    ):
        open_source(path, size=4)
    assert open_source(path, size=4, skip_bad=True).skipped == ("row 1", "row 2", "row 3")
    with pytest.raises(DataError, match=r"^images differ in size: row 0 is 4x4, row 4 is 6x3"):
        open_source(path, skip_bad=True)


def test_damaged_files(folder):
    path = folder / "data-00001.arrow"
    data = path.read_bytes()
    for length in (0, 10, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match="data-00001.arrow cannot be read as an Arrow stream: "):
            open_raw(folder)
    path.unlink()
    with pytest.raises(DataError, match="data-00001.arrow cannot be read as an Arrow stream: "):
        open_raw(folder)
    (folder / "state.json").write_text("{}")
    with pytest.raises(DataError, match="state.json names no files; expected at least one"):
        open_raw(folder)
    for text in ("{", "[]"):
        (folder / "dataset_info.json").write_text(text)
        with pytest.raises(DataError, match="dataset_info.json is damaged: it is not"):
            open_raw(folder)
    (folder / "dataset_info.json").unlink()
    with pytest.raises(Corrupt, match="dataset_info.json cannot be read"):
        open_raw(folder)


def test_without_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r'^this data needs pyarrow; .* pip install "undiffuse\[arrow\]"$'):
        open_raw(folder)
