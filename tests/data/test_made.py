"""The line about what was made of the images, and the counts behind it."""

import pytest

from undiffuse.data.made import count, line, summed, tally

NOTES = [("cropped", "4×2"), ("made grey", ""), ("cropped", "9×3")]


def test_equal_deeds_are_counted_with_the_first_of_them():
    assert tally(NOTES) == (("cropped", 2, "4×2"), ("made grey", 1, ""))
    both = summed(tally(NOTES), (), tally(NOTES[1:]))
    assert both == (("cropped", 3, "4×2"), ("made grey", 2, ""))
    assert (count(both, "cropped"), count(both, "enlarged")) == (3, 0)


@pytest.mark.parametrize("notes, total, shape, expected", [
    (NOTES, 1200, (1, 28, 30), "1,200 images become 30×28 grey: 2 cropped (4×2, for one), 1 made grey"),
    (NOTES[:1], 1, (3, 8, 8), "1 image becomes 8×8 RGB: 1 cropped (4×2)"),
    (NOTES[:1], 2, (4, 8, 8), "2 images become 8×8 with 4 channels: 1 cropped (4×2)"),
    ([], 5, (3, 8, 8), ""),
])  # fmt: skip
def test_the_line(notes, total, shape, expected):
    assert line(tally(notes), total, shape) == expected
