"""`undiffuse eval`: from what a user names to the scores of a model, or of pictures by whatever made them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from undiffuse.data import made, remark
from undiffuse.data.format.several import join
from undiffuse.data.picture import PLAIN, Reading
from undiffuse.data.source import ArraySource
from undiffuse.errors import DataError, UsageError
from undiffuse.machine import dist, log
from undiffuse.machine.device import choose
from undiffuse.measure import sets
from undiffuse.measure.passes import Judge, Reference, Ticking, silent
from undiffuse.measure.scores import Result, score
from undiffuse.measure.sets import Drawing, Real, Samples, Shape
from undiffuse.model.load import holds_model, load
from undiffuse.model.model import Model, Steps
from undiffuse.quality import statistics
from undiffuse.quality.feature.base import open_features
from undiffuse.quality.metric.base import Gathered
from undiffuse.quality.statistics import Statistics
from undiffuse.strict import whole

DRAWN = 10_000  # images of a model, unless n says another number

Given = Model | Tensor | str | Path


@dataclass(frozen=True)
class Query:
    """What samples are judged by: extractors, metrics (all that are possible unless some are named), and reference.

    `feature_weights` and `resize` are those of extractors that have such options; `reading` says how pictures are read.
    """

    features: tuple[str, ...] = ("auto",)
    metrics: tuple[str, ...] = ()
    feature_weights: Path | None = None
    resize: str | None = None
    split: str = "train"
    reading: Reading | None = None
    skip_bad: bool = False

    def judges(self, device: torch.device, shape: Shape) -> list[Judge]:
        """With their weights. Raises UsageError for images that one of them cannot see."""
        found = [open_features(name, device, self.feature_weights, self.resize, shape) for name in self.features]
        for extractor in found:
            extractor.check(shape)
        return [Judge.of(extractor, self.metrics) for extractor in found]


def evaluate(
    samples: Given,
    data: str | Path | Sequence[str | Path],
    query: Query | None = None,
    *,
    n: SupportsIndex | None = None,
    steps: Steps = None,
    solver: str | None = None,
    eta: float | int | None = None,
    label: str | SupportsIndex | None = None,
    seed: SupportsIndex = 0,
    seeds: SupportsIndex = 1,
    batch: SupportsIndex = 64,
    out: Path | None = None,
    keep_images: bool = False,
    save_statistics: Path | None = None,
    named: str | None = None,
    device: str = "auto",
    ticking: Ticking = silent,
    say: Callable[[str], None] = log.silent,
) -> Result:
    """How near samples are to real images, by every metric on the features of each extractor.

    `samples` is a model, or its path or name; or uint8 images [n, c, h, w]; or a folder, zip or npz of pictures that
    anything made. `data` is the reference: images, or an npz of statistics. A model draws n images for each of `seeds`
    seeds from `seed` on, as `Model.sample` does. With `out` a stopped evaluation goes on, and its `keep_images` writes
    them there; `save_statistics` is a file for those of the reference. `named` is what a protocol calls the model.
    Raises UsageError, DataError, Corrupt, NotFiniteError.
    """
    query, count, batch = query or Query(), whole("seeds", seeds, 1), whole("batch", batch, 1)
    n = None if n is None else whole("n", n, 2)
    if keep_images and out is None:
        raise UsageError("the images that are kept have no place; give --out FOLDER too")
    model = samples if isinstance(samples, Model) else None
    if isinstance(samples, (str, Path)) and holds_model(samples):
        model = load(samples, device)
    if model is not None:
        how, first = Drawing(steps, solver or "ancestral", eta, label), whole("seed", seed)
        every = [sets.drawn_by(model, how, n or DRAWN, first + k) for k in range(count)]
    else:
        given = {"seeds": None if count == 1 else count, "steps": steps, "eta": eta, "label": label}
        _refuse_for_pictures(samples, given)
        every = [_pictures(samples, n, query.reading or PLAIN, say)]
    reading = query.reading or (PLAIN if model is None else model.data.reading)
    read = partial(_real, _spec(data), every[0].shape, reading, query.skip_bad, say)
    reference = _reference(_spec(data), query.split, read)
    floor = None if reference.images is None else sets.floor(reference.images, query.split, every[0].n, read)
    judges = query.judges(choose(device) if model is None else model.device, every[0].shape)
    if save_statistics is not None:
        _refuse_statistics(save_statistics, judges, reference)
    about = {} if model is None else {"model": sets.said_of(model, named or samples)}
    found = score(every, reference, floor, judges, batch, out, keep_images, about, ticking, say)
    if save_statistics is not None and dist.rank() == 0:
        _write_statistics(save_statistics, found, judges[0], reference)
    return found


def _spec(data: str | Path | Sequence[str | Path]) -> str:
    return str(data) if isinstance(data, (str, Path)) else join([str(each) for each in data])


def _refuse_statistics(path: Path, judges: Sequence[Judge], reference: Reference) -> None:
    if len(judges) > 1 or reference.images is None or not Gathered(judges[0].metrics, True).moments():
        raise UsageError(
            f"{path} can hold the statistics of one extractor's features of images; give one --features with metric "
            "frechet, and images as DATA"
        )


def _write_statistics(path: Path, found: Result, judge: Judge, reference: Reference) -> None:
    assert reference.images is not None
    said = judge.extractor.identity | {"data": f"{reference.spec}, {reference.split}"}
    said |= {"fingerprint": reference.images.fingerprint()}
    statistics.write(path, Statistics(found.references[judge.extractor.name].moments(), said))


def _refuse_for_pictures(samples: Given, given: dict[str, Any]) -> None:
    """UsageError for what only a model can be asked."""
    name = next((name for name, value in given.items() if value is not None), None)
    if name is not None:
        what = "the images" if isinstance(samples, Tensor) else str(samples)
        raise UsageError(f"{name} is for a model that draws, and {what} is no model; leave it out, or give a model")


def _pictures(samples: Any, n: int | None, reading: Reading, say: Callable[[str], None]) -> Samples:
    """Images that are there already. Raises UsageError and DataError."""
    if isinstance(samples, Tensor):
        if samples.dtype != torch.uint8 or samples.ndim != 4 or not samples.numel():
            raise UsageError(
                f"images of {str(samples.dtype).removeprefix('torch.')} {list(samples.shape)} cannot be judged; give "
                "uint8 [n, c, h, w], as sample() returns"
            )
        return sets.given(ArraySource(samples.cpu()), n, "images from Python")
    if not isinstance(samples, (str, Path)):
        raise UsageError(f"samples {samples!r} are not possible; give a model, a path, or uint8 images [n, c, h, w]")
    try:
        source = sets.open_samples(str(samples), None, reading)
    except DataError as error:
        raise DataError(f"samples: {error}") from error
    say(f"samples: {len(source):,} images of {_shape(source.image_shape)} from {samples}")
    return sets.given(source, n, str(samples))


def _real(spec: str, shape: Shape, reading: Reading, skip_bad: bool, say: Callable[[str], None], split: str) -> Real:
    """A split of the data in the shape of the samples; what is made of it is said."""
    source = sets.open_real(spec, shape, split, reading, skip_bad)
    remark.refuse(source, spec, split, reading, is_meant=reading.range is not None)
    for text in (made.line(source.made, len(source), shape), remark.left_out(source)):
        if text:
            say(f"{split}: {text}")
    return source


def _reference(spec: str, split: str, read: Callable[[str], Real]) -> Reference:
    if split not in sets.OTHER:
        raise UsageError(f'split "{split}" is not known; expected train or test')
    known = statistics.read(Path(spec)) if statistics.is_statistics(spec) else None
    images = read(split) if known is None or statistics.has_images(spec) else None
    return Reference(spec.replace("\n", ", "), split, images, known, "" if images is None else sets.note_of(images))


def _shape(shape: Shape) -> str:
    c, h, w = shape
    return f"{w}×{h} {made.channels(c)}"
