"""Looking into a model: what it sees on the way, what a latent keeps, what lies between two pictures, what it copied.

The figures of DDPM as functions of a `Model`, each a pure function of its seed. All pictures are uint8.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from undiffuse.data.source import Source
from undiffuse.diffusion.numbers import F64, per_image
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.reverse import Learned
from undiffuse.diffusion.sampler.base import SAMPLERS, Sampler
from undiffuse.errors import DataError, UsageError
from undiffuse.figure import encoded, enlarged, grid
from undiffuse.key import Key, Keys
from undiffuse.machine import disk
from undiffuse.measure.along import stops, x_0_along
from undiffuse.measure.passes import Ticking, over_real, silent
from undiffuse.model.classes import Label
from undiffuse.model.model import Model, to_float, to_uint8
from undiffuse.model.walk import Steps
from undiffuse.network.base import Conditioning
from undiffuse.quality.feature.base import Extractor
from undiffuse.quality.gather import gather
from undiffuse.quality.metric.base import Features, refuse_not_finite
from undiffuse.quality.metric.distances import nearest
from undiffuse.strict import whole

Number = float | int  # said in full, because the tests' type checker does not take an int for a float
Solver = str | Sampler | None
Crop = tuple[int, int] | tuple[int, int, int, int]

CHUNK = 1 << 23  # float64 values of the training set that are compared at once: 64 MiB


def progressive(
    model: Model,
    n: int,
    seed: int = 0,
    steps: Steps = None,
    slots: int | None = None,
    progress: Callable[[int], None] | None = None,
    solver: Solver = None,
    label: Label = None,
) -> tuple[UInt8[Tensor, "n slots c h w"], Float[Tensor, "slots"]]:
    """x̂_0 at `slots` times along the chain of `model.sample`, given the same, and those times (Fig. 6).

    There are 20 slots, or as many as steps if these are fewer. They are evenly spread, and the last holds the finished
    samples; on 1000 steps, 20 slots are the authors' indices 950, 900, …, 0. Costs `slots` − 1 evaluations more
    than sampling.
    """
    n = model.count(whole("n", n, 1), label)
    told, way = model.told(label, n, seed).conditioning.to(model.device), model.walk(steps, solver)
    total = len(way.times) - 1
    at = stops(total, min(20, total) if slots is None else slots, "slots")
    keys = Key(seed).fold("sample").rows(n)
    seen = x_0_along(model, keys, way.times, way.sampler, at, told, progress)
    return seen, torch.stack([way.times[total - r] for r in at])


def shared(
    model: Model,
    n: int,
    seed: int = 0,
    at: Sequence[Number] = (1.0, 0.75, 0.5, 0.25),
    steps: Steps = None,
    progress: Callable[[int], None] | None = None,
    solver: Solver = None,
    label: Label = None,
) -> tuple[UInt8[Tensor, "at n c h w"], Float[Tensor, "at"]]:
    """n samples for each t of `at` that have x_t in common, and those times (Fig. 7).

    One chain runs from the noise to an image; where it passes t, n independent continuations leave it. All are of one
    class. A solver that adds no noise would continue in one way only, and is refused.
    """
    n, told = whole("n", n, 1), _one_class(model, label, seed)
    sampler, branches, (times, *below) = _shared_chains(model, at, steps, solver)
    latents = {}

    def keep(remaining: int, x: Tensor, t: Tensor) -> None:
        if float(t[0]) in branches:
            latents[float(t[0])] = x.cpu()

    key = Key(seed).fold("shared")
    model.chain(key.rows(1), times, sampler, told, callback=keep, progress=progress)
    rows = []
    for t, rest in zip(branches, below, strict=True):
        steps_to_t = t / model.process.t_min
        on_table = model.process.steps is None or abs(steps_to_t - round(steps_to_t)) < 1e-6
        keys = key.fold("continue", round(steps_to_t) if on_table else str(t)).rows(n)
        start = latents[t].expand(n, -1, -1, -1)
        rows.append(to_uint8(model.chain(keys, rest, sampler, told.at([0] * n), start, progress=progress)))
    return torch.stack(rows), torch.tensor(branches, dtype=F64, device="cpu")


def shared_steps(model: Model, at: Sequence[Number], steps: Steps = None, solver: Solver = None) -> int:
    """How many steps of a chain `shared` takes."""
    return sum(len(times) - 1 for times in _shared_chains(model, at, steps, solver)[2])


def _shared_chains(
    model: Model, at: Sequence[Number], steps: Steps, solver: Solver
) -> tuple[Sampler, list[float], list[Float[Tensor, "_"]]]:
    """The solver, where the chain is left, and the times of the whole and of what follows each branch."""
    model.refuse_distilled("a latent on the way")
    if not at:
        raise UsageError("no t was given; name the times at which the latent is shared, for example 0.5")
    branches = [_place(model, t, low=model.process.t_min) for t in at]
    way = model.walk(steps, solver, noisy=True)
    if not way.sampler.noisy:
        raise UsageError(
            f"solver {SAMPLERS.name_of(way.sampler)} adds no noise, so that all images that share a latent are the "
            "same; give ancestral, dpmpp-sde, ddim with eta above 0, or heun with a churn, such as heun,churn=40"
        )
    times = _with(way.times, *branches)
    return way.sampler.within(len(times) - 1), branches, [times, *(times[times <= t] for t in branches)]


def interpolate(
    model: Model,
    a: Shaped[Tensor, "c h w"],
    b: Shaped[Tensor, "_ _ _"],
    at: Sequence[Number] = (0.5,),
    lambdas: Sequence[Number] = tuple(i / 10 for i in range(11)),
    seed: int = 0,
    steps: Steps = None,
    progress: Callable[[int], None] | None = None,
    solver: Solver = None,
    label: Label = None,
) -> UInt8[Tensor, "at lambdas c h w"]:
    """Denoised mixtures (1 − λ) x_t + λ x_t' of two pictures, a row for each t (Fig. 8; several t: Fig. 9).

    Each picture has noise of its own, which is the same in all columns and rows. The reverse chains are independent,
    and the noise of each depends on its λ alone; ddim adds none, which makes a morph. t = 0 mixes pixels, t = 1 forgets
    the pictures. λ below 0 or above 1 goes beyond them.
    """
    model.refuse_distilled("interpolation")
    if not at or not lambdas:
        raise UsageError(f"{len(at)} times and {len(lambdas)} mixtures were asked for; give one or more of each")
    if not all(map(math.isfinite, lambdas)):
        raise UsageError(f"λ = {', '.join(f'{x:g}' for x in lambdas)} is not possible; give finite numbers")
    for name, given in (("first", a), ("second", b)):
        _check_levels(f"the {name} picture", given)
        if tuple(given.shape) != model.image_shape:
            raise DataError(f"the {name} picture is {_size(given)}; this model needs {_size(model.image_shape)}")
    x_0 = to_float(torch.stack([a.cpu(), b.cpu()]))
    key = Key(seed).fold("interpolate")
    eps = key.fold("eps").rows(2).normal(*model.image_shape)
    mix = torch.tensor(lambdas, dtype=torch.float32, device="cpu").reshape(-1, 1, 1, 1)
    own, told = _row_of(lambdas), _one_class(model, label, seed).at([0] * len(lambdas))
    rows = []
    sampler, grids = _interpolation_chains(model, at, steps, solver)
    for times in grids:
        x_t, other = model.process.marginal(x_0, eps, times[:1].expand(2))
        start, keys = (1 - mix) * x_t + mix * other, key.fold("chain").rows(own)
        rows.append(to_uint8(model.chain(keys, times, sampler, told, start, progress=progress)))
    return torch.stack(rows)


def _row_of(lambdas: Sequence[Number]) -> Int[Tensor, "n"]:
    """A row of a key for each λ: the bits of the number, so that it draws the same noise wherever it stands."""
    return torch.tensor([float(x) + 0.0 for x in lambdas], dtype=F64, device="cpu").view(torch.int64)


def _one_class(model: Model, label: Label, seed: int) -> Conditioning:
    """The label of images that belong together. Raises UsageError for `all`."""
    if model.count(1, label) > 1:
        raise UsageError(f"label {label} is not possible here, where all images come of one latent; give one class")
    return model.told(label, 1, seed).conditioning


def interpolation_steps(model: Model, at: Sequence[Number], steps: Steps = None, solver: Solver = None) -> int:
    """How many steps of a chain `interpolate` takes."""
    return sum(len(times) - 1 for times in _interpolation_chains(model, at, steps, solver)[1])


def _interpolation_chains(
    model: Model, at: Sequence[Number], steps: Steps, solver: Solver
) -> tuple[Sampler, list[Float[Tensor, "_"]]]:
    """The solver, and the times from each t of `at` down to 0."""
    way, grids = model.walk(steps, solver), list[Tensor]()
    for t in (_place(model, t, low=0.0) for t in at):
        times = _with(way.times, t)
        grids.append(times[times <= t])
    return way.sampler.within(len(way.times) - 1), grids


def comparable(shape: tuple[int, int, int], source: Source, k: int, crop: Crop | None = None) -> None:
    """Refuses what `neighbours` cannot do for samples of that (channels, height, width): known before one is drawn."""
    if not 1 <= whole("k", k) <= len(source):
        raise UsageError(f"{k} neighbours are not possible in {len(source)} images; give 1 to {len(source)}")
    if tuple(source[0].image.shape) != shape:
        raise DataError(
            f"the samples are {_size(shape)} and the training images {_size(source[0].image)}; resize one of them"
        )
    if crop is not None:
        (top, left, height, width), (h, w) = _box(crop, *shape[1:]), shape[1:]
        if min(top, left) < 0 or min(height, width) < 1 or top + height > h or left + width > w:
            names = "(height, width)" if len(crop) == 2 else "(top, left, height, width)"
            raise UsageError(f"crop {crop} {names} does not lie within images of {h}×{w}")


def _box(crop: Crop, h: int, w: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop of images of h×w."""
    return crop if len(crop) == 4 else ((h - crop[0]) // 2, (w - crop[1]) // 2, *crop)


class Neighbours(NamedTuple):
    """The nearest first; distances are root-mean-square differences of values in [0, 255], in features Euclidean."""

    indices: Int[Tensor, "n k"]
    distance: Float[Tensor, "n k"]


def neighbours(samples: Shaped[Tensor, "n c h w"], source: Source, k: int = 1, crop: Crop | None = None) -> Neighbours:
    """The k images of `source` that are nearest to each sample, pixel by pixel (Figs. 12 and 15).

    Exact: squared distances of uint8 are integers that float64 holds. Of equal distances the lower index comes first.
    `crop` compares a part alone: (height, width) in the middle, as in Fig. 12, or (top, left, height, width).
    """
    _check_levels("samples", samples)
    comparable((samples.shape[1], samples.shape[2], samples.shape[3]), source, k, crop)
    queries = _flat(samples, crop)  # (n, d)
    best = torch.empty(len(samples), 0, dtype=F64, device="cpu")
    index = torch.empty(len(samples), 0, dtype=torch.int64, device="cpu")
    chunk = max(1, CHUNK // max(queries.shape))
    for first in range(0, len(source), chunk):
        numbers = torch.arange(first, min(first + chunk, len(source)), dtype=torch.int64, device="cpu")
        images = _flat(source.gather(numbers)[0], crop)  # (m, d)
        squared = queries.square().sum(1, keepdim=True) - 2 * queries @ images.T + images.square().sum(1)
        candidates = torch.cat([index, numbers.expand(len(samples), -1)], 1)
        best, order = torch.sort(torch.cat([best, squared], 1), dim=1, stable=True)
        best, index = best[:, :k], candidates.gather(1, order[:, :k])
    return Neighbours(index, (best / queries.shape[1]).sqrt())


def neighbours_in(
    extractor: Extractor, samples: UInt8[Tensor, "n c h w"], source: Source, k: int = 1, ticking: Ticking = silent
) -> Neighbours:
    """The k images of `source` that are nearest to each sample in the features of an extractor (Figs. 12 and 15).

    The features of `source` are kept in the cache for the next time. Raises UsageError for images that the extractor
    cannot see, DataError for other ones than the samples, and NotFiniteError.
    """
    shape = (samples.shape[1], samples.shape[2], samples.shape[3])
    extractor.check(shape)
    comparable(shape, source, k)
    found: dict[bool, list[Tensor]] = {True: [], False: []}

    def take(is_sample: bool, features: Features, index: Int[Tensor, "b"]) -> None:
        refuse_not_finite(features.pool, index, "pool")
        found[is_sample].append(features.pool.to(F64))

    gather(lambda index: samples[index].cpu(), len(samples), [extractor], lambda _, *each: take(True, *each))
    over_real(source, extractor, lambda _, *each: take(False, *each), ticking, "training images")
    distance, indices = nearest(torch.cat(found[True]), torch.cat(found[False]), k)
    return Neighbours(indices, distance)


def langevin(
    score: Callable[[Tensor, Tensor], Tensor],
    process: Process,
    keys: Keys,
    shape: tuple[int, ...],
    times: Float[Tensor, "n"],
    repeats: int = 10,
    step: float = 0.1,
) -> Float[Tensor, "b *x"]:
    """Annealed Langevin dynamics (Song & Ermon 2019, Alg. 1): roughly a draw of q(x_t) at each t in turn; the last.

    x ← x + ½ε score(x, t) + √ε z, `repeats` times at each t, with ε = step · sigma(t)². `score` is `Denoiser.score`.
    """
    x = process.prior_std * keys.fold("x_T").normal(*shape)
    for i, t in enumerate(times):
        now = t.expand(len(x))
        size = step * process.sigma(now).square()
        for r in range(repeats):
            z = keys.fold("langevin", i, r).normal(*shape)
            x = x + per_image(size / 2, x) * score(x, now) + per_image(size.sqrt(), x) * z
    return x


def write_grid(images: UInt8[Tensor, "rows columns c h w"], path: Path) -> None:
    """Rows of pictures as one, small ones enlarged, in the format that the name says."""
    disk.write_atomic(path, encoded(grid(images.flatten(0, 1), images.shape[1], enlarged(images.shape[-1])), path))


def _place(model: Model, t: Number, low: float) -> float:
    """t, at least t_min unless it is 0; of a model that knows steps of 1/T alone at the nearest n/T. UsageError."""
    if not low <= t <= 1:
        raise UsageError(f"t = {t:g} is not possible here; give {low:g} to 1, where 1 is pure noise")
    steps, config = model.process.steps, model.config
    if steps is not None and (config.parameterisation.needs_table or isinstance(config.variance, Learned)):
        return round(t * steps) / steps
    return max(float(t), model.process.t_min) if t > 0 else 0.0


def _with(times: Float[Tensor, "n"], *more: float) -> Float[Tensor, "m"]:
    """A descending grid with these times in it."""
    return torch.cat([times, torch.tensor(more, dtype=F64, device="cpu")]).unique().flip(0)


def _flat(images: UInt8[Tensor, "n c h w"], crop: Crop | None) -> Float[Tensor, "n d"]:
    if crop is not None:
        top, left, height, width = _box(crop, *images.shape[2:])
        images = images[:, :, top : top + height, left : left + width]
    return images.cpu().flatten(1).to(F64)


def _size(image: Tensor | tuple[int, ...]) -> str:
    c, h, w = image.shape if isinstance(image, Tensor) else image
    return f"{c}×{h}×{w} (channels × height × width)"


def _check_levels(what: str, images: Shaped[Tensor, "..."]) -> None:
    if images.dtype != torch.uint8:
        raise UsageError(
            f"{what}: values of type {str(images.dtype).removeprefix('torch.')}; expected uint8 from 0 to 255. "
            "For values in [0, 1] give (255 * x).round().to(torch.uint8)"
        )
