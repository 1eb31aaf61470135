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

from undiffuse import log
from undiffuse.errors import MemoryExhausted

BEAT = 0.5  # seconds between two signs of life of a worker
STILL = 8  # seconds without one after which it is ended: stopped, or lost in a call that never returns


def finished(work: Callable[[int], None], numbers: Iterable[int], workers: int) -> Iterator[int]:
    """Does `work` for each number, in any order and perhaps more than once, and yields each as it is done.

    `work` is pickled. When a worker is ended, or stands still, all are, and half as many do what is left: what ends
    them is most often a want of memory. Raises MemoryExhausted where one alone does not last either.
    """
    left = set(numbers)
    while left:
        try:
            for number in _in_pool(work, sorted(left), min(workers, len(left))):
                left.remove(number)
                yield number
        except BrokenProcessPool as error:
            if workers == 1:
                raise MemoryExhausted(
                    "a process that decodes images was ended or stood still, most likely for want of memory; with more "
                    "of it free the same command goes on"
                ) from error
            workers = max(1, min(workers, len(left)) // 2)
            log.warn(f"a process that decodes images was ended or stood still; going on with {workers}")


def _in_pool(work: Callable[[int], None], numbers: Sequence[int], workers: int) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")  # a fork would share the source's open files, and torch's threads
    slots, beats = context.Value("q", 0), context.Array("q", 2 * workers)  # (pid, count of beats) of each
    with ProcessPoolExecutor(workers, context, _begin, (slots, beats)) as pool:
        jobs = {pool.submit(work, number): number for number in numbers}
        pending, look = set(jobs), _Look(beats)
        try:
            while pending:
                done, pending = wait(pending, BEAT, FIRST_COMPLETED)
                for job in done:
                    job.result()
                    yield jobs[job]
                if look.stands_still():
                    look.kill()
        except BrokenProcessPool:
            look.kill()  # the pool waits for the others, of which one may stand still
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class _Look:
    """The parent's view of its workers, in its own time: what stopped them all together is not held against them."""

    def __init__(self, beats: Any):
        self._beats, self._seen, self._looked = beats, list(beats), time.monotonic()
        self._still = [0.0] * len(self._seen)

    def stands_still(self) -> bool:
        now, now_seen = time.monotonic(), list(self._beats)
        passed, self._looked = min(now - self._looked, 2 * BEAT), now
        pairs = zip(self._still, self._seen, now_seen, strict=True)
        self._still = [still + passed if old == new else 0 for still, old, new in pairs]
        self._seen = now_seen
        started = [self._still[i + 1] for i in range(0, len(now_seen), 2) if now_seen[i]]
        return max(started, default=0) > STILL

    def kill(self) -> None:
        pids = set(self._beats[::2])
        for process in multiprocessing.active_children():
            if process.pid in pids:
                process.kill()


def _begin(slots: Any, beats: Any) -> None:
    """One thread, no answer to Ctrl-C, and an end when the parent has one: a killed parent cannot tell its workers."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent, "this runs in a worker"
    with slots.get_lock():
        mine, slots.value = slots.value, slots.value + 1
    beats[2 * mine] = os.getpid()

    def follow() -> None:
        while parent.is_alive():
            beats[2 * mine + 1] += 1
            parent.join(BEAT)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
