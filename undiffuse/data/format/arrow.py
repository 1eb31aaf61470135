"""A data set of Hugging Face's `datasets`, as `save_to_disk` writes it. Needs the extra `arrow` (pyarrow alone)."""

import json
from pathlib import Path
from typing import Any

from undiffuse.data.format.arrays import MAX_CLASSES, whole
from undiffuse.data.format.folder import Pictures
from undiffuse.data.picture import Reading
from undiffuse.data.source import Format, Source, Split, extra, split_name
from undiffuse.errors import DataError
from undiffuse.machine import disk

INFO, STATE, SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"


class SavedDataset(Format):
    """A folder with `dataset_info.json` and `state.json`, or one with `train` and `test` that are such folders.

    The pictures are those of the first column of type Image, the classes those of the first of type ClassLabel.
    """

    @staticmethod
    def match(spec: str) -> int:
        path = Path(spec)
        return 2 if (path / STATE).is_file() or (path / SPLITS).is_file() else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        path = Path(spec)
        if (path / STATE).is_file():
            whole(split, spec)
        else:
            path = path / (split_name({each.name for each in path.iterdir() if each.is_dir()}, split) or split)
        if not (path / STATE).is_file():
            raise DataError(f"{spec} has no {split} split; expected the folder {path} with {STATE}")
        features = _json(path / INFO).get("features") or {}
        images, labels = _column(features, "Image"), _column(features, "ClassLabel")
        if images is None:
            raise DataError(f"{path} has the columns {', '.join(features) or 'none'}; expected one of type Image")
        table = _table(path, [images] if labels is None else [images, labels])
        cells = table.column(images)

        def load(name: str) -> bytes:
            cell = cells[int(name.removeprefix("row "))].as_py() or {}
            if cell.get("bytes") is None:
                raise DataError(f"it holds no bytes but the path {cell.get('path')}; save it with its pictures in it")
            return cell["bytes"]

        names = tuple(f"row {row}" for row in range(len(cells)))
        found = None if labels is None else _labels(path, table.column(labels).to_pylist())
        classes = None if labels is None or found is None else _classes(features[labels], found)
        return Pictures(names, load, found, classes, reading)


def _json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file. DataError for anything else."""
    try:
        value = json.loads(disk.read_small(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: it is not a JSON object")
    return value


def _column(features: dict[str, Any], kind: str) -> str | None:
    return next((name for name, each in features.items() if isinstance(each, dict) and each.get("_type") == kind), None)


def _table(path: Path, columns: list[str]) -> Any:
    """Those columns of all files, mapped into memory."""
    pa = extra("pyarrow", "arrow")
    files = [path / Path(str(each["filename"])).name for each in _json(path / STATE).get("_data_files", [])]
    tables = []
    for file in files:
        try:
            tables.append(pa.ipc.open_stream(pa.memory_map(str(file))).read_all().select(columns))
            tables[-1].validate(full=True)  # else a damaged offset would be followed out of the file
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(f"{file} cannot be read as an Arrow stream: {error}") from error
    if not tables:
        raise DataError(f"{path / STATE} names no files; expected at least one")
    return pa.concat_tables(tables)


def _labels(path: Path, labels: list[int | None]) -> tuple[int, ...] | None:
    """The column as it is, or None where nothing has a label."""
    known = [label for label in labels if label is not None and label >= 0]  # -1 is how `datasets` writes none
    if not known:
        return None
    if len(known) < len(labels):
        raise DataError(f"{path} has a label for {len(known)} of {len(labels)} rows; give all or none")
    if max(known) >= MAX_CLASSES:
        raise DataError(f"{path} has labels up to {max(known)}; expected 0 to {MAX_CLASSES - 1}")
    return tuple(known)


def _classes(feature: dict[str, Any], labels: tuple[int, ...]) -> tuple[str, ...]:
    names = tuple(str(name) for name in feature.get("names") or ())
    return names if len(names) > max(labels) else tuple(str(label) for label in range(max(labels) + 1))
