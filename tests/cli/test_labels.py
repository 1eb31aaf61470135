"""Labels by command: a run with classes is trained, drawn from and measured, and each mistake is one line."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from undiffuse.training.start import train

SETTINGS = [
    "process.steps=4", "network.channels=8", "network.multipliers=[1]", "network.attention=[]", "train.batch=8",
    "train.sample_every=2", "train.held_out_every=2", "data.labels=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`always` was never trained without a label, `some` was; their classes are those of `pets`."""
    root = tmp_path_factory.mktemp("runs")
    for split, count in (("train", 6), ("test", 2)):
        for k, name in enumerate(("bird", "cat", "dog")):
            (root / "pets" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(80 * k, 80 * k + 80, (8, 8), np.uint8)
                Image.fromarray(pixels).save(root / "pets" / split / name / f"{i}.png")
    for name, drop in (("always", 0), ("some", 0.1)):
        settings = [*SETTINGS, f"train.drop_label={drop}"]
        train(root / "pets", root / name, "digits", steps=2, settings=settings, device="cpu", show_progress=False)
        assert (root / name / "samples" / "step-000000002.png").exists()
    return root


def test_the_command_that_a_run_ends_with_can_be_pasted(call, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    words += ["--preset", "digits", "--set", "train.drop_label=0", "--steps", "2", "--json"]
    code, text, err = call("train", runs / "pets", "-o", runs / "always", *words)
    assert code == 0, err
    after = shlex.split(json.loads(text)["next"])
    assert after[:2] == ["undiffuse", "sample"] and call(*after[1:])[0] == 0


@pytest.mark.parametrize(
    "words, labels",
    [
        ("sample RUNS/always --label dog -n 2 --npz x.npz", "2 dog"),
        ("sample RUNS/always --label 0 -n 2 --npz x.npz", "0 bird"),
        ("sample RUNS/always --label random -n 2 --npz x.npz", "random, as often as in training"),
        ("sample RUNS/some -n 2 --npz x.npz", "none"),
        ("progressive RUNS/always --label cat -n 2 -o x.png", "1 cat"),
        ("shared RUNS/always --label random -n 2 -o x.png", "random, as often as in training"),
        ("interpolate RUNS/always A B --label cat --solver ddim -o x.png", "1 cat"),
        ("neighbours RUNS/always RUNS/pets -n 2 -k 1 -o x.png", "random, as often as in training"),
        ("neighbours RUNS/some RUNS/pets -n 2 -k 1 --label none -o x.png", "none"),
        ("nll RUNS/always RUNS/pets", "of the data"),
        ("nll RUNS/some RUNS/pets", "of the data"),
        ("nll RUNS/some RUNS/pets --label none", "none"),
        ("nll RUNS/always digits -n 2 --label cat", "1 cat"),
        ("nll RUNS/always digits -n 2 --label cat --ode --tolerance 0.1", "1 cat"),
        ("nll RUNS/some RUNS/pets --ode --tolerance 0.1", "of the data"),
    ],
)
def test_every_command_says_which_labels_it_took(call, runs, tmp_path, monkeypatch, words, labels):
    monkeypatch.chdir(tmp_path)
    picture = runs / "pets" / "test" / "cat" / "0.png"
    named = [str(runs / w[5:]) if w.startswith("RUNS/") else str(picture) if w in "AB" else w for w in words.split()]
    code, text, err = call(*named, "--json")
    assert code == 0, err
    assert json.loads(text)["labels"] == labels


def test_all_draws_a_row_for_each_class(call, runs, tmp_path):
    code, text, err = call("sample", runs / "always", "--label", "all", "-n", 2, "-o", tmp_path / "s", "--json")
    assert code == 0, err
    assert json.loads(text)["images"] == 6 and len(list((tmp_path / "s").glob("0*.png"))) == 6
    with Image.open(tmp_path / "s" / "grid.png") as grid:
        assert (grid.width // 7 - 1) // 9 == 2 and (grid.height // 7 - 1) // 9 == 3


@pytest.mark.parametrize(
    "words, message",
    [
        ("sample RUNS/always -n 2 -o x", "this model was never trained without a label; give one, all or random. This"),
        ("sample RUNS/always --label none -o x", "label none is not possible: this model was never trained so. This"),
        ("sample RUNS/some --label dgo -o x", 'label dgo is not possible. Did you mean "dog"? This model knows 0 bird'),
        ("sample fashion-mnist --label 3 -o x", "label 3 is not possible: this model was trained without labels"),
        ("shared RUNS/always --label all -o x.png", "label all is not possible here, where all images come of one"),
        (
            "nll RUNS/always RUNS/pets --label all",
            "label all is not possible for images that are measured",
        ),
        (
            "nll RUNS/always RUNS/pets --label random",
            "label random is not possible for images that are measured",
        ),
        ("progressive RUNS/always -o x.png", "this model was never trained without a label; give one, all or random"),
        (
            "nll RUNS/always digits -n 2",
            'the data has classes that the model was not trained on: "1", "7". This',
        ),
    ],
)
def test_a_label_that_is_missing_or_unknown_is_one_line(call, runs, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*(str(runs / w[5:]) if w.startswith("RUNS/") else w for w in words.split()))
    assert code == 2 and message in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
