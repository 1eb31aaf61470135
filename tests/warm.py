"""Real processes without four seconds of imports each: forked from one that has imported all and done nothing else."""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

COMMAND = "from undiffuse.cli import main; main.main()"


class Process:
    """A script in a process of its own, as `python -c script words…` would run it; used as subprocess.Popen is."""

    def __init__(self, script: str, *words: str, env: dict[str, str] | None = None):
        self.args, self.returncode = [script, *words], None
        self._files, self._said = (tempfile.TemporaryFile(), tempfile.TemporaryFile()), ("", "")
        self._told, status = os.pipe()
        request = {"script": script, "words": words, "cwd": os.getcwd(), "env": {**os.environ, **(env or {})}}
        socket.send_fds(_server(), [json.dumps(request).encode()], [*(file.fileno() for file in self._files), status])
        os.close(status)
        self.pid = self._number()

    def _number(self) -> int:
        """What the server tells: first the process's id, then how it ended."""
        data = os.read(self._told, 8)
        assert len(data) == 8, "the process that starts the others has ended"
        return struct.unpack("q", data)[0]

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._number()
            self._said = self.said()
            for file in self._files:
                file.close()
            os.close(self._told)
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def said(self) -> tuple[str, str]:
        """Standard output and standard error up to now."""
        if self._files[0].closed:
            return self._said
        out, err = (os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in self._files)
        return out, err

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.said()


def run(script: str, *words: str, timeout: float = 240, env: dict[str, str] | None = None):
    """As subprocess.run with captured text."""
    process = Process(script, *words, env=env)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


@cache
def _server() -> socket.socket:
    """The other end of the process that forks; it ends, with all it has started, when this one does."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.warm", str(its.fileno())],
        stdin=subprocess.DEVNULL,
        pass_fds=[its.fileno()],
        start_new_session=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    its.close()

    def end() -> None:
        mine.close()
        server.wait()

    atexit.register(end)
    return mine


def serve(channel: socket.socket) -> str | None:
    """Forks for each request, and tells how each child ended. Returns in a child, with its script, and at the end."""
    import torch._dynamo  # which the first optimiser imports
    import torch.profiler  # noqa: F401

    import undiffuse

    for module in pkgutil.walk_packages(undiffuse.__path__, "undiffuse."):
        importlib.import_module(module.name)
    gc.freeze()  # a collection in a child would copy every page of what is here
    jobs: dict[int, tuple[int, int]] = {}  # by the descriptor of the process: its id, and where to tell
    while True:
        for ready in select.select([channel, *jobs], [], [])[0]:
            if ready in jobs:
                pid, status = jobs.pop(ready)
                os.write(status, struct.pack("q", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
                os.close(status)
                os.close(ready)
                continue
            data, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 3)
            if not data:
                for pid, _ in jobs.values():
                    os.kill(pid, signal.SIGKILL)
                return None
            assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads"
            out, err, status = descriptors
            if (pid := os.fork()) == 0:
                request = json.loads(data)
                os.dup2(out, 1)
                os.dup2(err, 2)
                for each in (*descriptors, *jobs, *(told for _, told in jobs.values())):
                    os.close(each)
                channel.close()
                os.environ.clear()
                os.environ.update(request["env"])
                os.chdir(request["cwd"])
                sys.argv = ["-c", *request["words"]]
                return request["script"]
            os.close(out)
            os.close(err)
            os.write(status, struct.pack("q", pid))
            jobs[os.pidfd_open(pid)] = pid, status


if __name__ == "__main__":
    if script := serve(socket.socket(fileno=int(sys.argv[1]))):
        exec(compile(script, "<string>", "exec"), {"__name__": "__main__"})
