"""Hugging Face's parquet as it is downloaded: one file, or the clone of a data set. Needs the extra `arrow`."""

import json
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from undiffuse.data.arrange import no_split
from undiffuse.data.format.arrays import whole
from undiffuse.data.format.arrow import bytes_of, image_column, label_column, labelled
from undiffuse.data.format.folder import Pictures
from undiffuse.data.listing import FOLDER, ending, is_hidden, split_inside, splits
from undiffuse.data.passed import Passed, beside
from undiffuse.data.picture import Reading
from undiffuse.data.source import Format, Source, Split
from undiffuse.errors import DataError
from undiffuse.strict import extra

DEPTH = 3  # folders down to the files: a configuration, a split
LOOKED_AT = 16  # folders in a folder
POINTER = b"version https://git-lfs"
GROUPS = 4  # groups of rows that are kept in memory


class Parquet(Format):
    """A `.parquet` file, or a folder such as `data/train-00000-of-00001.parquet` is in.

    The pictures are those of the column of type Image, the classes those of the first of type ClassLabel. In files that
    do not name types, a column with the bytes of pictures, and whole numbers called `label`, are taken.
    """

    @staticmethod
    def match(spec: str) -> int:
        path = Path(spec)
        if path.is_dir():
            return 2 if next(_below(path, DEPTH), None) else 0
        return 2 if ending(spec) == ".parquet" and path.is_file() else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        files, near = _files(spec, split)
        tables = [_open(file) for file in files]
        features = _features(tables[0])
        images = image_column(str(files[0]), features, reading.picture)
        label = label_column(features)
        rows = Rows(tables, images)
        found = classes = None
        if label is not None:
            found, classes, told = labelled(spec, label, features[label], rows.column(label))
            near = (*near, *told)
        names = tuple(f"row {row}" for row in range(sum(table.metadata.num_rows for table in tables)))
        return Pictures(names, rows.load, found, classes, reading, near)


class Rows:
    """Reads by row; a group of rows at a time, of which the last few are kept."""

    def __init__(self, tables: Sequence[Any], images: str):
        self.tables, self.images, self.lock = tables, images, threading.Lock()
        sizes = [table.metadata.row_group(k).num_rows for table in tables for k in range(table.num_row_groups)]
        self.groups = [(table, k) for table in tables for k in range(table.num_row_groups)]
        self.ends = list(accumulate(sizes))
        self.cells = lru_cache(maxsize=GROUPS)(self._cells)

    def load(self, name: str) -> bytes:
        """The encoded picture of `row 17`."""
        row = int(name.removeprefix("row "))
        group = bisect_right(self.ends, row)
        with self.lock:
            cells = self.cells(group)
        return bytes_of(_reading(lambda: cells[row - (self.ends[group - 1] if group else 0)].as_py()))

    def _cells(self, group: int) -> Any:
        table, k = self.groups[group]
        return _reading(lambda: table.read_row_group(k, columns=[self.images]).column(self.images))

    def column(self, name: str) -> list[Any]:
        """All values of a small column."""
        return [value for table in self.tables for value in _reading(partial(table.read, [name]))[name].to_pylist()]


def _reading(read: Callable[[], Any]) -> Any:
    """DataError for what is damaged."""
    pa = extra("pyarrow", "arrow")
    try:
        return read()
    except (pa.ArrowException, OSError, LookupError, ValueError) as error:
        raise DataError(f"it cannot be read as parquet: {' '.join(str(error).split())}") from error


def _open(path: Path) -> Any:
    parquet = extra("pyarrow.parquet", "arrow")
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise DataError(f"{path} is a pointer of Git LFS and not the data; fetch it with: git lfs pull")
    try:
        table = _reading(lambda: parquet.ParquetFile(path))
        rows = [_reading(lambda k=k: table.metadata.row_group(k).num_rows) for k in range(table.num_row_groups)]
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if min(rows, default=0) < 0 or sum(rows) != table.metadata.num_rows or sum(rows) > path.stat().st_size:
        raise DataError(f"{path} is damaged: it is said to have {table.metadata.num_rows} rows")
    return table


def _features(table: Any) -> dict[str, Any]:
    """The types that Hugging Face's metadata gives the columns, else what can be said from the columns themselves."""
    schema = table.schema_arrow
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info.get("info", {}).get("features", {})
    except (ValueError, AttributeError, RecursionError):  # it is for a program, and another one may have written it
        features = {}
    if isinstance(features, dict) and set(features) & set(schema.names):
        return {name: kind for name, kind in features.items() if name in schema.names}
    found: dict[str, Any] = {}
    for column in schema:
        kind = str(column.type)
        if "binary" in kind and not kind.startswith("list"):
            found[column.name] = {"_type": "Image"}
        else:
            found[column.name] = {"_type": "Value"}
    return found


def _below(path: Path, depth: int) -> Iterator[Path]:
    """The parquet files of a folder and of the first folders in it, in order; without tables beside pictures."""
    names = sorted(each for each in path.iterdir() if not is_hidden(each.name))
    for each in names:
        if ending(each.name) == ".parquet" and each.stem.lower() != "metadata" and each.is_file():
            yield each
    if depth > 1:
        for each in [each for each in names if each.is_dir()][:LOOKED_AT]:
            yield from _below(each, depth - 1)


def _files(spec: str, split: Split) -> tuple[list[Path], tuple[Passed, ...]]:
    """The files of a split, and what lies beside all of them."""
    root = Path(spec)
    if root.is_file():
        whole(split, spec)
        return [root], ()
    files = list(_below(root, DEPTH))
    places = {file: _place(file.relative_to(root)) for file in files}
    sets = sorted({folder for folder, _ in places.values()})
    if len(sets) > 1:
        raise DataError(f"{spec} has several data sets: {', '.join(sets)}; give the folder of one of them")
    named = splits({word for _, word in places.values()})
    if named and split not in named:
        raise no_split(spec, split)
    if not named:
        whole(split, spec)
    used = [file for file in files if not named or places[file][1] in named.values()]
    near = beside(root, [file.relative_to(root).as_posix() for file in used], split == "train")
    return [file for file in files if not named or places[file][1] == named[split]], near


def _place(file: Path) -> tuple[str, str]:
    """The folder of a data set, and the word for the split: of `a/train-00000-of-00001.parquet`, `train/0.parquet`."""
    word, folder = split_inside(file.stem), file.parent
    if not word and (found := FOLDER.fullmatch(folder.name)):
        word, folder = found[2].lower(), folder.parent
    return folder.as_posix(), word
