"""Before step 0: how a batch is divided, what the run will cost, and which settings cannot work together."""

import math
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from undiffuse.errors import UsageError
from undiffuse.machine import dist
from undiffuse.machine.device import making_float32
from undiffuse.model.recipe import ModelConfig, Recipe, TrainConfig

SHORT = 5  # steps: nobody wants the average of a run that is shorter
REMEMBERED = 0.05  # the share of the first weights in the final average from which it is worth a warning


@dataclass(frozen=True)
class Budget:
    """When to stop: the first of these that is reached. Steps and images count from the start of the run."""

    steps: int | None = None
    images: int | None = None
    minutes: float | int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "images", "minutes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, (bool, str)) or not isinstance(value, (int, float))):
                raise UsageError(f"a budget of {value!r} {name} is not possible; give a number")
            if value is not None and not value > 0:
                raise UsageError(f"a budget of {value} {name} is not possible; give more than 0, or leave it out")

    def last_step(self, config: TrainConfig) -> int:
        steps = config.steps if self.steps is None else self.steps
        return steps if self.images is None else min(steps, -(-self.images // config.batch))


def shares(train: TrainConfig) -> tuple[int, int]:
    """The rows of a process and of a micro-batch. Raises UsageError where the batch cannot be divided so."""
    processes, shards = dist.size(), train.exact_shards
    if shards and train.batch % shards:
        raise UsageError(
            f"a batch of {train.batch} images cannot be divided into {shards} exact shards; set a train.batch of which "
            f"{shards} is a divisor, such as {max(1, train.batch // shards) * shards}"
        )
    if train.batch % processes or (shards and shards % processes):
        fit = [n for n in range(1, train.batch + 1) if train.batch % n == 0 and (not shards or shards % n == 0)]
        what = f"{train.batch} images in {shards} exact shards" if shards else f"{train.batch} images"
        raise UsageError(
            f"a batch of {what} cannot be divided over {processes} processes; "
            f"{', '.join(map(str, fit))} of them would do, or set another train.batch"
        )
    if shards:
        if train.micro_batch not in (None, "auto", train.batch // shards):
            raise UsageError(
                f"exact_shards = {shards} makes micro-batches of {train.batch // shards}; leave train.micro_batch out"
            )
        return train.batch // processes, train.batch // shards
    share = train.batch // processes
    micro = share if train.micro_batch in (None, "auto") else train.micro_batch
    return share, min(micro, share)


def forward_flops(config: ModelConfig) -> int:
    """Floating-point operations of the network on one image, counted without computing any."""
    with making_float32("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network = config.build(clip=False, device="meta").network
        image = torch.empty(1, *config.asked, dtype=torch.float32, device="meta")
        network(image, torch.empty(1, dtype=torch.float32, device="meta"))
    return counter.get_total_flops()


def plan(recipe: Recipe, config: ModelConfig, micro: int, images: int, last: int) -> str:
    """The size of a step and the cost of the whole run, in words; `images` are those of the training set."""
    train, objective = recipe.train, recipe.objective
    processes, share = dist.size(), train.batch // dist.size()
    micros = -(-share // micro)
    flops, epochs = forward_flops(config), last * train.batch / images
    forwards = 3 * objective.evaluations + objective.taught  # of an image; a backward counts as two
    seen = f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"
    return (
        f"batch {train.batch} = {processes} process{'es' if processes > 1 else ''} × {micros} micro-batch"
        f"{'es' if micros > 1 else ''} of {micro}, {train.precision}; {last:,} steps see "
        f"{last * train.batch:,} images, {seen} epochs. An image forward is {flops / 1e9:.3g} GFLOP; the whole run "
        f"{forwards * flops * last * train.batch:.2g} FLOP"
    )


def first_weights_share(train: TrainConfig, last: int) -> float:
    """How much the first, untrained weights still count in the average after `last` steps."""
    if not train.ema_ramp:
        return train.ema**last
    ramped = min(last, 1000)  # beyond these steps the ramp has passed any decay that leaves something to tell
    return math.prod(min(train.ema, (1 + n) / (10 + n)) for n in range(ramped)) * train.ema ** (last - ramped)


def advice(train: TrainConfig, device: torch.device) -> list[str]:
    """What would make a run on this device faster, where its preset leaves that out; see docs/benchmarks.md."""
    if device.type != "cuda" or train.precision != "float32":
        return []
    return [
        "float32 is exact and slow on a card: --set train.precision=auto (bf16) or tf32 took a third of the time of a "
        "step on an H200; auto is float16 on a card without bf16"
    ]


def conflicts(
    train: TrainConfig,
    last: int,
    minutes: float | int | None = None,
    tuned: bool = False,
    config: ModelConfig | None = None,
    held: bool = True,
) -> list[str]:
    """Settings that cannot do together what they are for in a run of `last` steps, each with what to set instead.

    `tuned` runs begin with weights that were trained; `held` is whether images are held out.
    """
    found = []
    if config is not None:
        try:
            config.parameterisation.check(config.process)
        except UsageError as error:  # it may be trained all the same
            found.append(f"this model will never be sampled: {error}; set parameterisation.name=v")
    share = first_weights_share(train, last)
    if share > REMEMBERED and not tuned and last >= SHORT:
        fit = math.floor(1000 * 0.01 ** (1 / last)) / 1000
        found.append(
            f"train.ema = {train.ema:g} is long for {last:,} steps: the untrained weights would still be {share:.0%} "
            f"of the average at the end; set train.ema={fit:g} or less, or train more steps"
        )
    if train.warmup >= last and train.warmup > 0:
        found.append(
            f"train.warmup = {train.warmup:,} is not over at the last step, {last:,}, so the learning rate never "
            f"comes to {train.lr:g}; set train.warmup={last // 10}{' or less' if last >= 10 else ''}"
        )
    if train.eval_every > last:
        found.append(
            f"train.eval_every = {train.eval_every:,} is more than the {last:,} steps, so that samples are scored at "
            f"the end alone; set train.eval_every={max(1, last // 10)}"
        )
    if train.patience and not held:
        found.append(
            f"train.patience = {train.patience:g} ends nothing, because no images are held out, so the run goes on to "
            f"step {last:,}; set data.hold_out=0.05 and train.held_out above 0, or train.patience=0"
        )
    if minutes is not None and train.decay != "constant":
        found.append(
            f"the learning rate falls until step {last:,}, which --minutes may not let it reach; give fewer steps, or "
            "set train.decay=constant"
        )
    return found
