"""What every metric shares: the features of images, what is kept of them in one pass, and the metric itself.

A *summary* is what is kept of one set of images; it grows batch by batch, and two of them merge into that of both sets,
so that processes can divide the work. A *metric* compares the summaries of two sets, or looks at one. So a reference is
summarised once for all sample sets and for the floor, and metrics that keep the same thing keep it once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from undiffuse.config import Table
from undiffuse.errors import NotFiniteError, UsageError

F64 = torch.float64
MOST = 100_000  # images whose features are kept


@dataclass(frozen=True, eq=False)
class Features:
    """What an extractor makes of a batch of images: pooled features, class logits, and some of a place each."""

    pool: Float[Tensor, "b d"]
    logits: Float[Tensor, "b k"] | None = None
    spatial: Float[Tensor, "b s"] | None = None

    def __getitem__(self, part: str) -> Float[Tensor, "b _"]:
        """Raises UsageError for what this extractor does not give."""
        found = getattr(self, part)
        if found is None:
            raise UsageError(f"these features have no {part}; choose other --features, or leave this metric out")
        return found

    def parts(self) -> tuple[str, ...]:
        """Which of them there are."""
        return tuple(each.name for each in fields(self) if getattr(self, each.name) is not None)

    def some(self, mask: Bool[Tensor, "b"]) -> "Features":
        """Those of some of the images."""
        return Features(**{part: self[part][mask] for part in self.parts()})


class Summary(ABC):
    """What is kept of one set of images."""

    @property
    @abstractmethod
    def n(self) -> int:
        """How many images are in it."""

    @abstractmethod
    def update(self, rows: Float[Tensor, "b d"], index: Int[Tensor, "b"]) -> None:
        """Adds a batch; `index` are the numbers of its images in their set."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Adds the images of another summary of the same set."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds, to be sent to another process."""

    @staticmethod
    @abstractmethod
    def of_tensors(tensors: Sequence[Tensor]) -> "Summary":
        """The inverse."""


class Moments(Summary):
    """Mean and covariance, in float64, by the pairwise rule of Chan, Golub & LeVeque 1979."""

    def __init__(self) -> None:
        self._n, self._mean, self._scatter = 0, torch.zeros(0, dtype=F64, device="cpu"), None

    @staticmethod
    def of(n: int, mean: Float[Tensor, "d"], covariance: Float[Tensor, "d d"]) -> "Moments":
        """Known ones, of n images; `covariance` is that of n − 1."""
        made = Moments()
        made._n, made._mean = n, mean.to(F64)
        made._scatter = covariance.to(F64) * (n - 1)
        return made

    @property
    def n(self) -> int:
        return self._n

    @property
    def mean(self) -> Float[Tensor, "d"]:
        return self._mean

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Unbiased, that of n − 1, as every FID has it."""
        assert self._scatter is not None and self._n > 1
        return self._scatter / (self._n - 1)

    def update(self, rows: Float[Tensor, "b d"], index: Int[Tensor, "b"]) -> None:
        if not len(rows):
            return
        rows = rows.to("cpu", F64)
        mean = rows.mean(0)
        centred = rows - mean
        self._add(len(rows), mean, centred.T @ centred)

    def merge(self, other: Any) -> None:
        if other._scatter is not None:
            self._add(other._n, other._mean, other._scatter)

    def tensors(self) -> tuple[Tensor, ...]:
        scatter = torch.zeros(0, 0, dtype=F64, device="cpu") if self._scatter is None else self._scatter
        return torch.tensor(self._n, dtype=torch.int64, device="cpu"), self._mean, scatter

    @staticmethod
    def of_tensors(tensors: Sequence[Tensor]) -> "Moments":
        made = Moments()
        n, mean, scatter = tensors
        if int(n):
            made._n, made._mean, made._scatter = int(n), mean, scatter
        return made

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if self._scatter is None:
            self._n, self._mean, self._scatter = n, mean.clone(), scatter.clone()
            return
        total, apart = self._n + n, mean - self._mean
        self._scatter += scatter + torch.outer(apart, apart) * (self._n * n / total)
        self._mean = self._mean + apart * (n / total)
        self._n = total


