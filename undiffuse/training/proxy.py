"""A cheap score of the samples of a run on its way: few of them, in few steps, beside some of its own images.

It says whether the samples get better, with the same noise each time; `undiffuse eval` says how good they are.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from undiffuse.data.source import spread
from undiffuse.errors import NotFiniteError, UsageError
from undiffuse.machine import log
from undiffuse.quality.feature.base import Extractor, open_features
from undiffuse.quality.metric.base import F64, refuse_not_finite
from undiffuse.quality.metric.frechet import frechet_of_rows, root
from undiffuse.quality.metric.kernel import kernel_distance
from undiffuse.training import look
from undiffuse.training.trainer import Trainer

REFERENCE = 2000  # real images, at most
TOLD = 2  # times that the cost is told: the first has that of the real images too


class Real(NamedTuple):
    """Features of real images, their mean, and the root of their covariance."""

    rows: Float[Tensor, "n d"]
    mean: Float[Tensor, "d"]
    half: Float[Tensor, "d d"]


@dataclass
class Proxy:
    """What scores `images` samples in `steps` steps; `real` is filled when it is first needed."""

    extractor: Extractor
    images: int
    steps: int
    every: int
    solver: str | None = "ddim"  # None for that of a distilled model
    real: Real | None = None
    costs: list[float] = field(default_factory=list)  # seconds of each time; the first has those of the real images

    @property
    def names(self) -> tuple[str, str]:
        """What the two distances are called."""
        return self.extractor.named("{fd}"), self.extractor.named("{kd}")

    def protocol(self) -> dict[str, Any]:
        """What must be the same for two of these numbers to be compared."""
        drawn = {"images": self.images, "steps": self.steps, "solver": self.solver or "its own"}
        return {**self.extractor.identity, **drawn, "real": 0 if self.real is None else len(self.real.rows)}

    def plan(self, images: int) -> str:
        """What is measured, in words, in a run on so many images."""
        chain = f"{self.steps} steps of {self.solver or 'its own'}"
        return (
            f"proxy scores every {self.every:,} steps: {' and '.join(self.names)} of {self.images:,} samples in "
            f"{chain}, beside {min(images, REFERENCE):,} training images; `undiffuse eval` measures in full"
        )

    def cost(self, step: float) -> str:
        """What the last one cost, with steps of so many seconds."""
        took, with_real = self.costs[-1], " with the features of the training images" if len(self.costs) == 1 else ""
        share = took / (took + self.every * step)
        return (
            f"it took {log.duration(took)}{with_real}, and every {self.every:,} steps that is {share:.1%} of the time"
        )


def prepare(trainer: Trainer) -> Proxy | None:
    """What scores the samples of a run, None if nothing does. Raises UsageError for what cannot be measured."""
    train = trainer.recipe.train
    if not train.eval_every:
        return None
    if train.eval_images < 2:
        raise UsageError(f"train.eval_images = {train.eval_images} is too few for a distance; set 2 or more")
    if len(trainer.batches.loader.source) < 2:
        raise UsageError(
            f"train.eval_every = {train.eval_every} is not possible: 1 training image is too few for a distance; give "
            "more, or leave it out"
        )
    model = trainer.model()
    try:
        model.config.parameterisation.check(model.process)
        model.times(train.eval_steps)
        extractor = open_features(train.eval_features, trainer.device, shape=model.image_shape)
        extractor.check(model.image_shape)
    except UsageError as error:
        raise UsageError(f"train.eval_every = {train.eval_every} is not possible: {error}") from error
    solver = "ddim" if model.config.bounds is None else None
    return Proxy(extractor, train.eval_images, train.eval_steps, train.eval_every, solver)


def tell(
    proxy: Proxy,
    trainer: Trainer,
    lines: look.Journal,
    step: float,
    tick: Callable[[int], None],
    say: Callable[[str], None],
) -> None:
    """Scores the samples, for the log and in one line; the first two times with the cost, beside steps of `step` s.

    Samples that cannot be had are a warning and no reason to end a run.
    """
    try:
        found = score(proxy, trainer, tick)
    except (UsageError, NotFiniteError) as error:
        log.warn(f"no proxy score at step {trainer.step}: {error}")
        return
    lines.write({"step": trainer.step, **found, "proxy": proxy.protocol()})
    values = ", ".join(f"{name} {value:.4g}" for name, value in zip(proxy.names, found.values(), strict=True))
    cost = f"; {proxy.cost(step)}" if len(proxy.costs) <= TOLD else ""
    say(f"proxy at step {trainer.step:,}: {values}{cost}")


def score(proxy: Proxy, trainer: Trainer, tick: Callable[[int], None]) -> dict[str, float]:
    """The two distances of the averaged weights. `tick(n)` is told of n steps of a batch, and may raise.

    Raises UsageError and NotFiniteError for samples that cannot be drawn or looked at.
    """
    began = time.monotonic()
    if proxy.real is None:
        proxy.real = _real(proxy.extractor, trainer, tick)
    real, batches = proxy.real, look.draw(trainer, "proxy", proxy.images, proxy.steps, proxy.solver, True, tick)
    parts = list[Tensor]()
    for images in batches:
        parts.append(_seen(proxy.extractor, images, sum(map(len, parts))))
    rows = torch.cat(parts)
    found = {
        "proxy_fd": frechet_of_rows(rows, real.mean, real.half),
        "proxy_kd": kernel_distance(rows, real.rows),
    }
    proxy.costs.append(time.monotonic() - began)
    return found


def _real(extractor: Extractor, trainer: Trainer, tick: Callable[[int], None]) -> Real:
    """Some training images, evenly, since data may be in the order of their classes."""
    source = trainer.batches.loader.source
    index = torch.tensor(spread(len(source), REFERENCE), dtype=torch.int64, device="cpu")
    parts = []
    for part in index.split(64):
        tick(0)
        parts.append(_seen(extractor, source.gather(part)[0], sum(map(len, parts))))
    rows = torch.cat(parts)
    wide = rows.to(F64)
    return Real(rows, wide.mean(0), root(torch.atleast_2d(wide.T.cov())))


def _seen(extractor: Extractor, images: UInt8[Tensor, "b c h w"], first: int) -> Float[Tensor, "b d"]:
    pool = extractor(images).pool.to("cpu", torch.float32)
    refuse_not_finite(pool, torch.arange(first, first + len(pool), dtype=torch.int64, device="cpu"), "pool")
    return pool
