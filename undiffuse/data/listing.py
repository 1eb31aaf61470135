"""What names of files and folders say by themselves: which belong to a system, which split, in which order.

One set of rules for folders, zips, tars and databases, whatever made them.
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal

from undiffuse.data import picture
from undiffuse.errors import UsageError

Split = Literal["train", "test"]
# What the two splits are called. Where several held-out ones lie beside each other, the first of these is taken.
TRAIN = ("train", "training")
HELD_OUT = ("test", "testing", "t10k", "val", "valid", "validation", "eval", "evaluation", "dev")
HELD_OUT += ("holdout", "hold-out", "hold_out", "heldout", "held-out", "held_out")
WORDS = "|".join(sorted((*TRAIN, *HELD_OUT), key=len, reverse=True))
# `train`, `Training Set`, `val2017`, `seg_test`.
FOLDER = re.compile(rf"(?:(.*)[-_ .])?({WORDS})(?:[-_ .]?(?:\d+|sets?|images?|imgs?|data|split))?", re.IGNORECASE)
# `trainA`, `test_hr`: of the kind that is named after it.
KIND = re.compile(rf"(?:(.*)[-_ .])?({WORDS})([-_ .].+|(?-i:[A-RT-Z]))", re.IGNORECASE)
INSIDE = re.compile(rf"(?:^|[-_ .])({WORDS})(?=[-_ .\d]|$)", re.IGNORECASE)  # `birds-train-0`

# What systems and their tools put beside the files of users; names that begin with a dot are hidden too.
SYSTEM = frozenset(
    ("__macosx", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin")
    + ("recycler", "system volume information", "lost+found", "icon\r", "@recycle", "@__thumb", "#snapshot")
    + ("network trash folder", "temporary items", "__pycache__", "pax_global_header")
)
# What tar and its relatives make of long names and of holes, where another program unpacks it: `PaxHeaders.123`.
OF_TAR = re.compile(r"(?:paxheaders?|gnusparsefile)(?:\.\d+)?|@longlink", re.IGNORECASE)


def printable(name: str) -> str:
    """A file name need not be UTF-8, but what is printed or kept must be."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


GRID = "grid.png"  # beside samples, all of them in one picture
MARK = ".undiffuse"  # in a folder of samples, so that they are not taken for data; it says what was asked, or nothing
CONFIG = "config.toml"  # what a run folder has, with a checkpoint or its data beside it
RUN = re.compile(r"step-\d{9}|data\.json|log\.jsonl")


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it lies in, belongs to a system or its tools, and not to the data."""
    return any(
        part.startswith((".", "~$")) or part.casefold() in SYSTEM or OF_TAR.fullmatch(part) is not None
        for part in name.split("/")
    )


def inner(name: str) -> str:
    """The name of an archive's member with `/` between its parts, and no `./` or `/` at its start."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def ending(name: str) -> str:
    """`.png` of `a/b.PNG`."""
    return PurePosixPath(name).suffix.lower()


def is_picture(name: str) -> bool:
    """By its ending."""
    return ending(name) in picture.suffixes()


