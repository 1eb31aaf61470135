"""What a run looks at on its way: the loss on held-out images, the lowest of them so far, and previews."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from undiffuse.data.source import Source, Wanted, open_raw, spread, unify
from undiffuse.errors import DataError, NotFiniteError, UsageError
from undiffuse.figure import grid, png
from undiffuse.key import Key
from undiffuse.machine import disk, dist, log, sink
from undiffuse.model.classes import drawn, told_of
from undiffuse.model.model import to_float, to_uint8
from undiffuse.model.recipe import Recipe
from undiffuse.model.walk import best
from undiffuse.network.base import NOTHING, Conditioning
from undiffuse.training.trainer import Trainer

Journal = sink.Journal | sink.Nowhere
TERMS = 256  # losses that a held-out loss is at least the mean of: fewer images are seen with more noises each
PREVIEWS, PREVIEW_STEPS = 64, 50  # the latter of a model that no fast solver takes


def held_out_split(data: str, recipe: Recipe, shape: tuple[int, int, int], skip_bad: bool = False) -> Source | None:
    """What process 0 measures of the test split of a data set, in the training images' shape; None without one."""
    count = recipe.train.held_out
    if count < 1 or not dist.is_first():
        return None
    wanted = Wanted.of(shape[1:], shape[0])
    try:
        return unify(open_raw(data, "test", wanted.reading(recipe.data.reading)), shape[1:], shape[0], skip_bad, count)
    except DataError as error:
        log.warn(f"no held-out loss: {error}. --set data.hold_out=0.05 keeps some of the training images for it")
        return None


class Held(NamedTuple):
    """Held-out images and what the network is told of them."""

    images: UInt8[Tensor, "n c h w"]
    cond: Conditioning


def held_out_images(trainer: Trainer, source: Source | None) -> Held | None:
    """Some images of a held-out split, spread evenly over it, or None. DataError for a class that is not trained on."""
    count = trainer.recipe.train.held_out
    if source is None or count < 1:
        return None
    index = torch.tensor(spread(len(source), count), dtype=torch.int64, device="cpu")
    return Held(source.gather(index)[0], told_of(trainer.classes, source, index).conditioning)


@torch.no_grad()
def fixed_loss(
    trainer: Trainer,
    images: UInt8[Tensor, "n c h w"],
    key: Key,
    cond: Conditioning = NOTHING,
    draws: int = 1,
    averaged: bool = True,
    check: Callable[[], None] | None = None,
) -> float:
    """The objective on fixed images with `draws` fixed noises each, in float32."""
    denoiser = trainer.model(averaged).denoiser
    denoiser.clip = False
    rows, total = torch.arange(len(images) * draws, dtype=torch.int64, device="cpu"), 0.0
    for part in rows.split(trainer.micro):
        if check is not None:
            check()
        chosen = part % len(images)
        x_0 = to_float(images[chosen].to(trainer.device))
        told, keys = cond.at(chosen).to(trainer.device), key.rows(part, trainer.device)
        loss = trainer.objective(denoiser, x_0, told, keys)
        total += float(loss.per_example.cpu().double().sum())
    return total / len(rows)


def held_out_loss(trainer: Trainer, held: Held, check: Callable[[], None] | None = None) -> float:
    """The objective on held-out images, by the averaged weights."""
    draws = -(-TERMS // len(held.images))
    return fixed_loss(trainer, held.images, Key(0).fold("held out"), held.cond, draws, check=check)


@dataclass
class Lowest:
    """The lowest held-out loss so far and its step, and the step that was measured last."""

    loss: float = math.inf
    step: int = 0
    measured: int = 0

    def note(self, step: int, loss: float) -> bool:
        """Whether it is the lowest."""
        self.measured = step
        if loss < self.loss:
            self.loss, self.step = loss, step
        return self.step == step

    def is_over(self, patience: float, every: int) -> bool:
        """Whether it has not fallen for `patience` times the steps up to the lowest, and five measurements at least."""
        return patience > 0 and self.measured >= self.step + max(patience * self.step, 5 * every)


def save_grids(trainer: Trainer, folder: Path, lines: Journal, tick: Callable[[int], None]) -> None:
    """64 samples of the averaged weights, and of the weights as they are, from the same noise each time.

    None, and a warning, if they cannot be drawn; `tick(n)` is called after every n of `preview_steps` and may raise:
    nothing is written then.
    """
    for averaged, name in ((True, f"step-{trainer.step:09d}.png"), (False, f"step-{trainer.step:09d}-raw.png")):
        try:
            picture = grid(torch.cat(list(draw(trainer, "preview", PREVIEWS, *_preview(trainer), averaged, tick))))
        # Such a process may be trained, and such weights are no reason to end a run; who asks for a sample is told.
        except (UsageError, NotFiniteError) as error:
            log.warn(f"no preview at step {trainer.step}: {error}")
            return
        disk.write_atomic(folder / name, png(picture, drawn=True))
        lines.image(trainer.step, "samples" if averaged else "samples of the raw weights", picture)


def draw(
    trainer: Trainer, name: str, n: int, steps: int, solver: str | None, averaged: bool, tick: Callable[[int], None]
) -> Iterator[UInt8[Tensor, "b c h w"]]:
    """n samples in batches, from the same noise each time, which is that of `name`; `tick` as in `save_grids`."""
    model = trainer.model(averaged)
    keys, cond = Key(0).fold(name).rows(n), drawn(model.classes, n).conditioning
    (times, sampler, _), batch = model.walk(steps, solver), _batch(trainer)
    for part in (slice(i, i + batch) for i in range(0, n, batch)):
        yield to_uint8(model.chain(keys[part], times, sampler, cond.at(part), progress=tick))


def drawing_steps(trainer: Trainer, n: int, steps: int) -> int:
    """How many steps of a batch `draw` takes."""
    return steps * -(-n // _batch(trainer))


def preview_steps(trainer: Trainer) -> int:
    """How many steps of a batch `save_grids` takes."""
    return 2 * drawing_steps(trainer, PREVIEWS, _preview(trainer)[0])


def _preview(trainer: Trainer) -> tuple[int, str | None]:
    """Steps and solver: those of `Model.walk`, but for mu, which would take all steps."""
    config = trainer.config
    if config.bounds is not None:
        return len(config.bounds), None
    if config.parameterisation.needs_table:
        return min(PREVIEW_STEPS, config.process.steps or PREVIEW_STEPS), "ddim"
    return best(config.process, None, None)[1], None


def _batch(trainer: Trainer) -> int:
    # Without a backward pass an image takes less than half the room of one in a step; all at once may not fit.
    return trainer.micro * (1 if trainer.recipe.train.recompute else 2)
