"""What a model that was trained with labels knows of its classes, and which labels it is told of which images.

A label is a class by its name or its number, or one of three words: `all` is every class in turn, `random` draws them
as often as they were trained on, and `none` says no class. A class that has one of these names, or a number for a name,
is meant first. Unless a label is given, "no class" is said where it was trained; where it was not, one must be given.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from undiffuse.config import Number
from undiffuse.data.source import Source
from undiffuse.errors import DataError, UsageError, nearest
from undiffuse.key import Key, Keys, Seed
from undiffuse.network.base import Conditioning

ALL, RANDOM, NONE = "all", "random", "none"
SHOWN = 12  # classes that a message names

Label = str | SupportsIndex | Sequence[Any] | Tensor | None


class Told(NamedTuple):
    """The label of each image, None for no label, and in words what they are."""

    label: Int[Tensor, "n"] | None
    words: str

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(label=self.label)


@dataclass(frozen=True)
class Classes:
    """`counts` are the training images of each class; `unlabelled` is whether "no class" was trained as well."""

    names: tuple[str, ...]
    counts: tuple[Number, ...]
    unlabelled: bool

    @staticmethod
    def of(source: Source, unlabelled: bool) -> "Classes | None":
        """Those of a training set; None if it has no labels. Raises DataError for a label that is no class."""
        labels = source.every_label()
        if labels is None:
            return None
        names = source.classes or tuple(map(str, range(int(labels.max()) + 1)))
        if labels.min() < 0 or labels.max() >= len(names):
            raise DataError(f"labels {labels.min()} to {labels.max()} for {len(names)} classes; number them from 0")
        return Classes(names, tuple(labels.bincount(minlength=len(names)).tolist()), unlabelled)

    @staticmethod
    def unknown(count: int, unlabelled: bool) -> "Classes":
        """Of a model that says no more than how many it has."""
        return Classes(tuple(map(str, range(count))), (1,) * count, unlabelled)

    def number(self, label: Any, words: tuple[str, ...] = (ALL, RANDOM, NONE)) -> int:
        """The number of a class, by name or number. Raises UsageError, which may propose one of the `words`."""
        if isinstance(label, str) and label in self.names:
            return self._trained(self.names.index(label))
        try:
            number: int = int(label) if isinstance(label, str) and label.isdecimal() else operator.index(label)  # pyright: ignore[reportArgumentType]
        except TypeError:
            number = -1
        if 0 <= number < len(self.names) and not isinstance(label, bool):
            return self._trained(number)
        is_word = isinstance(label, str) and not label.isdecimal()
        near = nearest(str(label), (*words, *self.names)) if is_word else ""
        question = near[: near.index("?") + 1] if "?" in near else ""
        shown = label if isinstance(label, str) and label else repr(label)
        raise UsageError(f"label {shown} is not possible.{question} {self.known()}")

    def none(self) -> int:
        """The number that says no class. Raises UsageError where that was never trained."""
        if not self.unlabelled:
            raise UsageError(f"label none is not possible: this model was never trained so. {self.known()}")
        return len(self.names)

    def _trained(self, number: int) -> int:
        if not self.counts[number]:
            raise UsageError(
                f"label {_named(number, self.names[number])} is not possible: no picture of that class was trained on"
            )
        return number

    @property
    def trained(self) -> list[int]:
        """The numbers of the classes that had pictures."""
        return [number for number, count in enumerate(self.counts) if count]

    def known(self) -> str:
        """`This model knows 0 cat, 1 dog`."""
        return f"This model knows {self.listed()}"

    def listed(self) -> str:
        """`0 cat, 1 dog`; of many the first and the last."""
        more = f" … {len(self.names) - 1} {self.names[-1]}" if len(self.names) > SHOWN else ""
        shown = ", ".join(_named(i, name) for i, name in enumerate(self.names[: SHOWN - 1 if more else SHOWN]))
        return shown + more

    def untrained(self) -> str:
        """The classes that had no pictures, empty where all had."""
        bare = [_named(number, name) for number, name in enumerate(self.names) if not self.counts[number]]
        return ", ".join(bare[:SHOWN]) + (f" and {len(bare) - SHOWN} more" if len(bare) > SHOWN else "")

    def random(self, keys: Keys) -> Int[Tensor, "n"]:
        """Classes as often as they were trained on; that of an image depends on its key alone."""
        counts = torch.tensor(self.counts, dtype=torch.float64, device="cpu")
        share = (counts / counts.sum()).cumsum(0)
        # The first class whose sum is above; one that was never trained on has no room of its own.
        return torch.searchsorted(share, keys.fold("label").uniform(), right=True).clamp(max=len(counts) - 1)

    def mapped(self, labels: Int[Tensor, "n"], names: tuple[str, ...] | None, what: str) -> Int[Tensor, "n"]:
        """Labels of another data set as ours, by the names of the classes. Raises DataError for one that we lack."""
        theirs = names or tuple(map(str, range(int(labels.max()) + 1)))
        ours = {self.names[number]: number for number in self.trained}
        if labels.min() < 0 or labels.max() >= len(theirs):
            raise DataError(
                f"{what} has labels {labels.min()} to {labels.max()} for {len(theirs)} classes; number them from 0"
            )
        table = torch.tensor([ours.get(name, -1) for name in theirs], dtype=torch.int64, device="cpu")
        found = table[labels]
        if bool((found < 0).any()):
            strange = sorted({theirs[i] for i in labels[found < 0].tolist()})
            listed = ", ".join(f'"{name}"' for name in strange[:SHOWN])
            raise DataError(
                f"{what} has classes that the model was not trained on: {listed}. {self.known()}. Give other data, or "
                "one --label for all images"
            )
        return found


def _named(number: int, name: str) -> str:
    return name if name == str(number) else f"{number} {name}"


def told(classes: Classes | None, label: Label, n: int, seed: Seed = 0) -> Told:
    """The labels of n images that are drawn. Raises UsageError for one that is not known, or is missing.

    With `all` the first n / classes images are of class 0, the next of class 1, and so on.
    """
    if classes is None:
        if label is None or (isinstance(label, str) and label == NONE):
            return Told(None, NONE)
        raise UsageError(f"label {label} is not possible: this model was trained without labels")
    if label is None:
        if classes.unlabelled:
            return Told(None, NONE)
        raise UsageError(f"this model was never trained without a label; give one, all or random. {classes.known()}")
    if isinstance(label, str) or (isinstance(label, SupportsIndex) and getattr(label, "ndim", 0) == 0):
        return _one(classes, label, n, seed)
    each: Any = label.tolist() if hasattr(label, "tolist") else label  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(each, (list, tuple, range)):
        raise UsageError(f"label {label!r} is not possible; give a class, or a list of one for each image")
    numbers = [_number_or_none(classes, one) for one in each]
    if len(numbers) != n:
        raise UsageError(f"{len(numbers)} labels were given for {n} images; give one for each, or a single one")
    return Told(torch.tensor(numbers, dtype=torch.int64, device="cpu"), "as given")


def _number_or_none(classes: Classes, label: Any) -> int:
    """One of a list, in which None and "none" are no class."""
    if label is None or (isinstance(label, str) and label == NONE and NONE not in classes.names):
        return classes.none()
    return classes.number(label, (NONE,))


def drawn(classes: Classes | None, n: int, seed: Seed = 0) -> Told:
    """The labels of n images that stand for what the model draws: each class as often as in training."""
    if classes is None:
        return Told(None, NONE)
    return Told(classes.random(Key.each(seed, n)), f"{RANDOM}, as often as in training")


def _one(classes: Classes, label: str | SupportsIndex, n: int, seed: Seed) -> Told:
    if label not in classes.names:
        if label == NONE:
            classes.none()
            return Told(None, NONE)
        if label == ALL:
            if n % len(classes.trained):
                raise UsageError(f"{n} images cannot be divided over {len(classes.trained)} classes; give a multiple")
            numbers = torch.tensor(classes.trained, dtype=torch.int64, device="cpu")
            return Told(numbers.repeat_interleave(n // len(numbers)), ALL)
        if label == RANDOM:
            return drawn(classes, n, seed)
    number = classes.number(label)
    return Told(torch.full((n,), number, dtype=torch.int64, device="cpu"), _named(number, classes.names[number]))


def told_of(
    classes: Classes | None, source: Source, index: Int[Tensor, "n"], label: Label = None, seed: Seed = 0
) -> Told:
    """The labels of images of a data set that are measured: its own, unless others are given.

    Where it has none they are said to have no class, if that was trained; else labels are drawn, and the bound is one
    of the images all the same (by Jensen's inequality), if a looser one.
    """
    if classes is None or label is not None:
        return told(classes, label, len(index), seed)
    labels = source.every_label()
    if labels is not None:
        return Told(classes.mapped(labels[index], source.classes, "the data"), "of the data")
    return Told(None, NONE) if classes.unlabelled else drawn(classes, len(index), seed)
