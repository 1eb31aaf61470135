"""Channels, ranges, large pictures and what is made of them, from the command line to what is written."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.cli.test_cli import one_line
from tests.data.test_colour import rgb_profile

TINY = [
    "--preset", "digits", "--set", "process.steps=4", "--set", "network.channels=8", "--set",
    "network.multipliers=[1,1]", "--set", "network.attention=[]", "--set", "train.batch=4", "--set",
    "train.sample_every=0", "--steps", 1,
]  # fmt: skip


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def put(folder, arrays, kind="png", **options):
    folder.mkdir(parents=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i}.{kind}", **options)
    return folder


def data_of(kind, folder):
    """A set of 6 images and its number of channels."""
    channels = int(kind[-1])
    if kind.startswith("png"):
        return put(folder / "set", noise(6, 8, 8, channels)), channels
    folder.mkdir()
    array = noise(6, 8, 8, channels)
    np.save(folder / "set.npy", array if "nhwc" in kind else array.transpose(0, 3, 1, 2))
    return folder / "set.npy", channels


def opened(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("kind", ["nhwc-2", "nchw-4", "nhwc-6", "png-2", "png-4"])
def test_any_number_of_channels_from_end_to_end(call, tmp_path, kind):
    data, channels = data_of(kind, tmp_path / "data")
    out = tmp_path / "run"
    if not kind.startswith("png"):
        code, _, err = call("train", data, *TINY, "-o", out)
        assert code == 2 and one_line(err) == (
            f"undiffuse: {channels} channels cannot be turned into 1, only grey and RGB into each other; "
            f"keep them with --set data.channels={channels}"
        )
    every = int(channels == 6)  # previews, once
    code, _, err = call("train", data, *TINY, "--set", f"data.channels={channels}", "-o", out,
                        "--set", f"train.sample_every={every}")  # fmt: skip
    assert code == 0 and f"6 images of {channels}×8×8" in err, err
    assert len(list((out / "samples").glob("*.png"))) == 2 * every
    code, text, err = call("sample", out, "-n", 3, "--steps", 2, "-o", tmp_path / "s", "--npz", tmp_path / "s.npz")
    array = np.load(tmp_path / "s.npz")["arr_0"]
    assert code == 0 and array.shape == (3, 8, 8, channels), err
    for i in range(3):
        found = opened(tmp_path / "s" / f"000{i}.png")
        assert np.array_equal(found, np.concatenate(list(array[i].transpose(2, 0, 1)), 1) if channels > 4 else array[i])
    said = {2: "the second channel is written as opacity", 4: "the fourth channel is written as opacity",
            6: "6 channels side by side in each PNG, in grey, the first at the left"}  # fmt: skip
    assert said[channels] in text
    code, text, err = call("nll", out, data, "--split", "train", "--draws", 1, "--json")
    assert code == 0 and json.loads(text)["images"] == 6, err
    code, _, err = call("neighbours", out, data, "--steps", 2, "-n", 2, "-k", 1, "-o", tmp_path / "n.png")
    assert code == 0 and (tmp_path / "n.png").exists(), err


@pytest.mark.parametrize("kind", ["nchw-2", "nhwc-5"])
def test_auto_takes_any_number_of_channels(call, tmp_path, kind):
    data, channels = data_of(kind, tmp_path / "data")
    code, _, err = call("train", data, "-o", tmp_path / "run", "--steps", 1, "--set", "train.sample_every=0",
                        "--set", "network.channels=8", "--set", "network.attention=[]")  # fmt: skip
    assert code == 0 and f"auto: images of 8×8, {channels} channels, because" in err, err


def test_transparent_samples_read_back(call, tmp_path):
    """A folder of samples is data again, and none of their values is lost."""
    folder = put(tmp_path / "set", noise(6, 8, 8, 4))
    code, _, err = call("train", folder, *TINY, "--set", "data.channels=4", "-o", tmp_path / "run")
    assert code == 0 and "become" not in err, err
    code, text, _ = call("data", "inspect", folder, "--set", "data.channels=4", "--json")
    assert code == 0 and json.loads(text)["channels"] == {"4": 6}
    flat = call("data", "inspect", folder, "--json")[1]
    assert json.loads(flat)["made"] == {"with transparency laid on white": 6}


RANGED = {  # what is stored, the line that refuses it, the range to give
    "float32": (np.linspace(0, 1, 384, dtype=np.float32), "float32 values from 0 to 1; say what is black and what is "
                "white, for example --set 'data.range=[0,1]'"),
    "float16": (np.linspace(-1, 1, 384, dtype=np.float16), "float16 values from -1 to 1; say what is black and what is "
                "white, for example --set 'data.range=[-1,1]'"),
    "int64": (np.linspace(0, 255, 384).round().astype(np.int64), "int64 values from 0 to 255; say what is black and "
              "what is white, for example --set 'data.range=[0,255]'"),
}  # fmt: skip


@pytest.mark.parametrize("case", RANGED)
def test_arrays_of_other_values_need_a_range(call, tmp_path, case):
    values, line = RANGED[case]
    path, given = tmp_path / "a.npy", ["--set", re.search(r"data.range=[^']*", line)[0]]
    np.save(path, values.reshape(6, 8, 8))
    code, text, err = call("data", "inspect", path)
    assert code == 0 and f"wrong  {line}" in text and f"{line.partition(';')[0]}, mean" in text, err
    pack = ["data", "pack", path, "-o", tmp_path / "packed", "--workers", 1]
    train = ["train", path, *TINY, "-o", tmp_path / "run"]
    for command in (["data", "check", path], pack, train):
        code, _, err = call(*command)
        assert code == 2 and one_line(err) == f"undiffuse: {path}: {line}"
        code, text, err = call(*command, *given)
        assert code == 0, err
    measure = [tmp_path / "run", path, "--split", "train", "--draws", 1, "--json"]
    code, _, err = call("nll", *measure)  # as the model was trained
    assert code == 0, err
    bytes_ = tmp_path / "b.npy"
    np.save(bytes_, noise(6, 8, 8))
    code, _, err = call("nll", tmp_path / "run", bytes_, "--split", "train", "--draws", 1)
    if case != "int64":
        assert code == 2 and "images have values outside of" in one_line(err)
        assert "with --set 'data.range=[0,255]'" in err
    assert (
        call("nll", tmp_path / "run", bytes_, "--split", "train", "--draws", 1, "--set", "data.range=[0,255]")[0] == 0
    )
    code, _, err = call("nll", *measure, "--set", "data.size=4")
    assert code == 2 and "--set data.size=4 is not possible here; give one of data.axes, data.background," in err


def test_a_set_that_is_nearly_black_is_refused_until_told(call, tmp_path):
    folder = put(tmp_path / "set", (noise(6, 8, 8) % 2).astype(np.uint8))
    line = (
        "all images are nearly black: uint8 values from 0 to 1, where 0 is black and 255 white. Say what they are with "
        "--set 'data.range=[0,1]', or --set 'data.range=[0,255]' if this is meant"
    )
    train = ["train", folder, *TINY, "-o", tmp_path / "run"]
    code, _, err = call(*train)
    assert code == 2 and one_line(err) == f"undiffuse: {line}" and not (tmp_path / "run").exists()
    assert f"wrong  {line}" in call("data", "inspect", folder)[1]
    assert call("data", "check", folder)[:2] == (2, f"{line}\n")
    code, text, _ = call("data", "pack", folder, "-o", tmp_path / "packed", "--workers", 1)
    assert code == 0 and re.search(f"wrong +{re.escape(line)}\n", text)
    assert call(*train, "--set", "data.range=[0,255]")[0] == 0
    code, _, err = call("nll", "fashion-mnist", folder, "--split", "train", "--draws", 1)
    assert code == 2 and one_line(err) == f"undiffuse: {line}"


def test_a_part_that_is_nearly_black_is_told(call, tmp_path):
    folder = put(tmp_path / "set", [*(noise(9, 8, 8) % 2), noise(8, 8)])
    line = (
        "9 of 10 images are nearly black (uint8 values from 0 to 1, for one). Leave them out, or bring them to the "
        "range of the others, unless this is meant"
    )
    (folder / "bad.png").write_bytes(b"text")
    measure = ["fashion-mnist", folder, "--split", "train", "--draws", 1, "--skip-bad"]
    commands = [["train", folder, *TINY, "--skip-bad", "-o", tmp_path / "run"], ["nll", *measure]]
    for command in commands:
        code, _, err = call(*command)
        assert code == 0 and err.count(f"warning: {line}\n") == 1, err
        assert "1 left out: bad.png (not a picture in a known format)\n" in err
    assert f"wrong  {line}\n" in call("data", "inspect", folder)[1]
    code, text, _ = call("data", "check", folder)
    assert code == 2 and text.splitlines()[-1] == f"1 bad; {line}"
    (folder / "bad.png").unlink()
    assert call("data", "check", folder)[:2] == (0, f"{line}\n")
    assert json.loads(call("data", "check", folder, "--json")[1])["wrong"] == line


def test_the_range_of_a_model_is_no_leave_for_other_data(call, tmp_path):
    run, masks = tmp_path / "run", put(tmp_path / "masks", noise(6, 8, 8) % 2)
    data = put(tmp_path / "set", noise(6, 8, 8))
    assert call("train", data, *TINY, "--set", "data.range=[0,255]", "-o", run)[0] == 0
    measure = ["nll", run, masks, "--split", "train", "--draws", 1]
    code, _, err = call(*measure)
    assert code == 2 and one_line(err) == (
        "undiffuse: all images are nearly black: uint8 values from 0 to 1, where 0 is black and 255 white. Say what "
        "they are with --set 'data.range=[0,1]', or --set 'data.range=[0,255]' if this is meant"
    )
    for span in ("[0,1]", "[0,255]"):
        assert call(*measure, "--set", f"data.range={span}")[0] == 0


def test_a_large_jpeg_is_read_smaller_and_others_name_the_setting(call, tmp_path):
    """12,000 × 9,000 in one level, which takes no room and still meets both Pillow's limit and ours."""
    (tmp_path / "set").mkdir()
    Image.new("L", (12000, 9000), 77).save(tmp_path / "set/a.jpg")
    Image.new("L", (64, 48), 200).save(tmp_path / "set/b.jpg")
    code, _, err = call("train", tmp_path / "set", *TINY, "--size", 16, "-o", tmp_path / "run")
    assert code == 0 and "Warning" not in err, err
    assert "2 images become 16×16 grey: 1 decoded at a lower resolution (12000×9000), 2 cropped (" in err
    code, text, err = call("data", "check", tmp_path / "set")
    assert (code, text) == (0, "all good\n") and "Warning" not in err
    Image.new("L", (12000, 9000), 77).save(tmp_path / "set/c.png")
    code, _, err = call("train", tmp_path / "set", *TINY, "--size", 16, "-o", tmp_path / "other")
    assert code == 2 and "Warning" not in err
    assert "c.png (12000x9000 is more than 67108864 pixels; allow it with --set data.max_pixels=108000000)" in err
    limit = ["--set", "data.max_pixels=108000000"]
    assert call("data", "check", tmp_path / "set", *limit)[0] == 0


