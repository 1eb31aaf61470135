"""Which layout of images a network is trained faster in, measured once for each machine.

Neither is right everywhere: in bf16 an AMD EPYC is a third faster without the channels of a pixel side by side, and an
Intel Xeon with matrix tiles is faster with them.
"""

import hashlib
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.config import plain
from undiffuse.errors import Corrupt, StorageError, UsageError
from undiffuse.machine import device as machine
from undiffuse.machine import disk
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.base import Conditioning
from undiffuse.strict import to_json

LAYOUTS = {"plain": torch.contiguous_format, "channels_last": torch.channels_last}
ROUNDS, LONG = 3, 10.0  # of each layout after one to warm up, unless they have taken so many seconds
MOST, PIXELS = 16, 1 << 14  # images of a step, and pixels of them all: that of one image at 128×128
GAIN = 1.03  # what moving images about has to bring


def wants_channels_last(config: ModelConfig, precision: str, micro: int, device: torch.device) -> tuple[bool, str]:
    """Whether steps of so many images are faster so, and what was measured, in words.

    The answer is kept in the cache by processor, torch, threads, network and precision, so that a second run on this
    machine takes the same: layouts differ in the last bits. Where nothing can be kept it is measured each time.
    """
    facts, once = _facts(config, precision, micro, device), "measured once for this machine"
    kept = _kept(facts)
    rates = _read(kept) if kept is not None and kept.exists() else None
    if rates is None:
        rates = measured(config, precision, facts["images"], device)
        if kept is not None:
            try:
                disk.write_json(kept, {**facts, **rates})
            except StorageError:  # a run needs no cache
                once = f"which could not be kept in {kept.parent} for the next run"
    ratio = rates["channels_last"] / rates["plain"]
    answer = ratio > GAIN
    told = f"train.channels_last = {str(answer).lower()}: with it a step is {ratio:.2f} times as fast as without"
    return answer, f"{told}, {once}"


def _facts(config: ModelConfig, precision: str, micro: int, device: torch.device) -> dict[str, Any]:
    """What decides."""
    channels, height, width = config.asked
    return {
        "processor": processor() if device.type == "cpu" else machine.name_of(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "network": plain(config)["network"],
        "classes": config.classes,
        "image": [channels, height, width],
        "precision": precision,
        "images": max(1, min(micro, MOST, PIXELS // (height * width))),
    }


@cache
def processor() -> str:
    """Its name, and the instructions that torch uses of it."""
    return f"{machine.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def _kept(facts: dict[str, Any]) -> Path | None:
    """Where the answer is kept; None where there is no home folder and no cache is named."""
    try:
        folder = disk.cache_folder()
    except UsageError:
        return None
    return folder / "layout" / f"{hashlib.sha256(to_json(facts).encode()).hexdigest()[:32]}.json"


def _read(path: Path) -> dict[str, float]:
    found = disk.read_json(path)
    rates = {name: found.get(name) for name in LAYOUTS} if isinstance(found, dict) else {}
    known = {name: rate for name, rate in rates.items() if isinstance(rate, float) and rate > 0}
    if len(known) < len(LAYOUTS):
        raise Corrupt(f"{path} is damaged: it does not say how fast both layouts are; remove it")
    return known


def measured(config: ModelConfig, precision: str, images: int, device: torch.device) -> dict[str, float]:
    """Images a second of each layout, in its best step: what else the machine does makes one slower, never faster.

    On a processor it is a second of one thread.
    """
    denoiser, label = config.build(clip=False).to(device), None
    x = torch.full((images, *config.asked), 0.5, dtype=torch.float32, device=device)  # what it shows does not matter
    if config.classes is not None:
        label = torch.zeros(images, dtype=torch.int64, device=device)
    best, began = dict.fromkeys(LAYOUTS, float("inf")), time.perf_counter()
    for turn in range(1 + ROUNDS):
        for name, layout in LAYOUTS.items():
            denoiser.network.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
            with machine.in_precision(precision, device)():
                seconds = _step(denoiser.network, x.contiguous(memory_format=layout), Conditioning(label=label))
            best[name] = min(best[name], seconds) if turn else best[name]
        if turn and time.perf_counter() - began > LONG:
            break
    del denoiser
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what is kept is not free for the estimate of what a run needs
    return {name: images / seconds for name, seconds in best.items()}


def _step(network: Any, x: Float[Tensor, "b c h w"], cond: Conditioning) -> float:
    """Seconds of forward and backward."""
    told = torch.full((len(x),), 0.5, dtype=torch.float32, device=x.device)
    began = _now(x.device)
    network(x, told, cond).float().square().mean().backward()
    seconds = _now(x.device) - began
    network.zero_grad()
    return seconds


def _now(device: torch.device) -> float:
    """After all that was asked of the device; on a processor, which may have other work, the time that it gave us."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()
