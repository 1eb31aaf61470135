"""Which of a set's pictures belong to a split, and the class of each: follows from their names alone.

The folders below the common one are the classes, or the splits with the classes inside them. A file of labels, where
there is one (`labelfile.py`), goes before the folders.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from undiffuse.data.listing import counting, look_like_splits, printable, several_kinds, split_inside, splits, used
from undiffuse.data.passed import LOOKS, Passed
from undiffuse.errors import DataError, NoSplit

FILES = 'files named "{}"'
SHOWN = 8  # folders, in an error

Folders = tuple[str, ...]


@dataclass(frozen=True)
class Arranged:
    """The places, in the list of names, of the pictures of one split; their labels, the classes, what is left out."""

    chosen: tuple[int, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None
    passed: tuple[Passed, ...] = ()
    above: int = 0  # how many folders are above those of the classes


def no_split(where: str, split: str) -> NoSplit:
    return NoSplit(
        f'{where} has no {split} split; give the path of the {split} images, or a folder with "train" and "test"'
    )


def arrange(spec: str, names: Sequence[str], split: str, by_folder: bool = True) -> Arranged:
    """`names` have `/` between their parts; without `by_folder` no folder is a class. DataError for no such split."""
    paths = [tuple(name.split("/")[:-1]) for name in names]
    root = _common(paths)
    below = {path[len(root)] for path in paths if _is_below(path, root)}
    named, form = splits(below), "{}/"
    if not named and (kinds := several_kinds(below)):
        raise DataError(
            f"{spec} has several training splits: {', '.join(f'{name}/' for name in kinds)}; "
            f"give one of these folders itself, such as {'/'.join((*root, kinds[0]))}/"
        )
    if not named and (inner := _splits_in_each(paths, root, below)):
        paths = [_turned(path, root) for path in paths]
        below, named = {path[len(root)] for path in paths if _is_below(path, root)}, inner
    words = [split_inside(name) for name in names]
    if not named and all(words) and len(found := splits(words)) == 2:
        paths = [(*root, word, *path[len(root) :]) for path, word in zip(paths, words, strict=True)]
        below, named, form = set(words), found, FILES
    if not named:
        if split == "test":
            raise no_split(spec, split)
        everything = range(len(paths))
        found = _by_class(paths, everything) if by_folder else Arranged(tuple(everything), None, None)
        return replace(found, passed=(*found.passed, *_unused(paths, root, words)))
    if split not in named:
        shown = [*(f"{name}/" for name in sorted(below)[:SHOWN]), *(["…"] if len(below) > SHOWN else [])]
        raise NoSplit(
            f"{spec} has no {split} split, only {', '.join(shown)}; "
            f"give one of these folders itself, or --split test for {named['test']}/"
        )
    tops = {word: (*root, name) for word, name in named.items()}
    inside = {word: [i for i, path in enumerate(paths) if path[: len(top)] == top] for word, top in tops.items()}
    # Those of neither split are told with the one that is trained on.
    passed = _beside(paths, root, named, form) if split == "train" or "train" not in named else ()
    if not by_folder:
        return Arranged(tuple(inside[split]), None, None, passed)
    first = "train" if "train" in named else "test"  # whose folders are the classes of both
    trained = _by_class(paths, inside[first])
    found = trained if split == first else _held_out(paths, inside[split], trained)
    return replace(found, passed=(*passed, *found.passed))


def _unused(paths: Sequence[Folders], root: Folders, words: Sequence[str]) -> tuple[Passed, ...]:
    """What looks like a split by its name and is read with the rest."""
    places = Counter(path[len(root)] for path in paths if _is_below(path, root))
    passed = [Passed(places[name], f"{name}/", LOOKS) for name in look_like_splits(places)]
    in_files = Counter(filter(None, words))
    if len(splits(in_files)) == 2:
        passed += [Passed(count, f'files named "{word}"', LOOKS) for word, count in sorted(in_files.items())]
    return tuple(passed)


def _common(paths: Sequence[Folders]) -> Folders:
    """The folder below which they part, whatever lies beside it on the way."""
    root: Folders = ()
    while len(below := {path[len(root)] for path in paths if _is_below(path, root)}) == 1:
        root = (*root, *below)
    return root


def _is_below(path: Folders, root: Folders) -> bool:
    return len(path) > len(root) and path[: len(root)] == root


def _splits_in_each(paths: Sequence[Folders], root: Folders, below: set[str]) -> dict[str, str]:
    """The splits where each class, or nearly each, has its own: `cat/train/…`, `cat/test/…`, `dog/train/…`."""
    depth = len(root) + 1
    each = {name: {path[depth] for path in paths if path[depth - 1 : depth] == (name,) and len(path) > depth}
            for name in below}  # fmt: skip
    named = splits(set().union(*each.values()))
    having = [name for name, inside in each.items() if len(named) == 2 and inside & set(named.values())]
    both = [name for name in having if set(named.values()) <= each[name]]
    return named if len(both) > 1 and 2 * len(having) > len(below) else {}


def _turned(path: Folders, root: Folders) -> Folders:
    """With the split above the class."""
    depth = len(root)
    return (*root, path[depth + 1], path[depth], *path[depth + 2 :]) if len(path) > depth + 1 else path


def _beside(paths: Sequence[Folders], root: Folders, named: dict[str, str], form: str) -> tuple[Passed, ...]:
    """Pictures in neither split."""
    places = Counter(path[len(root)] if _is_below(path, root) else "" for path in paths)
    told = used(named, form)
    return tuple(
        Passed(count, f"in {form.format(place)} ({told})" if place else f"beside the splits ({told})")
        for place, count in sorted(places.items())
        if place not in named.values()
    )


def _by_class(paths: Sequence[Folders], chosen: Sequence[int]) -> Arranged:
    """The folders below the common one are classes, if there are two, and few pictures in none of them.

    Few is no more than a class has on average: those are stray, and left out.
    """
    root = _common([paths[i] for i in chosen])
    inside = [i for i in chosen if _is_below(paths[i], root)]
    classes = tuple(sorted({paths[i][len(root)] for i in inside}, key=counting))
    stray = len(chosen) - len(inside)
    if len(classes) < 2:
        return Arranged(tuple(chosen), None, None)
    if stray * len(classes) > len(inside):
        because = Passed(len(classes), f"because {stray:,} pictures lie in no folder of a class", "class")
        return Arranged(tuple(chosen), None, None, (because,))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = tuple(numbers[paths[i][len(root)]] for i in inside)
    passed = (Passed(stray, "in no folder of a class"),) if stray else ()
    return Arranged(tuple(inside), labels, tuple(map(printable, classes)), passed, len(root))


def _held_out(paths: Sequence[Folders], chosen: Sequence[int], trained: Arranged) -> Arranged:
    """The pictures of the classes that are trained on; all of them, without labels, where none is in a class."""
    if trained.classes is None:
        return Arranged(tuple(chosen), None, None)
    numbers = {name: number for number, name in enumerate(trained.classes)}
    place = {i: printable(paths[i][trained.above]) if len(paths[i]) > trained.above else "" for i in chosen}
    inside = [i for i in chosen if place[i] in numbers]
    if not inside:
        return Arranged(tuple(chosen), None, None)
    others = Counter(place[i] for i in chosen if place[i] not in numbers)
    passed = tuple(
        Passed(count, f"in {name}/ (no class of the training split)" if name else "in no folder of a class")
        for name, count in sorted(others.items())
    )
    return Arranged(tuple(inside), tuple(numbers[place[i]] for i in inside), trained.classes, passed)
