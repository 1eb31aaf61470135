"""Looking into a model: what it sees on the way, what a latent keeps, what lies between two pictures, what it copied.

The figures of DDPM as functions of a `Model`, each a pure function of its seed. All pictures are uint8.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from undiffuse import store
from undiffuse.data.source import Source
from undiffuse.errors import DataError, UsageError
from undiffuse.figure import grid, picture, png
from undiffuse.key import Key, Keys
from undiffuse.model import Model, to_float, to_uint8
from undiffuse.process import F64, Process, per_image

CHUNK = 1 << 23  # float64 values of the training set that are compared at once: 64 MiB


def progressive(
    model: Model,
    n: int,
    seed: int = 0,
    steps: int | None = None,
    slots: int = 20,
    progress: Callable[[int], None] | None = None,
) -> tuple[UInt8[Tensor, "n slots c h w"], Float[Tensor, "slots"]]:
    """x̂_0 at `slots` times along the chain of `model.sample(n, steps, seed=seed)`, and those times (Fig. 6).

    The slots are evenly spread and the last holds the finished samples; on 1000 steps, 20 slots are the authors'
    indices 950, 900, …, 0. Costs `slots` network evaluations more than sampling.
    """
    _check_count("images", n)
    times = model.times(steps)
    total = len(times) - 1
    if not 1 <= slots <= total:
        raise UsageError(f"{slots} slots along a chain of {total} steps are not possible; give 1 to {total}")
    wanted = {1 + k * total // slots for k in range(slots)}
    seen: list[Tensor] = []

    def look(remaining: int, x: Tensor, t: Tensor) -> None:
        if remaining in wanted:
            seen.append(to_uint8(model.denoiser(x, t).x_0).cpu())

    model.chain(Key(seed).fold("sample").rows(n), times, model.sampler(), callback=look, progress=progress)
    return torch.stack(seen, 1), torch.stack([times[total - r] for r in sorted(wanted, reverse=True)])


def shared(
    model: Model, n: int, seed: int = 0, at: Sequence[float] = (1.0, 0.75, 0.5, 0.25), steps: int | None = None
) -> tuple[UInt8[Tensor, "at n c h w"], Float[Tensor, "at"]]:
    """n samples for each t of `at` that have x_t in common, and those times on the model's grid (Fig. 7).

    One chain runs from the noise to an image; where it passes t, n independent continuations leave it.
    """
    _check_count("samples", n)
    if not at:
        raise UsageError("no t was given; name the times at which the latent is shared, for example 0.5")
    branches = [_on_grid(model.process, t, low=model.process.t_min) for t in at]
    times, latents = _with(model.times(steps), *branches), {}

    def keep(remaining: int, x: Tensor, t: Tensor) -> None:
        if float(t[0]) in branches:
            latents[float(t[0])] = x.cpu()

    key = Key(seed).fold("shared")
    model.chain(key.rows(1), times, model.sampler(), callback=keep)
    rows = []
    for t in branches:
        keys = key.fold("continue", round(t / model.process.t_min)).rows(n)
        start = latents[t].expand(n, -1, -1, -1)
        rows.append(to_uint8(model.chain(keys, times[times <= t], model.sampler(), start=start)))
    return torch.stack(rows), torch.tensor(branches, dtype=F64)


def interpolate(
    model: Model,
    a: UInt8[Tensor, "c h w"],
    b: UInt8[Tensor, "_ _ _"],
    at: Sequence[float] = (0.5,),
    lambdas: Sequence[float] = tuple(i / 10 for i in range(11)),
    seed: int = 0,
    steps: int | None = None,
) -> UInt8[Tensor, "at lambdas c h w"]:
    """Denoised mixtures (1 − λ) x_t + λ x_t' of two pictures, a row for each t (Fig. 8; several t: Fig. 9).

    Each picture has noise of its own, which is the same in all columns and rows; the reverse chains are independent.
    t = 0 mixes pixels, t = 1 forgets the pictures.
    """
    if not at or not lambdas:
        raise UsageError(f"{len(at)} times and {len(lambdas)} mixtures were asked for; give one or more of each")
    for name, given in (("first", a), ("second", b)):
        if tuple(given.shape) != model.image_shape:
            raise DataError(f"the {name} picture is {_size(given)}; this model needs {_size(model.image_shape)}")
    x_0 = to_float(torch.stack([a, b]))
    key = Key(seed).fold("interpolate")
    eps = key.fold("eps").rows(2).normal(*model.image_shape)
    mix = torch.tensor(lambdas, dtype=torch.float32).reshape(-1, 1, 1, 1)
    rows = []
    for t in (_on_grid(model.process, t, low=0.0) for t in at):
        x_t, other = model.process.marginal(x_0, eps, torch.full((2,), t, dtype=F64))
        times = _with(model.times(steps), t)
        start, keys = (1 - mix) * x_t + mix * other, key.fold("chain").rows(len(lambdas))
        rows.append(to_uint8(model.chain(keys, times[times <= t], model.sampler(), start=start)))
    return torch.stack(rows)


class Neighbours(NamedTuple):
    """The nearest first; distances are root-mean-square differences of values in [0, 255]."""

    indices: Int[Tensor, "n k"]
    distance: Float[Tensor, "n k"]


def neighbours(
    samples: UInt8[Tensor, "n c h w"], source: Source, k: int = 1, crop: tuple[int, int, int, int] | None = None
) -> Neighbours:
    """The k images of `source` that are nearest to each sample, pixel by pixel (Figs. 12 and 15).

    Exact: squared distances of uint8 are integers that float64 holds. Of equal distances the lower index comes first.
    `crop` = (top, left, height, width) compares that part alone.
    """
    if not 1 <= k <= len(source):
        raise UsageError(f"{k} neighbours are not possible in {len(source)} images; give 1 to {len(source)}")
    shape = tuple(source[0].image.shape)
    if tuple(samples.shape[1:]) != shape:
        raise DataError(
            f"the samples are {_size(samples[0])} and the training images {_size(shape)}; resize one of them"
        )
    queries = _flat(samples, crop)  # (n, d)
    best, index = torch.empty(len(samples), 0, dtype=F64), torch.empty(len(samples), 0, dtype=torch.int64)
    chunk = max(1, CHUNK // max(queries.shape))
    for first in range(0, len(source), chunk):
        numbers = range(first, min(first + chunk, len(source)))
        images = _flat(torch.stack([source[i].image for i in numbers]), crop)  # (m, d)
        squared = queries.square().sum(1, keepdim=True) - 2 * queries @ images.T + images.square().sum(1)
        candidates = torch.cat([index, torch.tensor(numbers).expand(len(samples), -1)], 1)
        best, order = torch.sort(torch.cat([best, squared], 1), dim=1, stable=True)
        best, index = best[:, :k], candidates.gather(1, order[:, :k])
    return Neighbours(index, (best / queries.shape[1]).sqrt())


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
    """Rows of pictures as one PNG, small ones enlarged."""
    store.write_atomic(path, png(grid(images.flatten(0, 1), images.shape[1], enlarged(images.shape[-1]))))


def write_images(images: UInt8[Tensor, "n c h w"], folder: Path | None, npz: Path | None) -> dict[str, Path]:
    """PNG files and a grid in `folder`, one array `arr_0` [n, h, w, c] in `npz`; returns what was written, by kind."""
    written = {}
    if folder is not None:
        digits = max(4, len(str(len(images) - 1)))
        for i, image in enumerate(images):
            store.write_atomic(folder / f"{i:0{digits}}.png", png(picture(image)))
        store.write_atomic(folder / "grid.png", png(grid(images, scale=enlarged(images.shape[-1]))))
        written |= {"folder": folder, "grid": folder / "grid.png"}
    if npz is not None:
        buffer = io.BytesIO()
        np.savez(buffer, arr_0=images.permute(0, 2, 3, 1).numpy())
        store.write_atomic(npz, buffer.getvalue())
        written["npz"] = npz
    return written


def enlarged(width: int) -> int:
    """How often a pixel is repeated so that a picture is at least 56 pixels wide on a screen."""
    return max(1, -(-56 // width))


def _on_grid(process: Process, t: float, low: float) -> float:
    """t at the nearest n/T of a table; elsewhere t itself, or t_min where t lies between that and 0."""
    if not low <= t <= 1:
        raise UsageError(f"t = {t:g} is not possible here; give {low:g} to 1, where 1 is pure noise")
    if process.steps is not None:
        return round(t * process.steps) / process.steps
    return max(float(t), process.t_min) if t > 0 else 0.0


def _with(times: Float[Tensor, "n"], *more: float) -> Float[Tensor, "m"]:
    """A descending grid with these times in it."""
    return torch.cat([times, torch.tensor(more, dtype=F64)]).unique().flip(0)


def _flat(images: UInt8[Tensor, "n c h w"], crop: tuple[int, int, int, int] | None) -> Float[Tensor, "n d"]:
    if crop is not None:
        (top, left, height, width), (h, w) = crop, images.shape[2:]
        if min(top, left) < 0 or min(height, width) < 1 or top + height > h or left + width > w:
            raise UsageError(f"crop {crop} (top, left, height, width) does not lie within images of {h}×{w}")
        images = images[:, :, top : top + height, left : left + width]
    return images.flatten(1).to(F64)


def _size(image: Tensor | tuple[int, ...]) -> str:
    c, h, w = image.shape if isinstance(image, Tensor) else image
    return f"{c}×{h}×{w} (channels × height × width)"


def _check_count(what: str, n: int) -> None:
    if n < 1:
        raise UsageError(f"n = {n} {what} were asked for; give 1 or more")
