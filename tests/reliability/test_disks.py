"""Real disks that are full or read-only: tmpfs mounts, which need root."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import warm
from tests.reliability.test_kills import preset
from tests.training.test_loop import assert_equal, state

SIZE = 16 * 2**20


def mount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """An empty disk of 16 MiB."""
    if os.geteuid():
        pytest.skip("mounting a disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, f"size={SIZE}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def train(out: Path, steps: int) -> tuple[int, str]:
    settings = out.parent.parent / "small.toml"
    words = ["train", "digits", "--preset", str(settings), "--out", str(out), "--steps", str(steps)]
    ended = warm.run(warm.COMMAND, *words)
    return ended.returncode, ended.stderr


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_is_full_or_read_only_ends_the_run_and_the_same_command_goes_on(disk, tmp_path, fault):
    preset(tmp_path, save_every=5)
    assert train(disk / "run", 5)[0] == 0
    before = {name: content for name, content in files(disk).items() if "step-" in name}
    assert before
    if fault == "full":
        with open(disk / "ballast", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(2**16))
        os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 2**16)  # room for the log alone
    else:
        mount(disk, "remount", "ro")
        with pytest.raises(OSError, match="Read-only"):
            (disk / "new").touch()

    code, said = train(disk / "run", 10)
    assert code == 4, said
    assert "Traceback" not in said and str(disk / "run") in said
    assert ("step-000000010 cannot be written" in said) if fault == "full" else "Read-only" in said
    after = files(disk)
    assert {name: after[name] for name in before} == before
    assert not any(".tmp-" in name for name in after)

    if fault == "full":
        (disk / "ballast").unlink()
    else:
        mount(disk, "remount", "rw", f"size={SIZE}")
    assert train(disk / "run", 10)[0] == train(tmp_path / "alone" / "run", 10)[0] == 0
    assert_equal(state(disk / "run", 10), state(tmp_path / "alone" / "run", 10))
