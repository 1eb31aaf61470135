"""The passes of an evaluation: over the reference, over real images in place of samples, and over the samples."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from undiffuse.data.source import Source
from undiffuse.errors import UsageError
from undiffuse.machine import disk, dist, log
from undiffuse.measure import claim
from undiffuse.measure.sets import Floor, Real, Samples
from undiffuse.quality.feature.base import Extractor
from undiffuse.quality.gather import Kept, exchange, gather
from undiffuse.quality.metric.base import METRICS, Features, Gathered, Metric, Moments
from undiffuse.quality.statistics import Statistics

REAL_BATCH = 128  # images of a batch of real ones, whatever --batch is, so that what is kept of them can be used
MOST_KEPT = 2 << 30  # bytes of features of real images that are kept in the cache
MOST_SEEN, MOST_SEEN_BYTES = 10_000, 1 << 30  # images of a set whose pixels are held in memory

# (what, how many) -> inside, what is told how many more are done
Ticking = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
Take = Callable[[str, Features, Int[Tensor, "b"]], None]


def silent(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Shows no progress."""
    return nullcontext(lambda count: None)


@dataclass(frozen=True)
class Judge:
    """An extractor and the metrics on its features."""

    extractor: Extractor
    metrics: tuple[Metric, ...]
    are_named: bool  # else those that are not possible are left out

    @staticmethod
    def of(extractor: Extractor, names: Sequence[str] = ()) -> "Judge":
        """All metrics that these features allow, unless some are named. Raises UsageError for one that they do not."""
        parts = extractor.dimensions.keys()
        found = [METRICS.build(name, trusted=True) for name in names or METRICS.classes]
        other = next((each for each in found if each.part not in parts), None)
        if names and other is not None:
            raise UsageError(
                f"metric {METRICS.name_of(other)} needs {other.part}, and features {extractor.name} have only "
                f"{', '.join(sorted(parts))}; choose other --features, or leave it out"
            )
        possible = sorted({each: None for each in found if each.part in parts}, key=lambda each: each.place)
        return Judge(extractor, tuple(possible), bool(names))


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with: images, statistics of a file, or both (then these stand for the images')."""

    spec: str
    split: str
    images: Real | None
    statistics: Statistics | None = None
    note: str = ""  # what was made of the images

    @cached_property
    def fingerprint(self) -> str | None:
        """That of the images, which are read whole for it; None where there are none."""
        return None if self.images is None else self.images.fingerprint()

    def refuse(self, judge: Judge, n: int) -> None:
        """UsageError where these statistics are of other features, or n samples too few for a metric that is named."""
        known = {} if self.statistics is None else self.statistics.moments
        if self.statistics is not None:
            self.statistics.check(judge.extractor, self.spec)
        for metric in judge.metrics if judge.are_named else ():
            has_moments = metric.part in known and (metric.keeps_reference or metric.keeps) is Moments
            if metric.compares and self.images is None and not has_moments:
                raise UsageError(
                    f"{METRICS.name_of(metric)} looks at each reference image, and {self.spec} has statistics alone; "
                    "give images as DATA, or leave it out"
                )
            metric.enough(n, None if not metric.compares or has_moments or self.images is None else len(self.images))

    def said(self) -> dict[str, Any]:
        """For the protocol."""
        found: dict[str, Any] = {"data": self.spec}
        if self.images is not None:
            found |= {"split": self.split, "images": len(self.images), "fingerprint": self.fingerprint}
        if self.statistics is not None:
            found |= {"statistics": self.statistics.said or "of another tool, which does not say whose features"}
        return found | ({"made": self.note} if self.note else {})


@dataclass(frozen=True, eq=False)
class Against:
    """What samples are compared with on one extractor's features."""

    reference: Gathered
    floor: Gathered | None  # real images in place of samples
    rest: Gathered  # the reference of the floor, which may have had to give images up


class Seen:
    """The first images of a set, held in memory: `most` of them, filled in one pass."""

    def __init__(self, most: int):
        self.most = most
        self._images: list[Tensor] = []
        self._index: list[Tensor] = []

    @staticmethod
    def of(samples: Samples) -> "Seen":
        """As many as there is room for."""
        c, h, w = samples.shape
        return Seen(min(samples.n, MOST_SEEN, max(1, MOST_SEEN_BYTES // (c * h * w))))

    def update(self, images: UInt8[Tensor, "b c h w"], index: Int[Tensor, "b"]) -> None:
        """Adds a batch; `index` are the numbers of its images."""
        few = index < self.most
        self._images.append(images[few].to("cpu"))
        self._index.append(index[few])

    def everywhere(self) -> UInt8[Tensor, "n c h w"]:
        """Those of all processes, in the order of their numbers; the same in each."""
        empty = torch.zeros(0, 0, 0, 0, dtype=torch.uint8, device="cpu")
        own = torch.cat(self._images) if self._images else empty
        numbers = torch.cat([torch.zeros(0, dtype=torch.int64, device="cpu"), *self._index])
        parts = [part for part in exchange((own, numbers)) if len(part[0])]
        return torch.cat([images for images, _ in parts])[torch.cat([index for _, index in parts]).argsort()]


def against(
    judge: Judge, reference: Reference, floor: Floor | None, ticking: Ticking = silent, rows: bool = False
) -> Against:
    """One pass over the reference, and one over the real images apart from it; with `rows` their features are kept."""
    whole, rest = Gathered(judge.metrics, True, rows), Gathered(judge.metrics, is_reference=True)
    apart = Gathered(judge.metrics, rows=rows)
    mask = None if floor is None else floor.apart

    def take(_: str, features: Features, index: Int[Tensor, "b"]) -> None:
        whole.update(features, index)
        if mask is not None:
            inside = mask[index]
            apart.update(features.some(inside), index[inside])
            rest.update(features.some(~inside), index[~inside])

    if reference.images is not None:
        over_real(reference.images, judge.extractor, take, ticking, "reference images", reference.fingerprint)
    if floor is not None and floor.images is not None:
        over_real(floor.images, judge.extractor, lambda _, features, i: apart.update(features, i), ticking, "for floor")
    found = whole.everywhere(exchange)
    if reference.statistics is not None:
        found = found.known(reference.statistics.moments)
    return Against(
        found,
        None if floor is None else apart.everywhere(exchange),
        found if mask is None else rest.everywhere(exchange),
    )


def over_real(
    source: Source, extractor: Extractor, take: Take, ticking: Ticking, what: str, fingerprint: str | None = None
) -> None:
    """The features of real images, kept in the cache by their fingerprint and the extractor's identity."""
    n, kept = len(source), None
    if n * sum(extractor.dimensions.values()) * 4 <= MOST_KEPT:
        key = claim.digest({"data": fingerprint or source.fingerprint(), "batch": REAL_BATCH} | extractor.identity)
        kept = Kept(disk.cache_folder() / "features" / key[:32])
    with ticking(f"{extractor.name}, {n:,} {what}", n) as tick:
        gather(lambda index: source.gather(index)[0], n, [extractor], take, REAL_BATCH, kept, tick)


@dataclass
class Costs:
    """What the rest of n samples (or chains) costs, told after the first batch that had to be drawn.

    `done` counts what this process has seen, of which a sample has `parts`.
    """

    what: str
    n: int
    evaluations: int | None
    batch: int
    say: Callable[[str], None]
    parts: int = 1
    done: int = 0

    def tell(self, seconds: float) -> None:
        """`seconds` is what a batch takes."""
        left = self.n - self.done // self.parts * dist.size()
        cost = f", {left * self.evaluations:,} evaluations of the network" if self.evaluations else ""
        there = f" ({self.n - left:,} are there)" if self.done else ""
        batches = -(-left // (self.batch * dist.size()))
        self.say(f"{left:,} {self.what}{there}{cost}: about {log.duration(seconds * batches)}")


def over_samples(
    samples: Samples,
    judges: Sequence[Judge],
    prefix: int | None = None,
    batch: int = 64,
    kept: Kept | None = None,
    ticking: Ticking = silent,
    say: Callable[[str], None] = log.silent,
    seen: Seen | None = None,
) -> tuple[dict[str, Gathered], dict[str, Gathered]]:
    """One pass over samples: what is gathered of all, and of the first `prefix` of them, by the extractor's name.

    With `seen`, which takes the first images, their features are kept as well.
    """
    rows = seen is not None
    whole = {judge.extractor.name: Gathered(judge.metrics, rows=rows) for judge in judges}
    first = {judge.extractor.name: Gathered(judge.metrics) for judge in judges}
    few = prefix is not None and prefix < samples.n

    def take(name: str, features: Features, index: Int[Tensor, "b"]) -> None:
        whole[name].update(features, index)
        if few:
            inside = index < (prefix or 0)
            first[name].update(features.some(inside), index[inside])

    costs = Costs("samples", samples.n, samples.said.get("evaluations"), batch, say)
    extractors = [judge.extractor for judge in judges]
    with ticking("samples", samples.n) as advance:

        def tick(count: int) -> None:
            costs.done += count
            advance(count)

        see, most = (None, 0) if seen is None else (seen.update, seen.most)
        gather(samples.images, samples.n, extractors, take, batch, kept, tick, costs.tell, see, most)
    all_of = {name: each.everywhere(exchange) for name, each in whole.items()}
    return all_of, {name: each.everywhere(exchange) for name, each in first.items()} if few else all_of


def kept_of(out: Path | None, samples: Samples, images: int) -> Kept | None:
    """Where the finished batches of a set of samples are, in the folder of an evaluation, with the first images."""
    return None if out is None else Kept(out / "parts" / samples.digest[:16], images)
