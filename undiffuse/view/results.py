"""What `undiffuse eval` and `undiffuse nll` left in their folders, read back, and its parts of a page."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from undiffuse.diffusion.likelihood import Terms, strata
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import Process
from undiffuse.errors import Corrupt, UsageError
from undiffuse.machine import disk
from undiffuse.machine.tensorfile import refuse_newer
from undiffuse.measure import nll
from undiffuse.measure import scores as measured
from undiffuse.measure.along import Along
from undiffuse.measure.claim import QUERY
from undiffuse.measure.memorise import FILE, rows_of, told
from undiffuse.view import pieces
from undiffuse.view.report import Figure, Listing, Section, Table

SUMMARY = "summary.json"
BINS = 40  # times of a plot over t
WIDEST = 200  # characters of a value in a listing
Json = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A finished `undiffuse eval`: a row for each score, and its protocol.

    `memorised` is what it says of copies. With --progressive there are `points` of the chain, the last of which has the
    scores of the samples.
    """

    path: Path
    scores: list[dict[str, Any]]
    notes: list[str]
    protocol: dict[str, Any]
    memorised: dict[str, Any] | None = None
    points: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def read(path: Path) -> "Evaluation":
        """Raises UsageError for a folder that is none or is not finished, Corrupt for a damaged one."""
        found = _summary(path, "undiffuse eval")
        points = found.get("points", [])
        scores = points[-1].get("scores") if points else found.get("scores")
        notes, protocol = found.get("notes"), found.get("protocol")
        if not (isinstance(scores, list) and isinstance(notes, list) and isinstance(protocol, dict)) or not all(
            isinstance(row, dict) and {"score", "value", "features"} <= row.keys() for row in scores
        ):
            raise UsageError(f"{path / SUMMARY} has no scores; give the --out folder of `undiffuse eval`")
        return Evaluation(path, scores, notes, protocol, found.get("memorisation"), points)

    def features(self, row: Json) -> dict[str, Any]:
        """What the protocol says of the extractor of a score."""
        found = [each for each in self.protocol.get("features", ()) if each.get("extractor") == row["features"]]
        return found[0] if found else {"extractor": row["features"]}

    @property
    def weights(self) -> str | None:
        """sha256 of the weights that drew the samples; None where no model did."""
        model = self.protocol.get("model")
        return model.get("sha256") if isinstance(model, dict) else None


@dataclass(frozen=True, eq=False)
class Bound:
    """A finished `undiffuse nll`. `terms` are those of the bound, which --ode has not."""

    path: Path
    summary: dict[str, Any]
    query: dict[str, Any]
    terms: Terms | None

    @staticmethod
    def read(path: Path) -> "Bound":
        """Raises UsageError for a folder that is none or is not finished, Corrupt for a damaged one."""
        found = _summary(path, "undiffuse nll")
        if not {"bits_per_dim", "images"} <= found.keys():
            raise UsageError(f"{path / SUMMARY} has no bits/dim; give the --out folder of `undiffuse nll`")
        query = disk.read_json(path / QUERY) if (path / QUERY).exists() else {}
        terms = None
        if "prior" in found and (path / "terms.npz").exists():
            terms = nll.PARTS.read(path / "terms.npz", found["images"])
        return Bound(path, found, query if isinstance(query, dict) else {}, terms)

    @property
    def whole(self) -> bool:
        """Whether every term of the chain was measured."""
        return self.terms is not None and bool((self.terms.weights == 1).all())


def _summary(path: Path, command: str) -> dict[str, Any]:
    if not path.is_dir():
        raise UsageError(f"{path} is no folder; give the --out folder of `{command}`")
    if not (path / SUMMARY).exists():
        if (path / QUERY).exists():
            raise UsageError(
                f"{path} is not finished, it has no {SUMMARY}; give the command that began it again, which goes on"
            )
        raise UsageError(f"{path} has no {SUMMARY}; give the --out folder of `{command}`")
    found = disk.read_json(path / SUMMARY)
    if not isinstance(found, dict):
        raise Corrupt(f"{path / SUMMARY} is damaged: it is not a JSON object; measure again with another --out")
    refuse_newer(path / SUMMARY, found.get("format"))
    return found


