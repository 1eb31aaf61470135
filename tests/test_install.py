"""What is published: a wheel that holds its data and runs with nothing else of the tree, and a source distribution."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from undiffuse import __version__
from undiffuse.model.recipe import presets

ROOT = Path(__file__).parent.parent
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")

FOLDERS = ("undiffuse", "tests", "docs", "bench")
FILES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile",
         "MANIFEST.in", "constraints.txt", "mkdocs.yml")  # fmt: skip
CACHES = ("__pycache__", ".hypothesis", ".pytest_cache")


def python(*words: object, path: Path | None = None) -> str:
    """What an interpreter prints that stands in no clone; `path` is all of PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True)
class Built:
    """From a copy of the tree, so that neither `build/` of an older tree gets in nor a new one is left behind."""

    wheel: Path
    sdist: Path  # unpacked in `unpacked`
    unpacked: Path
    second: Path  # the wheel that was built from what was unpacked


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    clone = folder / "clone"
    for place in FOLDERS:
        shutil.copytree(ROOT / place, clone / place, ignore=shutil.ignore_patterns(*CACHES))
        (clone / place / "__pycache__").mkdir()
        (clone / place / "__pycache__" / "stale.cpython-311.pyc").write_bytes(b"not to be shipped")
    for name in FILES:
        shutil.copy(ROOT / name, clone)
    build = ("-m", "build", "--no-isolation", "--outdir")
    python(*build, folder, "--sdist", clone)
    python(*build, folder / "first", "--wheel", clone)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), (folder / "first").glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    shutil.copytree(unpacked, folder / "source")
    python(*build, folder / "second", "--wheel", folder / "source")
    (second,) = (folder / "second").glob("*.whl")
    return Built(wheel, sdist, unpacked, second)


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return built.wheel


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


def files(folder: Path) -> set[str]:
    """Every file below, but caches."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not {*path.parts} & {*CACHES}}


@pytest.mark.slow
def test_both_can_be_published(built):
    said = python("-m", "twine", "--no-color", "check", "--strict", built.wheel, built.sdist)
    assert said.count("PASSED") == 2 and "WARNING" not in said


@pytest.mark.slow
def test_the_sources_are_all_there_and_nothing_else(built):
    with tarfile.open(built.sdist) as archive:
        inside = {member.name.partition("/")[2]: member.size for member in archive if member.isfile()}
    made = {name for name in inside if name.startswith("undiffuse.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    wanted = {f"{place}/{name}" for place in FOLDERS for name in files(ROOT / place)} | {*FILES}
    assert inside.keys() - made == wanted
    large = {name for name, size in inside.items() if size > 100_000}
    assert {name.rpartition("/")[0] for name in large} <= {
        *("undiffuse/assets", "undiffuse/assets/features", "docs/images")
    }


@pytest.mark.slow
def test_the_sources_build_the_same_wheel(built):
    def content(wheel: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    first, second = content(built.wheel), content(built.second)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.slow
def test_the_sources_can_be_tested(built):
    """By the tests that look for every file which the pages name."""
    words = (
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_docs.py",
        "-k",
        "links_and_names or named_exist",
    )
    done = subprocess.run([sys.executable, *words], cwd=built.unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"{len(list((ROOT / 'docs').glob('*.md'))) + 3} passed" in done.stdout
