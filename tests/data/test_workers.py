"""Work over several processes, of which some are killed, stopped or lost by themselves."""

import os
import signal
import threading
import time
from functools import partial

import pytest

from undiffuse.data import workers
from undiffuse.data.workers import finished
from undiffuse.errors import DataError, MemoryExhausted
from undiffuse.machine import log


def note(folder, number):
    (folder / f"{number}-{os.getpid()}").touch()
    time.sleep(0.2)


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(number):
    raise DataError(f"number {number} is bad")


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(log, "warn", said.append)
    return said


@pytest.mark.slow
@pytest.mark.parametrize("sent", [pytest.param(signal.SIGKILL, marks=pytest.mark.long), signal.SIGSTOP])
def test_the_work_of_a_worker_that_is_killed_or_stopped_is_done_by_others(tmp_path, warnings, monkeypatch, sent):
    monkeypatch.setattr(workers, "STILL", 3)
    done, hit = [], 0
    for number in finished(partial(note, tmp_path), range(12), 2):
        done.append(number)
        if not hit:
            hit = int(next(tmp_path.glob(f"{number}-*")).name.partition("-")[2])
            os.kill(hit, sent)
    assert sorted(done) == list(range(12)) and hit
    assert warnings == ["a process that decodes images was ended or stood still; going on with 1"]
    assert len({path.name.partition("-")[2] for path in tmp_path.iterdir()}) >= 2  # another process did the rest
    with pytest.raises(ProcessLookupError):
        os.kill(hit, 0)


@pytest.mark.slow
def test_work_that_ends_every_worker_is_given_up(warnings):
    message = "^a process that decodes images was ended or stood still, .* the same command goes on$"
    with pytest.raises(MemoryExhausted, match=message):
        list(finished(die, range(4), 2))
    assert len(warnings) == 1


def stop_when_idle(folder, number):
    """The first is stopped as soon as it has nothing more to do, while the other is at work."""
    if number == 1:
        (folder / "begun").touch()
        time.sleep(1.5)
        return
    while not (folder / "begun").exists():
        time.sleep(0.01)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGSTOP)).start()


@pytest.mark.slow
def test_a_worker_that_is_stopped_when_it_has_done_its_part_holds_nothing_up(tmp_path, warnings):
    assert sorted(finished(partial(stop_when_idle, tmp_path), range(2), 2)) == [0, 1]
    assert not warnings


@pytest.mark.slow
def test_an_error_of_the_work_is_passed_on(warnings):
    with pytest.raises(DataError, match=r"^number \d is bad$"):
        list(finished(refuse, range(4), 2))
    assert not warnings


def test_time_in_which_all_were_stopped_does_not_count(monkeypatch):
    """As of a laptop that was closed, or Ctrl-Z: the parent did not look either."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    beats = [1, 0]  # the second has not begun yet
    look = workers._Look(beats)
    now = 10_000.0
    assert not look.stands_still()
    beats[0] += 1
    now += 1
    assert not look.stands_still()
    waited = 0
    while not look.stands_still():
        now += workers.BEAT
        waited += 1
    assert waited == workers.STILL / workers.BEAT + 1
    beats = [0]
    look = workers._Look(beats)
    for _ in range(round(workers.START / workers.BEAT)):
        now += workers.BEAT
        assert not look.stands_still()
    now += workers.BEAT
    assert look.stands_still()
