"""What every test runs under: checked shapes and types, two threads, reproducible property tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Before the first import of the package: each annotation of `undiffuse` is then checked at each call.
install_import_hook("undiffuse", "beartype.beartype")

import torch  # noqa: E402

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)

settings.register_profile("undiffuse", deadline=None, derandomize=True)
settings.load_profile("undiffuse")


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command line; gives its exit code, standard output and standard error."""

    from undiffuse.cli import main as cli

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["undiffuse", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture(scope="session")
def data():
    """64 digits of 8×8."""
    from undiffuse.data.source import open_source

    return open_source("digits").subset(slice(64))


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The documentation as `make site` builds it, and what mkdocs said."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    root = Path(__file__).parent.parent
    return folder, subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
