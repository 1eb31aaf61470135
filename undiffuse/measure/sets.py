"""The sets of images that an evaluation looks at: samples, the reference, and real images apart from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from undiffuse.config import plain
from undiffuse.data.format.packed import PackedSource
from undiffuse.data.made import channels, count, done, listed
from undiffuse.data.pack import open_data
from undiffuse.data.picture import PLAIN, Reading
from undiffuse.data.source import ArraySource, Source, open_source, spread, unify
from undiffuse.data.subset import Subset
from undiffuse.diffusion.grid import GRIDS
from undiffuse.diffusion.reverse import Prediction
from undiffuse.diffusion.sampler.base import SAMPLERS, Sampler, sample
from undiffuse.errors import Corrupt, DataError, NoSplit, UsageError
from undiffuse.key import Key, Seed
from undiffuse.machine.device import name_of as device_name
from undiffuse.measure.claim import digest, in_other
from undiffuse.model.classes import Label, drawn
from undiffuse.model.fitted import NAME
from undiffuse.model.model import Model, to_uint8
from undiffuse.model.walk import Steps

Real = ArraySource | PackedSource
Shape = tuple[int, int, int]  # channels, height, width
Size = int | tuple[int, int] | None
OTHER = {"train": "test", "test": "train"}
LONGEST = 10_000  # characters of seeds that are said


@dataclass(frozen=True, eq=False)
class Samples:
    """Images that are judged: `said` is what makes them so in words, `digest` changes with them."""

    n: int
    shape: Shape
    said: dict[str, Any]
    digest: str
    images: Callable[[Int[Tensor, "b"]], UInt8[Tensor, "b c h w"]]
    are_drawn: bool = True


@dataclass(frozen=True)
class Drawing:
    """How a model draws: what `undiffuse sample` is asked."""

    steps: Steps = None
    solver: str | Sampler | None = None
    eta: SupportsFloat | None = None
    label: Label = None


def said_of_drawing(
    model: Model, times: Tensor, sampler: Sampler, seed: Seed, labels: str, counted: bool = True
) -> dict[str, Any]:
    """What makes samples so, in words; unless `counted` without the evaluations, which a walk along the chain tells."""
    return {
        "solver": SAMPLERS.name_of(sampler),
        **plain(sampler),
        "steps": len(times) - 1,
        **({"evaluations": evaluations(model, times, sampler)} if counted else {}),
        **({} if model.guide is None else model.guide.said),
        **_walk(model, times),
        "clip": model.denoiser.clip,
        **in_other(model),
        "seed": _in_words(seed),
        **({} if model.classes is None else {"labels": labels}),
    }


def drawn_by(model: Model, how: Drawing, n: int, seed: int) -> Samples:
    """n images of a model, drawn when they are asked for: the same as `sample` draws with that seed.

    A model with classes is told each as often as in training, unless `how` says another; `all` gives n of each class.
    """
    (times, sampler, _), n = model.walk(how.steps, how.solver, how.eta), model.count(n, how.label)
    told = drawn(model.classes, n, seed) if how.label is None else model.told(how.label, n, seed)
    keys = Key(seed).fold("sample").rows(n)

    def images(index: Int[Tensor, "b"]) -> UInt8[Tensor, "b c h w"]:
        some = keys[slice(int(index[0]), int(index[-1]) + 1)]
        return to_uint8(model.chain(some, times, sampler, told.conditioning.at(index)))

    said = said_of_drawing(model, times, sampler, seed, told.words)
    question = {"weights": model.digest(), "config": plain(model.config), **said, "walk": times.tolist()}
    return Samples(n, model.image_shape, said, digest(question), images)


def _walk(model: Model, times: Tensor) -> dict[str, Any]:
    """The grid that gives these times, by name; else the times themselves."""
    n = len(times) - 1
    for name in () if n > (model.process.steps or n) or model.config.bounds is not None else (*GRIDS.classes, NAME):
        try:
            found = model.times(n, name)
        except (UsageError, Corrupt):  # no grid is fitted, or not to so many steps; a damaged one has no name to give
            continue
        if len(found) == len(times) and bool((found == times).all()):
            return {"grid": name}
    return {"times": times[:-1].tolist()}


def _in_words(seed: Seed) -> int | str:
    """`3-5,7` of several, in their order; of very many a hash."""
    if not isinstance(seed, Sequence):
        return int(seed)
    runs = list[list[int]]()
    for each in map(int, seed):
        if runs and each == runs[-1][1] + 1:
            runs[-1][1] = each
        else:
            runs.append([each, each])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(text) <= LONGEST else digest(text)


def said_of(model: Model, source: Any) -> dict[str, Any]:
    """What a protocol says of a model."""
    how = {"parameterisation": plain(model.config)["parameterisation"]["name"], "precision": model.precision}
    known = {key: model.meta[key] for key in ("weights", "step") if key in model.meta}
    named = "from Python" if isinstance(source, Model) else str(source)
    return {"source": named, "sha256": model.digest()} | known | how | {"device": device_name(model.device)}


def asks(model: Model) -> int:
    """How many networks an answer takes: with guidance that of the guide too."""
    return 1 if model.guide is None else 2


def evaluations(model: Model, times: Tensor, sampler: Sampler) -> int:
    """How often the network is asked for one image: counted on a chain of one value, which asks nobody."""
    calls = 0

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        nonlocal calls
        calls += 1
        zero = torch.zeros_like(x_t)
        return Prediction(zero, zero, zero, None)

    sample(sampler, denoise, model.process, Key(0).rows(1), (1, 1, 1), times)
    return calls * asks(model)


def given(source: Real, n: int | None, spec: str) -> Samples:
    """Images that are there already, by whatever they were made; the first n, or all. UsageError for less than 2."""
    if n is not None and n > len(source):
        raise UsageError(f"{spec} has {len(source):,} images, and -n {n} is more; give fewer, or leave -n out")
    n = len(source) if n is None else n
    if n < 2:
        raise UsageError(f"{spec} has 1 image, and a distance needs 2 or more; give more")
    digest, note = source.fingerprint(), note_of(source)
    said = {"source": spec, "fingerprint": digest} | ({"made": note} if note else {})
    return Samples(n, source.image_shape, said, digest, lambda index: source.gather(index)[0], False)


def open_samples(spec: str | Tensor, size: Size, reading: Reading = PLAIN, skip_bad: bool = False) -> ArraySource:
    """The images of a folder, zip, npz or tensor in that size, or in their own. DataError where these differ."""
    if isinstance(spec, Tensor):
        return unify(ArraySource(spec.cpu()), size, reading.channels)
    return open_source(spec, size, reading.channels, reading, skip_bad=skip_bad)


def open_real(spec: str, shape: Shape, split: str, reading: Reading, skip_bad: bool) -> Real:
    """The images of a data set in the shape of the samples."""
    c, h, w = shape
    return open_data(spec, (h, w), c, reading, skip_bad, split=split)


def refuse_other_colours(source: Source, c: int, spec: str) -> None:
    """DataError for a reference that had to be made grey or RGB, as the samples are, in most of its images."""
    other = 3 if c == 1 else 1
    if 2 * count(source.made, "made grey" if c == 1 else "made RGB") > len(source):
        raise DataError(
            f"the samples are {channels(c)} and {spec} is {channels(other)}, so a distance would mostly say that; give "
            "--set data.channels=1 to compare both in grey, or 3 for RGB, if that is meant"
        )


def note_of(source: Source) -> str:
    """What was made of the images, in words; empty for nothing."""
    return listed(done(source.made))


@dataclass(frozen=True, eq=False)
class Floor:
    """Real images that take the place of samples, apart from the reference: the least distance that can be reached.

    They are `images`, or those of the reference where `apart` is true, which it then has to do without.
    """

    n: int
    said: str
    images: Source | None = None
    apart: Bool[Tensor, "n"] | None = None


def floor(source: Real, split: str, n: int, read: Callable[[str], Real]) -> Floor | None:
    """At most n real images that are not in the reference: those of the other split, else a part of this one.

    None where there are too few to divide.
    """
    try:
        other = read(OTHER[split])
    except NoSplit:
        other = None
    if other is not None and len(other) > 1:
        n = min(n, len(other))
        return Floor(n, f"{n:,} images of the {OTHER[split]} split", spread_over(other, n))
    n = min(n, len(source) // 2)
    if n < 2:
        return None
    apart = torch.zeros(len(source), dtype=torch.bool, device="cpu")
    apart[torch.argsort(Key(0).fold("floor").uniform(len(source)))[:n]] = True
    return Floor(n, f"{n:,} images of the set, apart from the other {len(source) - n:,}", apart=apart)


def spread_over(source: Real, n: int) -> Source:
    """n images of a source, evenly, since data may be in the order of their classes; all where there are no more."""
    if n >= len(source):
        return source
    return Subset(source, torch.tensor(spread(len(source), n), dtype=torch.int64, device="cpu"))


def words_of(shape: Shape) -> str:
    """`28×28 grey`."""
    c, h, w = shape
    return f"{w}×{h} {channels(c)}"
