"""Every `undiffuse` command of README.md and of getting-started.md is run, in order, in an empty folder with pictures.

Only budgets change: the options of `BRIEF` are put behind what the page says, where they win. `make` targets and the
extras of `pip install` are looked up; test_install.py does what `pip install .` does. A line that is none of these is
an error, so nothing is left out in silence.
"""

import ast
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from undiffuse.cli import main as cli
from undiffuse.training.auto import Facts, choose

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "getting-started.md"]

BRIEF = {
    "demo": "--quick",
    "train": "--steps 2 --device cpu --set train.batch=4 --set process.steps=8 --set network.channels=8",
    "sample": "-n 2 --steps 2",
    "progressive": "-n 2 --steps 2 --slots 2",
    "shared": "-n 2 --steps 2",
    "interpolate": "--count 3 --steps 2",
    "neighbours": "-n 2 -k 2 --steps 2",
    "nll": "-n 2 --steps 8",
    "eval": "-n 12 --steps 2",
    "report": "-n 2 --steps 2 --seed 1",
    "compare": "-n 2 --steps 2",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def lines(page: Path) -> list[str]:
    """The commands of a page, without remarks."""
    whole = "".join(blocks(page.read_text("utf-8"), "sh"))
    return [words for line in whole.splitlines() if (words := line.partition("  #")[0].strip())]


def briefly(words: list[str]) -> list[str]:
    return [*words, *BRIEF.get(words[0], "").split()]


def run(words: list[str], monkeypatch) -> None:
    """One command line of undiffuse; an AssertionError unless it succeeds and makes what it was asked for."""
    monkeypatch.setattr(sys, "argv", ["undiffuse", *briefly(words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code, f"undiffuse {shlex.join(words)} ended with {stopped.value.code}"
    made = [words[i + 1] for i, word in enumerate(words) if word in ("--out", "-o", "--npz", "--sheet")]
    assert [name for name in made if not Path(name).exists()] == []


def look_up(line: str) -> None:
    """`make target` is in the Makefile; what `pip install .[extra]` names is in pyproject.toml."""
    words = line.split()
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text("utf-8")
        assert len(words) == 2 and re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"no target for: {line}"
        return
    extra = re.fullmatch(r"pip install (?:'\.\[([\w,]+)\]'|\.)", line)
    assert extra, f"not a command that this test knows: {line}"
    known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert set(filter(None, (extra[1] or "").split(","))) <= known.keys(), f"no extra for: {line}"


PETS = [f"pets/{name}/{i}.png" for name in ("cat", "dog") for i in range(8)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the reader stands: photos/, more/ and pets/ with pictures of several sizes and formats."""
    names = ("a.jpg", "b.jpg", "c.png", "d.png", "e.webp", "f.bmp", "inner/g.png", "inner/h.jpg")
    for i, name in enumerate([*(f"photos/{name}" for name in names), "more/i.png", "more/j.jpg", *PETS]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (4, 5, 3), np.uint8)
        Image.fromarray(pixels).resize((40 + 3 * i, 36)).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs(page, folder, monkeypatch):
    for line in lines(page):
        if line.startswith("undiffuse "):
            run(shlex.split(line)[1:], monkeypatch)
        else:
            look_up(line)


def test_the_python_of_the_readme_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in blocks(PAGES[0].read_text("utf-8"), "python"):
        names = {"__name__": "__readme__"}
        exec(compile(code, "README.md", "exec"), names)
        assert names["images"].shape == (16, 1, 28, 28)
    assert 0 < ast.literal_eval(capsys.readouterr().out)["bits_per_dim"] < 8


def test_the_readme_quotes_what_auto_says():
    (quoted,) = blocks(PAGES[0].read_text("utf-8"), "text")
    sizes = ((367, 500), (367, 600))  # (height, width) of pictures like those it is about
    assert " ".join(quoted.split()) == " ".join(
        choose(Facts(40, sizes, grey=False, channels=3, has_test=False, device="cpu")).why
    )


def test_the_pages_show_what_there_is():
    """At least one command of each kind is on the first page."""
    shown = {line.split()[1] for line in lines(PAGES[0]) if line.startswith("undiffuse ")}
    assert shown == {*BRIEF, "codec", "data", "decode", "encode", "export", "import", "inspect", "verify"}
    assert {line for line in lines(PAGES[0]) if not line.startswith("undiffuse ")} == {
        "make demo", "make test", "make site", "pip install ."
    }  # fmt: skip


BAD = {
    "undiffuse sample no-such-model --out x": "ended with 2",
    "undiffuse presets --out x": "ended with 2",
    "make tset": "no target for: make tset",
    "pip install '.[tset]'": "no extra for",
    "pip install .[tensorboard]": "not a command that this test knows",  # some shells look for a file of that name
    "pip install torch": "not a command that this test knows",
    "rm -rf photos": "not a command that this test knows",
}


@pytest.mark.parametrize("line", BAD)
def test_a_line_that_does_not_work_is_seen(line, folder, monkeypatch):
    with pytest.raises(AssertionError, match=re.escape(BAD[line])):
        run(shlex.split(line)[1:], monkeypatch) if line.startswith("undiffuse") else look_up(line)
    assert (folder / "photos").exists()


def test_a_result_that_is_missing_is_seen(folder, monkeypatch):
    monkeypatch.setattr(cli, "main", lambda: sys.exit(0))
    with pytest.raises(AssertionError, match="samples"):
        run(["sample", "fashion-mnist", "--out", "samples"], monkeypatch)


def test_what_is_abbreviated_wins():
    assert briefly("nll m d -n 100".split()) == "nll m d -n 100 -n 2 --steps 8".split()
    assert briefly(["inspect", "m"]) == ["inspect", "m"]


def test_the_times_that_readme_names_are_those_that_were_measured():
    found = json.loads((ROOT / "bench" / "first_minute.json").read_text())
    median, ran = found["median"], found["machine"]
    speed = median["images_per_second"]
    text = PAGES[0].read_text("utf-8")
    machine = f"{ran['processor']}, {ran['threads']} threads ([benchmarks](docs/benchmarks.md#the-first-minute))"
    for what, value in (
        (
            "the run above (32×32, colour, 2.3 million parameters)",
            f"{speed:.0f} images per second, so at most {300_000 / speed / 60:.0f} minutes for 300,000 images",
        ),
        ("64 samples of the shipped model `fashion-mnist`", f"{median['seconds_to_sample_64']:.1f} seconds"),
    ):
        assert f"| {what} | {value} | {machine} |\n" in text