def counting(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A key that sorts as people count: 2 before 10, `Cat` beside `cat`."""
    parts = re.findall(r"\d+|\D+", name.casefold())
    numbers = [part.lstrip("0") if part.isdecimal() and part.isascii() else None for part in parts]
    # Of numbers the longer is the larger, whatever it has of digits.
    keys = [
        (1, 0, part) if digits is None else (0, len(digits), digits)
        for part, digits in zip(parts, numbers, strict=True)
    ]
    return keys, name


def splits(names: Iterable[str]) -> dict[str, str]:
    """The names that stand for "train" and "test", where both are there; only "test" where all are held out.

    Empty where the names are no splits, or are those of several kinds (`several_kinds`).
    """
    sets = _by_kind(names)
    found = [pair for pair in map(_pair, sets.values()) if pair]
    if ("", "") in sets and (plain := _pair(sets["", ""])):
        return plain
    if len(found) == 1:
        return found[0]
    if any(word in words for words in sets.values() for word in TRAIN):
        return {}
    held = next((words for words in sets.values() if len(words) > 1), {})
    return {"test": next(held[word] for word in HELD_OUT if word in held)} if held else {}


def used(named: dict[str, str], form: str) -> str:
    """`train/ is trained on, test/ is held out`, where `form` is `{}/`."""
    kinds, verb = {"train": "trained on", "test": "held out"}, "are" if form.startswith("files") else "is"
    return ", ".join(f"{form.format(name)} {verb} {kinds[word]}" for word, name in named.items())


def several_kinds(names: Iterable[str]) -> list[str]:
    """The training splits of several kinds that each have a held-out one, such as `trainA` and `trainB`; else none."""
    sets = _by_kind(names)
    if ("", "") in sets and _pair(sets["", ""]):
        return []
    found = sorted(pair["train"] for pair in map(_pair, sets.values()) if pair)
    return found if len(found) > 1 else []


def look_like_splits(names: Iterable[str]) -> list[str]:
    """Those that seem to be held out, and, where there are such, those that seem to be for training."""
    found = [(name, word) for name in names for words in _by_kind([name]).values() for word in words]
    return sorted(name for name, _ in found) if any(word in HELD_OUT for _, word in found) else []


def _by_kind(names: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Names by their words for a split, of each kind: what comes before and after the word."""
    sets: dict[tuple[str, str], dict[str, str]] = {}
    for name in sorted(names, key=lambda name: (len(name), name)):
        if found := FOLDER.fullmatch(name) or KIND.fullmatch(name):
            before, word, *after = (part or "" for part in found.groups())
            sets.setdefault((before.casefold(), "".join(after).casefold()), {}).setdefault(word.casefold(), name)
    return sets


def _pair(words: dict[str, str]) -> dict[str, str]:
    train = next((words[word] for word in TRAIN if word in words), None)
    test = next((words[word] for word in HELD_OUT if word in words), None)
    return {} if train is None or test is None else {"train": train, "test": test}


def split_inside(name: str) -> str:
    """The word for a split in a file's name, such as `train` in `birds-Train-0.tar`; empty without one."""
    found = INSIDE.search(PurePosixPath(name).name)
    return found[1].casefold() if found else ""


def split_of(name: str) -> str:
    """The same in a file's name, or of the folder that it lies in."""
    path = PurePosixPath(name)
    found = FOLDER.fullmatch(path.parent.name)
    return split_inside(path.stem) or (found[2].casefold() if found else "")


def is_run(names: Iterable[str]) -> bool:
    """Whether these are the files of a run, in its folder."""
    tops = {name.partition("/")[0] for name in names}
    return CONFIG in tops and any(RUN.fullmatch(top) for top in tops)


def own_folders(names: Iterable[str]) -> set[str]:
    """The folders below that are runs, or samples, of undiffuse: those with a mark, or a configuration and steps."""
    marked, configured, steps = set[str](), set[str](), set[str]()
    for name in names:
        folder, _, last = name.rpartition("/")
        if last == MARK:
            marked.add(folder)
        elif last == CONFIG:
            configured.add(folder)
        elif RUN.fullmatch(last):
            steps.add(folder)
        if RUN.fullmatch(folder.rpartition("/")[2]):
            steps.add(folder.rpartition("/")[0])
    return (marked | (configured & steps)) - {""}  # what is named as data itself is read


def walk(root: Path) -> list[str]:
    """Every file below, links followed; each real folder once, so a loop of links ends."""
    return tree(root)[0]


def tree(root: Path) -> tuple[list[str], list[str]]:
    """The same, and the links that lead to a folder that is there already, by another name."""
    again = list[str]()
    files = [_below(root, folder, name) for folder, names in _folders(root, again) for name in names]
    return files, sorted(_below(root, folder) for folder in again)


def _below(root: Path, *parts: str) -> str:
    return PurePosixPath(Path(*parts).relative_to(root)).as_posix()


def _folders(root: Path, again: list[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Each folder and its files: what is there itself, then what links lead to. `again` is given what comes twice."""
    seen, starts = set[str](), [str(root)]
    twice = [] if again is None else again
    while starts:
        start = starts.pop(0)
        for folder, below, files in os.walk(start):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
                twice.append(folder)
                continue
            seen.add(real)
            below.sort()
            starts += [path for name in below if os.path.islink(path := os.path.join(folder, name))]
            yield folder, files


def refuse_inside(out: Path, data: str, what: str) -> None:
    """UsageError where `out` is, or lies in, a part of the data: it would be read as data the next time.

    `data` is a specification as `open_raw` takes it, `what` the option that names `out`.
    """
    target = Path(os.path.realpath(out))
    for line in data.split("\n"):
        magic = glob.has_magic(line) and not Path(line).exists()
        places = glob.glob(line, recursive=True) if magic else [line]
        above = (out.absolute(), *out.absolute().parents)
        matches = magic and any(fnmatch(str(each), os.path.abspath(line)) for each in above)
        if matches or any(_holds(Path(place), target) for place in places):
            raise UsageError(
                f"{what} {out} lies in the data, {line}, and would be read as data the next time; "
                "give a place outside of it"
            )


def _holds(place: Path, target: Path) -> bool:
    real = Path(os.path.realpath(place))
    if target.is_relative_to(real):
        return place.exists()
    # A link inside may lead to where the target is.
    return place.is_dir() and any(target.is_relative_to(os.path.realpath(folder)) for folder, _ in _folders(place))
