"""How the threads of the command line wait for one another: set before torch is loaded, and left to who has set it."""

import os
import subprocess
import sys

import pytest

from undiffuse.cli import main as command


@pytest.mark.parametrize(
    "given, spins",
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
        ({"OMP_NUM_THREADS": "2"}, "1000"),
    ],
)
def test_what_is_set_unless_the_user_has(monkeypatch, given, spins):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    command.wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="libgomp comes with the Linux builds of torch alone")
@pytest.mark.parametrize("given, spins", [({}, "1000"), ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_libgomp_has_it(given, spins):
    """By its own word, when a command that computes has loaded it."""
    quiet = {name: value for name, value in os.environ.items() if name not in command.WAITING}
    ran = subprocess.run(
        [sys.executable, "-m", "undiffuse", "doctor"],
        capture_output=True, text=True, check=True, env={**quiet, "OMP_DISPLAY_ENV": "VERBOSE", **given},
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{spins}'" in ran.stderr
