"""Signals and hangs: a flag that is looked at, and a thread that ends what does not move."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest

from undiffuse.machine import watch
from undiffuse.machine.watch import Asked, Flag, Watchdog, listening


def test_a_signal_raises_the_flag_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGUSR1)
    with listening() as flag:
        flag.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert flag.name == "SIGUSR1"
        with pytest.raises(Asked):
            flag.check()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_second_signal_ends_at_once():
    script = "import os, signal\nfrom undiffuse.machine.watch import listening\nwith listening():\n"
    script += "    os.kill(os.getpid(), signal.SIGTERM)\n    print('first', flush=True)\n"
    script += "    os.kill(os.getpid(), signal.SIGTERM)\n    print('never')\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "first\n")


def test_a_thread_that_shares_its_processor_waits_for_it():
    """Two that always want one processor have half of it each, less where others want it too."""
    script = "import os, time\nfrom undiffuse.machine.watch import waited\n"
    script += "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\nother = os.fork()\nwhile not other:\n    pass\n"
    script += "began, before = time.monotonic(), waited()\nwhile time.monotonic() - began < 1:\n    pass\n"
    script += "print(waited() - before)\nos.kill(other, 9)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert 0.3 < float(done.stdout) < 1.1, done.stderr


def test_a_crowd_is_told_once(monkeypatch):
    clock, count = [0.0], [5.0]
    monkeypatch.setattr(watch, "waited", lambda: count[0])
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    crowd, said = watch.Crowd(), []
    for seconds, more in ((6, 9.0), (6, 0.0), (10, 0.4), (10, 9.0), (10, 9.0)):
        clock[0], count[0] = clock[0] + seconds, count[0] + more
        said.append(crowd.look(2))
    assert said[0] == "" and "its 2 threads wait for a processor 38 % of the time" in said[1] and said[2:] == [""] * 3
    alone = watch.Crowd()
    clock[0], count[0] = clock[0] + 20, count[0] + 20
    assert alone.look(1) == ""  # it has nothing to wait for
    monkeypatch.setattr(watch, "waited", lambda: None)
    assert watch.Crowd().look(2) == ""


def test_a_hang_is_ended_with_the_stacks_of_all_threads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch, "TICK", 0.01)
    ended = []
    with Watchdog(tmp_path / "stacks.txt", patience=0.1, end=ended.append) as dog:
        dog.stepped()
        here_it_hangs(ended)
    assert ended == [8]
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "here_it_hangs" in stacks and stacks.count("Thread 0x") >= 1
    assert "nothing has moved for" in capsys.readouterr().err


def test_a_hang_is_ended_where_there_is_no_folder_to_write_to(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(watch, "TICK", 0.01)
    ended = []
    with Watchdog(tmp_path / "gone" / "stacks.txt", patience=0.1, end=ended.append) as dog:
        dog.stepped()
        here_it_hangs(ended)
    assert ended == [8]
    said = capfd.readouterr().err
    assert "here_it_hangs" in said and "where each thread stands is above" in said


def here_it_hangs(ended: list[int]) -> None:
    deadline = time.monotonic() + 30
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)


def test_what_moves_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "TICK", 0.01)
    ended = []
    with Watchdog(tmp_path / "stacks.txt", patience=0.2, end=ended.append) as dog:
        for mark in (dog.stepped, dog.beat) * 20:
            time.sleep(0.02)
            mark()
        with dog.slow():
            time.sleep(0.5)
    assert ended == [] and not (tmp_path / "stacks.txt").exists()


def test_the_limit_is_ten_times_the_median_step_but_a_minute_at_least(tmp_path, monkeypatch):
    dog = Watchdog(tmp_path / "stacks.txt")
    assert dog.limit() == 600  # the first step may compile
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    dog.beat()
    for seconds in (1.0, 1.0, 500.0, *[20.0] * 5):
        now[0] += seconds
        dog.stepped()
        if seconds == 500:
            assert dog.limit() == 60
        dog.beat()  # as after a preview, which is no step
    assert dog.limit() == 200
    with dog.slow():
        assert dog.limit() == 2000
    assert dog.limit() == 200


def test_a_process_that_waits_for_another_is_given_any_time(tmp_path):
    dog = Watchdog(tmp_path / "stacks", 60.0)
    with dog.slow(math.inf):
        assert dog.limit() == math.inf
    assert dog.limit() == 600


@pytest.mark.parametrize("launched, ended", [(False, [143]), (True, [])])
def test_a_signal_that_torchrun_passes_on_is_no_second_one(monkeypatch, launched, ended):
    """The stop of a service reaches the processes twice: by itself, and by way of torchrun."""
    now, exits = [100.0], []
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setenv("RANK", "0") if launched else monkeypatch.delenv("RANK", raising=False)
    flag = Flag()
    flag(signal.SIGTERM, None)
    flag(signal.SIGTERM, None)
    assert flag.name == "SIGTERM" and exits == ended
    now[0] += 6
    flag(signal.SIGINT, None)
    assert exits == [*ended, 130]


def test_a_flag_outside_the_main_thread_is_only_a_flag():
    assert Flag().name is None
