"""Shards as webdataset writes them: tar files whose members `0001.jpg`, `0001.cls` are one example.

Each archive is walked once for the places of its pictures; after that any of them is read directly, so the order of
the examples is not bound to that of the files. What a shard says after its end mark is not read.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from undiffuse.data import picture
from undiffuse.data.format.arrays import MAX_CLASSES, whole
from undiffuse.data.format.folder import Pictures
from undiffuse.data.picture import Reading
from undiffuse.data.source import HELD_OUT, Format, Source, Split, split_name
from undiffuse.errors import DataError

LABELS = (".cls", ".json")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
SPLIT = re.compile(rf"(?:^|[-_.])(train|{'|'.join(HELD_OUT)})[-_.]")
LOOKED_AT = 16  # members that tell a shard from another archive
LABEL_BYTES = 2**20


@dataclass(frozen=True)
class Place:
    """Where the bytes of a picture are."""

    path: Path
    offset: int
    size: int


class TarShards(Format):
    """A tar of pictures, a folder of such, or `name-{000..123}.tar`.

    A folder has splits where it holds `train` and `test` with tars, or tars named `a-train-0.tar` and `a-test-0.tar`;
    `val`, `valid` and `validation` are other names of `test`.
    """

    @staticmethod
    def match(spec: str) -> int:
        files = _files(spec, "train") or _files(spec, "test")
        if not files:
            return 0
        named = bool(RANGE.search(spec)) or Path(spec).is_dir()
        return 2 if named or _has_pictures(files[0]) else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        if _is_whole(spec):
            whole(split, spec)
        places: dict[str, Place] = {}
        labels: dict[str, int] = {}
        files = _files(spec, split)
        short = len({path.name for path in files}) == len(files)
        for path in files:
            _index(path, path.name if short else path.as_posix(), places, labels)
        if not places:
            raise DataError(
                f"{spec} has no pictures in the tar files of its {split} split; expected members like 1.jpg"
            )
        return Pictures(tuple(places), lambda name: _read(places[name]), *_labels(spec, places, labels),
                        reading)  # fmt: skip


def _files(spec: str, split: str) -> list[Path]:
    """The shards in order. DataError if one of a range is missing and the first is there."""
    if RANGE.search(spec):
        files = [Path(text) for text in _expand(spec)]
        if not files or not files[0].is_file():
            return []
        if missing := [path for path in files if not path.is_file()]:
            raise DataError(
                f"{spec} names {len(files)} files, and {missing[0]} is missing; give the range that is there"
            )
        return files
    path = Path(spec)
    if path.is_dir():
        return _of_split(_in_folder(path), split) or _in_folder(_split_folder(path, split))
    return [path] if path.suffix == ".tar" and path.is_file() else []


def _in_folder(path: Path) -> list[Path]:
    """The tar files of a folder that holds nothing else to look at: no picture and no folder."""
    names = [each for each in sorted(path.iterdir()) if not each.name.startswith(".")] if path.is_dir() else []
    other = any(each.is_dir() or each.suffix.lower() in picture.suffixes() for each in names)
    return [] if other else [each for each in names if each.suffix == ".tar"]


def _split_folder(path: Path, split: str) -> Path:
    return path / (split_name({each.name for each in path.iterdir() if each.is_dir()}, split) or split)


def _of_split(files: list[Path], split: str) -> list[Path]:
    """Those that are named for the split, where both are there; else all."""
    named = [found[1] if (found := SPLIT.search(path.name)) else "" for path in files]
    wanted = split_name(named, split)
    return [path for path, name in zip(files, named, strict=True) if wanted in (None, name)]


def _is_whole(spec: str) -> bool:
    """Whether there is one split only."""
    files = _in_folder(Path(spec)) if Path(spec).is_dir() else []
    return not Path(spec).is_dir() or (bool(files) and _of_split(files, "test") == files)


def _expand(spec: str) -> Iterator[str]:
    """`a-{08..11}.tar` -> a-08.tar … a-11.tar."""
    found = RANGE.search(spec)
    if found is None:
        yield spec
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expand(f"{spec[: found.start()]}{number:0{len(first)}d}{spec[found.end() :]}")


def _has_pictures(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:") as archive:
            members = [member for _, member in zip(range(LOOKED_AT), archive, strict=False)]
    except (tarfile.TarError, OSError):
        return False
    return any(_is_picture(member) for member in members)


def _is_picture(member: tarfile.TarInfo) -> bool:
    return member.isreg() and PurePosixPath(member.name).suffix.lower() in picture.suffixes()


def _index(path: Path, shard: str, places: dict[str, Place], labels: dict[str, int]) -> None:
    """Adds the pictures of one shard, by `shard.tar/name.jpg`, and its labels, by `shard.tar/name`."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = f"{shard}/{member.name}"
                if _is_picture(member):
                    places[name] = Place(path, member.offset_data, member.size)
                elif member.isreg() and PurePosixPath(name).suffix in LABELS and member.size <= LABEL_BYTES:
                    text = _read(Place(path, member.offset_data, member.size))
                    if (label := _label(name, text)) is not None:
                        labels[_key(name)] = label
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue] — it would keep every header
            end = _read(Place(path, archive.offset, tarfile.BLOCKSIZE))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read as a tar archive: {error}") from error
    if end != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
        raise DataError(f"{path} has no end mark after {archive.offset} bytes; it is cut or damaged")


def _read(place: Place) -> bytes:
    with place.path.open("rb") as file:
        file.seek(place.offset)
        data = file.read(min(place.size, picture.MAX_BYTES))
    if len(data) != place.size:
        raise EOFError(f"{len(data)} bytes, not {place.size}")
    return data


def _key(name: str) -> str:
    """What the members of one example have in common: all before the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def _label(name: str, text: bytes) -> int | None:
    """The number in a .cls, or `label` or `cls` of a .json that has one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{name} holds {text[:20]!r}; expected the number of a class") from None
    if name.endswith(".json"):
        value = (
            next((value[key] for key in ("label", "cls") if key in value), None) if isinstance(value, dict) else None
        )
        return value if type(value) is int else None
    if type(value) is not int:
        raise DataError(f"{name} holds {text[:20]!r}; expected the number of a class")
    return value


def _labels(
    spec: str, places: dict[str, Place], labels: dict[str, int]
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """A label for each picture and the names of the classes, or neither."""
    found = [labels.get(_key(name)) for name in places]
    known = [label for label in found if label is not None]
    if not known:
        return None, None
    if len(known) < len(found):
        name = next(name for name, label in zip(places, found, strict=True) if label is None)
        raise DataError(
            f"{spec} has a label for {len(known)} of {len(found)} pictures, none for {name}; give all or none"
        )
    if min(known) < 0 or max(known) >= MAX_CLASSES:
        raise DataError(f"{spec} has labels from {min(known)} to {max(known)}; expected 0 to {MAX_CLASSES - 1}")
    return tuple(known), tuple(str(label) for label in range(max(known) + 1))
