"""Measuring a model on a data set, resumably: each finished batch is a file, and the same command goes on."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from undiffuse import store
from undiffuse.data.source import Source
from undiffuse.errors import UsageError
from undiffuse.figure import line_plot
from undiffuse.key import Key
from undiffuse.likelihood import Terms, bound, chain, concatenate
from undiffuse.model import Model, to_float

COLUMNS = ("prior", "bits", "mse", "index", "weights")


@dataclass(frozen=True)
class Nll:
    """What to measure: how many images, how many of the chain's terms each, on which chain."""

    images: int | None = None
    draws: int | None = None
    steps: int | None = None
    seed: int = 0
    batch: int = 50


def nll(
    model: Model, source: Source, query: Nll, out: Path | None = None, tick: Callable[[int], None] | None = None
) -> Terms:
    """The terms of the bound on the first images of a source. Finished batches are kept in `out`."""
    if query.images is not None and query.images < 1:
        raise UsageError(f"{query.images} images were asked for; give 1 or more, or leave it out for all")
    count = min(len(source), query.images or len(source))
    if out is not None:
        _claim(out, model, source, query)
    parts = []
    for first in range(0, count, query.batch):
        rows = torch.arange(first, min(first + query.batch, count))
        path = None if out is None else out / f"part-{first:08d}.npz"
        if path is not None and path.exists():
            part = _read(path)
            if tick is not None:
                tick(part.bits.size)
        else:
            x_0 = to_float(torch.stack([source[i].image for i in rows.tolist()]).to(model.device))
            keys = Key(query.seed).fold("nll").rows(rows, model.device)
            part = bound(model.denoiser, x_0, keys, query.steps, query.draws, tick)
            if path is not None:
                _write(path, part)
        parts.append(part)
    terms = concatenate(parts)
    if out is not None:
        _finish(out, terms, model)
    return terms


def evaluations(model: Model, source: Source, query: Nll) -> int:
    """How many network evaluations of one image `nll` will make."""
    count = min(len(source), query.images or len(source))
    return count * (query.draws or len(chain(model.process, query.steps)) - 1)


def _claim(out: Path, model: Model, source: Source, query: Nll) -> None:
    """The folder belongs to one question; another one in it would mix two answers."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.denoiser.network.state_dict().items()):
        weights.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    claim = {
        "model": weights.hexdigest(),
        "data": source.fingerprint(),
        "draws": query.draws,
        "steps": query.steps,
        "seed": query.seed,
        "batch": query.batch,
    }
    path = out / "query.json"
    if path.exists():
        before = store.read_json(path)
        changed = [key for key in claim if before.get(key) != claim[key]]
        if changed:
            raise UsageError(
                f"{out} holds another measurement (other {', '.join(changed)}); give the same settings or another --out"
            )
    else:
        out.mkdir(parents=True, exist_ok=True)
        store.write_json(path, claim)


def _write(path: Path, terms: Terms) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(terms, name) for name in COLUMNS})
    store.write_atomic(path, buffer.getvalue())


def _read(path: Path) -> Terms:
    with np.load(path) as arrays:
        return Terms(**{name: arrays[name] for name in COLUMNS})


def _finish(out: Path, terms: Terms, model: Model) -> None:
    """summary.json, terms.npz, and for a whole chain the terms by t and the rate-distortion table and plot."""
    _write(out / "terms.npz", terms)
    summary = terms.summary()
    store.write_json(out / "summary.json", summary | {"model": model.meta.get("step")})
    if (terms.weights != 1).any():
        return
    times = chain(model.process, None if terms.bits.shape[1] == (model.process.steps or 0) else terms.bits.shape[1])
    rows = [
        f"{i}\t{float(times[i + 1]):.6f}\t{b:.8f}\t{m:.8f}"
        for i, (b, m) in enumerate(zip(terms.bits.mean(0), terms.mse.mean(0), strict=True))
    ]
    store.write_atomic(out / "terms.tsv", "\n".join(["step\tt\tbits_per_dim\tmse", *rows, ""]).encode())
    curve = terms.rate_distortion()
    lines = [f"{row['step']}\t{row['rate']:.5f}\t{row['rmse']:.5f}" for row in curve]
    store.write_atomic(out / "rate-distortion.tsv", "\n".join(["step\trate\trmse", *lines, ""]).encode())
    svg = line_plot(
        [("", [row["rate"] for row in curve], [row["rmse"] for row in curve])],
        x="rate (bits/dim)",
        y="distortion (RMSE, 0–255)",
        title="Rate-distortion",
    )
    store.write_atomic(out / "rate-distortion.svg", svg.encode())


def table(terms: Terms, rows: int = 10) -> list[dict[str, float | int]]:
    """`rows` lines of the rate-distortion curve, evenly spread, the last step first: the form of Table 4."""
    curve = terms.rate_distortion()
    return [curve[round(len(curve) * (rows - i) / rows) - 1] for i in range(rows)]