def number(value: Any) -> str:
    """A score as it is read; empty for none."""
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return measured.number(value)


def spread(row: Json) -> str:
    """`12.3 ± 0.4`: over the seeds, else as one set of samples tells it; or the value alone."""
    error = row.get("sd", row.get("error"))
    return number(row["value"]) + ("" if error is None else f" ± {error:.2g}")


# Sections


def scores(found: Evaluation, title: str = "Scores", about: str = "") -> Section:
    """The scores beside those of real images, what is to be known of them, and the protocol."""
    seeds = max((len(row.get("each", ())) for row in found.scores), default=0)
    floors = sorted({row["real_n"] for row in found.scores if "real_n" in row})
    fewer = any("value_at_real_n" in row for row in found.scores)
    header = ["score", "samples"] + [f"{n:,} real images" for n in floors]
    header += [f"{n:,} samples" for n in floors if fewer] + ["better"]
    rows = []
    for row in found.scores:
        cells = [row["score"] + where(row), spread(row)]
        cells += [number(row.get("real")) if row.get("real_n") == n else "" for n in floors]
        cells += [number(row.get("value_at_real_n")) if row.get("real_n") == n else "" for n in floors if fewer]
        rows.append((*cells, row.get("better", "")))
    caption = (
        f"{found.protocol.get('n', 0):,} samples. Real images that take the place of samples show how far one can come."
    )
    caption += f" ± is the standard deviation over {seeds} seeds." if seeds else (
        " ± is what one set of samples tells: over the parts of an Inception score, and the standard error of a kernel "
        "or an extrapolated distance." if any("error" in row for row in found.scores) else ""
    )  # fmt: skip
    return Section(
        title,
        "\n\n".join(filter(None, [about, *found.notes])),
        tables=(Table(tuple(header), tuple(rows), caption),),
        listings=protocol(found),
    )


def where(row: Json) -> str:
    """The features of a score whose name does not say them."""
    return "" if row["features"].replace("-", "") in row["score"].lower().replace("-", "") else f", {row['features']}"


def protocol(found: Evaluation) -> tuple[Listing, ...]:
    """All that must be the same for the scores to be the same: a card for each part."""
    cards, plain = list[Listing](), list[tuple[str, str]]()
    for name, value in found.protocol.items():
        parts = value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]
        for part in parts:
            if isinstance(part, dict):
                cards.append(Listing(tuple(flat(part)), f"Protocol: {name.replace('_', ' ')}"))
            else:
                plain.append((name.replace("_", " "), words(part)))
    return Listing(tuple(plain), "Protocol"), *cards


def flat(said: Json, above: str = "") -> Iterator[tuple[str, str]]:
    """A line for each value that is no mapping, named with those above it."""
    for name, value in said.items():
        whole = f"{above}{str(name).replace('_', ' ')}"
        if isinstance(value, dict) and value:
            yield from flat(value, f"{whole}: ")
        else:
            yield whole, words(value)


