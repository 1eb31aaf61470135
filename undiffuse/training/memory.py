"""Whether a run fits into memory: by estimate, and for `micro_batch = "auto"` by trial."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from undiffuse.errors import MemoryExhausted, is_out_of_memory
from undiffuse.machine import device as machine
from undiffuse.machine import dist
from undiffuse.machine.log import Say
from undiffuse.model.recipe import TrainConfig
from undiffuse.training.need import Need, gigabytes, need
from undiffuse.training.plan import plan
from undiffuse.training.trainer import Trainer


def planned(trainer: Trainer, last: int) -> str:
    """The size of a step and the cost of the whole run, in words."""
    images = len(trainer.batches.loader.source)
    return plan(trainer.recipe, trainer.config, trainer.micro, images, last)


def of(trainer: Trainer, train: TrainConfig, micro: int) -> Need:
    """What a step needs by estimate with other settings and micro-batches."""
    return need(train, trainer.config, micro, trainer.device, trainer.recipe.objective)


def needed(trainer: Trainer) -> Need | None:
    """What a step of this run needs, by estimate; None for a network of the user's own.

    It may do with tensors that have no values what it must not, such as keep one of them for the steps that follow.
    """
    if not type(trainer.config.network).__module__.startswith("undiffuse."):
        return None
    return of(trainer, trainer.recipe.train, trainer.micro)


def foreseen(trainer: Trainer) -> str:
    """The same in words, for the end of a bracket."""
    wanted = needed(trainer)
    return "" if wanted is None else f"; {wanted}"


def tell_plan(trainer: Trainer, last: int, say: Say, warn: Say) -> None:
    """Before step 0: what the run costs and needs; a warning, not a refusal, if there may be less memory than that."""
    say(planned(trainer, last))
    wanted, free = needed(trainer), machine.free_bytes(trainer.device)
    if wanted is None:
        return
    if free is None:
        say(str(wanted))
        return
    there = free + held(trainer)
    say(f"{wanted}; there are {gigabytes(there)}")
    if wanted.total > there:
        ways = " or ".join(remedies(trainer, there)) or "a smaller network or data.size"
        warn(
            f"this run may not fit into memory: it needs {gigabytes(wanted.total)} by estimate, and there are "
            f"{gigabytes(there)} on {trainer.device}; set {ways}"
        )


def exhausted(trainer: Trainer, last: int) -> MemoryExhausted:
    """Out of memory in a step, with what was expected of it."""
    distils = trainer.recipe.objective.taught > 0
    anew = "Distil anew" if distils else "The last checkpoint is good; fine-tune from it with --init"
    return MemoryExhausted(
        f"out of memory at step {trainer.step} with micro-batches of {trainer.micro}, when "
        f"{machine.peak_bytes(trainer.device) / 1e9:.1f} GB had been in use ({planned(trainer, last)}"
        f"{foreseen(trainer)}). {anew}, in another --out and with a smaller one, --set "
        f"train.micro_batch={max(1, trainer.micro // 2)}, or with {less(trainer)}"
    )


def held(trainer: Trainer) -> int:
    """The bytes of an estimate that are taken before step 0: weights, averages, sums over processes."""
    sums = dist.size() > 1 and not trainer.recipe.train.exact_shards
    copies = 2 + len(trainer.recipe.train.ema_profiles) + sums + (trainer.recipe.objective.taught > 0)
    return copies * sum(weight.nbytes for weight in trainer.weights)


def remedies(trainer: Trainer, there: int) -> Iterator[str]:
    """The settings with which the run would fit into so many bytes by estimate, each with what it would need."""
    train = trainer.recipe.train
    if not train.exact_shards and trainer.micro > 1:
        # The peak is the larger of some linear functions of the images, so between two sizes it is below the chord.
        whole = replace(train, batch=2 * train.batch)  # of several micro-batches, whose gradients stay
        one, all_ = (of(trainer, whole, size).total for size in (1, trainer.micro))
        each = (all_ - one) / (trainer.micro - 1)
        fits = min(trainer.micro - 1, 1 + int((there - one) // each))
        if fits >= 1:
            auto = "auto or train.micro_batch=" if trainer.device.type == "cuda" else ""
            yield f"train.micro_batch={auto}{fits} ({gigabytes(one + (fits - 1) * each)})"
    if train.recompute is True:
        return
    levels = len(trainer.config.network.levels(trainer.config.build(clip=False, device="meta").network))
    for choice in (*range(int(train.recompute) + 1, levels), True):
        size = of(trainer, replace(train, recompute=choice), trainer.micro).total
        if size <= there:
            yield f"train.recompute={str(choice).lower()} ({gigabytes(size)})"
            return


def fit_micro_batch(trainer: Trainer, say: Say) -> None:
    """Takes the largest half of a half … of the share that fits, for good. Does nothing after step 0.

    With `exact_shards` a micro-batch is a shard, whether it fits or not.
    """
    if trainer.recipe.train.micro_batch != "auto" or trainer.recipe.train.exact_shards is not None:
        return
    while not _fits(trainer, trainer.micro):
        if trainer.micro == 1:
            raise MemoryExhausted(
                f"not even a micro-batch of one image fits into memory{foreseen(trainer)}; train with {less(trainer)}"
            )
        trainer.micro = -(-trainer.micro // 2)
    trainer.recipe = replace(trainer.recipe, train=replace(trainer.recipe.train, micro_batch=trainer.micro))
    say(f"micro-batches of {trainer.micro} images fit into memory")


def less(trainer: Trainer) -> str:
    """What makes an image need less memory than it does now."""
    if trainer.recipe.train.recompute is True:
        return "a smaller network or data.size"
    return "--set train.recompute=true, or to the number of levels from the largest resolution that is enough"


def _fits(trainer: Trainer, size: int) -> bool:
    """Whether all processes can run a micro-batch of that size beside the moments that are going to be needed."""
    failed = 0
    try:
        moments = [torch.empty_like(weight) for weight in trainer.weights for _ in trainer.optimizer.moments(weight)]
        with trainer.unsynchronised():
            loss, _ = trainer.loss(trainer.batches.at(0), slice(0, size))
            loss.sum().backward()
        del moments, loss
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = 1
    trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    return int(dist.total(torch.tensor(failed, dtype=torch.int64, device="cpu"))) == 0
