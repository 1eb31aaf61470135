"""What a night of training meets: real processes, real kills, counted; every test shows that its fault fired.

The long ones are left out of `make test`; `make test-reliability` runs them.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import warm
from tests.training.test_loop import assert_equal, recipe, state
from undiffuse.config import to_toml
from undiffuse.machine import store

STEPS, EVERY = 400, 5


def preset(folder: Path, **train) -> Path:
    path = folder / "small.toml"
    fields = {"steps": STEPS, "save_every": EVERY, "held_out": 0, "precision": "float32"}
    path.write_text(to_toml(recipe(train={**fields, **train})))
    return path


def start(out: Path, *more: str, script: str = warm.COMMAND) -> warm.Process:
    words = ["train", "digits", "--preset", str(out.parent / "small.toml"), "--out", str(out), *more]
    return warm.Process(script, *words)


def complete(out: Path, *more: str) -> None:
    process = start(out, *more)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def saving(out: Path) -> bool:
    return any(name.startswith(".tmp-") for name in (os.listdir(out) if out.exists() else ()))


def wait(process: warm.Process, what) -> bool:
    """Whether it came true before the process ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None:
        assert time.monotonic() < deadline
        if what():
            return True
    return False


def newest(out: Path) -> int:
    return max(store.Run(out).steps(), default=0)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_25_kills_end_where_no_kill_would_have(tmp_path):
    """kill −9 within steps and within saves: the end is equal to the bit, and no life loses more than one interval."""
    preset(tmp_path)
    complete(tmp_path / "whole")
    out, chance = tmp_path / "killed", random.Random(0)
    inside_save = inside_step = 0
    while inside_save + inside_step < 25:
        before = newest(out)
        process = start(out)
        assert wait(process, lambda before=before: newest(out) > before), process.said()
        if inside_save < 8:
            wait(process, lambda: saving(out))
        else:
            time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # else it had come to its end, and this proves nothing
        caught = saving(out)
        inside_save, inside_step = inside_save + caught, inside_step + (not caught)
        last = json.loads((out / "log.jsonl").read_bytes().rsplit(b"\n", 2)[-2])["step"]
        assert last - newest(out) <= EVERY
    assert inside_save >= 5 and inside_step >= 10, (inside_save, inside_step)
    complete(out)
    assert_equal(state(tmp_path / "whole", STEPS), state(out, STEPS))
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))  # none twice, none missing


