"""Several data sets as one: a specification of several lines, or a pattern such as `photos/*.jpg`."""

import glob
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedIOBase
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from undiffuse.data.format.folder import Files, pictures
from undiffuse.data.levels import Own, combined
from undiffuse.data.listing import is_hidden, is_picture
from undiffuse.data.made import Made, summed
from undiffuse.data.passed import Passed, kinds, line, merged
from undiffuse.data.picture import Reading
from undiffuse.data.source import Format, Item, Source, Split, is_readable, open_raw
from undiffuse.errors import DataError, NoSplit, UsageError, counted


@dataclass(frozen=True, eq=False)
class Joined(Source):
    """The images of one source after those of the other. Classes are joined by name, and dropped if a part has none."""

    parts: tuple[Source, ...]
    unmatched: tuple[Passed, ...] = ()  # files that a pattern found and nothing reads
    specs: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        named = [part.classes for part in self.parts]
        if any(names is None for names in named):
            return None
        return tuple(dict.fromkeys(name for names in named for name in names or ()))

    @property
    def skipped(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(name for part in self.parts for name in part.skipped)

    @property
    def reasons(self) -> tuple[tuple[str, str], ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(each for part in self.parts for each in part.reasons)

    @property
    def made(self) -> Made:  # pyright: ignore[reportIncompatibleVariableOverride]
        return summed(*(part.made for part in self.parts))

    @property
    def own(self) -> Own | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        known = [(part.own, len(part)) for part in self.parts if part.own is not None]
        return combined(known) if len(known) == len(self.parts) else None

    @property
    def passed(self) -> tuple[Passed, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        lost = sum(len(part.classes or ()) for part in self.parts) if self.classes is None else 0
        because = (Passed(lost, "because another part of the data has none", "class"),) if lost else ()
        return merged(*(part.passed for part in self.parts), self.unmatched, because)

    def _place(self, index: int) -> tuple[Source, int]:
        for part, end in zip(self.parts, accumulate(map(len, self.parts)), strict=True):
            if index < end:
                return part, index - end + len(part)
        raise IndexError(index)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Item:
        part, inside = self._place(index)
        item, classes = part[inside], self.classes
        if classes is None or part.classes is None or item.label is None:
            return replace(item, label=None)
        return replace(item, label=classes.index(part.classes[item.label]))

    def every_label(self) -> Int[Tensor, "n"] | None:
        if (classes := self.classes) is None:
            return None
        parts = []
        for part in self.parts:
            labels, names = part.every_label(), part.classes or ()
            if labels is None:
                return None
            parts.append(torch.tensor([classes.index(name) for name in names], dtype=torch.int64, device="cpu")[labels])
        return torch.cat(parts)

    def name(self, index: int) -> str:
        part, inside = self._place(index)
        return part.name(inside)

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(part.fingerprint() for part in self.parts).encode()).hexdigest()

    def stamp(self) -> list[tuple[int, int, int]] | None:
        stamps = [part.stamp() for part in self.parts]
        return None if None in stamps else [entry for stamp in stamps for entry in stamp or ()]


def join(specs: list[str]) -> str:
    """One specification of several. Raises DataError for one that has a line break in it."""
    for spec in specs:
        if "\n" in spec:
            raise DataError(f"data {spec!r} has a line break in its name, which undiffuse cannot tell from two names")
    return "\n".join(specs)


def spec_of(data: str | Path | Sequence[str | Path]) -> str:
    """One specification of what a function may be given: a path, a name, or several. Raises UsageError."""
    if isinstance(data, (str, Path)):
        return str(data)
    if not isinstance(data, Sequence) or not data:
        raise UsageError(f"data = {data!r} is not possible; give a path, the name of a set, or a list of them")
    return join([str(each) for each in data])


class Several(Format):
    """Files that are pictures count as one folder of them, so the folders that they lie in are their classes."""

    @staticmethod
    def match(spec: str) -> int:
        return 3 if "\n" in spec or (glob.has_magic(spec) and not Path(spec).exists()) else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        named, unread = _named(spec)
        files = [path for path in named if is_picture(path) and Path(path).is_file()]
        parts, specs, why = list[Source](), list[str](), DataError("")
        known = set(files)
        readers: dict[str, Callable[[], Source]] = {}
        if files:
            readers[f"the {len(files)} files"] = lambda: _files(files, split, reading)
        readers |= {path: partial(open_raw, path, split, reading) for path in named if path not in known}
        for name, read in readers.items():
            try:
                parts.append(read())
                specs.append(name)
            except NoSplit as error:
                if split == "train":
                    raise
                why = error  # one part with a test split is enough
        if not parts:
            raise why
        return Joined(tuple(parts), kinds(unread, open_path), tuple(specs)) if unread or len(parts) > 1 else parts[0]


def _files(files: list[str], split: Split, reading: Reading) -> Source:
    given = Files(files, lambda name: Path(name).read_bytes(), open_path, are_named=True)
    found = pictures(f"the set of {counted(len(files), 'file')}", given, split, reading)
    return replace(found, root=Path())


def open_path(name: str) -> BufferedIOBase:
    return open(name, "rb")


def _named(spec: str) -> tuple[list[str], list[str]]:
    """The paths that are named, each once; and the files that only a pattern named, and that nothing reads."""
    named, unread = dict[str, None](), dict[str, None]()
    for entry in spec.split("\n"):
        matches = _matches(entry)
        for path in [entry] if matches is None else matches:
            strange = matches is not None and Path(path).is_file() and not is_readable(path)
            if not (strange and is_hidden(Path(path).name)):
                (unread if strange else named)[path] = None
    if not named:
        raise DataError(f"{spec.replace(chr(10), ', ')} has no images: {line(kinds(unread, open_path))}")
    return list(named), list(unread)


def _matches(line: str) -> list[str] | None:
    """What a pattern finds; None for the name of one thing."""
    if not glob.has_magic(line) or Path(line).exists():
        return None
    found = sorted(glob.glob(line, recursive=True))
    if not found:
        raise DataError(f"no file matches {line}; check the path, or give the folder itself")
    return found
