"""Two machines, as network namespaces joined by a virtual cable, each with torchrun: one dies, and the job goes on.

Needs root and iproute2, to make the namespaces.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.reliability.test_kills import preset
from tests.training.test_loop import assert_equal, state

ADDRESSES = ("10.213.77.1", "10.213.77.2")
STEPS = 300


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """The names of two namespaces; the end of the cable in each has the namespace's name."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("making network namespaces needs root and iproute2")
    names = (f"un{os.getpid()}a", f"un{os.getpid()}b")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def launch(hosts: tuple[str, str], folder: Path, *more: str) -> list[subprocess.Popen]:
    """The command of docs/scaling.md on each host. Each has a disk of its own; only that of process 0 is written."""
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "0"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29500", "--rdzv-id", "night"]
    running = []
    for host, address in zip(hosts, ADDRESSES, strict=True):
        out = folder / ("first" if host == hosts[0] else "second")
        words = ["-m", "undiffuse", "train", "digits", "--preset", str(folder / "small.toml"), "--out", str(out)]
        # Namespaces share the host's name, by which torchrun would else know where the meeting is.
        meets = ["--rdzv-conf", f"is_host={int(host == hosts[0])}", "--local-addr", address]
        command = [sys.executable, *launcher, *meeting, *meets, *words, *more]
        with open(folder / f"{out.name}.txt", "w") as said:
            running.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", host, *command],
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": host},
                )
            )
    return running


def kill(process: subprocess.Popen) -> int:
    """torchrun and all its workers, as a power cut would. Returns how many processes these were."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], check=True, capture_output=True, text=True).stdout.split()
    children: dict[int, list[int]] = {}
    for pid, parent in zip(map(int, found[::2]), map(int, found[1::2]), strict=True):
        children.setdefault(parent, []).append(pid)
    doomed = [process.pid] if process.poll() is None else []
    for pid in doomed:
        doomed += children.get(pid, [])
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(doomed)


@pytest.mark.long
def test_one_of_two_hosts_dies_and_the_job_goes_on_to_the_same_bits(hosts, tmp_path):
    preset(tmp_path, steps=STEPS, exact_shards=4)
    log = tmp_path / "first" / "log.jsonl"
    running, said = launch(hosts, tmp_path), tmp_path / "first.txt"
    try:
        deadline = time.monotonic() + 120
        while not log.exists() or log.read_text().count("\n") < 30:
            assert time.monotonic() < deadline and running[0].poll() is None, said.read_text()
            time.sleep(0.05)
        assert kill(running[1]) >= 3  # torchrun and its two
        assert running[0].wait(120) != 0 and "lost another one" in said.read_text(), said.read_text()
    finally:
        for process in running:
            kill(process)
            process.wait()
    assert 30 <= len(log.read_text().splitlines()) < STEPS

    assert [process.wait(300) for process in launch(hosts, tmp_path)] == [0, 0], said.read_text()
    assert not (tmp_path / "second").exists()
    assert "images of" not in (tmp_path / "second.txt").read_text()  # process 0 alone speaks
    words = ["train", "digits", "--preset", str(tmp_path / "small.toml"), "--out", str(tmp_path / "alone")]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "undiffuse", *words], check=True, capture_output=True, env=one)
    assert_equal(state(tmp_path / "first", STEPS), state(tmp_path / "alone", STEPS))
