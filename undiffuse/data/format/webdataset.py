"""Several files that are one example: `0001.input.png`, `0001.mask.png`, as webdataset writes them, or `0001_mask.png`.

Only what repeats from example to example is the name of a picture; other dots belong to names as people write them.
"""

import json
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from undiffuse.data.labelfile import MAX_CLASSES
from undiffuse.data.listing import FOLDER, ending
from undiffuse.data.passed import Passed
from undiffuse.errors import DataError

LABELS = (".cls", ".json")  # endings of members that may hold the number of a class

MOST, NEARLY_ALL = 0.5, 0.9  # shares of the examples that have several pictures, so that these are asked about
MARKED = re.compile(r"(.*[^/_-])[_-]+([A-Za-z]+)", re.DOTALL)
ALL = "all"

Load = Callable[[str], bytes]


@dataclass(frozen=True)
class Chosen:
    """The pictures that are read, the example that each belongs to, and what is left out."""

    names: list[str]
    keys: dict[str, str]
    passed: tuple[Passed, ...] = ()


def stem_of(name: str) -> str:
    """All before the last dot of the last part."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.rpartition('.')[0] or last}"


def by_dots(name: str) -> tuple[str, str]:
    """`0001`, `mask` of `0001.mask.png`: the example, and the name of the picture within it, empty if it has none.

    Numbers are no names: `photo.001.png` and `photo.002.png` are two examples.
    """
    folder, slash, last = stem_of(name).rpartition("/")
    first, *parts = last.split(".")
    numbers = [part for part in parts if part.isdecimal()]
    return f"{folder}{slash}{'.'.join([first, *numbers])}", ".".join(part for part in parts if not part.isdecimal())


def by_mark(name: str) -> tuple[str, str]:
    """The same of `0001_mask.png` or `0001-mask.png`."""
    stem = stem_of(name)
    found = MARKED.fullmatch(stem)
    return (found[1], found[2]) if found else (stem, "")


def one_each(spec: str, names: Sequence[str], wanted: str) -> Chosen:
    """The pictures of that name; all where each example has one, or for `all`.

    DataError that asks which, and for a name that is not there.
    """
    every = Chosen(list(names), {name: by_dots(name)[0] for name in names})
    for parse, share in ((by_dots, MOST), (by_mark, NEARLY_ALL)):
        parsed = {name: parse(name) for name in names}
        fields = _fields(parsed, share)
        if fields:
            break
    else:
        return every  # a name that is wanted was meant for another data set
    if not wanted:
        raise which(spec, fields, "pictures in each example", f", or {ALL} to read {ALL} of them")
    if wanted == ALL and ALL not in fields:
        return every
    offered = {name: field or ending(name)[1:] for name, (_, field) in parsed.items()}
    chosen = [name for name in names if wanted in (offered[name], f"{parsed[name][1]}{ending(name)}".lstrip("."))]
    if not chosen:
        raise not_there(spec, wanted, fields)
    kept = set(chosen)
    left = Counter(offered[name] if offered[name] in fields else ending(name) for name in names if name not in kept)
    passed = tuple(Passed(count, f"{field} (data.picture={wanted})") for field, count in sorted(left.items()))
    return Chosen(chosen, {name: parsed[name][0] for name in chosen}, passed)


def _fields(parsed: dict[str, tuple[str, str]], share: float) -> list[str]:
    """The names of pictures that repeat from example to example, where so many of these have several; else none."""
    groups: defaultdict[str, set[str]] = defaultdict(set)
    for name, (key, field) in parsed.items():
        if not FOLDER.fullmatch(field):  # `1_train.png`, `1_test.png` are no one example
            groups[key].add(field or ending(name)[1:])
    counts = Counter(field for fields in groups.values() for field in fields)
    common = {field for field, count in counts.items() if count > 1 and count >= share * len(groups)}
    several = sum(len(fields & common) > 1 for fields in groups.values())
    return sorted(common) if several > 1 and several >= share * len(groups) else []


def which(spec: str, names: Sequence[str], what: str, more: str = "") -> DataError:
    """Asks for one of several pictures."""
    first = shlex.quote(names[0])
    return DataError(
        f"{spec} has several {what}: {', '.join(names)}; choose one with --set data.picture={first}, "
        f"or --picture {first} for `undiffuse data`{more}"
    )


def not_there(spec: str, wanted: str, names: Sequence[str]) -> DataError:
    return DataError(f'{spec} has no picture "{wanted}"; give one of {", ".join(names)} as data.picture')


def labels_of(names: Sequence[str], load: Load) -> dict[str, int]:
    """By the names of `.cls` and `.json` members, the numbers in them. DataError for a `.cls` with anything else."""
    return {name: label for name in names if (label := _label(name, load(name))) is not None}


def candidates(name: str, key: str) -> list[str]:
    """The names, without an ending, that a member with the label of a picture may have; the nearest first.

    `0001.rgb.left`, `0001.rgb`, `0001` for `0001.rgb.left.png`.
    """
    folder, slash, last = stem_of(name).rpartition("/")
    parts = last.split(".")
    return list(dict.fromkeys([*(f"{folder}{slash}{'.'.join(parts[:k])}" for k in range(len(parts), 0, -1)), key]))


def label_stems(names: Sequence[str]) -> dict[str, str]:
    """The names of members with labels without the ending, and without what all of them have: `0001.label.cls`."""
    fields = {by_dots(name)[1] for name in names}
    shared = len(fields) == 1 and len(names) > 1
    return {name: by_dots(name)[0] if shared else stem_of(name) for name in names}


def labelled(
    spec: str, pictures: dict[str, str], labels: dict[str, int]
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """A label for each picture and the names of the classes, or neither.

    `pictures` are names with the keys of their examples, `labels` are by `label_stems`.
    """
    names = list(pictures)
    found = [next((labels[c] for c in candidates(*each) if c in labels), None) for each in pictures.items()]
    known = [label for label in found if label is not None]
    if not known:
        return None, None
    if len(known) < len(found):
        name = next(name for name, label in zip(names, found, strict=True) if label is None)
        raise DataError(
            f"{spec} has a label for {len(known)} of {len(found)} pictures, none for {name}; give all or none"
        )
    if min(known) < 0 or max(known) >= MAX_CLASSES:
        raise DataError(f"{spec} has labels from {min(known)} to {max(known)}; expected 0 to {MAX_CLASSES - 1}")
    return tuple(known), tuple(str(label) for label in range(max(known) + 1))


def _label(name: str, text: bytes) -> int | None:
    """The number in a .cls, or `label` or `cls` of a .json that has one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{name} holds {text[:20]!r}; expected the number of a class") from None
    if name.lower().endswith(".json"):
        value = (
            next((value[key] for key in ("label", "cls") if key in value), None) if isinstance(value, dict) else None
        )
        return value if type(value) is int else None
    if type(value) is not int:
        raise DataError(f"{name} holds {text[:20]!r}; expected the number of a class")
    return value
