"""Sets whose values fill a small part of their range: what is refused, what is not, and the exact line."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.data import remark
from undiffuse.data.inspect import check, inspect
from undiffuse.data.picture import Reading
from undiffuse.data.source import ArraySource, open_raw, open_source
from undiffuse.errors import DataError

NIGHT = np.random.default_rng(0).gamma(1.0, 4.0, (3, 16, 16))  # levels: half of them below 3, the highest about 30


def put(folder, arrays, kind="png"):
    folder.mkdir(exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i}.{kind}")
    return folder


def ramp(low, high, dtype, n=5):
    values = np.linspace(low, high, 64).reshape(1, 8, 8).repeat(n, 0)
    return (values.round() if np.dtype(dtype).kind in "iu" else values).astype(dtype)


REFUSED = {  # arrays, least and most in the line, the range proposed, the range that says that it is meant
    "16 bits of 0 to 255": (ramp(0, 255, np.uint16), "black: uint16 values from 0 to 255", "[0,255]", "[0,65535]"),
    "12 bits": (ramp(0, 4095, np.uint16), "black: uint16 values from 0 to 4095", "[0,4095]", "[0,65535]"),
    "14 bits": (ramp(0, 16383, np.uint16), "black: uint16 values from 0 to 16383", "[0,16383]", "[0,65535]"),
    "10 bits": (ramp(3, 1000, np.uint16), "black: uint16 values from 3 to 1000", "[0,1023]", "[0,65535]"),
    "a mask": (ramp(0, 1, np.uint8), "black: uint8 values from 0 to 1", "[0,1]", "[0,255]"),
    "classes": (ramp(0, 15, np.uint8), "black: uint8 values from 0 to 15", "[0,15]", "[0,255]"),
    "nothing": (ramp(0, 0, np.uint8), "black: uint8 values from 0 to 0", "[0,1]", "[0,255]"),
    "white": (ramp(250, 255, np.uint8), "white: uint8 values from 250 to 255", "[250,255]", "[0,255]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_nearly_black_or_white_is_refused(tmp_path, case):
    arrays, what, proposed, whole = REFUSED[case]
    top = whole[3:-1]
    line = (
        f"all images are nearly {what}, where 0 is black and {top} white. Say what they are with "
        f"--set data.range={proposed}, or --set data.range={whole} if this is meant"
    )
    folder = put(tmp_path / "set", arrays)
    with pytest.raises(DataError, match=f"^{re.escape(line)}$"):
        remark.refuse(open_source(folder), str(folder), "train", Reading())
    assert inspect(open_raw(folder)).wrong == check(folder).wrong == line
    for text in (proposed, whole):
        reading = Reading(range=tuple(map(int, text[1:-1].split(","))))
        remark.refuse(open_source(folder, reading=reading), str(folder), "train", reading)
        assert inspect(open_raw(folder, "train", reading), reading).wrong == check(folder, reading=reading).wrong == ""


GOOD = {
    "a night": np.clip(NIGHT, 0, 255).round().astype(np.uint8),
    "one lamp": np.where(np.arange(320).reshape(5, 8, 8) == 77, 200, 0).astype(np.uint8),
    "a bright day": ramp(200, 255, np.uint8),
    "masks of 0 and 255": ramp(0, 1, np.uint8) * 255,
    "a dark photograph of 16 bits": ramp(200, 20000, np.uint16),
    "all 16 bits": ramp(0, 65535, np.uint16),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_dark_or_bright_is_not(tmp_path, case):
    folder = put(tmp_path / "set", GOOD[case])
    remark.refuse(open_source(folder), str(folder), "train", Reading())
    assert inspect(open_raw(folder)).wrong == check(folder).wrong == ""


def test_one_bright_picture_at_the_end_is_enough():
    images = torch.zeros(1000, 1, 4, 4, dtype=torch.uint8)
    assert remark.narrow(ArraySource(images)) is not None
    images[-1, 0, 3, 3] = 17
    assert remark.narrow(ArraySource(images)) is None


@pytest.mark.parametrize("channels", [2, 4])
def test_opacity_is_not_white(channels):
    images = torch.zeros(3, channels, 4, 4, dtype=torch.uint8)
    images[:, -1] = 255
    assert "nearly black" in str(remark.narrow(ArraySource(images)))
    images[:, -1, 0] = 90  # shapes in black, drawn by their opacity alone
    assert remark.narrow(ArraySource(images)) is None


INSPECTED = [  # array, least, most, mean, type, what is wrong
    (ramp(0, 1, np.float32), 0, 1, 0.5, "float32", "float32 values from 0 to 1; say what is black and what is white, "
                                                   "for example --set data.range=[0,1]"),
    (ramp(-1, 1, np.float64), -1, 1, 0, "float64", "float64 values from -1 to 1; say what is black and what is white, "
                                                   "for example --set data.range=[-1,1]"),
    (ramp(-2, 500, np.int32), -2, 500, 249, "int32", "int32 values from -2 to 500; say what is black and what is "
                                                     "white, for example --set data.range=[-2,500]"),
    (ramp(0, 255, np.uint8), 0, 255, 127.5, "uint8", ""),
]  # fmt: skip


@pytest.mark.parametrize("array, least, most, mean, kind, wrong", INSPECTED)
def test_values_are_shown_in_their_own_units(tmp_path, array, least, most, mean, kind, wrong):
    np.save(tmp_path / "a.npy", array)
    reading = Reading(guess=True)
    found = inspect(open_raw(tmp_path / "a.npy", "train", reading), reading)
    assert (found.values.least, found.values.most, found.values.kind, found.wrong) == (least, most, kind, wrong)
    assert found.values.mean == pytest.approx(mean, abs=0.02 * (most - least))


def test_values_of_pictures_in_their_own_units(tmp_path):
    folder = put(tmp_path / "set", [np.full((8, 8), v, np.uint16) for v in (100, 200, 4000)])
    found = inspect(open_raw(folder))
    assert found.values[:4] == (100, 4000, pytest.approx(4300 / 3), "uint16")
    assert found.made == (("read from more than 8 bits", 3, "100 to 100"),)
