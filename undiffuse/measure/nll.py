"""Measuring the bound of a model on a data set, resumably."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.data.source import Source
from undiffuse.diffusion.grid import GRIDS, Grid
from undiffuse.diffusion.likelihood import Terms, bound, chain, strata
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.reverse import VARIANCES
from undiffuse.errors import NotFiniteError
from undiffuse.figure import line_plot
from undiffuse.key import Key
from undiffuse.machine import disk, dist
from undiffuse.measure.claim import FORMAT, in_other
from undiffuse.measure.parts import Parts, claimed, divided, measured, told
from undiffuse.model.classes import Told
from undiffuse.model.load import load
from undiffuse.model.model import Model, to_float
from undiffuse.strict import whole

PARTS = Parts(Terms, shared=("weights",))


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
    model.refuse_distilled("a bound")
    model.refuse_guided("a bound")
    evaluations(model, source, query)  # refuses what has no answer before anything is made
    labels = told(model, source, query.count(source), query.label, query.seed)

    def measure(rows: Int[Tensor, "b"]) -> Terms:
        x_0 = to_float(source.gather(rows)[0].to(model.device))
        keys = Key(query.seed).fold("nll").rows(rows, model.device)
        cond = labels.conditioning.at(rows).to(model.device)
        part = bound(model.denoiser, x_0, keys, query.steps, query.draws, tick, cond, query.rule())
        _refuse_not_finite(part, int(rows[0]))
        return part

    def kept(part: Terms) -> None:
        if tick is not None:
            tick(part.bits.size)

    claim = claimed(out, model, source, _question(model, query, labels))
    terms = measured(PARTS, query.count(source), query.batch, measure, out, claim, kept)
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


def summary(terms: Terms, model: Model, source: Source, query: Nll) -> dict[str, Any]:
    """The means of the terms, and for a model with classes which labels it was told."""
    found = terms.summary() | in_other(model)
    if model.classes is None:
        return found
    return found | {"labels": told(model, source, query.count(source), query.label, query.seed).words}


def evaluations(model: Model, source: Source, query: Nll) -> int:
    """How many network evaluations of one image `nll` will make in this process. Raises UsageError where it would."""
    model.denoiser.parameterisation.check(model.process)
    count, total = query.count(source), len(query.times(model.process)) - 1
    images = divided(count, query.batch)
    return images * (total if query.draws is None else len(strata(total, query.draws)))


def _question(model: Model, query: Nll, labels: Told) -> dict[str, Any]:
    """What a folder is for, besides a model and data."""
    question = {
        "draws": query.draws,
        "steps": query.steps,
        "grid": query.grid,
        "seed": query.seed,
        "batch": query.batch,
        "clip": model.denoiser.clip,
        "variance": VARIANCES.name_of(model.denoiser.variance),
        "precision": model.precision,
    }
    if query.grid not in (None, "even"):  # a name does not say where its times are
        question["grid"] = [query.grid, *query.times(model.process).tolist()]
    return question | ({} if model.classes is None else {"labels": labels.words})


def _finish(out: Path, terms: Terms, model: Model, query: Nll, found: dict[str, Any]) -> None:
    """summary.json, terms.npz, and for a whole chain the terms by t and the rate-distortion table and plot."""
    PARTS.write(out / "terms.npz", terms)
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
