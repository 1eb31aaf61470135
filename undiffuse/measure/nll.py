"""Measuring a model on a data set, resumably: each finished batch is a file, and the same command goes on."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.config import plain
from undiffuse.data.source import Source
from undiffuse.diffusion.denoiser import VARIANCES
from undiffuse.diffusion.grid import GRIDS, Grid
from undiffuse.diffusion.likelihood import Terms, bound, chain, concatenate, strata
from undiffuse.diffusion.process import Process
from undiffuse.errors import Corrupt, NotFiniteError, UsageError
from undiffuse.figure import line_plot
from undiffuse.key import Key
from undiffuse.machine import disk, dist
from undiffuse.machine.tensorfile import refuse_newer
from undiffuse.measure.claim import FORMAT, QUERY, check
from undiffuse.model.classes import ALL, RANDOM, Told, told_of
from undiffuse.model.load import load, weights_of
from undiffuse.model.model import Model, to_float
from undiffuse.strict import whole

COLUMNS = ("prior", "bits", "mse", "index", "weights")


@dataclass(frozen=True)
class Nll:
    """What to measure: how many images, how many of the chain's terms each, on which chain, told of which class."""

    images: int | None = None
    draws: int | None = None
    steps: int | None = None
    seed: int = 0
    batch: int = 50
    label: str | SupportsIndex | None = None
    grid: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("draws", None), ("steps", None), ("seed", None), ("batch", 1)):
            value = getattr(self, name)
            if value is not None or name in ("seed", "batch"):
                whole(name, value, least)

    def count(self, source: Source) -> int:
        """How many images of a source are measured."""
        return min(len(source), self.images or len(source))

    def rule(self) -> Grid | None:
        """The grid of the chain; None is what suits the process."""
        return None if self.grid is None else GRIDS.build(self.grid, trusted=True)

    def times(self, process: Process) -> Float[Tensor, "times"]:
        """The chain whose bound is measured, ascending from 0."""
        return chain(process, self.steps, self.rule())


