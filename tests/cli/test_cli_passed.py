"""What the commands say of files that they do not read, and where they will not write."""

import json

import pytest

from tests.cli.test_cli import SETTINGS, one_line
from tests.data.test_passed import PNG, animation, as_tar, encoded, fill

FILES = {f"{i}.JPG": encoded("JPEG", 60 * i) for i in range(3)} | {f"{i}.CR2": b"" for i in range(20)}
FILES |= {"a.gif": animation("GIF", 5)}
LINE = "20 files passed over: 20 .CR2 (raw: develop them to PNG)"
FRAMES = f"{LINE}; 4 frames passed over: 4 after the first of their file"
SMALL = [
    "--preset",
    "cifar10",
    "--size",
    8,
    "--set",
    "data.channels=1",
    *(word for setting in SETTINGS for word in ("--set", setting)),
]
COUNTS = {".CR2 (raw: develop them to PNG)": 20, "frames after the first of their file": 4}


@pytest.fixture
def photos(tmp_path):
    return fill(tmp_path / "photos", FILES)


def test_inspect_and_check(call, photos):
    code, out, _ = call("data", "inspect", photos)
    assert code == 0 and out.endswith(f"\n{FRAMES}\n")
    assert json.loads(call("data", "inspect", photos, "--json")[1])["passed_over"] == COUNTS
    assert call("data", "check", photos)[:2] == (0, f"{FRAMES}\nall good\n")
    assert json.loads(call("data", "check", photos, "--json")[1]) == {"bad": {}, "passed_over": COUNTS, "wrong": ""}


def test_train_and_its_data_json(call, photos, tmp_path):
    words = [*SMALL, "--steps", 2, "--out", tmp_path / "run"]
    code, _, err = call("train", photos, *words)
    assert code == 0, err
    assert f"\n{FRAMES}\n" in err
    assert json.loads((tmp_path / "run/data.json").read_text())["passed_over"] == COUNTS


def test_pack(call, photos, tmp_path):
    pack = ["data", "pack", photos, "--size", 4, "--channels", 1, "--out", tmp_path / "packed", "--json"]
    assert json.loads(call(*pack)[1])["passed_over"] == COUNTS
    assert json.loads(call("data", "check", tmp_path / "packed", "--json")[1])["passed_over"] == COUNTS


def test_output_inside_the_data_is_refused_before_anything_is_done(call, photos, tmp_path):
    before = sorted(photos.rglob("*"))
    (tmp_path / "link").symlink_to(photos)
    for data, words, option in [
        (photos, ["train", photos, "--out", photos / "run"], "--out"),
        (tmp_path / "link", ["train", tmp_path / "link", "--out", photos / "run"], "--out"),
        (photos, ["train", "digits", photos, "--out", photos], "--out"),
        (photos, ["data", "inspect", photos, "--sheet", photos / "sheet.png"], "--sheet"),
        (photos, ["data", "pack", photos, "--out", tmp_path / "link" / "packed"], "--out"),
    ]:
        code, _, err = call(*words)
        assert code == 2
        assert one_line(err).startswith(
            f"undiffuse: {option} {words[-1]} lies in the data, {data}, and would be read as data"
        )
    assert sorted(photos.rglob("*")) == before


def test_samples_in_the_data_are_never_read(call, photos, tmp_path):
    words = [*SMALL, "--steps", 2, "--out", tmp_path / "run"]
    assert call("train", photos, *words)[0] == 0
    count = len(json.loads(call("data", "inspect", photos, "--json")[1])["sizes"])
    sample = ["sample", tmp_path / "run", "-n", 2, "--steps", 2]
    assert call(*sample, "--out", photos / "s")[0] == 0
    found = json.loads(call("data", "inspect", photos, "--json")[1])
    assert len(found["sizes"]) == count
    assert found["passed_over"] == COUNTS | {"in s/ (written by undiffuse)": 3}
    named = json.loads(call("data", "inspect", photos / "s", "--json")[1])  # by the user
    assert named["images"] == 2 and named["bad"] == {}
    assert named["passed_over"] == {"pictures grid.png (all samples in one)": 1}
    code, _, err = call("train", tmp_path / "run", *SMALL, "--out", tmp_path / "again")
    assert code == 2 and f"{tmp_path / 'run'} is a run of undiffuse, and no data; give the pictures that it was" in err
    code, _, err = call(*sample, "--out", photos)
    assert code == 2 and "holds other pictures (0.JPG), which samples would mix with; give a new folder" in one_line(
        err
    )


def test_several_pictures_in_an_example(call, tmp_path):
    path = as_tar(tmp_path, {f"{i}.{kind}.png": PNG for i in range(4) for kind in ("input", "mask")})
    code, _, err = call("data", "check", path)
    assert code == 2 and (
        f"{path} has several pictures in each example: input, mask; choose one with --set data.picture=input, "
        "or --picture input for `undiffuse data`"
    ) in one_line(err)
    for words in (["data", "inspect", path], ["data", "check", path]):
        assert json.loads(call(*words, "--picture", "mask", "--json")[1])["passed_over"] == {
            "input (data.picture=mask)": 4
        }
    pack = ["data", "pack", path, "--picture", "input", "--out", tmp_path / "packed", "--json"]
    assert json.loads(call(*pack)[1])["images"] == 4
    words = [*SMALL, "--steps", 2]
    code, _, err = call("train", path, *words, "--set", "data.picture=mask", "--out", tmp_path / "run")
    assert code == 0 and "\n4 files passed over: 4 input (data.picture=mask)\n" in err
    assert 'picture = "mask"' in (tmp_path / "run/config.toml").read_text()


def test_classes_without_held_out_pictures_are_told(call, tmp_path):
    names = [
        *(f"train/{c}/{i}.png" for c in ("ant", "bee", "cow") for i in range(3)),
        "test/bee/1.png",
        "test/wolf/1.png",
    ]
    path = fill(tmp_path / "set", {name: PNG for name in names})
    words = [*SMALL, "--steps", 2, "--set", "train.held_out=8"]
    code, _, err = call("train", path, *words, "--set", "data.labels=true", "--out", tmp_path / "run")
    assert code == 0, err
    assert "\nheld out: 1 file passed over: 1 in wolf/ (no class of the training split)\n" in err
    assert "\nheld out: no pictures of ant, cow\n" in err
