"""What is named with the data and not read: each kind with its count, said in one line."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path, PurePosixPath

from undiffuse.data import listing, picture

KINDS = 8  # in the line; the rest is one number
MOST = 32  # endings that are counted one by one
LOOKED_AT = 3  # files of an unknown ending whose first bytes are looked at
# What would make a file readable, by its ending. What is read without any help is known to Pillow alone.
HINTS = (
    dict.fromkeys((".heic", ".heif", ".hif"), "install pillow-heif")
    | dict.fromkeys((".avif", ".avifs"), "install pillow>=11.3")
    | {".jxl": "install pillow-jxl-plugin"}
    | dict.fromkeys((".svg", ".svgz", ".pdf", ".ai", ".eps"), "drawings: turn them into PNG")
    | dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"), "raw: develop them to PNG")
    | dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"), "films: save their frames as pictures")
    | dict.fromkeys((".zip", ".tar", ".tgz", ".tar.gz", ".npz", ".npy", ".parquet"), "give the file itself to read it")
    | dict.fromkeys((".rar", ".7z", ".gz"), "unpack it")
)
LOOKS = "split"  # the noun of what is read as data though it is named like a split
PLURAL = {"class": "classes"}
Open = Callable[[str], BufferedIOBase]


@dataclass(frozen=True)
class Passed:
    """So many files (or frames, arrays, …) that are not read, and which: `.HEIC (install pillow-heif)`."""

    count: int
    what: str
    noun: str = "file"

    def __post_init__(self) -> None:
        object.__setattr__(self, "what", listing.printable(self.what))


def frames(count: int) -> tuple[Passed, ...]:
    """Of animations and of files of several pages."""
    return (Passed(count, "after the first of their file", "frame"),) if count else ()


def line(passed: Iterable[Passed]) -> str:
    """`20 files passed over: 20 .HEIC (install pillow-heif)`; empty where nothing was."""
    groups: defaultdict[str, list[Passed]] = defaultdict(list)
    for each in merged(passed):
        groups[each.noun].append(each)
    said = []
    for noun, kinds in groups.items():
        kinds.sort(key=lambda each: -each.count)
        if noun == LOOKS:
            names = ", ".join(f"{each.what} ({each.count:,})" for each in kinds[:KINDS])
            said.append(f"looks like a split but is read with the rest: {names}{', …' if kinds[KINDS:] else ''}")
            continue
        total = sum(each.count for each in kinds)
        shown = [f"{each.count:,} {each.what}" for each in kinds[:KINDS]]
        if rest := kinds[KINDS:]:
            shown.append(f"{sum(each.count for each in rest):,} of {len(rest)} other kinds")
        name = noun if total == 1 else PLURAL.get(noun, f"{noun}s")
        said.append(f"{total:,} {name} passed over: {', '.join(shown)}")
    return "; ".join(said)


def counts(passed: Iterable[Passed]) -> dict[str, int]:
    """The same for a JSON object."""
    return {
        each.what if each.noun == "file" else f"{PLURAL.get(each.noun, f'{each.noun}s')} {each.what}": each.count
        for each in merged(passed)
    }


def merged(*several: Iterable[Passed]) -> tuple[Passed, ...]:
    """All together, with equal kinds added up."""
    total: Counter[tuple[str, str]] = Counter()
    for each in (each for passed in several for each in passed):
        total[each.what, each.noun] += each.count
    return tuple(Passed(count, what, noun) for (what, noun), count in total.items())


def kinds(names: Iterable[str], open_file: Open | None = None, where: str = "") -> tuple[Passed, ...]:
    """Files by their ending, with what would make them readable; `where` is added for those that are pictures.

    Files of unknown ending are opened to look whether they are pictures.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_ending(name).lower()].append(name)
    found = []
    most = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    for key, group in most[:MOST]:
        shown = {_ending(name) for name in group}
        what = shown.pop() if len(shown) == 1 else key
        hint = where if key in picture.suffixes() else HINTS.get(key) or _looked(key, group, open_file)
        found.append(Passed(len(group), f"{what} ({hint})" if hint else what))
    if rest := most[MOST:]:
        found.append(Passed(sum(len(group) for _, group in rest), "of other endings"))
    return tuple(found)


