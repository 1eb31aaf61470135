"""`micro_batch = "auto"`: the largest part of a batch that fits into memory, found by trying."""

from collections.abc import Callable
from dataclasses import replace

import torch

from undiffuse.errors import MemoryExhausted, is_out_of_memory
from undiffuse.machine import dist
from undiffuse.training.trainer import Trainer


def fit_micro_batch(trainer: Trainer, say: Callable[[str], None]) -> None:
    """Takes the largest half of a half … of the share that fits, for good. Does nothing after step 0.

    With `exact_shards` a micro-batch is a shard, whether it fits or not.
    """
    if trainer.recipe.train.micro_batch != "auto" or trainer.recipe.train.exact_shards is not None:
        return
    while not _fits(trainer, trainer.micro):
        if trainer.micro == 1:
            raise MemoryExhausted("not even a micro-batch of one image fits into memory; set train.recompute=true")
        trainer.micro = -(-trainer.micro // 2)
    trainer.recipe = replace(trainer.recipe, train=replace(trainer.recipe.train, micro_batch=trainer.micro))
    say(f"micro-batches of {trainer.micro} images fit into memory")


def _fits(trainer: Trainer, size: int) -> bool:
    """Whether all processes can run a micro-batch of that size beside the moments that Adam is going to need."""
    failed = 0
    try:
        moments = [torch.empty_like(weight) for weight in trainer.weights for _ in range(2)]
        with trainer.unsynchronised():
            loss, _ = trainer.loss(trainer.batches.at(0), slice(0, size))
            loss.sum().backward()
        del moments, loss
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = 1
    trainer.adam.zero_grad(set_to_none=True)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    return int(dist.total(torch.tensor(failed, dtype=torch.int64, device="cpu"))) == 0
