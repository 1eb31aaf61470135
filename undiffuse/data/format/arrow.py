"""A data set of Hugging Face's `datasets`, as `save_to_disk` writes it. Needs the extra `arrow` (pyarrow alone)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from undiffuse.data.format.arrays import MAX_CLASSES, whole
from undiffuse.data.format.folder import Pictures
from undiffuse.data.format.webdataset import not_there, which
from undiffuse.data.labelfile import LABELS
from undiffuse.data.listing import counting, splits
from undiffuse.data.passed import Passed, beside
from undiffuse.data.picture import Reading
from undiffuse.data.source import Format, Source, Split
from undiffuse.errors import DataError, NoSplit
from undiffuse.machine import disk
from undiffuse.strict import extra

INFO, STATE, SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"


class SavedDataset(Format):
    """A folder with `dataset_info.json` and `state.json`, or one with `train` and `test` that are such folders.

    The pictures are those of the column of type Image, the classes those of the first of type ClassLabel, else
    of a column called `label`.
    """

    @staticmethod
    def match(spec: str) -> int:
        path = Path(spec)
        return 2 if (path / STATE).is_file() or (path / SPLITS).is_file() else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        root = path = Path(spec)
        parts = {"train": root}
        if (path / STATE).is_file():
            whole(split, spec)
        else:
            folders = sorted(each.name for each in path.iterdir() if (each / STATE).is_file())
            parts = {word: root / name for word, name in splits(folders).items()}
            path = parts.get(split) or root / next((name for name in folders if name == split), split)
        if not (path / STATE).is_file():
            raise NoSplit(f"{spec} has no {split} split; expected the folder {path} with {STATE}")
        features = _json(path / INFO).get("features") or {}
        images, labels = image_column(str(path), features, reading.picture), label_column(features)
        table = _table(path, [images] if labels is None else [images, labels])
        cells = table.column(images)

        def load(name: str) -> bytes:
            return bytes_of(cells[int(name.removeprefix("row "))].as_py())

        names = tuple(f"row {row}" for row in range(len(cells)))
        found = classes = None
        told: tuple[Passed, ...] = ()
        if labels is not None:
            found, classes, told = labelled(str(path), labels, features[labels], table.column(labels).to_pylist())
        used = [file.relative_to(root).as_posix() for part in {*parts.values(), path} for file in _files(part)]
        near = beside(root, [SPLITS, *used], split == "train")
        return Pictures(names, load, found, classes, reading, (*near, *told))


def _files(folder: Path) -> list[Path]:
    """All that `save_to_disk` writes."""
    return [folder / INFO, folder / STATE, *_arrows(folder)]


def _arrows(folder: Path) -> list[Path]:
    return [folder / Path(str(each["filename"])).name for each in _json(folder / STATE).get("_data_files", [])]


def image_column(spec: str, features: dict[str, Any], wanted: str) -> str:
    """The column of type Image. DataError where there is none, or where it must be chosen from several."""
    names = [name for name, each in features.items() if isinstance(each, dict) and each.get("_type") == "Image"]
    if not names:
        raise DataError(f"{spec} has the columns {', '.join(features) or 'none'}; expected one of type Image")
    if len(names) == 1:
        return names[0]
    if not wanted:
        raise which(spec, names, "columns of pictures")
    if wanted not in names:
        raise not_there(spec, wanted, names)
    return wanted


def bytes_of(cell: Any) -> bytes:
    """The encoded picture of a cell. DataError for one that only names a file."""
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, dict) or cell.get("bytes") is None:
        path = cell.get("path") if isinstance(cell, dict) else None
        raise DataError(f"it holds no bytes but the path {path}; save it with its pictures in it")
    return cell["bytes"]


def _json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file. DataError for anything else."""
    try:
        value = json.loads(disk.read_small(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: it is not a JSON object")
    return value


def column_of(features: dict[str, Any], kind: str) -> str | None:
    """The first column of a type."""
    return next((name for name, each in features.items() if isinstance(each, dict) and each.get("_type") == kind), None)


def _table(path: Path, columns: list[str]) -> Any:
    """Those columns of all files, mapped into memory."""
    pa = extra("pyarrow", "arrow")
    tables = []
    for file in _arrows(path):
        try:
            tables.append(pa.ipc.open_stream(pa.memory_map(str(file))).read_all().select(columns))
            tables[-1].validate(full=True)  # else a damaged offset would be followed out of the file
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(f"{file} cannot be read as an Arrow stream: {error}") from error
    if not tables:
        raise DataError(f"{path / STATE} names no files; expected at least one")
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise DataError(f"{path} has parts whose columns differ: {error}") from error


def label_column(features: dict[str, Any]) -> str | None:
    """The first of type ClassLabel, else the one that is called a label."""
    return column_of(features, "ClassLabel") or next((name for name in features if name.lower() in LABELS), None)


def labelled(
    spec: str, name: str, feature: Any, values: Sequence[Any]
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None, tuple[Passed, ...]]:
    """The label of each row and the names of the classes, of whole numbers or of words; or neither, and why."""
    if any(isinstance(value, str) for value in values):
        words = [value if isinstance(value, str) and value else None for value in values]
        classes = tuple(sorted({word for word in words if word}, key=counting))
        numbers = {word: number for number, word in enumerate(classes)}
        labels = checked_labels(spec, [None if word is None else numbers[word] for word in words])
        return labels, None if labels is None else classes, ()
    known = [value for value in values if value is not None]
    if not all(isinstance(value, int) or (isinstance(value, float) and value.is_integer()) for value in known):
        return None, None, (Passed(1, f'"{name}" (neither whole numbers nor words)', "column"),)
    labels = checked_labels(spec, [None if value is None else int(value) for value in values])
    return labels, None if labels is None else class_names(feature, labels), ()


def checked_labels(spec: str, labels: list[int | None]) -> tuple[int, ...] | None:
    """The column as it is, or None where nothing has a label."""
    known = [label for label in labels if isinstance(label, int) and label >= 0]  # -1 is how `datasets` writes none
    if not known:
        return None
    if len(known) < len(labels):
        raise DataError(f"{spec} has a label for {len(known)} of {len(labels)} rows; give all or none")
    if max(known) >= MAX_CLASSES:
        raise DataError(f"{spec} has labels up to {max(known)}; expected 0 to {MAX_CLASSES - 1}")
    return tuple(known)


def class_names(feature: Any, labels: tuple[int, ...]) -> tuple[str, ...]:
    """The names that the data gives its classes, else their numbers."""
    given = feature.get("names") if isinstance(feature, dict) else None
    names = tuple(str(name) for name in given) if isinstance(given, list) else ()
    return names if len(names) > max(labels) else tuple(str(label) for label in range(max(labels) + 1))
