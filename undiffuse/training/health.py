"""Which checkpoint is known to be good: every number finite, and a loss that has not run away.

A loss that is not finite is seen at one step, but the weights were often lost some steps before: they are finite still,
and nothing that starts from them learns. So each checkpoint is tried on a fixed batch when it is written.
"""

from typing import Any

import torch

from undiffuse.errors import Corrupt, NotFiniteError
from undiffuse.key import Key
from undiffuse.machine import store
from undiffuse.network.base import Conditioning
from undiffuse.training import look
from undiffuse.training.trainer import Trainer

IMAGES = 16
LEAST = 0.01  # a loss at step 0 that is less, as after fine-tuning, counts as this
SLOWER, SAFE = 10, 2e-4  # a rate to try after one that ended in NaN: so many times smaller, and at most the paper's
LOST = 10  # times the loss of step 0; a network that has learnt nothing but zeros has once that loss


def examine(trainer: Trainer, first: float | None) -> dict[str, Any]:
    """What a checkpoint says of itself: its loss on a fixed batch, that of its average, that of step 0, and `good`."""
    losses = [fixed_loss(trainer, averaged) for averaged in (False, True)]
    first = losses[0] if trainer.step == 0 or first is None else first
    finite = all(bool(t.isfinite().all()) for part in trainer.tensors().values() for t in part.values())
    good = finite and all(loss <= LOST * max(first, LEAST) for loss in losses)  # NaN is not
    return {"good": good, "loss": losses[0], "average_loss": losses[1], "first": first}


def fixed_loss(trainer: Trainer, averaged: bool) -> float:
    """The objective on the first images of the training set, with fixed noise."""
    source = trainer.batches.loader.source
    images, labels = source.gather(torch.arange(min(IMAGES, len(source)), dtype=torch.int64, device="cpu"))
    cond = Conditioning(labels if trainer.classes is not None else None)
    return look.fixed_loss(trainer, images, Key(0).fold("health"), cond, averaged=averaged)


def known_good(run: store.Run, before: int | None = None) -> int | None:
    """The newest step, below `before` if that is given, whose checkpoint was found good when it was written."""
    for step in reversed(run.steps()):
        if before is None or step < before:
            try:
                meta = run.load(step, only=())[1]
            except Corrupt:
                continue
            if meta.get("health", {}).get("good") is True:
                return step
    return None


def advised(error: NotFiniteError, trainer: Trainer, run: store.Run) -> NotFiniteError:
    """The same, with what to do about it."""
    good, lr = known_good(run, before=trainer.step), min(trainer.recipe.train.lr / SLOWER, SAFE)
    # A distillation begins from its teacher, whatever there is.
    folder = None if good is None or trainer.recipe.objective.taught else run.folder(good)
    start = "start a new run" if folder is None else f"start a new run from {folder}, which is known to be good, with"
    precise = "" if trainer.recipe.train.precision == "float32" else ", or with --set train.precision=float32"
    advised = NotFiniteError(
        f"{error}. The state before this step is saved, and the same command replays it. To go on, {start} "
        f"{'with ' if folder is None else ''}a lower learning rate, --set train.lr={lr:g}{precise}"
    )
    advised.good, advised.lr, advised.run = None if folder is None else str(folder), lr, str(run.path)
    return advised
