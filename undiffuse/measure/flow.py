"""Measuring the likelihood of the probability-flow ODE on a data set, resumably."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from jaxtyping import Int
from torch import Tensor

from undiffuse.data.source import Source
from undiffuse.diffusion.flow import FlowTerms, Solver, flow_bits
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.machine import disk, dist
from undiffuse.measure.claim import FORMAT
from undiffuse.measure.parts import Parts, claimed, measured, told
from undiffuse.model.load import load
from undiffuse.model.model import Model, to_float
from undiffuse.strict import whole

PARTS = Parts(FlowTerms)


@dataclass(frozen=True)
class Ode:
    """What to measure: how many images, told of which class, how exactly."""

    images: int | None = None
    solver: Solver = Solver()
    seed: int = 0
    batch: int = 50
    label: str | SupportsIndex | None = None

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("seed", None), ("batch", 1)):
            if name != "images" or self.images is not None:
                whole(name, getattr(self, name), least)

    def count(self, source: Source) -> int:
        """How many images of a source are measured."""
        return min(len(source), self.images or len(source))


def nll_ode(
    model: Model | str | Path,
    data: Source | str | Path,
    *,
    split: str = "test",
    images: SupportsIndex | None = None,
    tolerance: float = 1e-5,
    probes: SupportsIndex = 1,
    seed: SupportsIndex = 0,
    label: str | SupportsIndex | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Bits/dim of the probability-flow ODE on a data set (Song et al. 2021): what `undiffuse nll --ode --json` prints.

    On the first `images`, all unless given. A model with classes is told those of the data, unless `label` says
    another.
    """
    loaded = model if isinstance(model, Model) else load(model)
    source = data if isinstance(data, Source) else loaded.source(data, split)
    count = None if images is None else whole("images", images)
    query = Ode(count, Solver(float(tolerance), whole("probes", probes)), whole("seed", seed), label=label)
    return summary(terms_of(loaded, source, query, out), loaded, source, query)


def terms_of(
    model: Model, source: Source, query: Ode, out: Path | None = None, tick: Callable[[int], None] | None = None
) -> FlowTerms:
    """The bits of the first images of a source; x̂_0 is not clipped. Finished batches are kept in `out`.

    `tick(n)` is called after each n images. The processes of a run take turns at the batches, and each returns all.
    """
    if model.precision != "float32":
        raise UsageError(f"the ODE is solved in float32, and this model computes in {model.precision}; leave that out")
    model.refuse_distilled("the likelihood of its flow")
    model.refuse_guided("the likelihood of its flow")
    model = model.variant(clip=False)
    model.denoiser.parameterisation.check(model.process)
    labels = told(model, source, query.count(source), query.label, query.seed)

    def measure(rows: Int[Tensor, "b"]) -> FlowTerms:
        x_0 = to_float(source.gather(rows)[0].to(model.device))
        keys = Key(query.seed).fold("nll", "ode").rows(rows, model.device)
        part = flow_bits(model.denoiser, x_0, keys, query.solver, labels.conditioning.at(rows).to(model.device))
        kept(part)
        return part

    def kept(part: FlowTerms) -> None:
        if tick is not None:
            tick(len(part.bits))

    question = {
        "ode": {"tolerance": query.solver.tolerance, "probes": query.solver.probes},
        "seed": query.seed,
        "batch": query.batch,
    } | ({} if model.classes is None else {"labels": labels.words})
    claim = claimed(out, model, source, question)
    terms = measured(PARTS, query.count(source), query.batch, measure, out, claim, kept)
    if out is not None and dist.rank() == 0:
        PARTS.write(out / "terms.npz", terms)
        found = summary(terms, model, source, query)
        disk.write_json(out / "summary.json", {"format": FORMAT} | found | {"model": model.meta.get("step")})
    return terms


def summary(terms: FlowTerms, model: Model, source: Source, query: Ode) -> dict[str, Any]:
    """The means over the images, how they were found, and for a model with classes which labels it was told."""
    found = terms.summary() | {"tolerance": query.solver.tolerance, "probes": query.solver.probes}
    if model.classes is None:
        return found
    return found | {"labels": told(model, source, query.count(source), query.label, query.seed).words}
