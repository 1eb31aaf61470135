"""What a run tells while it runs: one JSON object a line, cut back on resume, and its progress on stderr."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from undiffuse.errors import Corrupt, StorageError
from undiffuse.strict import to_json

Say = Callable[[str], None]  # what takes one line
LINE_EVERY, BAR_EVERY = 10.0, 0.1  # seconds between two lines of progress, between two redraws of a bar


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"warning: {text}", file=sys.stderr)


def say(text: str) -> None:
    """One line on stderr, where it does not mix with results."""
    print(text, file=sys.stderr)


def silent(text: str) -> None:
    """Says nothing: for all processes but the first."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, without a last one that was cut short; none if there is no file.

    Raises Corrupt for any other line that is not a JSON object, StorageError for a file that cannot be read.
    """
    return [row for _, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with the offset of the byte after it."""
    try:
        # What follows the last newline is dropped even if it parses: `{"step": 12}` is whole only with its end of line.
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    end = 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise Corrupt(f"{path} is damaged: line {number} is not a JSON object; delete that line, or move the file")
        end += len(line) + 1
        yield end, row


class JsonLines:
    """A file of one JSON object a line, opened to go on after `resume_step`; the rows of later steps are cut off.

    Rows carry an integer "step" that never falls. A resume_step of 0 begins a run.
    """

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        end = 0
        for offset, row in _rows(path):
            if row.get("step", 0) > resume_step:
                break
            end = offset
        try:
            self._file = open(path, "ab", buffering=0)
            self._file.truncate(end)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from error

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row in one call, so that whoever reads beside sees it whole or not at all."""
        line = to_json(dict(row), ensure_ascii=False).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror}") from error
        if written != len(line):
            raise StorageError(f"{self.path} cannot be written: the disk is full; free space and run the same again")

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def duration(seconds: float) -> str:
    """`42 s`, `5 min 10 s`, `3 h 7 min`, `2 d 4 h`."""
    whole = round(seconds)
    for large, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= large:
            return f"{whole // large} {name} {whole % large // small} {small_name}"
    return f"{whole} s"


class Progress:
    """A count on its way to `total`, shown at most every `interval` seconds. `done` of it were finished before.

    `seconds` is how long there is at most, if less than the count would take.
    """

    def __init__(
        self,
        total: int,
        what: str,
        done: int,
        show: Callable[[str, int], None],
        interval: float,
        seconds: float | None = None,
    ):
        self.total, self.what, self.done, self.seconds = total, what, done, seconds
        self._show, self._interval = show, interval
        self._first, self._values = done, dict[str, float]()
        self._began = self._started = self._shown = time.monotonic()
        self._aside: Progress | None = None

    def advance(self, n: int = 1, **values: float) -> None:
        """Counts n more; `values`, such as the loss, stand beside the count until they are given anew."""
        self.done += n
        self._values |= values
        if time.monotonic() - self._shown >= self._interval:
            self.display()

    def display(self) -> None:
        self._shown = time.monotonic()
        self._show(str(self), self.done)

    @contextmanager
    def aside(self, total: int = 0, what: str = "") -> Iterator[Callable[[int], None]]:
        """Something else for a while, shown beside the count if it has a name; its time is not that of the count."""
        began = time.monotonic()
        beside = Progress(total, what, 0, lambda text, done: self.display(), self._interval)
        self._aside = beside if what else None
        try:
            yield beside.advance
        finally:
            self._aside = None
            self._started += time.monotonic() - began

    def __str__(self) -> str:
        """`training 1200/5000 (24 %), 12.3/s, 5 min 9 s left, loss 0.0312`; the rate counts only what was done here."""
        now = time.monotonic()
        seconds, counted = now - self._started, self.done - self._first
        if self._aside is not None:
            seconds -= now - self._aside._began
        parts = [f"{self.what} {self.done}/{self.total} ({100 * self.done // max(self.total, 1)} %)"]
        if counted and seconds > 0:
            rate = counted / seconds
            left = (self.total - self.done) / rate
            if self.seconds is not None:
                left = min(left, max(0.0, self._began + self.seconds - now))
            parts += [f"{rate:.3g}/s", f"{duration(left)} left" if self.done < self.total else duration(seconds)]
        parts += [f"{name} {value:.4g}" for name, value in self._values.items()]
        return ", ".join(parts) + ("" if self._aside is None else f"; {self._aside.brief()}")

    def brief(self) -> str:
        return f"{self.what} {self.done}/{self.total}"


@contextmanager
def progress(total: int, what: str, enabled: bool, done: int = 0, seconds: float | None = None) -> Iterator[Progress]:
    """Shows how far `what` is, how fast and how long to go: a bar on a terminal, else a line every ten seconds.

    Goes to stderr. What an exception interrupts is not shown as ended.
    """
    if not enabled:
        yield Progress(total, what, done, lambda text, done: None, float("inf"), seconds)
    elif sys.stderr.isatty():
        with _bar(total, done) as show:
            yield (state := Progress(total, what, done, show, BAR_EVERY, seconds))
            state.display()
    else:
        yield (
            state := Progress(total, what, done, lambda text, done: print(text, file=sys.stderr), LINE_EVERY, seconds)
        )
        state.display()


@contextmanager
def _bar(total: int, done: int) -> Iterator[Callable[[str, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
    # No thread that redraws, because workers are forked; and stdout stays the caller's, who may pipe it.
    with Bars(*columns, console=Console(stderr=True), auto_refresh=False, redirect_stdout=False) as bars:
        task = bars.add_task("", total=max(total, 1), completed=done)
        yield lambda text, done: bars.update(task, description=text, completed=done, refresh=True)


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its first column at the left and the others at the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(_cells(line, widths)).rstrip() for line in lines]


def _cells(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
