"""How good x̂_0 is along the reverse chain (Fig. 10 of DDPM): the scores of an evaluation at several steps of it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from undiffuse.diffusion.sampler.base import Sampler
from undiffuse.errors import UsageError
from undiffuse.figure import line_plot
from undiffuse.key import Key, Keys
from undiffuse.machine import disk, dist, log
from undiffuse.measure import claim
from undiffuse.measure.evaluate import DRAWN, Query, compared, query_of
from undiffuse.measure.passes import Costs, Judge, Reference, Ticking, against, kept_of, silent
from undiffuse.measure.scores import number, once, protocol_of, question_of, rows_of, warnings_of
from undiffuse.measure.sets import Drawing, Floor, Samples, asks, drawn_by, said_of
from undiffuse.model.classes import drawn
from undiffuse.model.load import load
from undiffuse.model.model import Model, to_uint8
from undiffuse.model.walk import Steps
from undiffuse.network.base import NOTHING, Conditioning
from undiffuse.quality.gather import Kept, exchange, gather
from undiffuse.quality.metric.base import METRICS, Features, Gathered
from undiffuse.strict import whole

POINTS = 10  # as in Fig. 10
CHEAP = ("frechet", "inception-score")  # what Fig. 10 shows, and what is measured unless metrics are named


def stops(total: int, points: SupportsIndex, named: str = "points") -> list[int]:
    """How many of `total` steps remain at so many points, evenly, the first of the chain first; at the last it is 1.

    On 1,000 steps 20 points are the authors' indices 950, 900, …, 0, which count from 0.
    """
    points = whole(named, points)
    if not 1 <= points <= total:
        raise UsageError(f"{points} {named} along a chain of {total} steps are not possible; give 1 to {total}")
    return [1 + k * total // points for k in reversed(range(points))]


def x_0_along(
    model: Model,
    keys: Keys,
    times: Tensor,
    sampler: Sampler,
    at: Sequence[int],
    cond: Conditioning = NOTHING,
    progress: Callable[[int], None] | None = None,
) -> UInt8[Tensor, "b points c h w"]:
    """x̂_0 where so many steps of a chain remain; before the last one, the sample itself.

    Costs an evaluation of the network more for each of these points but that.
    """
    seen: list[Tensor] = []
    denoise = model.denoise(times, torch.empty(1, *model.image_shape, dtype=torch.float32, device=model.device), cond)

    def look(remaining: int, x: Tensor, t: Tensor) -> None:
        if remaining in at and remaining > 1:
            seen.append(to_uint8(denoise(x, t).x_0).cpu())

    end = model.chain(keys, times, sampler, cond, callback=look, progress=progress)
    return torch.stack([*seen, *([to_uint8(end)] if 1 in at else [])], 1)


def drawn_along(model: Model, how: Drawing, n: int, seed: int, at: Sequence[int]) -> Samples:
    """x̂_0 of the chains that `drawn_by` walks; image i · points + k is sample i at point k, so that n is that many."""
    whole_chain = drawn_by(model, how, n, seed)
    (times, sampler, _), points = model.walk(how.steps, how.solver, how.eta), len(at)
    n = whole_chain.n
    told = drawn(model.classes, n, seed) if how.label is None else model.told(how.label, n, seed)
    keys = Key(seed).fold("sample").rows(n)

    def images(index: Int[Tensor, "b"]) -> UInt8[Tensor, "b c h w"]:
        some = slice(int(index[0]) // points, int(index[-1]) // points + 1)
        return x_0_along(model, keys[some], times, sampler, at, told.conditioning.at(some)).flatten(0, 1)

    more = (points - at.count(1)) * asks(model)
    said = whole_chain.said | {"points": points, "evaluations": whole_chain.said["evaluations"] + more}
    digest = claim.digest({"chain": whole_chain.digest, "at": list(at)})
    return replace(whole_chain, n=n * points, said=said, digest=digest, images=images)


@dataclass(frozen=True, eq=False)
class Along:
    """`points`: the number of the reverse step that makes this x̂_0, its t, and its scores as an evaluation has them."""

    points: list[dict[str, Any]]
    notes: list[str]
    protocol: dict[str, Any]

    def columns(self) -> list[tuple[str, str, str]]:
        """Features, score and key of each number."""
        return list({(row["features"], row["score"], row["key"]): None for row in self._every_row()})

    def _every_row(self) -> list[dict[str, Any]]:
        return [row for point in self.points for row in point["scores"]]

    def _values(self, features: str, key: str, name: str = "value") -> list[float]:
        """One number at each point, NaN where it could not be had."""
        nothing = dict[str, float]()
        rows = [
            next((row for row in point["scores"] if (row["features"], row["key"]) == (features, key)), nothing)
            for point in self.points
        ]
        return [row.get(name, float("nan")) for row in rows]

    def _real(self) -> str:
        """How many real images there were."""
        n = next(row["real_n"] for row in self._every_row() if "real_n" in row)
        return f"{n:,} real images"

    def lines(self) -> list[str]:
        """Lines of text: a row for each point, and one for real images."""
        columns = [(self._values(f, key), self._values(f, key, "real")) for f, _, key in self.columns()]
        lines = [["reverse step", "t", *(score for _, score, _ in self.columns())]]
        for i, point in enumerate(self.points):
            lines.append([f"{point['step']:,}", f"{point['t']:.4g}", *(number(values[i]) for values, _ in columns)])
        if any(real[-1] == real[-1] for _, real in columns):
            lines.append([self._real(), "", *("" if real[-1] != real[-1] else number(real[-1]) for _, real in columns)])
        return log.aligned(lines)

    def tsv(self) -> str:
        """The same for other programs, in full, with the spread over the seeds where there are several."""
        head, columns = ["reverse_step", "t"], [[p["step"] for p in self.points], [p["t"] for p in self.points]]
        for features, score, key in self.columns():
            head.append(f"{features} {score}")
            columns.append(self._values(features, key))
            if any("sd" in row for row in self._every_row()):
                head.append(f"{features} {score} sd")
                columns.append(self._values(features, key, "sd"))
        rows = zip(*columns, strict=True)
        return "".join("\t".join(map(str, row)) + "\n" for row in [head, *rows])

    def plots(self) -> dict[str, str]:
        """An SVG for each score, by the name of its file: the two sides of Fig. 10."""
        steps, found = [point["step"] for point in self.points], dict[str, str]()
        for features, score, key in self.columns():
            values, real = self._values(features, key), self._values(features, key, "real")
            series = [(score, steps, values), *([("real images", steps, real)] if real[-1] == real[-1] else [])]
            name = re.sub(r"[^\w.-]+", "-", f"{features}-{key}")
            is_distance = key.startswith(("fd", "sfd"))
            title = "The predicted x_0 along the chain"
            found[f"{name}.svg"] = line_plot(series, "reverse process steps", score, title, log_y=is_distance)
        return found

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"points": self.points, "notes": self.notes, "protocol": self.protocol}

    def write(self, out: Path) -> None:
        """`summary.json`, `progressive.tsv`, and the plots. Raises StorageError."""
        disk.write_json(out / "summary.json", {"format": claim.FORMAT} | self.plain())
        disk.write_atomic(out / "progressive.tsv", self.tsv().encode())
        for name, text in self.plots().items():
            disk.write_atomic(out / name, text.encode())


def evaluate_along(
    samples: Model | str | Path,
    data: str | Path | Sequence[str | Path],
    query: Query | str | Sequence[str] | None = None,
    *,
    points: SupportsIndex = POINTS,
    n: SupportsIndex | None = None,
    steps: Steps = None,
    solver: str | Sampler | None = None,
    eta: SupportsFloat | None = None,
    label: str | SupportsIndex | None = None,
    seed: SupportsIndex | None = None,
    seeds: SupportsIndex = 1,
    batch: SupportsIndex = 64,
    out: str | Path | None = None,
    named: str | None = None,
    device: str = "auto",
    ticking: Ticking = silent,
    say: Callable[[str], None] = log.silent,
) -> Along:
    """The scores of x̂_0 at so many points of the chains that `evaluate` would draw, given the same (Fig. 10).

    The Fréchet distance, and the Inception score where features have logits, unless metrics are named. With `out` a
    stopped evaluation goes on. Raises UsageError, DataError, Corrupt, NotFiniteError.
    """
    query, count, batch = query_of(query), whole("seeds", seeds, 1), whole("batch", batch, 1)
    n, out = DRAWN if n is None else whole("n", n, 2), None if out is None else Path(out)
    model = samples if isinstance(samples, Model) else load(samples, device)
    how, first = Drawing(steps, solver, eta, label), whole("seed", 0 if seed is None else seed)
    times = model.walk(steps, solver, eta).times.tolist()
    total = len(times)
    at = stops(total - 1, points)
    sets = [drawn_along(model, how, n, first + k, at) for k in range(count)]
    chains = [replace(each, n=each.n // len(at)) for each in sets]
    reference, floor, judges = compared(data, query, chains[0], model, model.device, say)
    judges = judges if query.metrics else [_cheap(judge) for judge in judges]
    about = {"model": said_of(model, named or samples)}
    protocol = protocol_of(chains, reference, floor, judges, batch, about)
    for judge in judges:
        reference.refuse(judge, chains[0].n)
    if out is not None:
        claim.take(out, question_of(chains, reference, judges, batch, keep_images=False))
    prefix, told = None if floor is None else floor.n, list[str]()
    every = [
        _over(each, judges, len(at), batch, prefix, kept_of(out, each, False), ticking, once(say, told, count - i))
        for i, each in enumerate(sets)
    ]
    where = [{"step": total - remaining, "t": times[total - 1 - remaining]} for remaining in at]
    found = _scored(where, every, judges, reference, floor, protocol, ticking)
    found.notes.extend(warnings_of(found.points[-1]["scores"], chains[0], reference))
    if out is not None and dist.rank() == 0:
        found.write(out)
    return found


def _cheap(judge: Judge) -> Judge:
    return replace(judge, metrics=tuple(each for each in judge.metrics if METRICS.name_of(each) in CHEAP))


def _over(
    samples: Samples,
    judges: Sequence[Judge],
    points: int,
    batch: int,
    prefix: int | None,
    kept: Kept | None,
    ticking: Ticking,
    say: Callable[[str], None],
) -> dict[str, list[tuple[Gathered, Gathered]]]:
    """One pass over the chains: what is gathered at each point, by the extractor's name, of all and of `prefix`."""
    chains = samples.n // points
    few = chains if prefix is None else min(prefix, chains)
    found = {
        judge.extractor.name: [(Gathered(judge.metrics), Gathered(judge.metrics)) for _ in range(points)]
        for judge in judges
    }

    def take(name: str, features: Features, index: Int[Tensor, "b"]) -> None:
        for k, (every, first) in enumerate(found[name]):
            here = index % points == k
            every.update(features.some(here), index[here] // points)
            if few < chains:
                here &= index // points < few
                first.update(features.some(here), index[here] // points)

    costs = Costs("chains", chains, samples.said["evaluations"], batch, say, points)
    extractors = [replace(it.extractor, network=partial(_in_parts, it.extractor.network, batch)) for it in judges]
    with ticking(f"x_0 at {points} points of chains", samples.n) as advance:

        def tick(count: int) -> None:
            costs.done += count
            advance(count)

        gather(samples.images, samples.n, extractors, take, batch * points, kept, tick, costs.tell)
    pairs = dict[str, list[tuple[Gathered, Gathered]]]()
    for name, points_of in found.items():
        for every, first in points_of:
            joined = every.everywhere(exchange)
            pairs.setdefault(name, []).append((joined, first.everywhere(exchange) if few < chains else joined))
    return pairs


def _in_parts(network: Callable[[Tensor], Features], most: int, images: UInt8[Tensor, "n c h w"]) -> Features:
    """So many images at a time, because those of all points are more than an extractor has room for."""
    parts = [network(images[i : i + most]) for i in range(0, len(images), most)]
    return Features(**{name: torch.cat([part[name] for part in parts]) for name in parts[0].parts()})


def _scored(
    where: Sequence[dict[str, Any]],
    every: Sequence[dict[str, list[tuple[Gathered, Gathered]]]],
    judges: Sequence[Judge],
    reference: Reference,
    floor: Floor | None,
    protocol: dict[str, Any],
    ticking: Ticking,
) -> Along:
    """The scores of each point, against a reference that is looked at once."""
    others = {judge.extractor.name: against(judge, reference, floor, ticking) for judge in judges}
    points, notes = list[dict[str, Any]](), list[str]()
    for k, point in enumerate(where):
        rows = list[dict[str, Any]]()
        for judge in judges:
            name = judge.extractor.name
            pairs = [of_seed[name][k] for of_seed in every]
            for metric in judge.metrics:
                rows += rows_of(judge, metric, pairs, others[name], floor, notes)
        points.append({**point, "scores": rows})
    return Along(points, list(dict.fromkeys(notes)), protocol)
