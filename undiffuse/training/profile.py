"""Where the time of a training step goes, and how much memory it takes: `undiffuse train --profile`."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from undiffuse.machine import device, dist
from undiffuse.timing import timed
from undiffuse.training.trainer import Trainer

WARM_UP, STEPS, LONGEST = 5, 20, 10
MOST, ALIKE = 60, 0.1  # steps of warm-up of a compiled network, and how far two fives of them may be apart
PARTS = ("data", "noise", "forward", "backward", "clip", "optimizer", "ema")


@dataclass(frozen=True)
class Profile:
    """Seconds a step in each part; `noise` is inside `forward`. A checkpoint is spread over the steps between two.

    On a card parts and operators have its own time, and what it waits is in the rest. `operators` are the longest ones,
    without what they call. `compiled`, where the network is, counts the graphs, of them those that were
    compiled again for other input, and the breaks between graphs.
    """

    step: float
    parts: dict[str, float]
    checkpoint: float
    images_per_second: float
    flop_per_second: float
    peak_bytes: int
    operators: dict[str, float]
    warm_up: int
    compiled: dict[str, int] | None = None

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
            "warm_up_steps": self.warm_up,
            **({} if self.compiled is None else {"compiled": self.compiled}),
            "parts": {name: {"ms": round(ms, 3), "share": round(share, 4)} for name, ms, share in self.rows()},
            "operators_ms": {name: round(1000 * seconds, 3) for name, seconds in self.operators.items()},
        }

    def __str__(self) -> str:
        rates = f"{self.images_per_second:.1f} images/s, {self.flop_per_second / 1e9:.0f} GFLOP/s"
        head = f"{1000 * self.step:.1f} ms a step, {rates}"
        lines = [f"{name:>11} {ms:10.2f} ms {share:7.1%}" for name, ms, share in self.rows()]
        longest = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in self.operators.items())
        before = f"measured after {self.warm_up} steps"
        if self.compiled is not None:
            before += ", in which were compiled: " + ", ".join(f"{name} {n}" for name, n in self.compiled.items())
        return "\n".join(
            [
                f"{head}, {self.peak_bytes / 1e6:,.0f} MB at the peak",
                *lines,
                f"longest operators, ms a step: {longest}",
                before,
            ]
        )


def measure(trainer: Trainer, save: Callable[[], None], last: int, flop: int) -> Profile:
    """Trains for steps that count, the last 20 of them measured, and saves: ten without torch's profiler, ten with it.

    The step is timed without the profiler, which makes small operations slower. On a CPU the parts are its shares of
    that; on a card they are timed between events, also without.
    """
    on_card, count, made = trainer.device.type == "cuda", STEPS // 2, compilations(trainer)
    warm_up = _warm_up(trainer, last)
    started = time.perf_counter()
    with timed() if on_card else nullcontext() as passed:
        for _ in range(count):
            trainer.update(last)
        parts = {} if passed is None else passed.seconds()
    step = (time.perf_counter() - started) / count
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_card else [])
    with profile(activities=kinds) as profiler:
        started = time.perf_counter()
        for _ in range(count):
            trainer.update(last)
        _wait(trainer)
        slower = (time.perf_counter() - started) / count / step  # without what the profiler does at its ends
    events, scale = profiler.key_averages(), 1.0 if on_card else slower
    if not on_card:
        marked = {event.key: event.cpu_time_total / 1e6 for event in events}
        parts = {name: marked.get(f"undiffuse {name}", 0.0) / slower for name in PARTS}
    own = {
        event.key.removeprefix("aten::"): _own_seconds(event, on_card) / count / scale
        for event in events
        if event.key.startswith(("aten::", "triton_"))
    }
    compiled = None if made is None else {name: n - made[name] for name, n in (compilations(trainer) or made).items()}
    started = time.perf_counter()
    save()
    every = trainer.recipe.train.save_every
    batch = trainer.recipe.train.batch
    return Profile(
        step,
        {name: parts.get(name, 0.0) / count for name in PARTS},
        (time.perf_counter() - started) / every,
        batch / step,
        3 * flop * batch / step / dist.size(),
        device.peak_bytes(trainer.device),
        dict(sorted(own.items(), key=lambda item: -item[1])[:LONGEST]),
        warm_up,
        compiled,
    )


def _warm_up(trainer: Trainer, last: int) -> int:
    """Five steps; where the network is compiled, more of them until none compiles and two fives take as long.

    Returns how many steps they were.
    """
    before = 0.0
    for done in range(WARM_UP, MOST + 1, WARM_UP):
        made, started = compilations(trainer), time.perf_counter()
        for _ in range(WARM_UP):
            trainer.update(last)
        _wait(trainer)
        seconds = time.perf_counter() - started
        settled = compilations(trainer) == made and (made is None or abs(seconds - before) <= ALIKE * before)
        if dist.decide(int(settled)):
            return done
        before = seconds
    return MOST


def compilations(trainer: Trainer) -> dict[str, int] | None:
    """What was compiled in this process so far; None where the network is not compiled."""
    if not trainer.recipe.train.compile:
        return None
    from torch._dynamo.utils import counters, get_compilation_metrics

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "recompilations": sum(each.recompile_reason is not None for each in get_compilation_metrics()),
        "graph breaks": sum(counters["graph_break"].values()),
    }


def _wait(trainer: Trainer) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


def _own_seconds(event: Any, on_card: bool) -> float:
    return (event.self_device_time_total if on_card else event.self_cpu_time_total) / 1e6
