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
from tests.test_train import assert_equal, state

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
        words = ["-m", "undiffuse.cli", "train", "digits", "--preset", str(folder / "small.toml"), "--out", str(out)]
        command = [sys.executable, *launcher, *meeting, "--local-addr", address, *words, *more]
        running.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": host},
                start_new_session=True,
            )
        )
    return running


def kill(process: subprocess.Popen) -> None:
    """torchrun and, as they have sessions of their own, its workers: what a power cut does to a machine."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], check=True, capture_output=True, text=True).stdout.split()
    children: dict[int, list[int]] = {}
    for pid, parent in zip(map(int, found[::2]), map(int, found[1::2]), strict=True):
        children.setdefault(parent, []).append(pid)
    doomed = [process.pid]
    for pid in doomed:
        doomed += children.get(pid, [])
    assert len(doomed) >= 3, "the workers should have been running"
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.long
def test_one_of_two_hosts_dies_and_the_job_goes_on_to_the_same_bits(hosts, tmp_path):
    preset(tmp_path, steps=STEPS, exact_shards=4)
    log = tmp_path / "first" / "log.jsonl"
    running = launch(hosts, tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not log.exists() or log.read_text().count("\n") < 30:
            assert time.monotonic() < deadline and running[0].poll() is None, running[0].communicate()[0]
            time.sleep(0.05)
        kill(running[1])
        told = running[0].communicate(timeout=120)[0]
    finally:
        for process in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert running[0].returncode != 0 and "lost another one" in told, told
    steps = len(log.read_text().splitlines())
    assert 30 <= steps < STEPS

    for process in launch(hosts, tmp_path):
        told = process.communicate(timeout=300)[0]
        assert process.returncode == 0, told
    assert not (tmp_path / "second").exists()
    words = ["train", "digits", "--preset", str(tmp_path / "small.toml"), "--out", str(tmp_path / "alone")]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "undiffuse.cli", *words], check=True, capture_output=True, env=one)
    assert_equal(state(tmp_path / "first", STEPS), state(tmp_path / "alone", STEPS))
