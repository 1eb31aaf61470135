"""Files that say the class of each picture: StyleGAN's `dataset.json`, Hugging Face's `metadata.csv` or `.jsonl`."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from undiffuse.data.arrange import Arranged
from undiffuse.data.listing import counting
from undiffuse.data.passed import Passed
from undiffuse.errors import DataError

STYLEGAN, TABLES = "dataset.json", ("metadata.csv", "metadata.jsonl")
FILE, LABELS = "file_name", ("label", "labels", "class")  # columns
MAX_CLASSES = 100_000

Label = int | str
Rows = dict[str, Label]  # by the whole name of a picture
Found = tuple[Rows, list[Passed]]


@dataclass(frozen=True)
class Given:
    """The labels that files give, and which files those are; no labels where no folder is a class either."""

    files: tuple[str, ...]
    labels: Rows
    passed: tuple[Passed, ...] = ()  # what is said in them and is no class

    @property
    def classes(self) -> tuple[str, ...]:
        """Numbers stand for themselves, words in the order in which people count."""
        labels = set(self.labels.values())
        if all(isinstance(label, int) for label in labels):
            return tuple(str(number) for number in range(1 + max((int(label) for label in labels), default=-1)))
        return tuple(sorted({str(label) for label in labels}, key=counting))


def named(names: Sequence[str]) -> list[str]:
    """Those that have the name of a file of labels."""
    return [name for name in names if PurePosixPath(name).name.lower() in (STYLEGAN, *TABLES)]


def find(names: Sequence[str], load: Callable[[str], bytes]) -> Given | None:
    """What the files of labels among `names` say, None where there are none. DataError for one that is damaged."""
    files, rows, passed = list[str](), Rows(), list[Passed]()
    for name in named(names):
        read = _stylegan if PurePosixPath(name).name.lower() == STYLEGAN else _table
        found = read(name, load(name))
        if found is None:
            continue
        files.append(name)
        folder = PurePosixPath(name).parent
        rows |= {(folder / file).as_posix(): label for file, label in found[0].items()}
        passed += found[1]
    if not files:
        return None
    numbers = [label for label in rows.values() if isinstance(label, int)]
    if numbers and (min(numbers) < 0 or max(numbers) >= MAX_CLASSES):
        raise DataError(f"{files[0]} has labels from {min(numbers)} to {max(numbers)}; expected 0 to {MAX_CLASSES - 1}")
    return Given(tuple(files), rows, tuple(passed))


def relabelled(spec: str, names: Sequence[str], arranged: Arranged, given: Given) -> Arranged:
    """The pictures of a split with the labels that a file gives them; those that it does not name are left out."""
    if not given.labels:
        return replace(arranged, passed=(*arranged.passed, *given.passed))
    labels = [given.labels.get(names[i]) for i in arranged.chosen]
    known = [(i, label) for i, label in zip(arranged.chosen, labels, strict=True) if label is not None]
    if not known:
        raise DataError(f"{spec}: {given.files[0]} names none of the {len(labels)} pictures; correct or remove it")
    missing = len(labels) - len(known)
    passed = [Passed(missing, f"without a label in {given.files[0]}")] if missing else []
    if absent := len(given.labels.keys() - set(names)):
        passed.append(Passed(absent, f"of {given.files[0]} without a picture", "row"))
    numbers = {name: number for number, name in enumerate(given.classes)}
    chosen = tuple(i for i, _ in known)
    return Arranged(
        chosen,
        tuple(numbers[str(label)] for _, label in known),
        given.classes,
        (*arranged.passed, *given.passed, *passed),
    )


def _stylegan(name: str, data: bytes) -> Found | None:
    """`{"labels": [["00000/img00000000.png", 3], …]}`, or null for none; None for another kind of file."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is damaged: it is not JSON; repair or remove it") from error
    if not isinstance(value, dict) or "labels" not in value:
        return None
    pairs = value["labels"] or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        what = "an object" if isinstance(pairs, dict) else "no such list"
        return {}, [Passed(1, f'{name} (its labels are {what}; expected ["a.png", 3], …)')]
    found = {file: label for file, value in pairs if isinstance(file, str) and (label := _label(value)) is not None}
    # Vectors, such as those of a camera, are no classes.
    others = len(pairs) - len(found)
    return found, [Passed(others, f"of {name} (no whole number and no word)", "label")] if others else []


def _table(name: str, data: bytes) -> Found | None:
    """A row a picture, with its class; None where the rows have no class."""
    try:
        text = data.decode("utf-8-sig")
        rows: list[dict[str, Any]] = (
            list(csv.DictReader(io.StringIO(text, newline="")))
            if name.lower().endswith(".csv")
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{name} is damaged: {error}; repair or remove it") from error
    if any(not isinstance(row, dict) or FILE not in row for row in rows):
        return None
    column = next((each for each in LABELS if any(each in row for row in rows)), None)
    if column is None:
        return None
    said = {str(row[FILE]): row[column] for row in rows if row.get(column) not in (None, "")}
    found = {file: label for file, value in said.items() if (label := _label(value)) is not None}
    others = len(said) - len(found)
    passed = [Passed(others, f"of {name} (no whole number and no word)", "label")] if others else []
    return (found, passed) if found else None


def _label(value: Any) -> Label | None:
    """A number where it is written as one, also with a fraction of 0."""
    if value is None or value == "" or isinstance(value, (list, dict, bool)):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    text = re.sub(r"(?<=\d)\.0+$", "", str(value))
    if isinstance(value, int) or re.fullmatch(r"-[1-9]\d{0,17}|0|[1-9]\d{0,17}", text, re.ASCII):
        return int(text)
    return None if re.fullmatch(r"-?\d*\.\d+(e[-+]?\d+)?", text, re.ASCII | re.IGNORECASE) else str(value)