def test_what_is_made_of_other_data_is_said(call, tmp_path):
    folder = put(tmp_path / "set", noise(3, 48, 64, 3))
    code, _, err = call("nll", "fashion-mnist", folder, "--split", "train", "--draws", 1)
    made = "3 images become 28×28 grey: 3 made grey, 3 cropped (64×48, for one), 3 reduced (64×48, for one)"
    assert code == 0 and made in err.splitlines()
    code, _, err = call("neighbours", "fashion-mnist", folder, "--steps", 1, "-n", 1, "-k", 1, "-o", tmp_path / "n.png")
    assert code == 0 and made in err.splitlines()
    point = put(tmp_path / "point", [np.full((1, 1, 3), 90, np.uint8)], "png", icc_profile=rgb_profile("Display P3"))
    mixed = ["interpolate", "fashion-mnist", folder / "0.png", point / "0.png", "--steps", 1, "-o", tmp_path / "i.png"]
    code, _, err = call(*mixed)
    assert (
        code == 0
        and (
            "2 images become 28×28 grey: 2 made grey, 1 cropped (64×48), 1 reduced (64×48), "
            "1 converted to sRGB (Display P3), 1 enlarged (1×1)"
        )
        in err.splitlines()
    )


def test_what_is_made_of_the_data_is_said_by_train(call, tmp_path):
    folder = put(tmp_path / "set", noise(3, 8, 8, 4))
    Image.fromarray(noise(1, 1, 3)).save(folder / "z.png")
    code, _, err = call("train", folder, *TINY, "--size", 16, "-o", tmp_path / "run")
    assert (
        code == 0
        and ("4 images become 16×16 grey: 3 with transparency laid on white, 4 made grey, 4 enlarged (8×8, for one)")
        in err.splitlines()
    )