def beside(root: Path, used: Iterable[str], said: bool = True) -> tuple[Passed, ...]:
    """The files below a folder of another format than pictures, but those that are used: names relative to it.

    They are `said` with one of the splits only.
    """
    if not said:
        return ()
    known, (names, again) = set(used), listing.tree(root)
    left = [name for name in names if name not in known and not listing.is_hidden(name)]
    mine, left = split_own(left, listing.own_folders(names))
    held, left = _other_splits(left, known)
    return (*mine, *held, *linked(again), *kinds(left, lambda name: (root / name).open("rb"), "beside the data"))


def _other_splits(names: list[str], used: set[str]) -> tuple[tuple[Passed, ...], list[str]]:
    """Files such as the used ones that are named for a third split, and the other names."""
    named = listing.splits(map(listing.split_of, used))
    endings = {listing.ending(name) for name in used}
    words = {name: listing.split_of(name) for name in names if len(named) == 2 and listing.ending(name) in endings}
    told = Counter((listing.ending(name), word) for name, word in words.items() if word)
    because = listing.used(named, "{}")
    passed = tuple(Passed(count, f"{suffix} of {word} ({because})") for (suffix, word), count in told.items())
    return passed, [name for name in names if not words.get(name)]


def linked(names: Iterable[str]) -> tuple[Passed, ...]:
    """Links to folders that are read already."""
    return tuple(
        Passed(1, f"{name}/ (a link to a folder that is read already)", "folder")
        for name in names
        if not listing.is_hidden(name)
    )


def split_own(names: list[str], folders: set[str]) -> tuple[tuple[Passed, ...], list[str]]:
    """What lies in folders of undiffuse itself, as passed over, and the other names."""
    if not folders:
        return (), names
    inside: Counter[str] = Counter()
    left = []
    for name in names:
        parts = name.split("/")[:-1]
        folder = next((path for k in range(1, len(parts) + 1) if (path := "/".join(parts[:k])) in folders), None)
        if folder is None:
            left.append(name)
        else:
            inside[folder] += 1
    return tuple(Passed(n, f"in {folder}/ (written by undiffuse)") for folder, n in inside.items()), left


def _ending(name: str) -> str:
    """As it is written; what is not letters and digits is left off: `.jpg…` of `a.jpg?w=200`."""
    name = PurePosixPath(name).name
    whole = "".join(PurePosixPath(name).suffixes[-2:])
    if whole.lower() == ".tar.gz":
        return whole
    suffix = PurePosixPath(name).suffix
    if not suffix or len(suffix) > 12:
        return _cut(name) or "without an ending"
    return suffix if suffix[1:].isalnum() else (_cut(name) or suffix)


def _cut(name: str) -> str:
    """The known ending within a name that goes on after it."""
    parts = re.findall(r"\.[A-Za-z0-9]+(?=[^A-Za-z0-9])", name)
    return next((f"{part}…" for part in parts if part.lower() in picture.suffixes()), "")


def _looked(key: str, group: list[str], open_file: Open | None) -> str:
    """What to do with files that are pictures by their first bytes."""
    if open_file is None:
        return ""
    seen = set()
    for name in group[:LOOKED_AT]:
        try:
            with open_file(name) as file:
                seen.add(picture.recognised(file))
        except Exception:  # a damaged archive raises nearly every type; the file is passed over in any case
            continue
    known = sorted(ending for ending in seen if ending)
    if not known:
        return ""
    if hint := HINTS.get(known[0]):
        return f"they are {known[0]} pictures; {hint}"
    return f"they are pictures; rename them to end in {known[0]}"