def nll(
    model: Model | str | Path,
    data: Source | str | Path,
    *,
    split: str = "test",
    images: SupportsIndex | None = None,
    draws: SupportsIndex | None = 8,
    steps: SupportsIndex | None = None,
    seed: SupportsIndex = 0,
    label: str | SupportsIndex | None = None,
    grid: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Bits/dim of a model on a data set, with its terms (Eq. 5 of DDPM): what `undiffuse nll --json` prints.

    On the first `images`, all unless given; with `draws` stratified times an image, or None for the whole chain, which
    `steps` and `grid` make another. A model with classes is told those of the data, unless `label` says another.
    """
    loaded = model if isinstance(model, Model) else load(model)
    source = data if isinstance(data, Source) else loaded.source(data, split)
    counts = {"images": images, "draws": draws, "steps": steps, "seed": seed}
    given = {name: whole(name, value) for name, value in counts.items() if value is not None or name == "seed"}
    query = Nll(**given, label=label, grid=grid)
    return summary(terms_of(loaded, source, query, out), loaded, source, query)


def terms_of(
    model: Model, source: Source, query: Nll, out: Path | None = None, tick: Callable[[int], None] | None = None
) -> Terms:
    """The terms of the bound on the first images of a source. Finished batches are kept in `out`.

    The processes of a run take turns at the batches, and each returns all.
    """
    evaluations(model, source, query)  # refuses what has no answer before anything is made
    labels, count = told(model, source, query), query.count(source)
    claim = {} if out is None else _claim(out, model, source, query, labels)
    parts = []
    mine = range(dist.rank() * query.batch, count, dist.size() * query.batch)
    for first in mine:
        rows = torch.arange(first, min(first + query.batch, count), dtype=torch.int64, device="cpu")
        path = None if out is None else out / f"part-{first:08d}.npz"
        part = None if path is None or not path.exists() else _read(path, len(rows))
        if part is not None:
            if tick is not None:
                tick(part.bits.size)
        else:
            x_0 = to_float(source.gather(rows)[0].to(model.device))
            keys = Key(query.seed).fold("nll").rows(rows, model.device)
            cond = labels.conditioning.at(rows).to(model.device)
            part = bound(model.denoiser, x_0, keys, query.steps, query.draws, tick, cond, query.rule())
            _refuse_not_finite(part, first)
            if out is not None and path is not None:
                if not (out / QUERY).exists():
                    disk.write_json(out / QUERY, claim)
                _write(path, part)
        parts.append(part)
    terms = concatenate(parts) if dist.size() == 1 else _gathered(parts, mine, count)
    if out is not None and dist.rank() == 0:
        _finish(out, terms, model, query, summary(terms, model, source, query))
    return terms


def _refuse_not_finite(part: Terms, first: int) -> None:
    bad = ~(np.isfinite(part.bits).all(1) & np.isfinite(part.mse).all(1) & np.isfinite(part.prior))
    if bad.any():
        raise NotFiniteError(
            f"the bound of image {first + int(bad.argmax())} is not finite, so there is no number to give: the weights "
            "are at fault; `undiffuse verify` checks a run, an older checkpoint is another to try"
        )


def told(model: Model, source: Source, query: Nll) -> Told:
    """The labels of the images that are measured. Raises UsageError for words that say how to draw."""
    names = () if model.classes is None else model.classes.names
    if query.label in (ALL, RANDOM) and query.label not in names:
        raise UsageError(f"label {query.label} is not possible for images that are measured; give one class, or none")
    rows = torch.arange(query.count(source), dtype=torch.int64, device="cpu")
    return told_of(model.classes, source, rows, query.label, query.seed)


def summary(terms: Terms, model: Model, source: Source, query: Nll) -> dict[str, Any]:
    """The means of the terms, and for a model with classes which labels it was told."""
    return terms.summary() | ({} if model.classes is None else {"labels": told(model, source, query).words})


def _gathered(parts: list[Terms], firsts: range, count: int) -> Terms:
    """The terms of all images, from processes that hold every so many batches of them; process 0 holds the first."""
    k = dist.decide(parts[0].bits.shape[1] if parts else 0)
    each = np.zeros((count, k))
    whole = Terms(np.zeros(count), each, each.copy(), np.zeros((count, k), np.int64), np.zeros(k))
    for first, part in zip(firsts, parts, strict=True):
        for name in ("prior", "bits", "mse", "index"):
            getattr(whole, name)[first : first + len(part.prior)] = getattr(part, name)
    if dist.rank() == 0:
        whole.weights[:] = parts[0].weights
    for name in COLUMNS:
        dist.total(torch.from_numpy(getattr(whole, name)))  # in place: the two share their memory
    return whole


def evaluations(model: Model, source: Source, query: Nll) -> int:
    """How many network evaluations of one image `nll` will make in this process. Raises UsageError where it would."""
    model.denoiser.parameterisation.check(model.process)
    count, total = query.count(source), len(query.times(model.process)) - 1
    mine = sum(
        min(first + query.batch, count) - first for first in range(0, count, query.batch)[dist.rank() :: dist.size()]
    )
    return mine * (total if query.draws is None else len(strata(total, query.draws)))


def _claim(out: Path, model: Model, source: Source, query: Nll, labels: Told) -> dict[str, Any]:
    """What the folder is for. Raises UsageError if it is for another question."""
    config = {name: value for name, value in plain(model.config).items() if name != "variance"}
    weights = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(weights_of(model.denoiser.network).items()):
        weights.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    claim = {
        "model": weights.hexdigest(),
        "data": source.fingerprint(),
        "draws": query.draws,
        "steps": query.steps,
        "grid": query.grid,
        "seed": query.seed,
        "batch": query.batch,
        "clip": model.denoiser.clip,
        "variance": VARIANCES.name_of(model.denoiser.variance),
    }
    if model.classes is not None:
        claim["labels"] = labels.words
    return check(out, claim)


def _write(path: Path, terms: Terms) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, format=np.array(FORMAT), **{name: getattr(terms, name) for name in COLUMNS})
    disk.write_atomic(path, buffer.getvalue())


def _read(path: Path, rows: int) -> Terms | None:
    """The first `rows` images of a finished batch; None where it was measured on fewer."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            version = arrays["format"].item()
            refuse_newer(path, version)
            terms = Terms(**{name: arrays[name] for name in COLUMNS})
    # What numpy, zip and the shapes that Terms declares make of bytes that are not ours.
    except (OSError, ValueError, TypeError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise Corrupt(f"{path} is damaged; delete it, and the same command measures that batch again") from error
    if len(terms.bits) < rows:
        return None
    return Terms(terms.prior[:rows], terms.bits[:rows], terms.mse[:rows], terms.index[:rows], terms.weights)


def _finish(out: Path, terms: Terms, model: Model, query: Nll, found: dict[str, Any]) -> None:
    """summary.json, terms.npz, and for a whole chain the terms by t and the rate-distortion table and plot."""
    _write(out / "terms.npz", terms)
    disk.write_json(out / "summary.json", {"format": FORMAT} | found | {"model": model.meta.get("step")})
    if query.draws is not None:
        return
    times = query.times(model.process)
    rows = [
        f"{i}\t{float(times[i + 1]):.6f}\t{b:.8f}\t{m:.8f}"
        for i, (b, m) in enumerate(zip(terms.bits.mean(0), terms.mse.mean(0), strict=True))
    ]
    disk.write_atomic(out / "terms.tsv", "\n".join(["step\tt\tbits_per_dim\tmse", *rows, ""]).encode())
    curve = terms.rate_distortion()
    lines = [f"{row['step']}\t{row['rate']:.5f}\t{row['rmse']:.5f}" for row in curve]
    disk.write_atomic(out / "rate-distortion.tsv", "\n".join(["step\trate\trmse", *lines, ""]).encode())
    svg = line_plot(
        [("", [row["rate"] for row in curve], [row["rmse"] for row in curve])],
        x="rate (bits/dim)",
        y="distortion (RMSE, 0–255)",
        title="Rate-distortion",
    )
    disk.write_atomic(out / "rate-distortion.svg", svg.encode())


def table(terms: Terms, rows: int = 10) -> list[dict[str, float | int]]:
    """At most `rows` lines of the rate-distortion curve, evenly spread, the last step first: the form of Table 4."""
    curve = terms.rate_distortion()
    steps = {max(1, round(len(curve) * i / rows)) for i in range(1, rows + 1)}
    return [curve[step - 1] for step in sorted(steps, reverse=True)]