def test_a_size_that_is_proposed_works(call, tmp_path):
    folder = put(tmp_path / "set", [noise(75, 100, 3), noise(64, 48, 3), noise(33, 33, 3)])
    code, _, err = call("train", folder, *TINY, "-o", tmp_path / "run")
    side = re.search(r"for example --size (\d+)$", one_line(err))
    assert code == 2 and side is not None
    code, _, err = call("train", folder, *TINY, "--size", side[1], "-o", tmp_path / "run")
    assert code == 0, err


def test_axes_are_asked_for_and_given(call, tmp_path):
    np.save(tmp_path / "a.npy", noise(5, 8, 8, 8))
    train = ["train", tmp_path / "a.npy", *TINY, "--set", "data.channels=8", "-o", tmp_path / "run"]
    code, _, err = call(*train)
    assert code == 2 and one_line(err).endswith("say which, --set data.axes=nhwc or --set data.axes=nchw")
    assert call(*train, "--set", "data.axes=nhwc")[0] == 0
    assert 'axes = "nhwc"' in (tmp_path / "run/config.toml").read_text()


def test_packed_data_keeps_its_range(call, tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((6, 8, 8)))
    out = tmp_path / "packed"
    assert call("data", "pack", tmp_path / "a.npy", "-o", out, "--set", "data.range=[0,1]", "--workers", 1)[0] == 0
    train = ["train", out, *TINY, "-o", tmp_path / "run"]
    code, _, err = call(*train, "--set", "data.range=[0,2]")
    assert code == 2 and one_line(err) == (
        f"undiffuse: {out} was packed with data.range=[0.0,1.0]; pack the data again with [0.0,2.0]"
    ).replace(".0", "")
    assert call(*train, "--set", "data.range=[0,1]")[0] == 0
    assert call(*train)[0] == 2  # of a run with other settings
