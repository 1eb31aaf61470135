"""Grids pixel by pixel, and plots read back as XML: a point must stand where its value says."""

import io
import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.errors import UsageError
from undiffuse.figure import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, grid, line_plot, picture, png, show

SVG = "{http://www.w3.org/2000/svg}"


def numbered(n: int, c: int = 1, h: int = 2, w: int = 3) -> torch.Tensor:
    return torch.arange(n * c * h * w, dtype=torch.uint8).reshape(n, c, h, w)


def test_a_grid_puts_each_image_in_its_place_on_white():
    images = numbered(5)
    sheet = np.asarray(grid(images, columns=3))
    assert sheet.shape == (2 * 3 + 1, 3 * 4 + 1)
    for i in range(5):
        top, left = i // 3 * 3 + 1, i % 3 * 4 + 1
        assert (sheet[top : top + 2, left : left + 3] == images[i, 0].numpy()).all()
    inside = sum(int(image.sum()) for image in images)
    assert int(sheet.sum()) == inside + 255 * (sheet.size - images.numel())


def test_a_grid_is_as_near_to_square_as_can_be_and_enlarges_without_blur():
    assert grid(numbered(10)).size == (4 * 4 + 1, 3 * 3 + 1)
    small, large = np.asarray(grid(numbered(4))), np.asarray(grid(numbered(4), scale=3))
    assert (large == small.repeat(3, 0).repeat(3, 1)).all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_channels_become_colours(channels, mode):
    image = numbered(1, channels)[0]
    drawn = picture(image)
    assert (drawn.mode, drawn.size) == (mode, (3, 2))
    assert (np.asarray(Image.open(io.BytesIO(png(drawn)))).reshape(2, 3, -1).transpose(2, 0, 1) == image.numpy()).all()


@pytest.mark.parametrize("channels", [5, 6, 9])
def test_more_channels_stand_side_by_side(channels):
    images = numbered(4, channels)
    drawn = picture(images[0])
    assert (drawn.mode, drawn.size) == ("L", (3 * channels, 2))
    assert (np.asarray(drawn) == np.concatenate(list(images[0].numpy()), axis=1)).all()
    sheet = np.asarray(grid(images))
    assert sheet.shape == (2 * 3 + 1, 2 * (3 * channels + 1) + 1)
    assert (sheet[1:3, 1 : 1 + 3 * channels] == np.asarray(drawn)).all()
    assert (sheet[4:6, 2 + 3 * channels : -1] == np.concatenate(list(images[3].numpy()), axis=1)).all()


def test_png_bytes_read_back():
    sheet = grid(numbered(4, 3))
    assert (np.asarray(Image.open(io.BytesIO(png(sheet)))) == np.asarray(sheet)).all()


def lines(svg: str) -> list[np.ndarray]:
    return [
        np.array([[float(v) for v in point.split(",")] for point in line.attrib["points"].split()])
        for line in ElementTree.fromstring(svg).iter(f"{SVG}polyline")
    ]


def texts(svg: str) -> list[str]:
    return [str(element.text) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_points_stand_where_their_values_say():
    svg = line_plot([("a", [0, 5, 10], [0.0, 1.0, 0.5])], "x", "y", "A plot")
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    expected = [[LEFT, bottom], [(LEFT + right) / 2, TOP], [right, (TOP + bottom) / 2]]
    np.testing.assert_allclose(lines(svg)[0], expected, atol=0.051)
    assert {"0", "2", "4", "6", "8", "10", "0.2", "1", "x", "y", "A plot", "a"} <= set(texts(svg))


def test_a_logarithmic_axis_spaces_decades_evenly():
    svg = line_plot([("", [1, 2, 3, 4, 5], [1e-3, 1e-2, 1e-1, 1, 10])], "x", "y", "t", log_y=True)
    np.testing.assert_allclose(np.diff(lines(svg)[0][:, 1]), (TOP - HEIGHT + BOTTOM) / 4, atol=0.11)
    assert {"0.001", "0.01", "0.1", "1", "10"} <= set(texts(svg))


def test_a_wide_logarithmic_axis_is_not_crowded_and_a_narrow_one_not_bare():
    def ticks(low: float, high: float) -> list[float]:
        svg = line_plot([("", [1, 2], [low, high])], "x", "y", "t", log_y=True)
        marks = ElementTree.fromstring(svg).iterfind(f"{SVG}text[@text-anchor='end']")
        return [float(str(mark.text)) for mark in marks]

    assert ticks(1e-12, 1e12) == [10.0**i for i in range(-12, 13, 3)]
    assert ticks(0.15, 0.9) == [0.2, 0.5]
    assert ticks(0.21, 0.23) == [0.1, 1.0]


def test_what_cannot_be_drawn_is_left_out():
    ys = [1.0, float("nan"), float("inf"), 0.0, 2.0]
    assert len(lines(line_plot([("", range(5), ys)], "x", "y", "t", log_y=True))[0]) == 2
    assert len(lines(line_plot([("", range(5), ys)], "x", "y", "t"))[0]) == 3
    with pytest.raises(UsageError, match='plot "loss" has no point that can be drawn; give finite numbers'):
        line_plot([("", [1.0], [float("nan")])], "x", "y", "loss")


@pytest.mark.parametrize("log", [False, True])
def test_one_value_alone_still_makes_an_axis(log):
    (point,) = lines(line_plot([("", [3.0], [7.0])], "x", "y", "t", log_x=log, log_y=log))
    assert LEFT < point[0, 0] < WIDTH - RIGHT and TOP < point[0, 1] < HEIGHT - BOTTOM


def test_several_lines_have_colours_and_a_legend_and_text_is_escaped():
    svg = line_plot([("train", [0, 1], [0, 1]), ("a < b", [0, 1], [1, 0])], "x & y", "y", '"t"')
    root = ElementTree.fromstring(svg)
    strokes = [line.attrib["stroke"] for line in root.iter(f"{SVG}polyline")]
    assert len(set(strokes)) == 2
    assert {"train", "a < b", "x & y", '"t"'} <= set(texts(svg))
    assert root.attrib["aria-label"] == '"t"'


@pytest.mark.parametrize("count", [1, 5, 6, 9])
def test_names_of_many_lines_stay_on_the_page(count):
    names = [f"dpmpp-{i}, quadratic" for i in range(count)]
    title = "Realism over rate"
    root = ElementTree.fromstring(line_plot([(name, [0, 1], [0, 1]) for name in names], "x", "y", title))
    spans = [(18.0, float(LEFT), LEFT + 9.0 * len(title))]
    for text in root.iter(f"{SVG}text"):
        if text.text in names:
            end, y = float(text.attrib["x"]), float(text.attrib["y"])
            spans.append((y, end - 7.5 * len(text.text), end))
    assert len(spans) == count + 1 and min(start for _, start, _ in spans) > 0
    lowest = max(y for y, _, _ in spans)
    assert all(line[:, 1].min() >= lowest + 10 for line in lines(ElementTree.tostring(root, "unicode")))
    for one, other in itertools.combinations(sorted(spans), 2):
        assert one[0] != other[0] or one[2] < other[1]


def test_a_notebook_shows_a_grid():
    shown = show(torch.full((4, 1, 28, 28), 7, dtype=torch.uint8))
    assert shown.size == (2 * (2 * 29 + 1),) * 2 and shown.getpixel((3, 3)) == 7
    assert shown._repr_png_().startswith(b"\x89PNG")
    assert show(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), columns=3, scale=1).size == (28, 10)
