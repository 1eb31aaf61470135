"""What a run keeps of its data, and what it says where the classes are no longer those of before."""

import json

import pytest
import torch

from tests.training.test_loop import recipe, run
from undiffuse.data.passed import Passed
from undiffuse.data.source import ArraySource
from undiffuse.errors import UsageError
from undiffuse.training import loop


def labelled(names, shift=0, passed=()):
    """Twelve pictures of as many classes in turn."""
    images = torch.arange(12 * 64, dtype=torch.int64).remainder(251 - shift).to(torch.uint8).reshape(12, 1, 8, 8)
    return ArraySource(images, torch.arange(12) % len(names), tuple(names), (), passed)


LABELS = recipe(data={"labels": True}, train={"held_out": 0})
PLAIN = recipe(train={"held_out": 0})
TWO = loop.Budget(steps=2)

# Classes before, classes now, the message without --accept-data and the one with it; None for the same message.
CHANGED = {
    "renamed": (
        ("cat", "dog"), ("cat", "wolf"),
        "the classes have changed since this run began (1 was dog and is wolf); give the same names, --accept-data to "
        "go on with these, or another --out",
        "these labels mean another class from here on: 1 was dog and is wolf",
    ),
    "renamed to another place": (
        ("ant", "bee", "cow"), ("bee", "cow", "zebra"),
        "the classes have changed since this run began (0 was ant and is bee, 1 was bee and is cow, 2 was cow and is "
        "zebra); give the same names, --accept-data to go on with these, or another --out",
        "these labels mean another class from here on: 0 was ant and is bee, 1 was bee and is cow, 2 was cow "
        "and is zebra",
    ),
    "another order": (
        ("cat", "dog"), ("dog", "cat"),
        "the classes are in another order than when this run began (0 was cat and is dog, 1 was dog and is cat), so "
        "each label would mean something else; give them in the order of before, or another --out",
        None,
    ),
    "added": (
        ("cat", "dog"), ("cat", "dog", "eel"),
        "the classes have changed since this run began (2 before, 3 now; new: eel), and its network has a row for each "
        "of those before; give the same classes, or another --out",
        None,
    ),
    "gone": (
        ("cat", "dog", "eel"), ("cat", "fox"),
        "the classes have changed since this run began (3 before, 2 now; new: fox; gone: dog, eel), and its network "
        "has a row for each of those before; give the same classes, or another --out",
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED)
def test_other_names_of_classes(tmp_path, capsys, case):
    before, now, refused, accepted = CHANGED[case]
    run(LABELS, labelled(before), tmp_path, budget=TWO)
    with pytest.raises(UsageError) as error:
        run(LABELS, labelled(now), tmp_path)
    assert str(error.value) == refused
    capsys.readouterr()
    if accepted is None:
        with pytest.raises(UsageError) as error:
            run(LABELS, labelled(now, shift=1), tmp_path, accept_data=True)
        assert str(error.value) == refused
    else:
        assert run(LABELS, labelled(now, shift=1), tmp_path, accept_data=True).meta["step"] == 6
        assert f"warning: {accepted}\n" in capsys.readouterr().err
        assert run(LABELS, labelled(now, shift=1), tmp_path).meta["step"] == 6  # they are the run's from then on


def test_names_mean_nothing_to_a_run_without_labels(tmp_path):
    run(PLAIN, labelled(("cat", "dog")), tmp_path, budget=TWO)
    assert run(PLAIN, labelled(("dog", "cat")), tmp_path).meta["step"] == 6


def test_what_is_kept_of_the_data(tmp_path):
    passed = (Passed(20, ".HEIC (install pillow-heif)"), Passed(3, "after the first of their file", "frame"))
    run(LABELS, labelled(("cat", "dog", "eel"), passed=passed), tmp_path, budget=TWO)
    kept = json.loads((tmp_path / "data.json").read_text())
    assert (kept["classes"], kept["images_of_class"]) == (["cat", "dog", "eel"], [4, 4, 4])
    assert kept["passed_over"] == {
        ".HEIC (install pillow-heif)": 20, "frames after the first of their file": 3,
    }  # fmt: skip


def test_a_run_from_before_names_were_kept_goes_on(tmp_path):
    run(LABELS, labelled(("cat", "dog")), tmp_path, budget=TWO)
    path = tmp_path / "data.json"
    old = {key: value for key, value in json.loads(path.read_text()).items() if "class" not in key}
    path.write_text(json.dumps(old))
    assert run(LABELS, labelled(("cat", "wolf")), tmp_path).meta["step"] == 6