@pytest.mark.slow
def test_sampling_killed_10_times_ends_as_if_it_had_not_been(tmp_path):
    """kill −9 at any moment, the same command again: only what is missing is made, and no half of a file is seen."""
    words = ["sample", "fashion-mnist", "-n", "96", "--batch", "4", "--steps", "4", "--solver", "ddim"]

    def command(name: str) -> warm.Process:
        return warm.Process(warm.COMMAND, *words, "--out", str(tmp_path / name), "--npz", str(tmp_path / f"{name}.npz"))

    _, errors = (whole := command("whole")).communicate(timeout=600)
    assert whole.returncode == 0, errors
    out, chance, kills = tmp_path / "killed", random.Random(1), 0
    times = dict[str, int]()
    while kills < 10:
        process, before = command("killed"), len(list(out.glob("[0-9]*.png")))
        if not wait(process, lambda before=before: len(list(out.glob("[0-9]*.png"))) > before):
            break
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        for path in sorted(out.glob("[0-9]*.png")):
            assert times.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns  # never made again
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    _, errors = (last := command("killed")).communicate(timeout=600)
    assert kills == 10 and last.returncode == 0, errors
    for name in os.listdir(tmp_path / "whole"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))
    assert (tmp_path / "killed.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


SLOW = """
import time
from pathlib import Path
from undiffuse.cli import main as cli
from undiffuse.machine import watch
real = watch.Flag.check
def check(self, *rest):
    Path("MARK").touch()
    time.sleep(0.3)
    real(self)
watch.Flag.check = check
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("phase, name", [
    ("step", "SIGUSR1"), ("step", "SIGINT"), ("sample_every", "SIGTERM"), ("held_out_every", "SIGTERM"),
])  # fmt: skip
def test_a_signal_is_honoured_in_every_phase(tmp_path, phase, name):
    """Previews and the held-out loss are left undone; the state that is saved goes on as if nothing had been."""
    preset(tmp_path, steps=10**6, save_every=10**6, held_out=64, **({phase: 2} if phase != "step" else {}))
    mark = tmp_path / "run" / "log.jsonl" if phase == "step" else tmp_path / "inside"
    process = start(tmp_path / "run", script=SLOW.replace("MARK", str(mark)))
    assert wait(process, mark.exists)
    asked = time.monotonic()
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and f"{name}: stopped after step" in errors
    assert time.monotonic() - asked < 30
    step = newest(tmp_path / "run")
    if phase != "step":  # it came while that was at work, and that was not done
        assert step == 3 and not list((tmp_path / "run" / "samples").glob("*.png"))
        assert "held_out" not in (tmp_path / "run" / "log.jsonl").read_text()
    complete(tmp_path / "run", "--steps", str(step + 3))
    preset(tmp_path)
    complete(tmp_path / "whole", "--steps", str(step + 3))
    assert_equal(state(tmp_path / "whole", step + 3), state(tmp_path / "run", step + 3))


HANG = """
import sys, time
from undiffuse.cli import main as cli
from undiffuse.training import trainer
from undiffuse.machine import watch
watch.PATIENCE = 2.0
real = trainer.Trainer.update
def update(self, last, *vote):
    while self.step == 4:
        time.sleep(1)
    return real(self, last, *vote)
trainer.Trainer.update = update
cli.main()
"""


@pytest.mark.slow
def test_a_step_that_hangs_ends_a_real_run_and_the_same_command_goes_on(tmp_path):
    preset(tmp_path, steps=8, save_every=2)
    words = ["train", "digits", "--preset", str(tmp_path / "small.toml"), "--out", str(tmp_path / "run")]
    ended = warm.run(HANG, *words)
    assert ended.returncode == 8, ended.stderr
    assert "nothing has moved for" in ended.stderr and newest(tmp_path / "run") == 4
    assert "in update" in (tmp_path / "run" / "stacks-0.txt").read_text()
    complete(tmp_path / "run")
    complete(tmp_path / "whole")
    assert_equal(state(tmp_path / "whole", 8), state(tmp_path / "run", 8))


@pytest.mark.slow
def test_a_run_whose_previews_are_slow_is_no_hang(tmp_path):
    """Steps of the chain are signs of life: here all of a preview takes longer than a step may."""
    preset(tmp_path, steps=4, sample_every=4)
    slow = HANG.replace("4:", "-1:").replace(
        "cli.main()",
        "real_chain = trainer.Model.chain\n"
        "def chain(self, keys, times, solver, *cond, **rest):\n"
        "    tell = rest.pop('progress')\n"
        "    slowly = lambda n: (time.sleep(0.04), tell(n))\n"
        "    return real_chain(self, keys, times, solver, *cond, progress=slowly, **rest)\n"
        "trainer.Model.chain = chain\ncli.main()",
    )
    words = ["train", "digits", "--preset", str(tmp_path / "small.toml"), "--out", str(tmp_path / "run")]
    ended = warm.run(slow, *words)
    assert ended.returncode == 0, ended.stderr


NARROW = """
import os, resource
from undiffuse.cli import main as cli
from undiffuse.training import trainer
size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + (1 << 29)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
cli.main()
"""


@pytest.mark.slow
def test_a_process_that_may_not_have_the_memory_says_what_to_set(tmp_path):
    """Allocations that really fail."""
    preset(tmp_path, steps=1, batch=2**15)
    words = ["train", "digits", "--preset", str(tmp_path / "small.toml"), "--out", str(tmp_path / "run")]
    ended = warm.run(NARROW, *words)
    assert ended.returncode == 6, ended.stderr
    assert "out of memory at step 0 with micro-batches of 32768, when" in ended.stderr
    assert "--set train.micro_batch=16384" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_long_run_does_not_grow(tmp_path):
    """2,000 steps with saves: resident memory within 1 %, the number of open files constant."""
    preset(tmp_path, steps=2600, save_every=50)
    process = start(tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    seen = {}
    for at in (500, 2500):
        assert wait(process, lambda at=at: log.exists() and log.read_bytes().count(b'"loss"') >= at)
        status = Path(f"/proc/{process.pid}/status").read_text()
        memory = int(status.partition("VmRSS:")[2].split()[0])
        files = [os.readlink(f"/proc/{process.pid}/fd/{n}") for n in os.listdir(f"/proc/{process.pid}/fd")]
        seen[at] = (memory, sorted(name for name in files if ".tmp-" not in name))
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert seen[2500][0] <= 1.01 * seen[500][0], seen
    assert len(seen[2500][1]) <= len(seen[500][1]), seen


SEVERAL = """
import runpy, sys
lines, codes = sys.argv[1:], []
for line in lines:
    sys.argv = ["undiffuse", *line.split()]
    try:
        runpy.run_module("undiffuse", run_name="__main__")
    except SystemExit as ended:
        codes.append(int(ended.code or 0))
print(codes)
"""


@pytest.mark.slow
def test_odd_surroundings(tmp_path):
    """`python -O`, a path with spaces and accents, no HOME, the C locale: training and drawing work all the same."""
    folder = tmp_path / "a földer (1) 'x'"
    folder.mkdir()
    preset(folder, steps=3, save_every=3)
    strange = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.getcwd()}
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | strange
    lines = (
        ("train digits --preset small.toml --out run", 0),
        ("sample run -n 2 --out drawn", 0),
        ("train digits --preset small.toml --out run2 --steps 0", 2),
    )
    command = [sys.executable, "-O", "-c", SEVERAL, *(line for line, _ in lines)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str([code for _, code in lines]), done.stderr
    assert "a budget of 0 steps is not possible" in done.stderr  # checks are raised, not asserted
    assert len(list((folder / "drawn").glob("*.png"))) == 3
