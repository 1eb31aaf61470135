"""Examples in archives as webdataset reads them: members whose names are equal up to the first dot are one example."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence

from undiffuse.data.labelfile import MAX_CLASSES
from undiffuse.data.passed import Passed
from undiffuse.errors import DataError

LABELS = (".cls", ".json")  # endings of members that may hold the number of a class

Load = Callable[[str], bytes]


def key_of(name: str) -> str:
    """What the members of one example have in common: all before the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def field_of(name: str) -> tuple[str, str]:
    """`mask`, `png` of `0001.mask.png`: the name of a picture within its example, if it has one, and its ending."""
    _, *fields, ending = name.rpartition("/")[2].split(".")
    return ".".join(field for field in fields if not field.isdecimal()), ending


def one_each(spec: str, names: Sequence[str], wanted: str) -> tuple[list[str], tuple[Passed, ...]]:
    """The pictures of that name; all where each example has one. DataError that asks which, and for one not there."""
    groups: defaultdict[str, set[str]] = defaultdict(set)
    offered = {name: field or ending.lower() for name in names for field, ending in [field_of(name)]}
    for name in names:
        # Numbers are no names: `photo.001.png`, `photo.002.png` are two examples.
        numbers = [part for part in name.rpartition("/")[2].split(".")[1:] if part.isdecimal()]
        groups[".".join([key_of(name), *numbers])].add(offered[name])
    known = sorted(set(offered.values()))
    several = max(groups.values(), key=len)
    if len(several) == 1 and wanted not in known:  # a name that was meant for another data set
        return list(names), ()
    if not wanted:
        raise which(spec, sorted(several), "pictures in each example")
    chosen = [name for name in names if wanted in (offered[name], ".".join(filter(None, field_of(name))))]
    if not chosen:
        raise not_there(spec, wanted, known)
    left = [offered[name] for name in names if name not in set(chosen)]
    return chosen, tuple(Passed(left.count(name), f"{name} (data.picture={wanted})") for name in known if name in left)


def which(spec: str, names: Sequence[str], what: str) -> DataError:
    """Asks for one of several pictures."""
    return DataError(
        f"{spec} has several {what}: {', '.join(names)}; choose one with --set data.picture={names[0]}, "
        f"or --picture {names[0]} for `undiffuse data`"
    )


def not_there(spec: str, wanted: str, names: Sequence[str]) -> DataError:
    return DataError(f'{spec} has no picture "{wanted}"; give one of {", ".join(names)} as data.picture')


def labels_of(names: Sequence[str], load: Load) -> dict[str, int]:
    """By the names of `.cls` and `.json` members, the numbers in them. DataError for a `.cls` with anything else."""
    return {name: label for name in names if (label := _label(name, load(name))) is not None}


def labelled(
    spec: str, names: Sequence[str], labels: dict[str, int]
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """A label for each picture and the names of the classes, or neither; `labels` are by `key_of`."""
    found = [labels.get(key_of(name)) for name in names]
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
