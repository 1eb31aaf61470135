"""What `undiffuse train` prints to be pasted, and the options of the whole command."""

import json
import shlex

import pytest

import undiffuse
from tests.cli.test_cli import SETTINGS
from undiffuse.cli.train import again

GIVEN = [
    "train",
    "my photos/",
    "-o",
    "a run",
    "--steps=5",
    "--images",
    "9",
    "--set",
    "train.lr=1",
    "--set=train.batch=4",
]
AGAIN = [
    ({}, (), "undiffuse train 'my photos/' -o 'a run' --steps=5 --images 9 --set train.lr=1 --set=train.batch=4"),
    ({"--steps": "10"}, ("--images",),
     "undiffuse train 'my photos/' -o 'a run' --set train.lr=1 --set=train.batch=4 --steps 10"),
    ({"--set train.lr": "0.1", "--set train.batch": "8"}, ("--images", "--steps"),
     "undiffuse train 'my photos/' -o 'a run' --set train.lr=0.1 --set train.batch=8"),
    ({"--out": "b"}, ("--images", "--steps"),
     "undiffuse train 'my photos/' --set train.lr=1 --set=train.batch=4 --out b"),
]  # fmt: skip


@pytest.mark.parametrize("options, without, expected", AGAIN)
def test_a_command_is_said_again_with_other_options(monkeypatch, options, without, expected):
    monkeypatch.setattr("sys.argv", ["/bin/undiffuse", *GIVEN])
    assert again(options, without) == expected


def test_the_next_commands_work_when_they_are_pasted(call, tmp_path, monkeypatch):
    """From a folder whose name has a blank in it."""
    monkeypatch.chdir(tmp_path)
    settings = [word for setting in [*SETTINGS, "data.size=8", "data.channels=1"] for word in ("--set", setting)]
    code, out, err = call("train", "digits", "-p", "cifar10", "-o", "a run", "--json", "--steps", "1", *settings)
    assert code == 0, err
    said = json.loads(out)
    for command, key in ((said["more"], "step"), (said["next"], "images")):
        words = shlex.split(command)
        assert words[0] == "undiffuse"
        code, out, err = call(*words[1:], *([] if "--json" in words else ["--json"]))
        assert code == 0, err
        assert json.loads(out)[key] == {"step": 2, "images": 64}[key]


def test_the_version(call):
    assert call("--version")[:2] == (0, f"undiffuse {undiffuse.__version__}\n")


@pytest.mark.slow
def test_a_model_to_begin_with_brings_its_network(call, tmp_path):
    out = tmp_path / "tuned"
    code, text, err = call("train", "fashion-mnist-sample", "--init", "fashion-mnist", "--out", out, "--steps", 1,
                           "--set", "train.sample_every=0", "--device", "cpu", "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(text)["parameters"] == 1_198_148


@pytest.mark.parametrize("words, added", [
    (["train", "-obad dir", "d"], "undiffuse train d --steps 4"),
    (["train", "--out", "a", "--", "-photos"], "undiffuse train --steps 4 -- -photos"),
    (["train", "d", "--out=a", "--profile"], "undiffuse train d --steps 4"),
])  # fmt: skip
def test_other_ways_to_write_an_option(monkeypatch, words, added):
    monkeypatch.setattr("sys.argv", ["undiffuse", *words])
    assert again({"--steps": "4"}, without=("--out",)) == added
