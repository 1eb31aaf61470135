"""Numbered work over several processes, which goes on where one of them is ended or stands still."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from undiffuse.errors import MemoryExhausted
from undiffuse.machine import log

BEAT = 0.5  # seconds between two signs of life of a worker
STILL = 8  # seconds without one after which it is ended: stopped, or lost in a call that keeps the interpreter;
# four times as many in the next try, for a picture that only takes so long
START = 120  # the same before the first, while it imports what it needs


def finished(work: Callable[[int], None], numbers: Iterable[int], workers: int) -> Iterator[int]:
    """Does `work` for each number, in any order and perhaps more than once, and yields each as it is done.

    `work` is pickled, and may be ended at any time. When a worker is ended, or stands still, all are, and half as many
    do what is left: what ends them is most often a want of memory. Raises MemoryExhausted where one alone does not last
    either.
    """
    left, patience = set(numbers), float(STILL)
    while left:
        try:
            for number in _in_pool(work, sorted(left), min(workers, len(left)), patience):
                left.remove(number)
                yield number
        except BrokenProcessPool as error:
            if workers == 1:
                raise MemoryExhausted(
                    "a process that decodes images was ended or stood still, most likely for want of memory; with more "
                    "of it free the same command goes on"
                ) from error
            workers, patience = max(1, min(workers, len(left)) // 2), 4 * patience
            log.warn(f"a process that decodes images was ended or stood still; going on with {workers}")


def _in_pool(work: Callable[[int], None], numbers: Sequence[int], workers: int, patience: float) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")  # a fork would share the source's open files, and torch's threads
    # No lock: one that ends while it holds it would stop the parent too.
    slots, beats = context.Value("q", 0), context.RawArray("q", workers)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _begin, (slots, beats))
    look = _Look(beats, patience)
    try:
        try:
            jobs = {pool.submit(work, number): number for number in numbers}
        except OSError as error:  # no memory for one more process
            raise BrokenProcessPool from error
        pending = set(jobs)
        while pending:
            done, pending = wait(pending, BEAT, FIRST_COMPLETED)
            for job in done:
                job.result()
                yield jobs[job]
            if look.stands_still():
                raise BrokenProcessPool
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()  # the pool would wait for one that stands still
        pool.shutdown(cancel_futures=True)


class _Look:
    """The parent's view of its workers, in its own time: what stopped them all together is not held against them."""

    def __init__(self, beats: Any, patience: float = STILL):
        self._patience = patience
        self._beats, self._seen, self._looked = beats, list(beats), time.monotonic()
        self._still = [0.0] * len(self._seen)

    def stands_still(self) -> bool:
        now, beats = time.monotonic(), list(self._beats)
        passed, self._looked = min(now - self._looked, 2 * BEAT), now
        self._still = [
            still + passed if old == new else 0.0
            for still, old, new in zip(self._still, self._seen, beats, strict=True)
        ]
        self._seen = beats
        return any(still > (self._patience if beat else START) for still, beat in zip(self._still, beats, strict=True))


def _begin(slots: Any, beats: Any) -> None:
    """One thread, no answer to Ctrl-C, and an end when the parent has one: a killed parent cannot tell its workers."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent, "this runs in a worker"
    with slots.get_lock():
        mine, slots.value = slots.value, slots.value + 1

    def follow() -> None:
        while parent.is_alive():
            beats[mine] += 1
            parent.join(BEAT)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
