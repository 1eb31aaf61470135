"""A log that survives kills at any byte, and progress that says the truth about rate and time left."""

import json
import os
import pty
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest

from undiffuse.errors import Corrupt, StorageError
from undiffuse.machine import log
from undiffuse.machine.log import JsonLines, duration, progress, read_rows


def write(path, steps, resume_step=0):
    with JsonLines(path, resume_step) as lines:
        for step in steps:
            lines.write({"step": step, "loss": 1 / step})


def steps(path):
    return [row["step"] for row in read_rows(path)]


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(log.time, "monotonic", clock)
    return clock


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "text": "ümläut\nand a second line", "list": [1, None]}]
    with JsonLines(tmp_path / "log.jsonl", 0) as lines:
        for row in rows:
            lines.write(row)
    assert read_rows(tmp_path / "log.jsonl") == rows
    assert (tmp_path / "log.jsonl").read_bytes().count(b"\n") == 2


def test_a_row_is_on_disk_when_write_returns(tmp_path):
    with JsonLines(tmp_path / "log.jsonl", 0) as lines:
        lines.write({"step": 1})
        assert steps(tmp_path / "log.jsonl") == [1]


def test_no_file_means_no_rows_and_makes_none(tmp_path):
    assert read_rows(tmp_path / "log.jsonl") == []
    assert list(tmp_path.iterdir()) == []


def test_non_finite_numbers_become_null(tmp_path):
    with JsonLines(tmp_path / "log.jsonl", 0) as lines:
        lines.write({"step": 1, "loss": float("nan"), "by_t": [float("-inf"), 2.0]})
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "by_t": [None, 2.0]}


def test_torn_at_every_byte_then_resumed_at_every_step(tmp_path):
    """Row 28: whatever is left of the file, a run that goes on from a checkpoint shows each step once, in order."""
    path = tmp_path / "log.jsonl"
    write(path, range(1, 5))
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        complete = whole[:cut].count(b"\n")
        for resume in range(complete + 2):
            path.write_bytes(whole[:cut])
            assert steps(path) == list(range(1, complete + 1))
            write(path, range(resume + 1, 7), resume)
            assert steps(path) == [*range(1, min(resume, complete) + 1), *range(resume + 1, 7)]


def test_several_rows_of_the_restored_step_are_kept(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, [5, 10, 10, 15])
    write(path, [11], resume_step=10)
    assert steps(path) == [5, 10, 10, 11]


@pytest.mark.parametrize("line", [b"\0\0\0\0", b'{"step": 2', b"[1, 2]", b"\xff", b"[" * 100_000, b"7" * 5000])
def test_damage_inside_is_named_by_line(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(Corrupt, match=r"log\.jsonl is damaged: line 2 is not a JSON object; delete that line"):
        read_rows(path)
    with pytest.raises(Corrupt, match="line 2"):
        JsonLines(path, 3)


def test_what_cannot_be_opened_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="cannot be written: No such file or directory"):
        JsonLines(tmp_path / "absent" / "log.jsonl", 0)
    with pytest.raises(StorageError, match="cannot be read: Is a directory"):
        read_rows(tmp_path)


def test_a_full_disk_is_a_storage_error(tmp_path):
    with JsonLines(tmp_path / "log.jsonl", 0) as lines:
        lines._file.close()
        lines._file = open("/dev/full", "ab", buffering=0)
        with pytest.raises(StorageError, match=r"log\.jsonl cannot be written: No space left on device"):
            lines.write({"step": 1})


def test_a_row_that_is_written_in_part_is_a_storage_error(tmp_path):
    with JsonLines(tmp_path / "log.jsonl", 0) as lines:
        lines._file.close()
        lines._file = SimpleNamespace(write=lambda line: len(line) - 1, close=lambda: None)
        with pytest.raises(StorageError, match=r"log\.jsonl cannot be written: the disk is full; free space and run"):
            lines.write({"step": 1})


@pytest.mark.parametrize("seconds, left", [(None, "80 s"), (1000.0, "80 s"), (50.0, "30 s"), (10.0, "0 s")])
def test_what_is_left_is_the_less_of_the_count_and_of_the_time(clock, capsys, seconds, left):
    """20 of 100 in 20 s: 80 s more, unless the time is over before."""
    with progress(100, "training", True, seconds=seconds) as bar:
        clock.now += 20
        bar.advance(20)
        expected = "1 min 20 s" if left == "80 s" else left
        assert capsys.readouterr().err == f"training 20/100 (20 %), 1/s, {expected} left\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (310.0, "5 min 10 s"),
        (11_220.0, "3 h 7 min"),
        (187_200.0, "2 d 4 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_lines_come_at_most_every_ten_seconds_and_at_the_end(clock, capsys):
    with progress(100, "training", True) as bar:
        for i in range(100):
            clock.now += 0.25  # 4/s, 25 s in all
            bar.advance(1, loss=i / 1000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "training 40/100 (40 %), 4/s, 15 s left, loss 0.039",
        "training 80/100 (80 %), 4/s, 5 s left, loss 0.079",
        "training 100/100 (100 %), 4/s, 25 s, loss 0.099",
    ]


def test_what_was_done_before_does_not_count_in_the_rate(clock, capsys):
    with progress(1000, "training", True, done=900) as bar:
        clock.now += 20
        bar.advance(40)
    assert capsys.readouterr().err.splitlines() == ["training 940/1000 (94 %), 2/s, 30 s left"] * 2


def test_disabled_progress_is_silent(clock, capsys):
    with progress(10, "sampling", False) as bar:
        clock.now += 1000
        bar.advance(10)
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_count_is_not_shown_as_ended(capsys):
    with pytest.raises(KeyboardInterrupt), progress(10, "sampling", True):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_on_stderr_alone(clock, capsys, monkeypatch):
    main, side = pty.openpty()
    with os.fdopen(side, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        with progress(8, "sampling [x]", True) as bar:
            clock.now += 2
            bar.advance(4)
            print("the caller's")
    shown = ""
    with open(main, encoding="utf-8") as screen, suppress(OSError):  # its end, once the terminal is closed
        while text := screen.readline():
            shown += text
    assert "sampling [x] 4/8 (50 %), 2/s, 2 s left" in shown and "━" in shown
    assert capsys.readouterr().out == "the caller's\n"


def test_a_warning_is_one_line_on_stderr(capsys):
    log.warn("step 500 is damaged")
    assert capsys.readouterr() == ("", "warning: step 500 is damaged\n")
