"""How good samples are: every metric on every extractor's features, beside real images, with all that was chosen."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from undiffuse import __version__
from undiffuse.errors import UsageError
from undiffuse.figure import png
from undiffuse.machine import disk, dist, log
from undiffuse.machine.arrayfile import write_arrays
from undiffuse.measure import claim
from undiffuse.measure.memorise import FILE, Memorisation, memorise
from undiffuse.measure.passes import Against, Judge, Reference, Seen, Ticking, against, kept_of, over_samples, silent
from undiffuse.measure.sets import Floor, Samples, words_of
from undiffuse.quality.gather import Kept
from undiffuse.quality.metric.base import METRICS, Gathered, Metric, compute

BIASED = {"fd", "sfd"}  # keys of the numbers that few samples make too high
NO_MEASURE = "too few training images, or no held-out image that is not among them, so nothing says what is near"
ENOUGH, ENOUGH_OF_FEW = 50_000, 10_000  # images that a distance wants; and where the reference has fewer than the first

Numbers = dict[str, float]


@dataclass(frozen=True, eq=False)
class Result:
    """`rows`: one for each number, with the same of real images; `protocol`: all that was chosen.

    `references` are what was gathered of the reference, by the extractor's name. `memorisation` is None where it was
    left out, or nothing can be said.
    """

    rows: list[dict[str, Any]]
    notes: list[str]
    protocol: dict[str, Any]
    references: dict[str, Gathered]
    memorisation: Memorisation | None = None

    def table(self) -> list[str]:
        """Lines of text: each score, its spread over the seeds, else what one set tells of it, and real images."""
        return log.aligned(self.cells())

    def lines(self) -> list[str]:
        """The table, and what is said of memorisation."""
        return [*self.table(), *([] if self.memorisation is None else self.memorisation.lines())]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        head, *lines = (tuple(map(escape, line)) for line in self.cells())
        rows = "".join(f"<tr><th>{name}</th><td>{'</td><td>'.join(rest)}</td></tr>" for name, *rest in lines)
        return f"<table><tr><th>{'</th><th>'.join(head)}</th></tr>{rows}</table>"

    def cells(self) -> list[list[str]]:
        """The table by rows, the first of which says what stands in the others."""
        seeds = max((len(row.get("each", ())) for row in self.rows), default=0)
        spread, of = ("sd", f"{seeds} seeds") if seeds else ("error", "one set")
        is_spread = any(spread in row for row in self.rows)
        head = ["score", "samples"] + ([f"± ({of})"] if is_spread else [])
        floors = {row["real_n"] for row in self.rows if "real_n" in row}
        fewer = any("value_at_real_n" in row for row in self.rows)
        for n in sorted(floors):
            head += [f"{n:,} real"] + ([f"{n:,} samples"] if fewer else [])
        lines = [head]
        for row in self.rows:
            line = [row["score"], number(row["value"])] + ([number(row.get(spread))] if is_spread else [])
            line += [number(row.get("real"))] if floors else []
            lines.append(line + ([number(row.get("value_at_real_n"))] if floors and fewer else []))
        return lines

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        found = {} if self.memorisation is None else {"memorisation": self.memorisation.plain()}
        return {"scores": self.rows, "notes": self.notes, **found, "protocol": self.protocol}


def number(value: float | None) -> str:
    """For a table: five digits."""
    return "" if value is None else f"{value:.5g}" if abs(value) >= 0.001 or value == 0 else f"{value:.2e}"


def score(
    sets: Sequence[Samples],
    reference: Reference,
    floor: Floor | None,
    judges: Sequence[Judge],
    batch: int = 64,
    out: Path | None = None,
    keep_images: bool = False,
    about: Mapping[str, Any] | None = None,
    ticking: Ticking = silent,
    say: Callable[[str], None] = log.silent,
    memorisation: bool = True,
) -> Result:
    """The scores of each set of samples (one for each seed), their mean and spread, and those of real images.

    Every process of a run returns the same. With `out` a stopped evaluation goes on; `about` is put into the protocol.
    `memorisation` of the first set is told where the reference is training images.
    """
    for judge in judges:
        reference.refuse(judge, sets[0].n)
    protocol = protocol_of(sets, reference, floor, judges, batch, about or {})
    if out is not None:
        claim.take(out, question_of(sets, reference, judges, batch, keep_images))
    memorisation &= reference.images is not None and reference.split == "train" and floor is not None
    seen = Seen.of(sets[0]) if memorisation else None
    prefix = None if floor is None else floor.n
    # Samples first: they cost most as a rule, and what they cost is told after their first batch.
    passes, told = [], list[str]()
    for i, each in enumerate(sets):
        look = seen if i == 0 else None
        images = each.n if keep_images else look.most if look is not None and each.are_drawn else 0
        kept, cost = kept_of(out, each, images), once(say, told, len(sets) - i)
        passes.append(over_samples(each, judges, prefix, batch, kept, ticking, cost, look))
        if keep_images and out is not None and dist.rank() == 0:
            _write_images(out / f"samples-{each.said.get('seed', 0)}.npz", each, kept, batch)
    others = {judge.extractor.name: against(judge, reference, floor, ticking, memorisation) for judge in judges}
    rows, notes = list[dict[str, Any]](), list[str]()
    for judge in judges:
        name = judge.extractor.name
        pairs = [(whole[name], first[name]) for whole, first in passes]
        for metric in judge.metrics:
            rows += rows_of(judge, metric, pairs, others[name], floor, notes)
    notes += warnings_of(rows, sets[0], reference)
    copied = None
    if seen is not None and floor is not None:
        device = judges[0].extractor.device
        copied = memorise(seen.everywhere(), passes[0][0], others, reference, floor, device, ticking)
        notes += [] if copied else [f"memorisation is left out: {NO_MEASURE}"]
    result = Result(rows, notes, protocol, {name: each.reference for name, each in others.items()}, copied)
    if out is not None and dist.rank() == 0:
        disk.write_json(out / "summary.json", {"format": claim.FORMAT} | result.plain())
        if copied is not None:
            disk.write_atomic(out / FILE, png(copied.picture(), drawn=True))
    return result


def _write_images(path: Path, samples: Samples, kept: Kept | None, batch: int) -> None:
    """The images of the finished batches as one array, `arr_0` [n, h, w, c], as other tools read it."""
    assert kept is not None
    images = torch.cat([kept.read_images(first) for first in range(0, samples.n, batch)])
    write_arrays(path, {"arr_0": images.permute(0, 2, 3, 1).numpy()})


def once(say: Callable[[str], None], told: list[str], sets: int) -> Callable[[str], None]:
    """Says what a set of samples costs, and of how many, unless that of an earlier one was `told`."""

    def cost(text: str) -> None:
        if not told:
            told.append(text)
            say(text + (f" for each of {sets} seeds" if sets > 1 else ""))

    return cost


def rows_of(
    judge: Judge,
    metric: Metric,
    samples: Sequence[tuple[Gathered, Gathered]],
    other: Against,
    floor: Floor | None,
    notes: list[str],
) -> list[dict[str, Any]]:
    """What one metric says, a row for each of its numbers. Where it cannot be and nobody named it, why is noted."""
    if metric.compares and not other.reference.has(metric):
        return _left_out(judge, metric, "the reference is statistics and no images", notes)
    try:
        values = [compute(metric, whole, other.reference) for whole, _ in samples]
    except UsageError as error:
        if judge.are_named:
            raise
        return _left_out(judge, metric, str(error), notes)
    best, least = _floor(metric, samples, other, floor)
    rows = []
    for key, label in metric.labels.items():
        each = [value[key] for value in values]
        row: dict[str, Any] = {"features": judge.extractor.name, "score": judge.extractor.named(label), "key": key}
        row |= {"value": fmean(each), "better": metric.better[key]}
        if len(each) > 1:
            row |= {"sd": stdev(each), "each": each}
        if key in metric.errors:
            row["error"] = fmean(value[metric.errors[key]] for value in values)
        row |= {name: fmean(value[name] for value in values) for name in values[0] if name.startswith(f"{key}_")}
        if best is not None and floor is not None:
            row |= {"real": best[key], "real_n": floor.n}
            if least is not None:
                row |= {"value_at_real_n": fmean(value[key] for value in least)}
        rows.append(row)
    return rows


def _left_out(judge: Judge, metric: Metric, why: str, notes: list[str]) -> list[dict[str, Any]]:
    notes.append(f"{METRICS.name_of(metric)} on {judge.extractor.name} is left out: {why}")
    return []


def _floor(
    metric: Metric,
    samples: Sequence[tuple[Gathered, Gathered]],
    other: Against,
    floor: Floor | None,
) -> tuple[Numbers | None, Sequence[Numbers] | None]:
    """What real images score, and what samples do beside them, where that is another number or another reference."""
    if floor is None or other.floor is None or floor.n < metric.least:
        return None, None
    best = compute(metric, other.floor, other.rest)
    if other.rest is other.reference and all(whole is first for whole, first in samples):
        return best, None
    return best, [compute(metric, first, other.rest) for _, first in samples]


def question_of(
    sets: Sequence[Samples], reference: Reference, judges: Sequence[Judge], batch: int, keep_images: bool
) -> dict[str, Any]:
    """What a folder is for."""
    features = [judge.extractor.identity | {"metrics": sorted(map(METRICS.name_of, judge.metrics))} for judge in judges]
    asked = {"samples": [each.digest for each in sets], "n": sets[0].n, "batch": batch, "features": features}
    return asked | {"reference": claim.digest(reference.said()), "keep_images": keep_images}


def warnings_of(rows: Sequence[Mapping[str, Any]], samples: Samples, reference: Reference) -> list[str]:
    """Of samples that are the reference or of another size, and of few, with what is known of the bias."""
    n, statistics = samples.n, reference.statistics
    total = len(reference.images) if reference.images is not None else statistics.n if statistics is not None else None
    notes = []
    if reference.fingerprint == samples.digest:
        notes.append(f"the samples are the images of {reference.spec} themselves, so that these scores say nothing")
    shape = words_of(samples.shape)
    other = None if statistics is None else statistics.said.get("images")
    if other not in (None, shape):
        notes.append(f"{reference.spec} was made of images of {other}, and these samples are {shape}")
    enough = ENOUGH if total is None or total >= ENOUGH else ENOUGH_OF_FEW
    if n >= enough or not any(row["key"] in BIASED for row in rows):
        return notes
    key = "fd_infinity_bias"
    bias = [f"{row['score'].removesuffix('∞')} by {row[key]:.3g}" for row in rows if row.get(key, 0) > 0]
    high = f", which is too high at this number ({', '.join(bias)}, by extrapolation)" if bias else ""
    return [
        *notes,
        f"{n:,} samples are fewer than the {enough:,} that a Fréchet distance is given with{high}; compare it only "
        "with one of as many",
    ]


def protocol_of(
    sets: Sequence[Samples],
    reference: Reference,
    floor: Floor | None,
    judges: Sequence[Judge],
    batch: int,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """What must be the same for the numbers to be the same."""
    c = sets[0].shape[0]
    seeds = {} if len(sets) == 1 else {"seed": [each.said.get("seed") for each in sets]}
    return {
        "n": sets[0].n,
        "images": f"{words_of(sets[0].shape)}, uint8",
        "samples": sets[0].said | seeds,
        **about,
        "reference": reference.said(),
        "floor": "none: no images apart from the reference" if floor is None else floor.said,
        "features": [_features(judge, c) for judge in judges],
        "batch": batch,
        "date": date.today().isoformat(),
        "versions": {"undiffuse": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _features(judge: Judge, count: int) -> dict[str, Any]:
    it = judge.extractor
    note = {} if it.note(count) is None else {"note": it.note(count)}
    metrics = {METRICS.name_of(each): asdict(each) for each in judge.metrics}  # pyright: ignore[reportArgumentType]
    said = {**it.identity, "dimensions": it.dimensions, "precision": "float32", "device": str(it.device), **note}
    return said | {"metrics": metrics}
