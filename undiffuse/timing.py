"""The parts of a training step, marked where they are done; a card's time for them is taken only while one asks."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch.autograd.profiler import record_function


class Events:
    """Seconds of each part on a card, between events that it passes at the part's borders.

    A processor only queues work, so that its own time says where it waits for what was queued before.
    """

    def __init__(self) -> None:
        self._passed: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def between(self, name: str) -> Iterator[None]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._passed.append((name, begin, end))

    def seconds(self) -> dict[str, float]:
        """By the name of the part, all its times together; waits for the card."""
        torch.cuda.synchronize()
        total = Counter[str]()
        for name, begin, end in self._passed:
            total[name] += begin.elapsed_time(end) / 1e3  # pyright: ignore[reportArgumentType]
        return dict(total)


_asked: ContextVar[Events | None] = ContextVar("events", default=None)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Marks what is inside as that part of a step, for torch's profiler, and for `timed`."""
    events = _asked.get()
    with record_function(f"undiffuse {name}"), nullcontext() if events is None else events.between(name):
        yield


@contextmanager
def timed() -> Iterator[Events]:
    """Inside, a card's time is taken of every part that this thread marks."""
    events = Events()
    token = _asked.set(events)
    try:
        yield events
    finally:
        _asked.reset(token)
