"""What `pip install .` installs: a wheel that holds its data, and runs from a folder with nothing else of the tree."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from undiffuse import __version__
from undiffuse.model.recipe import presets

ROOT = Path(__file__).parent.parent
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")


def python(*words: object, path: Path | None = None) -> str:
    """What an interpreter prints that stands in no clone; `path` is all of PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that neither `build/` of an older tree gets in nor a new one is left behind."""
    folder = tmp_path_factory.mktemp("wheel")
    clone = folder / "clone"
    shutil.copytree(ROOT / "undiffuse", clone / "undiffuse", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, clone)
    python(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, clone)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    python(*PIP, "install", "--no-deps", "--no-index", "--target", wheel.parent / "installed", wheel)
    return wheel.parent / "installed"


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    package = {path for path in (ROOT / "undiffuse").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path.relative_to(ROOT).as_posix() for path in package} <= inside
    assert {name for name in inside if not name.startswith("undiffuse/")} == {
        f"undiffuse-{__version__}.dist-info/{name}"
        for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE",
                     "top_level.txt")
    }  # fmt: skip
    assert {"undiffuse/py.typed", "undiffuse/assets/digits.npz", "undiffuse/presets/cifar10.toml"} <= inside


@pytest.mark.slow
def test_what_is_installed_runs_with_its_data(installed):
    assert python("-c", "import undiffuse; print(undiffuse.__file__)", path=installed).startswith(str(installed))
    assert "sample" in python("-m", "undiffuse", "--help", path=installed)
    found = json.loads(python(installed / "bin" / "undiffuse", "presets", "--json", path=installed))
    assert sorted(found) == presets()
    model = json.loads(python("-m", "undiffuse", "inspect", "fashion-mnist", "--json", path=installed))
    assert model["parameters"] == found["fashion-mnist"]["expected"]["parameters"]
    digits = json.loads(python("-m", "undiffuse", "data", "inspect", "digits", "--json", path=installed))
    assert digits["images"] == 1500
