"""Signals that ask a run to end, a watchdog for one that neither ends nor moves, and whether threads must wait."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from undiffuse.errors import Stalled

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
TICK = 0.5  # seconds between two looks of the watchdog
ECHO = 5.0  # seconds in which torchrun passes a signal on to processes that have had it already
PATIENCE, MULTIPLE = 60.0, 10  # a step may take this many seconds, or this many times the median
SPAN, CROWDED = 10.0, 0.15  # over so many seconds: which share of them a thread waits for a processor beside other work


class Asked(Exception):
    """A signal has come; raised only where work can be left without loss, and caught by the loop."""


class Flag:
    """Set by a signal; looked at once a step. A second one, if not the first again by way of torchrun, ends all now."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._since, self._echo = 0.0, ECHO if "RANK" in os.environ else 0.0

    def __call__(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, now
        elif now - self._since >= self._echo:
            os._exit(128 + number)

    def check(self, *_: object) -> None:
        """For the inner loops of what may be left undone: previews and held-out losses."""
        if self.name is not None:
            raise Asked


@contextmanager
def listening() -> Iterator[Flag]:
    """A flag that the signals raise, while inside; in a thread other than the main one there are none."""
    flag, before = Flag(), {}
    for name in SIGNALS:
        number = getattr(signal, name, None)
        try:
            before[number] = signal.signal(number, flag) if number is not None else None
        except ValueError:  # not the main thread
            break
    try:
        yield flag
    finally:
        for number, handler in before.items():
            if number is not None:
                signal.signal(number, handler)


class Watchdog:
    """Ends a process in which nothing has moved for max(60 s, 10 × the median step), with the stacks of all threads.

    A thread of its own counts the time in its own ticks, so that a process which was stopped as a whole, or a machine
    that slept, is not taken for one that hangs. `stepped()` marks the end of a step, `beat()` that something else has
    moved, and inside `slow()`, for what gives no sign until it is done, ten times as long may pass, or
    as many times as it is given.
    """

    def __init__(self, stacks: Path, patience: float | None = None, end: Callable[[int], None] = os._exit):
        self.stacks, self.patience, self._end = stacks, PATIENCE if patience is None else patience, end
        self._idle, self._last, self._slack = 0.0, time.monotonic(), 1.0
        self._steps: deque[float] = deque(maxlen=101)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def beat(self) -> None:
        self._idle, self._last = 0.0, time.monotonic()

    def stepped(self) -> None:
        self._steps.append(time.monotonic() - self._last)
        self.beat()

    @contextmanager
    def slow(self, times: float = MULTIPLE) -> Iterator[None]:
        self.beat()
        self._slack = times
        try:
            yield
        finally:
            self.beat()
            self._slack = 1

    def limit(self) -> float:
        usual = max(self.patience, MULTIPLE * median(self._steps)) if self._steps else MULTIPLE * self.patience
        return self._slack * usual

    def _run(self) -> None:
        while not self._stop.wait(TICK):
            self._idle += TICK
            if self._idle > self.limit():
                self._give_up()
                return

    def _give_up(self) -> None:
        try:
            with open(self.stacks, "w") as file:
                faulthandler.dump_traceback(file)
            where = f"in {self.stacks}"
        except OSError:  # a full disk, or the run folder is another machine's
            faulthandler.dump_traceback(sys.__stderr__ or 2)
            where = "above"
        print(
            f"nothing has moved for {self._idle:.0f} s; where each thread stands is {where}. The last checkpoint is "
            "good, and the same command goes on from it",
            file=sys.stderr,
            flush=True,
        )
        self._end(Stalled.exit_code)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def waited() -> float | None:
    """Seconds in which threads of this process could run and had no processor; None where the system does not count."""
    found = []
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            found.append(int(path.read_text().split()[1]))
        except (OSError, IndexError, ValueError):  # a thread that has ended, or a kernel without the count
            continue
    return sum(found) / 1e9 if found else None


class Crowd:
    """Whether other work keeps several threads from their processors, which costs far more than its share of the time.

    Each operation ends with its slowest thread (docs/scaling.md).
    """

    def __init__(self) -> None:
        self._began, self._waited, self._told = time.monotonic(), waited(), False

    def look(self, threads: int) -> str:
        """What to say of it, once; else nothing."""
        seconds = time.monotonic() - self._began
        if self._told or threads < 2 or self._waited is None or seconds < SPAN:
            return ""
        now = waited()
        share = 0.0 if now is None else (now - self._waited) / seconds / threads
        self._began, self._waited, self._told = time.monotonic(), now, share > CROWDED
        if not self._told:
            return ""
        return (
            f"other work runs beside this: its {threads} threads wait for a processor {100 * share:.0f} % of the time, "
            "and one may be faster; to try, stop this and start it again with OMP_NUM_THREADS=1 (docs/scaling.md)"
        )
