"""What a page is about: a model or a run with what was measured of it, real images beside it, how it is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from undiffuse.errors import NoSplit, UsageError, counted
from undiffuse.machine import log
from undiffuse.measure import parts, sets
from undiffuse.measure.claim import QUERY
from undiffuse.measure.sets import Real
from undiffuse.model.model import Model
from undiffuse.view import results
from undiffuse.view.results import Bound, Evaluation

STEPS, SMALL = 50, 64 * 64  # steps of a chain; pixels up to which 64 samples are drawn, of larger images 16


@dataclass(frozen=True, eq=False)
class Subject:
    """What a page is about. `log` is empty where the history is missing; `spec` is how a user names it."""

    spec: str
    model: Model
    log: list[dict[str, Any]]
    evaluations: list[Evaluation]
    bound: Bound | None
    unfinished_scores: tuple[str, ...] = ()
    unfinished_bound: str = ""

    @property
    def run(self) -> Path | None:
        """Its folder, where it is one of a run."""
        return Path(self.spec) if (Path(self.spec) / "config.toml").exists() else None

    @cached_property
    def digest(self) -> str:
        """sha256 of the weights."""
        return self.model.digest()

    def is_stale(self, found: Evaluation | Bound) -> bool:
        """Whether a measurement is of other weights."""
        if isinstance(found, Evaluation):
            return found.weights not in (None, self.digest)
        return found.query.get("model") not in (None, parts.identity(self.model))

    def stale(self, of_scores: bool = False) -> list[str]:
        """What is said of the bound, or of evaluations, that are of other weights."""
        found = self.evaluations if of_scores else [] if self.bound is None else [self.bound]
        return [f"{each.path} is {OTHER}" for each in found if self.is_stale(each)]

    @property
    def steps(self) -> int | None:
        return self.model.meta.get("step")


OTHER = "of other weights than those of this page: the training has gone on since, or another average was measured."


def subject(
    spec: str, model: Model, evaluations: Sequence[Path] | None = None, bound: Path | None = None, looks: bool = True
) -> Subject:
    """A model with its log and its measurements: those that are named, else those inside of its folder.

    Without `looks` no bound is looked for there; with an empty list no evaluation.

    Raises UsageError for a measurement that is named and is not finished; of one that is found so, that is told.
    """
    folder = Path(spec) if Path(spec).is_dir() else None
    found, left, begun = list[Evaluation](), list[str](), ""
    named = [*(evaluations or ())]
    if folder is not None and evaluations is None:
        named = sorted({path.parent for path in folder.glob("eval*/*") if path.name in (QUERY, results.SUMMARY)})
    for path in named:
        if evaluations or (path / results.SUMMARY).exists():
            found.append(Evaluation.read(path))
        else:
            left.append(f"{path} is an evaluation that is not finished; the same `undiffuse eval` again goes on.")
    if looks and bound is None and folder is not None and (folder / "nll").is_dir():
        if (folder / "nll" / results.SUMMARY).exists():
            bound = folder / "nll"
        else:
            begun = f"{folder / 'nll'} is a measurement that is not finished; the same `undiffuse nll` again goes on."
    rows = [] if folder is None else log.read_rows(folder / "log.jsonl")
    return Subject(spec, model, rows, found, None if bound is None else Bound.read(bound), tuple(left), begun)


@dataclass(frozen=True)
class Drawing:
    """How much is drawn: n samples (64, of large images 16, unless given) in so many steps (50 unless given) of DDIM.

    A distilled model draws in its own steps and with its own solver unless others are named.
    """

    n: int | None = None
    steps: int | None = None
    solver: str | None = None
    seed: int = 0

    def count(self, model: Model) -> int:
        _, height, width = model.image_shape
        return self.n if self.n is not None else (64 if height * width <= SMALL else 16)

    def length(self, model: Model) -> int:
        """The steps of the chain."""
        if self.steps is None and model.config.bounds is not None:
            return len(model.config.bounds)
        return self.steps if self.steps is not None else min(STEPS, model.process.steps or STEPS)

    def named(self, model: Model) -> str | None:
        """The solver; None for that of a distilled model."""
        return "ddim" if self.solver is None and model.config.bounds is None else self.solver

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise UsageError(f"-n {self.n} is not possible; give 1 or more")

    def check(self, model: Model) -> None:
        """UsageError for what cannot be drawn, before anything is."""
        model.times(self.length(model))
        model.sampler(self.named(model))

    def said(self, model: Model) -> str:
        if model.config.bounds is not None:
            return f"the {counted(self.length(model), 'step')} of this distilled model, seed {self.seed}"
        steps, whole = self.length(model), model.process.steps
        taken = f"{steps} of {counted(whole, 'step')}" if whole else counted(steps, "step")
        return f"{taken} of {self.named(model)}, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class Data:
    """Real images in the shape of the model's: those it was trained on, and others, where there are any."""

    spec: str
    train: Real | None
    held_out: Real | None

    @property
    def shown(self) -> Real:
        found = self.held_out or self.train
        assert found is not None
        return found

    @property
    def words(self) -> str:
        return "held-out images" if self.held_out is not None else "training images"

    @staticmethod
    def open(spec: str, model: Model, skip_bad: bool = False) -> "Data":
        """Both splits, or the one that there is. Raises DataError."""
        read = partial(sets.open_real, spec, model.image_shape, reading=model.data.reading, skip_bad=skip_bad)
        train = read(split="train")
        try:
            return Data(spec, train, read(split="test"))
        except NoSplit:
            return Data(spec, train, None)


def some(source: Real, n: int) -> UInt8[Tensor, "n c h w"]:
    """At most n images, spread evenly, since data may be in the order of its classes."""
    chosen = sets.spread_over(source, n)
    return chosen.gather(torch.arange(len(chosen), dtype=torch.int64, device="cpu"))[0]
