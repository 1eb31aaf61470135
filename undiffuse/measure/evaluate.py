"""`undiffuse eval`: from what a user names to the scores of a model, or of pictures by whatever made them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from undiffuse.data import made, remark
from undiffuse.data.format.several import spec_of
from undiffuse.data.picture import PLAIN, Reading
from undiffuse.data.source import is_readable
from undiffuse.diffusion.sampler.base import Sampler
from undiffuse.errors import Error, UsageError, nearest
from undiffuse.machine import dist, log
from undiffuse.machine.device import choose
from undiffuse.measure import sets
from undiffuse.measure.passes import Judge, Reference, Ticking, silent
from undiffuse.measure.scores import Result, score
from undiffuse.measure.sets import Drawing, Floor, Real, Samples, Shape, Size
from undiffuse.model.load import holds_model, load, shipped
from undiffuse.model.model import Model
from undiffuse.model.walk import Steps
from undiffuse.quality import statistics
from undiffuse.quality.feature.base import several_features
from undiffuse.quality.metric.base import Gathered
from undiffuse.quality.statistics import Statistics
from undiffuse.strict import whole

DRAWN = 10_000  # images of a model, unless n says another number

Given = Model | Tensor | str | Path


@dataclass(frozen=True)
class Query:
    """What samples are judged by: extractors, metrics (all that are possible unless some are named), and reference.

    `feature_weights` and `resize` are those of extractors that have such options; `size` and `reading` say how pictures
    are read, with `reading.channels` what samples that are there already and DATA are made into.
    """

    features: tuple[str, ...] = ("auto",)
    metrics: tuple[str, ...] = ()
    feature_weights: Path | None = None
    resize: str | None = None
    split: str = "train"
    size: Size = None
    reading: Reading | None = None
    skip_bad: bool = False

    def judges(self, device: torch.device, shape: Shape) -> list[Judge]:
        """With their weights. Raises UsageError for images that one of them cannot see."""
        found = several_features(self.features, device, self.feature_weights, self.resize, shape)
        for extractor in found:
            extractor.check(shape)
        same = next((each.name for i, each in enumerate(found) if each.name in [e.name for e in found[:i]]), None)
        if same is not None:
            raise UsageError(f"two extractors are called {same}; give one of them, or another name to one")
        return [Judge.of(extractor, self.metrics) for extractor in found]


def evaluate(
    samples: Given,
    data: str | Path | Sequence[str | Path],
    query: Query | str | Sequence[str] | None = None,
    *,
    n: SupportsIndex | None = None,
    steps: Steps = None,
    solver: str | Sampler | None = None,
    eta: SupportsFloat | None = None,
    label: str | SupportsIndex | None = None,
    seed: SupportsIndex | None = None,
    seeds: SupportsIndex = 1,
    batch: SupportsIndex = 64,
    out: str | Path | None = None,
    keep_images: bool = False,
    save_statistics: str | Path | None = None,
    memorisation: bool = True,
    named: str | None = None,
    device: str = "auto",
    ticking: Ticking = silent,
    say: Callable[[str], None] = log.silent,
) -> Result:
    """How near samples are to real images, by every metric on the features of each extractor.

    `samples` is a model, or its path or name; or uint8 images [n, c, h, w]; or a folder, zip or npz of pictures that
    anything made. `data` is the reference: images, or an npz of statistics. `query` may be the names of the features.
    A model draws n images (10,000) for each of `seeds` seeds from `seed` (0) on, as `Model.sample` does. With `out` a
    stopped evaluation goes on, and `keep_images` writes the samples there; `save_statistics` is a file for those of
    the reference. `memorisation`: where these are training images, the nearest to each sample are looked for. `named`
    is what a protocol calls the model. Raises UsageError, DataError, Corrupt, NotFiniteError.
    """
    query, count, batch = query_of(query), whole("seeds", seeds, 1), whole("batch", batch, 1)
    n = None if n is None else whole("n", n, 2)
    out, save_statistics = (None if path is None else Path(path) for path in (out, save_statistics))
    if keep_images and out is None:
        raise UsageError("the images that are kept have no place; give --out FOLDER too")
    model = samples if isinstance(samples, Model) else None
    if isinstance(samples, (str, Path)) and holds_model(samples):
        model = load(samples, device)
    if model is not None:
        first, how = whole("seed", 0 if seed is None else seed), Drawing(steps, solver, eta, label)
        every = [sets.drawn_by(model, how, n or DRAWN, first + k) for k in range(count)]
    else:
        given = {"seeds": None if count == 1 else count, "seed": seed, "steps": steps, "solver": solver, "eta": eta}
        _refuse_for_pictures(samples, given | {"label": label, "keep_images": keep_images or None})
        every = [_pictures(samples, n, query, say)]
    where = choose(device) if model is None else model.device
    reference, floor, judges = compared(data, query, every[0], model, where, say)
    if save_statistics is not None:
        _refuse_statistics(save_statistics, judges, reference)
    about = {} if model is None else {"model": sets.said_of(model, named or samples)}
    found = score(every, reference, floor, judges, batch, out, keep_images, about, ticking, say, memorisation)
    if save_statistics is not None and dist.rank() == 0:
        _write_statistics(save_statistics, found, judges[0], reference)
    return found


def query_of(given: Query | str | Sequence[str] | None) -> Query:
    """Names of features as a query. Raises UsageError for anything else."""
    if given is None or isinstance(given, Query):
        return given or Query()
    if not isinstance(given, (str, Sequence)):
        raise UsageError(f"features = {given!r} is not possible; give a name, a list of names, or a Query")
    return Query((given,) if isinstance(given, str) else tuple(given))


def _reading(query: Query, model: Model | None) -> tuple[Reading, bool]:
    """How DATA is read, and whether its range was given for it, not for what the model was trained on."""
    if model is None:
        reading = query.reading or PLAIN
        return reading, reading.range is not None
    if query.size is not None:
        raise UsageError("size is for samples that are there already; a model draws in its own, so leave it out")
    trained = model.data.reading
    reading = query.reading or trained
    return reading, reading.range not in (None, trained.range)


def compared(
    data: str | Path | Sequence[str | Path],
    query: Query,
    samples: Samples,
    model: Model | None,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[Reference, Floor | None, list[Judge]]:
    """What samples are compared with, real images in their place, and what judges them."""
    read = partial(_real, spec_of(data), samples, _reading(query, model), query.skip_bad, say)
    reference = _reference(spec_of(data), query.split, read)
    floor = None if reference.images is None else sets.floor(reference.images, query.split, samples.n, read)
    return reference, floor, query.judges(device, samples.shape)


def _refuse_statistics(path: Path, judges: Sequence[Judge], reference: Reference) -> None:
    given = reference.images is not None and reference.statistics is None
    if len(judges) > 1 or not given or "pool" not in Gathered(judges[0].metrics, True).moments():
        raise UsageError(
            f"{path} can hold the statistics of one extractor's features of images; give one --features with metric "
            "frechet, and images as DATA"
        )


def _write_statistics(path: Path, found: Result, judge: Judge, reference: Reference) -> None:
    assert reference.images is not None
    said = judge.extractor.identity | {"data": f"{reference.spec}, {reference.split}"}
    said |= {"fingerprint": reference.fingerprint or "", "images": sets.words_of(reference.images.image_shape)}
    statistics.write(path, Statistics(found.references[judge.extractor.name].moments(), said))


def refuse_unknown(spec: str) -> None:
    """Raises UsageError for samples that are nothing that is there."""
    if not Path(spec).exists() and not is_readable(spec):
        raise UsageError(
            f"samples {spec} are neither a model nor pictures: there is no such file or folder, and no such name."
            + nearest(spec, shipped())
        )


def _refuse_for_pictures(samples: Given, given: dict[str, Any]) -> None:
    """UsageError for what only a model can be asked."""
    if isinstance(samples, (str, Path)):
        refuse_unknown(str(samples))
    name = next((name for name, value in given.items() if value is not None), None)
    if name is not None:
        what = "the images" if isinstance(samples, Tensor) else str(samples)
        raise UsageError(f"{name} is for a model that draws, and {what} is no model; leave it out, or give a model")


def _pictures(samples: Any, n: int | None, query: Query, say: Callable[[str], None]) -> Samples:
    """Images that are there already. Raises UsageError and DataError."""
    reading = query.reading or PLAIN
    if isinstance(samples, Tensor):
        if samples.dtype != torch.uint8 or samples.ndim != 4 or not samples.numel():
            raise UsageError(
                f"images of {str(samples.dtype).removeprefix('torch.')} {list(samples.shape)} cannot be judged; give "
                "uint8 [n, c, h, w], as sample() returns"
            )
        return sets.given(sets.open_samples(samples, query.size, reading), n, "images from Python")
    if not isinstance(samples, (str, Path)):
        kind = type(samples).__name__
        raise UsageError(
            f"samples of type {kind} are not possible; give a model, a path, or a torch tensor of uint8 [n, c, h, w]"
        )
    spec = str(samples)
    if statistics.is_statistics(spec) and not statistics.has_images(spec):
        raise UsageError(f"{spec} holds statistics and no images, which are for DATA; give the samples themselves")
    try:
        source = sets.open_samples(spec, query.size, reading, query.skip_bad)
    except Error as error:
        raise type(error)(f"samples: {error}") from error
    what = made.line(source.made, len(source), source.image_shape)
    say(f"samples from {spec}: {what or f'{len(source):,} images of {sets.words_of(source.image_shape)}'}")
    if left_out := remark.left_out(source):
        say(f"samples from {spec}: {left_out}")
    return sets.given(source, n, spec)


def _real(
    spec: str, samples: Samples, how: tuple[Reading, bool], skip_bad: bool, say: Callable[[str], None], split: str
) -> Real:
    """A split of the data in the shape of the samples; what is made of it is said."""
    shape, (reading, is_meant) = samples.shape, how
    source = sets.open_real(spec, shape, split, reading, skip_bad)
    if not samples.are_drawn and reading.channels is None:
        sets.refuse_other_colours(source, shape[0], spec)
    remark.refuse(source, spec, split, reading, is_meant)
    if not is_meant:
        remark.refuse_clipped(source, reading)
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