class Rows(Summary):
    """The features themselves, in the order of the images' numbers, whoever computed them.

    Of more images than `most` only every second is kept, or every fourth, …, so that memory does not grow without end.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most, self.every = most, 1
        self._rows: list[Tensor] = []
        self._index: list[Tensor] = []

    @property
    def n(self) -> int:
        return sum(len(each) for each in self._index)

    def update(self, rows: Float[Tensor, "b d"], index: Int[Tensor, "b"]) -> None:
        index = index.to("cpu")
        kept = index % self.every == 0
        self._rows.append(rows.to("cpu")[kept])
        self._index.append(index[kept])
        self._thin()

    def merge(self, other: Any) -> None:
        self._thin(other.every)
        for rows, index in zip(other._rows, other._index, strict=True):
            kept = index % self.every == 0
            self._rows.append(rows[kept])
            self._index.append(index[kept])
        self._thin()

    def _thin(self, every: int = 1) -> None:
        """Keeps the images whose numbers are multiples of `every`, which doubles until there are not too many."""
        while self.every < every or self.n > self.most:
            self.every = max(every, self.every if self.every < every else 2 * self.every)
            kept = [index % self.every == 0 for index in self._index]
            self._rows = [rows[mask] for rows, mask in zip(self._rows, kept, strict=True)]
            self._index = [index[mask] for index, mask in zip(self._index, kept, strict=True)]

    def tensors(self) -> tuple[Tensor, ...]:
        every = torch.tensor(self.every, dtype=torch.int64, device="cpu")
        if not self.n:
            nothing = torch.zeros(0, 0, dtype=torch.float32, device="cpu")
            return nothing, torch.zeros(0, dtype=torch.int64, device="cpu"), every
        return self.rows().to(torch.float32), self.index(), every

    @staticmethod
    def of_tensors(tensors: Sequence[Tensor]) -> "Rows":
        made, (rows, index, every) = Rows(), tensors
        made.every = int(every)
        if len(index):
            made.update(rows, index)
        return made

    def rows(self) -> Float[Tensor, "n d"]:
        """All that are kept, sorted by number."""
        index, rows = torch.cat(self._index), torch.cat(self._rows)
        order = torch.argsort(index, stable=True)
        self._index, self._rows = [index[order]], [rows[order]]
        return self._rows[0]

    def index(self) -> Int[Tensor, "n"]:
        """The numbers of these images."""
        self.rows()
        return self._index[0]


class Metric(ABC):
    """One file each: a frozen dataclass whose fields are its options.

    The keys of `compute` are known by `labels`, where `{fd}` is what a Fréchet distance on the features is called (FID,
    FD-EffLite0) and `{kd}` the kernel distance; `better` is "lower" or "higher". What else `compute` gives are details
    of these, and `errors` says which of them is the error of a number, as far as one set of samples tells.
    """

    part: ClassVar[str] = "pool"  # of the features
    keeps: ClassVar[type[Summary]] = Rows
    keeps_reference: ClassVar[type[Summary] | None] = None  # where it is another kind
    compares: ClassVar[bool] = True  # with a reference; else the samples alone are looked at
    place: ClassVar[int] = 9  # in a table of scores, the least first
    labels: ClassVar[dict[str, str]]
    better: ClassVar[dict[str, str]]
    errors: ClassVar[dict[str, str]] = {}

    @abstractmethod
    def compute(self, samples: Any, reference: Any) -> dict[str, float]:
        """The numbers; `samples` and `reference` are summaries of the kinds that it keeps (None without reference)."""

    @property
    def least(self) -> int:
        """How many images each set must have."""
        return 2

    def check(self, samples: Summary, reference: Summary | None) -> None:
        """Raises UsageError for sets too small for this metric."""
        self.enough(samples.n, None if reference is None else reference.n)

    def enough(self, samples: int, reference: int | None) -> None:
        """The same for so many images."""
        for n, what in ((samples, "sample"), (reference, "reference image")):
            if n is not None and n < self.least:
                given = f"1 {what} is" if n == 1 else f"{n} {what}s are"
                raise UsageError(
                    f"{given} too few for {METRICS.name_of(self)}, which needs {self.least}; give more, or leave it out"
                )


METRICS = Table("metric", Metric, "undiffuse.quality.metric")


class Gathered:
    """The summaries that some metrics need of one set of images, filled in one pass; with `rows` also the features."""

    def __init__(self, metrics: Iterable[Metric], is_reference: bool = False, rows: bool = False):
        self.is_reference = is_reference
        keys = {self._key(each): None for each in metrics if each.compares or not is_reference}
        keys |= {("pool", Rows): None} if rows else {}
        self._summaries: dict[tuple[str, type[Summary]], Summary] = {key: key[1]() for key in keys}

    def _key(self, metric: Metric) -> tuple[str, type[Summary]]:
        kind = metric.keeps_reference if self.is_reference else None
        return metric.part, kind or metric.keeps

    def update(self, features: Features, index: Int[Tensor, "b"]) -> None:
        """Adds a batch. Raises NotFiniteError, with the number of the first image at fault, for NaN and infinity."""
        for part in {part for part, _ in self._summaries}:
            refuse_not_finite(features[part], index, part)
        for (part, _), summary in self._summaries.items():
            summary.update(features[part], index)

    def merge(self, other: "Gathered") -> None:
        """Adds the images of another part of the same set."""
        for key, summary in self._summaries.items():
            summary.merge(other._summaries[key])

    def everywhere(self, exchange: Callable[[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]) -> "Gathered":
        """The whole set, from the parts that several processes hold; `exchange` gives the tensors of each, in order."""
        made = Gathered((), self.is_reference)
        for key, summary in sorted(self._summaries.items(), key=lambda item: (item[0][0], item[0][1].__name__)):
            first, *others = (key[1].of_tensors(tensors) for tensors in exchange(summary.tensors()))
            for other in others:
                first.merge(other)
            made._summaries[key] = first
        return made

    def known(self, moments: Mapping[str, Moments]) -> "Gathered":
        """The same with these moments, by part of the features, for those that were taken."""
        made = Gathered((), self.is_reference)
        made._summaries = self._summaries | {(part, Moments): each for part, each in moments.items()}
        return made

    def moments(self) -> dict[str, Moments]:
        """Those that were taken, by part of the features."""
        return {part: each for (part, _), each in self._summaries.items() if isinstance(each, Moments)}

    def rows(self) -> Rows | None:
        """The pooled features themselves, where they were kept."""
        found = self._summaries.get(("pool", Rows))
        return found if isinstance(found, Rows) and found.n else None

    def has(self, metric: Metric) -> bool:
        """Whether there is such a summary, with images in it."""
        found = self._summaries.get(self._key(metric))
        return found is not None and found.n > 0

    def of(self, metric: Metric) -> Summary:
        """The summary that the metric looks at."""
        return self._summaries[self._key(metric)]


def refuse_not_finite(rows: Float[Tensor, "b d"], index: Int[Tensor, "b"], part: str) -> None:
    """Raises NotFiniteError for features with NaN or infinity in them."""
    bad = ~rows.isfinite().all(1)
    if bool(bad.any()):
        first = int(index.to(bad.device)[bad][0])
        raise NotFiniteError(
            f"the {part} features of image {first} are not finite, so no distance can be measured; look at that image, "
            "and at the weights of the extractor"
        )


def compute(metric: Metric, samples: Gathered, reference: Gathered | None) -> dict[str, float]:
    """The numbers of one metric on two gathered sets. Raises UsageError for sets too small for it."""
    one, other = samples.of(metric), None if reference is None or not metric.compares else reference.of(metric)
    metric.check(one, other)
    return metric.compute(one, other)
