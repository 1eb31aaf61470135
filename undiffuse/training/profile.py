"""Where the time of a training step goes, and how much memory it takes: `undiffuse train --profile`."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from undiffuse.machine import device, dist
from undiffuse.training.trainer import Trainer

WARM_UP, STEPS, LONGEST = 5, 20, 10
PARTS = ("data", "noise", "forward", "backward", "clip", "optimizer", "ema")


@dataclass(frozen=True)
class Profile:
    """Seconds a step in each part; `noise` is inside `forward`. A checkpoint is spread over the steps between two.

    `operators` has the seconds of torch's longest ones, wherever they run, without those of what they call.
    """

    step: float
    parts: dict[str, float]
    checkpoint: float
    images_per_second: float
    flop_per_second: float
    peak_bytes: int
    operators: dict[str, float]

    def rows(self) -> list[tuple[str, float, float]]:
        """(part, milliseconds, share of the step), with what no part accounts for."""
        parts = {**self.parts, "forward": self.parts["forward"] - self.parts["noise"]}
        parts["rest"] = self.step - sum(parts.values())
        parts["checkpoint"] = self.checkpoint
        return [(name, 1000 * seconds, seconds / self.step) for name, seconds in parts.items()]

    def plain(self) -> dict[str, Any]:
        return {
            "milliseconds_per_step": round(1000 * self.step, 3),
            "images_per_second": round(self.images_per_second, 2),
            "gflop_per_second": round(self.flop_per_second / 1e9, 1),
            "peak_memory_mb": round(self.peak_bytes / 1e6),
            "parts": {name: {"ms": round(ms, 3), "share": round(share, 4)} for name, ms, share in self.rows()},
            "operators_ms": {name: round(1000 * seconds, 3) for name, seconds in self.operators.items()},
        }

    def __str__(self) -> str:
        rates = f"{self.images_per_second:.1f} images/s, {self.flop_per_second / 1e9:.0f} GFLOP/s"
        head = f"{1000 * self.step:.1f} ms a step, {rates}"
        lines = [f"{name:>11} {ms:10.2f} ms {share:7.1%}" for name, ms, share in self.rows()]
        longest = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in self.operators.items())
        return "\n".join(
            [f"{head}, {self.peak_bytes / 1e6:,.0f} MB at the peak", *lines, f"longest operators, ms a step: {longest}"]
        )


def measure(trainer: Trainer, save: Callable[[], None], last: int, flop: int) -> Profile:
    """Trains for 25 steps that count, the last 20 of them measured, and saves: once untimed parts, once with them.

    The step is timed without the profiler, which makes small operations slower; the parts are its shares of that.
    """
    for _ in range(WARM_UP):
        trainer.update(last)
    _wait(trainer)
    started = time.perf_counter()
    for _ in range(STEPS // 2):
        trainer.update(last)
    _wait(trainer)
    step = (time.perf_counter() - started) / (STEPS // 2)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if trainer.device.type == "cuda" else [])
    with profile(activities=kinds) as profiler:
        started = time.perf_counter()
        for _ in range(STEPS // 2):
            trainer.update(last)
        _wait(trainer)
        slower = (time.perf_counter() - started) / (STEPS // 2) / step  # without what the profiler does at its ends
    events, count = profiler.key_averages(), STEPS // 2 * slower
    seconds = {event.key: _seconds(event) / count for event in events}
    own = {event.key.removeprefix("aten::"): _own_seconds(event) / count for event in events if "aten::" in event.key}
    started = time.perf_counter()
    save()
    every = trainer.recipe.train.save_every
    batch = trainer.recipe.train.batch
    return Profile(
        step,
        {name: seconds.get(f"undiffuse {name}", 0.0) for name in PARTS},
        (time.perf_counter() - started) / every,
        batch / step,
        3 * flop * batch / step / dist.size(),
        device.peak_bytes(trainer.device),
        dict(sorted(own.items(), key=lambda item: -item[1])[:LONGEST]),
    )


def _wait(trainer: Trainer) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


def _seconds(event: Any) -> float:
    """On the device where there is one, because there the processor only queues the work."""
    return max(event.cpu_time_total, event.device_time_total) / 1e6


def _own_seconds(event: Any) -> float:
    return max(event.self_cpu_time_total, event.self_device_time_total) / 1e6
