"""Sets whose values fill a small part of their range: what is refused, what is not, and the exact line."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.data.test_picture import deep_colour
from undiffuse.data import remark
from undiffuse.data.format.arrays import array_source
from undiffuse.data.format.several import join
from undiffuse.data.inspect import check, inspect
from undiffuse.data.pack import pack
from undiffuse.data.picture import PLAIN, Reading
from undiffuse.data.source import open_raw, open_source
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
        f"--set 'data.range={proposed}', or --set 'data.range={whole}' if this is meant"
    )
    folder = put(tmp_path / "set", arrays)
    with pytest.raises(DataError, match=f"^{re.escape(line)}$"):
        remark.refuse(open_source(folder), str(folder), "train", Reading(), is_meant=False)
    assert inspect(open_raw(folder)).wrong == check(folder).wrong == line
    for text in (proposed, whole):
        reading = Reading(range=tuple(map(int, text[1:-1].split(","))))
        remark.refuse(open_source(folder, reading=reading), str(folder), "train", reading, is_meant=True)
        assert inspect(open_raw(folder, "train", reading), reading).wrong == check(folder, reading=reading).wrong == ""


GOOD = {
    "a night": np.clip(NIGHT, 0, 255).round().astype(np.uint8),
    "one lamp": np.where(np.arange(320).reshape(5, 8, 8) % 64 == 13, 200, 0).astype(np.uint8),
    "a bright day": ramp(200, 255, np.uint8),
    "masks of 0 and 255": ramp(0, 1, np.uint8) * 255,
    "a dark photograph of 16 bits": ramp(200, 20000, np.uint16),
    "all 16 bits": ramp(0, 65535, np.uint16),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_dark_or_bright_is_not(tmp_path, case):
    folder = put(tmp_path / "set", GOOD[case])
    remark.refuse(open_source(folder), str(folder), "train", Reading(), is_meant=False)
    assert inspect(open_raw(folder)).wrong == check(folder).wrong == ""


def line_of(folder, reading=PLAIN):
    """What inspect and check say and train does: one function decides for all of them."""
    found = check(folder, reading=reading)
    raw = open_raw(folder, "train", reading)
    assert found.wrong == inspect(raw, reading).wrong
    judged = remark.of(open_source(folder, reading=reading), str(folder), "train", reading)
    assert (judged.line if judged else "", bool(judged and judged.refused)) == (found.wrong, found.refused)
    return found.wrong, found.refused


LOOK = "Leave them out, or bring them to the range of the others, unless this is meant"
DARK, BRIGHT, NORMAL = ramp(0, 1, np.uint8), ramp(250, 255, np.uint8), ramp(0, 255, np.uint8)
DEEP = ramp(0, 255, np.uint16)
PARTS = {  # images, the line
    "9 masks beside a picture": ([*DARK, *DARK[:4], NORMAL[0]],
                                 "9 of 10 images are nearly black (uint8 values from 0 to 1, for one)"),
    "16 bits of 0 to 255 beside others": ([*DEEP[:4], *NORMAL[:4]],
                                          "4 of 8 images are nearly black (uint16 values from 0 to 255, for one)"),
    "both ends": ([*DARK[:2], *BRIGHT[:3], *NORMAL],
                  "2 of 10 images are nearly black (uint8 values from 0 to 1, for one), and "
                  "3 of 10 images are nearly white (uint8 values from 250 to 255, for one)"),
    "a tenth": ([*DARK[:2], *NORMAL, *NORMAL, *NORMAL, *NORMAL[:3]],
                "2 of 20 images are nearly black (uint8 values from 0 to 1, for one)"),
    "less than a tenth": ([*DARK[:2], *NORMAL, *NORMAL, *NORMAL, *NORMAL[:4]], ""),
    "one": ([DARK[0], *NORMAL], ""),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_part_of_a_set_is_counted(tmp_path, case, packed):
    arrays, said = PARTS[case]
    folder = put(tmp_path / "set", arrays)
    if packed:
        folder = pack(folder, tmp_path / "packed").path
    assert line_of(folder) == (f"{said}. {LOOK}" if said else "", False)


def test_images_of_an_array_are_counted(tmp_path):
    np.save(tmp_path / "a.npy", np.concatenate([DARK, NORMAL]))
    said = f"5 of 10 images are nearly black (uint8 values from 0 to 1, for one). {LOOK}"
    assert line_of(tmp_path / "a.npy") == (said, False)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ["folder", "npy"])
def test_each_of_several_sets_is_judged_by_itself(tmp_path, first, kind):
    good, bad = put(tmp_path / "good", [*NORMAL, *NORMAL, *NORMAL, *NORMAL]), put(tmp_path / "bad", DARK[:1])
    if kind == "npy":
        bad = tmp_path / "bad.npy"
        np.save(bad, DARK[:1])
    spec = join([str(bad), str(good)] if first else [str(good), str(bad)])
    line = (
        f"all images of {bad} are nearly black: uint8 values from 0 to 1, where 0 is black and 255 white. Leave them "
        "out, or convert them, or --set 'data.range=[0,255]' if this is meant"
    )
    assert line_of(spec) == (line, True)


def test_one_bright_picture_at_the_end_is_enough():
    """For a set not to be refused."""
    for last, refused in ((16, True), (17, False)):
        images = np.zeros((1000, 1, 4, 4), np.uint8)
        images[-1, 0, 3, 3] = last
        source = array_source(images, None, "a")
        assert remark.judge(source, source.made, 1000, Reading()).refused is refused


@pytest.mark.parametrize("channels", [2, 4])
def test_opacity_is_not_white(channels):
    images = np.zeros((3, channels, 4, 4), np.uint8)
    images[:, -1] = 255
    axes = Reading(axes="nchw")
    assert array_source(images, None, "a", reading=axes).made == (("nearly black", 3, "uint8 values from 0 to 0"),)
    images[:, -1, 0] = 90  # shapes in black, drawn by their opacity alone
    assert array_source(images, None, "a", reading=axes).made == ()


def drawn(values, opacity):
    return np.stack([values, opacity], -1)


CLEAR, ROUND = np.zeros((8, 8), np.uint8), np.tri(8, dtype=np.uint8) * 255
BLACK_ONES, WHITE_ONES = np.zeros((8, 8), np.uint8), np.full((8, 8), 255, np.uint8)
UNSEEN = (
    "all images are transparent, or of the colour of the background, so that nothing of them is seen. Give another "
    "with --set data.background=black, keep the transparency with --set data.channels=4, or say "
    "--set 'data.range=[0,255]' if this is meant"
)


@pytest.mark.parametrize("values, opacity, background, line", [
    (NORMAL[0], CLEAR, "white", UNSEEN), (NORMAL[0], CLEAR, "red", UNSEEN), (WHITE_ONES, ROUND, "white", UNSEEN),
    (BLACK_ONES, ROUND, "black", UNSEEN), (BLACK_ONES, ROUND, "white", ""), (WHITE_ONES, ROUND, "black", ""),
    (NORMAL[0], ROUND, "white", ""),
])  # fmt: skip
def test_what_is_laid_on_a_background_must_be_seen(tmp_path, values, opacity, background, line):
    (tmp_path / "set").mkdir()
    for i in range(2):
        Image.fromarray(drawn(values, opacity), "LA").save(tmp_path / f"set/{i}.png")
    assert line_of(tmp_path / "set", Reading(background)) == (line, bool(line))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_dark_colours_of_16_bits_are_refused_at_once(tmp_path, channels):
    (tmp_path / "set").mkdir()
    values = np.random.default_rng(0).integers(0, 256, (8, 8, channels))
    values[0, 0, :2], values[0, 1, :2] = 0, 255
    if channels != 3:
        values[..., -1] = np.tri(8) * 65535
    for i in range(2):
        (tmp_path / f"set/{i}.png").write_bytes(deep_colour(values))
    line, refused = line_of(tmp_path / "set")
    assert refused and line.startswith("all images are nearly black: uint16 values from 0 to 255, where 0 is black and")
    assert line.endswith("with --set 'data.range=[0,255]', or --set 'data.range=[0,65535]' if this is meant")
    open_source(tmp_path / "set", reading=Reading(range=(0, 255)))


INSPECTED = [  # array, least, most, mean, type, what is wrong
    (ramp(0, 1, np.float32), 0, 1, 0.5, "float32", "float32 values from 0 to 1; say what is black and what is white, "
                                                   "for example --set 'data.range=[0,1]'"),
    (ramp(-1, 1, np.float64), -1, 1, 0, "float64", "float64 values from -1 to 1; say what is black and what is white, "
                                                   "for example --set 'data.range=[-1,1]'"),
    (ramp(-2, 500, np.int32), -2, 500, 249, "int32", "int32 values from -2 to 500; say what is black and what is "
                                                     "white, for example --set 'data.range=[-2,500]'"),
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


def test_what_is_left_out_is_named_with_the_reason(tmp_path):
    folder = put(tmp_path / "set", NORMAL)
    assert remark.left_out(open_source(folder)) == ""
    for name in "abcd":
        (folder / f"{name}.png").write_bytes(b"text")
    why = "not a picture in a known format"
    line = f"4 left out: a.png ({why}), b.png ({why}), c.png ({why}) and 1 more"
    assert remark.left_out(open_source(folder, skip_bad=True)) == line
    assert remark.left_out(pack(folder, tmp_path / "packed", skip_bad=True)) == line
    assert remark.left_out(open_source(tmp_path / "packed")) == line
    other = put(tmp_path / "other", ramp(0, 255, np.uint8))
    assert remark.left_out(open_source(join([str(tmp_path / "packed"), str(other)]))) == line
