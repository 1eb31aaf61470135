"""What is trained on and what is held out: decided by the pixels of each image, and each with its own label."""

import hashlib

import pytest
import torch

from undiffuse.data.source import ArraySource
from undiffuse.data.subset import Subset, divide
from undiffuse.errors import DataError

IMAGES = torch.arange(200 * 6).reshape(200, 1, 2, 3).to(torch.uint8)
WHOLE = ArraySource(IMAGES, torch.arange(200) % 7, tuple("abcdefg"), ("bad.png",))


def places(source) -> list[float]:
    """48 bits of the blake2b of each image's bytes, as a part of 1."""
    pixels = [source[i].image.numpy().tobytes() for i in range(len(source))]
    return [int(hashlib.blake2b(each, digest_size=6).hexdigest(), 16) / 16**12 for each in pixels]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_pixels_decide_and_nothing_is_in_both_or_in_neither(share):
    rest, held = divide(WHOLE, share)
    assert held.index.tolist() == [i for i, place in enumerate(places(WHOLE)) if place < share]
    assert rest.index.tolist() == [i for i, place in enumerate(places(WHOLE)) if place >= share]
    assert len(held) == pytest.approx(200 * share, abs=4 * (200 * share * (1 - share)) ** 0.5)


def test_more_images_do_not_move_those_before():
    before, after = (set(divide(source, 0.2)[1].index.tolist()) for source in (WHOLE.subset(slice(120)), WHOLE))
    assert before == {i for i in after if i < 120}


def test_copies_of_an_image_are_in_one_part_and_equal_images_are_divided_all_the_same():
    twice = ArraySource(torch.cat([IMAGES[:100], IMAGES[:100]]))
    rest, held = (set((part.index % 100).tolist()) for part in divide(twice, 0.3))
    assert not rest & held and rest | held == set(range(100))
    same = divide(ArraySource(torch.zeros(3, 1, 2, 2, dtype=torch.uint8)), 0.5)
    assert min(map(len, same)) >= 1 and sum(map(len, same)) == 3


@pytest.mark.parametrize("share, count", [(0.0, 1), (1e-9, 1), (1.0, 199)])
def test_there_is_one_image_at_least_on_either_side(share, count):
    rest, held = divide(WHOLE, share)
    assert (len(held), len(rest)) == (count, 200 - count)
    chosen = held if count == 1 else rest
    order = sorted(range(200), key=places(WHOLE).__getitem__)
    assert chosen.index.tolist() == [order[0] if count == 1 else order[-1]]
    with pytest.raises(DataError, match="^1 image cannot be divided into .*; give 2 or more$"):
        divide(WHOLE.subset(slice(1)), 0.5)


def test_an_image_keeps_its_pixels_its_label_and_its_name():
    part = Subset(WHOLE, torch.tensor([150, 3, 77]))
    assert len(part) == 3 and part.image_shape == (1, 2, 3)
    assert (part.classes, part.skipped) == (tuple("abcdefg"), ("bad.png",))
    for place, number in enumerate((150, 3, 77)):
        assert torch.equal(part[place].image, IMAGES[number]) and part[place].label == number % 7
        assert part.name(place) == f"image {number}"
    images, labels = part.gather(torch.tensor([2, 0]))
    assert torch.equal(images, IMAGES[[77, 150]]) and labels.tolist() == [0, 3]
    assert part.every_label().tolist() == [3, 3, 0]


def test_another_choice_or_another_whole_is_other_data():
    other = ArraySource(255 - IMAGES, WHOLE.labels, WHOLE.classes)
    parts = [(WHOLE, [1, 2]), (WHOLE, [2, 1]), (WHOLE, [1]), (WHOLE, [1, 3]), (other, [1, 2])]
    assert len({Subset(whole, torch.tensor(index)).fingerprint() for whole, index in parts}) == len(parts)
    assert Subset(WHOLE, torch.arange(200)).fingerprint() != WHOLE.fingerprint()
