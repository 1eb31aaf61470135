"""Scores and bits/dim of several models, each in one table; a row of scores is of what was measured in the same way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from undiffuse.model.model import Model
from undiffuse.quality.metric.base import METRICS
from undiffuse.view import pieces, results
from undiffuse.view.report import Listing, Section, Table
from undiffuse.view.results import Bound, Evaluation

UNSAID = {"device", "note", "metrics"}  # what the protocol says of features and does not decide a score
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Score:
    """One number of one evaluation: whose it is, its folder, and what must be the same for another to be compared."""

    owner: int
    row: Row
    terms: dict[str, str]
    folder: str

    @staticmethod
    def of(owner: int, found: Evaluation, row: Row) -> "Score":
        return Score(owner, row, terms(found, row), found.path.name)


def terms(found: Evaluation, row: Row) -> dict[str, str]:
    """What decides a score besides the samples: their number and shape, the extractor, the metric, the reference."""
    said = found.protocol
    features = found.features(row)
    metric = next(
        (options for name, options in features.get("metrics", {}).items() if row.get("key") in _labels(name)), {}
    )
    reference = said.get("reference", {})
    images = reference.get("fingerprint") or reference.get("data")
    found_terms = {"n": said.get("n"), "images": said.get("images")}
    found_terms |= {
        name if name == "extractor" else f"extractor {name}": value
        for name, value in features.items()
        if name not in UNSAID
    }
    found_terms |= {f"metric {name}": value for name, value in metric.items()}
    found_terms |= {"reference": images, "reference split": reference.get("split")}
    found_terms |= {"reference statistics": reference.get("statistics")}
    return {name: results.words(value) for name, value in found_terms.items() if value is not None}


def _labels(name: str) -> dict[str, str]:
    """The numbers of a metric by key; none for one that is not ours."""
    kind = METRICS.classes.get(name)
    return {} if kind is None else kind.labels


def differences(a: dict[str, str], b: dict[str, str]) -> list[tuple[str, str, str]]:
    """What two scores disagree in, with both sides."""
    names = dict.fromkeys([*a, *b])
    return [(name, a.get(name, "–"), b.get(name, "–")) for name in names if a.get(name) != b.get(name)]


def groups(evaluations: Sequence[Sequence[Evaluation]]) -> list[list[Score]]:
    """The scores that may be compared, together, one of each owner; those of one name follow one another."""
    by_name = dict[tuple[str, str], list[list[Score]]]()
    for owner, several in enumerate(evaluations):
        for found in several:
            for row in found.scores:
                score = Score.of(owner, found, row)
                same = by_name.setdefault((row["features"], row["score"]), [])
                fitting = next((group for group in same if _fits(score, group)), None)
                if fitting is None:
                    same.append([score])
                else:
                    fitting.append(score)
    return [group for same in by_name.values() for group in same]


def _fits(score: Score, group: Sequence[Score]) -> bool:
    return group[0].terms == score.terms and all(other.owner != score.owner for other in group)


def section(evaluations: Sequence[Sequence[Evaluation]], names: Sequence[str]) -> Section | None:
    """A row for each score that was measured in one way, the best strong; None where nothing was measured."""
    found = groups(evaluations)
    if not found:
        return None
    rows, strong = list[tuple[str, ...]](), set[tuple[int, int]]()
    same_name = [(group[0].row["features"], group[0].row["score"]) for group in found]
    for i, (group, name) in enumerate(zip(found, same_name, strict=True)):
        first = group[0]
        at = [] if same_name.count(name) == 1 else _apart(first, [g[0] for g, n in zip(found, same_name, strict=True)
                                                                  if n == name])  # fmt: skip
        cells = {score.owner: results.spread(score.row) for score in group}
        real = list(dict.fromkeys(results.number(score.row.get("real")) for score in group))
        title = f"{first.row['score']}{results.where(first.row)}" + (f" ({'; '.join(at)})" if at else "")
        row = (title, *(cells.get(owner, "–") for owner in range(len(names))))
        rows.append((*row, " / ".join(filter(None, real)), first.row.get("better", "")))
        best = _best(group)
        if best is not None:
            strong.add((i, 1 + best))
    seeds = any(score.row.get("sd") is not None for group in found for score in group)
    caption = "In bold the best of a row, where its lead is beyond the spread over the seeds (±)." if seeds else (
        "In bold the best of a row. Each value is of one seed, so that a small lead means nothing; `undiffuse eval "
        "--seeds 3` gives the spread."
    )  # fmt: skip
    caption = caption if strong else ""
    table = Table(("score", *names, "real images", "better"), tuple(rows), caption, frozenset(strong))
    return Section("Scores", "\n\n".join(refusals(evaluations, names)), tables=(table,))


def _apart(score: Score, others: Sequence[Score]) -> list[str]:
    """What sets a score apart from others of its name."""
    names = dict.fromkeys(name for other in others for name, _, _ in differences(score.terms, other.terms))
    alike = sum(other.terms == score.terms for other in others) > 1
    folder = [f"in {score.folder}"] if alike else []  # several of one owner, which may differ in how they were drawn
    return folder + [f"{name} {shortened(score.terms.get(name, '–'))}" for name in names]


def shortened(text: str) -> str:
    """The beginning of a sum."""
    return f"{text[:8]}…" if len(text) >= 32 and " " not in text else text


def _best(group: Sequence[Score]) -> int | None:
    """Whose score is the best, where it leads by more than the spread."""
    if len({score.owner for score in group}) < 2:
        return None
    sign = 1 if group[0].row.get("better") == "higher" else -1
    first, second, *_ = sorted(group, key=lambda score: -sign * score.row["value"])
    spread = sum((score.row.get("sd", score.row.get("error")) or 0) ** 2 for score in (first, second)) ** 0.5
    return first.owner if abs(first.row["value"] - second.row["value"]) > spread else None


def refusals(evaluations: Sequence[Sequence[Evaluation]], names: Sequence[str]) -> list[str]:
    """Which evaluations are not ranked against each other, and what both sides are."""
    letters = [name.partition(":")[0] for name in names]
    first = dict[tuple[str, str], Score]()
    said = dict[str, None]()
    for group in groups(evaluations):
        name = (group[0].row["features"], group[0].row["score"])
        other = first.setdefault(name, group[0])
        if other.terms != group[0].terms:
            both = "; ".join(
                f"{what} is {shortened(a)} for {letters[other.owner]} and {shortened(b)} for {letters[group[0].owner]}"
                for what, a, b in differences(other.terms, group[0].terms)
            )
            said[f"Not ranked in one row, because the protocols differ: {both}."] = None
    return list(said)


def protocols(evaluations: Sequence[Sequence[Evaluation]], names: Sequence[str]) -> Section:
    """What differs between the protocols in a table, and what is the same in all, once."""
    columns = [
        (name if len(several) == 1 else f"{name}, {found.path.name}", _said(found))
        for several, name in zip(evaluations, names, strict=True)
        for found in several
    ]
    keys = dict.fromkeys(key for _, said in columns for key in said)
    rows, cards = list[tuple[str, ...]](), dict[str, list[tuple[str, str]]]()
    for key in keys:
        cells = [said.get(key, "–") for _, said in columns]
        part, _, name = key.partition(": ")
        if len(set(cells)) > 1:
            rows.append((key, *map(shortened, cells)))
        elif name:
            cards.setdefault(part, []).append((name, cells[0]))
        else:
            cards.setdefault("protocol", []).append((key, cells[0]))
    same = tuple(Listing(tuple(each), f"The same for all: {part}") for part, each in cards.items())
    table = Table(("what differs", *(name for name, _ in columns)), tuple(rows), words=True)
    return Section("Protocols of the scores", tables=(table,) if rows and len(columns) > 1 else (), listings=same)


def _said(found: Evaluation) -> dict[str, str]:
    """Each line of a protocol, features by the name of their extractor."""
    features = {str(each.get("extractor")): each for each in found.protocol.get("features", ())}
    return dict(results.flat(found.protocol | {"features": features}))


def bits(known: Sequence[tuple[str, Bound, Model, list[str]]]) -> list[Section]:
    """bits/dim of several models by name, and the terms and the curves over each other; warnings of each come first."""
    if not known:
        return []
    stale = [f"{name}: {text}" for name, _, _, texts in known for text in texts]
    rows = tuple((name, *_bound(bound)) for name, bound, _, _ in known)
    header = ("", "bits/dim", "images", "prior", "rate", "decoder", "terms an image", "data")
    data = {(bound.query.get("data"), bound.summary["images"]) for _, bound, _, _ in known}
    text = [] if len(data) == 1 else ["Measured on other images, so that the numbers are not to be compared."]
    if len({"ode" in bound.query for _, bound, _, _ in known}) > 1:
        text.append("A bound is higher than the likelihood of the ODE of the same model; compare like with like.")
    loss, error, curves = dict[str, pieces.Line](), dict[str, pieces.Line](), dict[str, pieces.Line]()
    for name, bound, model, _ in known:
        if bound.terms is not None and (lines := results.time_lines(bound.terms, bound.query, model.process)):
            loss[name], error[name] = lines
        if bound.terms is not None and bound.whole:
            curve = bound.terms.rate_distortion()
            curves[name] = ([row["rate"] for row in curve], [row["rmse"] for row in curve])
    figures = (
        pieces.plot(loss, "t", "bits/dim of a step", "Loss by t", "", log_x=True, log_y=True),
        pieces.plot(error, "t", "RMSE of x̂₀, 0–255", "Error of the predicted image by t", ""),
        pieces.plot(curves, "rate (bits/dim)", "distortion (RMSE, 0–255)", "Rate-distortion", ""),
    )
    caption = "± is the standard error over the images."
    table = Table(header, rows, caption)
    return [
        Section(
            "Bits per dimension",
            "\n\n".join([*stale, *text]),
            (),
            (),
            (table,),
            pieces.present(figures),
            least=pieces.HALF,
        )
    ]


def _bound(bound: Bound) -> tuple[str, ...]:
    """A row of the table, in the order of its header."""
    said, query = bound.summary, bound.query
    return (
        results.spread({"value": said["bits_per_dim"], "sd": said.get("standard_error")}),
        f"{said['images']:,}",
        *(results.number(said.get(key)) for key in ("prior", "rate", "decoder")),
        "ODE" if "ode" in query else "all" if query.get("draws") is None else f"{query['draws']:,}",
        shortened(query.get("data", "–")),
    )