def words(value: Any) -> str:
    """Plain data in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {words(each)}" for name, each in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        text = ", ".join(map(words, value))
        return text if len(text) <= WIDEST else f"{text[:WIDEST]} …"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def memorisation(found: Evaluation) -> Section | None:
    """The rates, what they mean, and the worst pairs; None where nobody looked."""
    said = found.memorised
    if said is None:
        return None
    header, *rows = map(tuple, rows_of(said))
    worst, path = tuple[Figure, ...](), found.path / FILE
    if path.exists():
        spaces = ", then in ".join(space["space"] for space in said["spaces"])
        worst = (
            Figure(_picture(path), f"The nearest pairs, in {spaces}: a sample, and its training image at the right."),
        )
    text = (
        f"The table counts {told(said)}. Each distance is divided by what is usual around that training image. The "
        "column of new images is what as many images that the model has not seen would show."
    )
    table = Table(tuple(header), tuple(rows))
    return Section("Memorisation", f"{said['says']}\n\n{text}", tables=(table,), figures=worst)


def along(found: Evaluation) -> Section | None:
    """The scores of the predicted x_0 along the chain; None where they were not measured."""
    if not found.points:
        return None
    whole = Along(found.points, found.notes, found.protocol)
    text = "The scores of what the model expects the finished image to be, at several steps (Fig. 10 of the paper)."
    gallery = tuple(Figure(svg) for svg in whole.plots().values())
    return Section("Scores along the chain", text, gallery=gallery, least=pieces.HALF)


def _picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            file.load()
            return file.copy()
    except OSError as error:
        raise Corrupt(f"{path} is damaged; delete it, and the same `undiffuse eval` writes it again") from error


# Bits per dimension


def bits(found: Terms | None, summary: Json, query: Json, process: Process, how: str) -> Section:
    """The bound with its terms, those by t, and for a whole chain the rate-distortion curve."""
    error = summary.get("standard_error")
    value = f"{summary['bits_per_dim']:.3f}" + ("" if error is None else f" ± {error:.3f}")
    facts = [("bits/dim, at most" if "prior" in summary else "bits/dim", value), ("images", f"{summary['images']:,}")]
    figures, tables = list[Figure | None](), list[Table]()
    if "prior" in summary:
        tables.append(pieces.terms(summary))
    if found is not None:
        figures += by_time(found, query, process)
        if (found.weights == 1).all():
            curve = found.rate_distortion()
            caption = f"All {len(curve)} steps: what a receiver knows after so many bits."
            figures.append(pieces.rate_distortion(curve, caption))
            tables.append(pieces.table_4(nll.table(found)))
    known = {"bits_per_dim", "standard_error", "images", "prior", "rate", "decoder", "format", "model"}
    rest = {name: each for name, each in summary.items() if name not in known}
    said = {name: value for name, value in query.items() if name not in ("format",) and value is not None}
    listing = Listing(tuple(flat(said | rest)), "How it was measured")
    return Section(
        "Bits per dimension", how, tuple(facts), (), tuple(tables), pieces.present(figures),
        (listing,) if listing.rows else (), least=pieces.HALF,
    )  # fmt: skip


def by_time(found: Terms, query: Json, process: Process) -> list[Figure | None]:
    """The mean term of the bound and the error of x̂_0 at each time, in bins where the terms are many."""
    lines = time_lines(found, query, process)
    if lines is None:
        return []
    loss, error = lines
    return [
        pieces.plot(
            {"": loss}, "t", "bits/dim of a step", "Loss by t",
            "The mean term of the bound by the time t that its step starts from. The first is the decoder's.",
            log_x=True, log_y=True,
        ),
        pieces.plot(
            {"": error}, "t", "RMSE of x̂₀, 0–255", "Error of the predicted image by t",
            "How far the image that the network predicts from x_t is from the true one.",
        ),
    ]  # fmt: skip


def time_lines(found: Terms, query: Json, process: Process) -> tuple[pieces.Line, pieces.Line] | None:
    """(t, bits of a step) and (t, RMSE of x̂_0); None where the chain is not known any more."""
    grid = query.get("grid")
    if isinstance(grid, list):  # its name, and where its times were
        chain = torch.tensor(grid[1:], dtype=F64, device="cpu")
    else:
        chain = nll.Nll(steps=query.get("steps"), grid=grid).times(process)
    total = len(chain) - 1
    if int(found.index.max()) >= total:
        return None
    edges = [low for low, _ in strata(total, min(BINS, total))]
    which = np.searchsorted(edges, found.index.ravel(), side="right") - 1
    times = chain.numpy()[found.index.ravel() + 1]
    count = np.bincount(which, minlength=len(edges))
    full = count > 0
    means = [
        np.bincount(which, values.ravel(), len(edges))[full] / count[full] for values in (times, found.bits, found.mse)
    ]
    t, loss, mse = (each.tolist() for each in means)
    return (t, loss), (t, [127.5 * value**0.5 for value in mse])
