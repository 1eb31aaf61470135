"""A batch is a function of the step: each row is the same whatever is asked with it."""

import pytest
import torch

from undiffuse.data.loader import Loader
from undiffuse.data.order import order
from undiffuse.data.source import ArraySource, Item, Source
from undiffuse.errors import UsageError
from undiffuse.key import Key

WIDE = torch.arange(30 * 2 * 3 * 4).reshape(30, 2, 3, 4).to(torch.uint8)
SOURCE = ArraySource(WIDE, torch.arange(30) % 7)


class Lazy(Source):
    """The same images, one at a time."""

    classes = None

    def __init__(self, labelled):
        self.labelled = labelled

    def __len__(self):
        return len(SOURCE)

    def __getitem__(self, index):
        return Item(WIDE[index], index % 7 if self.labelled else None)

    def fingerprint(self):
        return ""


def test_an_epoch_holds_each_image_once_across_batches():
    loader = Loader(SOURCE, 8, seed=3)
    index = torch.cat([loader.batch(step).index for step in range(15)])  # 120 rows: four epochs
    for epoch in index.reshape(4, 30):
        assert torch.equal(epoch.sort().values, torch.arange(30))


def test_images_and_labels_are_those_of_the_index():
    batch = Loader(SOURCE, 8, seed=1).batch(5)
    assert torch.equal(batch.image, WIDE[batch.index])
    assert torch.equal(batch.label, batch.index % 7)
    assert batch.rows.tolist() == list(range(8))


@pytest.mark.parametrize("flip", [False, True])
def test_rows_of_a_batch_are_what_they_are_in_the_whole(flip):
    loader = Loader(SOURCE, 8, seed=2, flip=flip)
    whole = loader.batch(9)
    for rows in (torch.tensor([5]), torch.tensor([7, 0, 3]), torch.arange(4, 8)):
        part = loader.batch(9, rows)
        assert torch.equal(part.image, whole.image[rows])
        assert torch.equal(part.index, whole.index[rows])
        assert torch.equal(part.label, whole.label[rows])
        assert torch.equal(part.rows, rows)


def test_half_of_the_rows_are_flipped_and_anew_at_each_step():
    plain, flipping = Loader(SOURCE, 30, seed=4), Loader(SOURCE, 30, seed=4, flip=True)
    flipped = []
    for step in range(20):
        before, after = plain.batch(step).image, flipping.batch(step).image
        turned = (after == before.flip(-1)).flatten(1).all(1)
        assert bool((turned | (after == before).flatten(1).all(1)).all())
        flipped.append(turned)
    share = torch.stack(flipped).double().mean()
    assert abs(float(share) - 0.5) < 5 * 0.5 / 600**0.5
    assert not torch.equal(flipped[0], flipped[1])


@pytest.mark.parametrize("seed", [0, 6])
def test_the_seed_decides_which_image_stands_where_and_which_is_flipped(seed):
    """Row r of step n is at position 8 n + r of the walk of that seed; a flip is one bit by seed, step and row."""
    batch = Loader(SOURCE, 8, seed, flip=True).batch(5)
    index = order(seed, 30, torch.arange(40, 48))
    flips = Key(seed).fold("flip", 5).rows(8).uniform() >= 0.5
    assert torch.equal(batch.index, index) and 0 < int(flips.sum()) < 8
    for image, number, flip in zip(batch.image, index, flips, strict=True):
        assert torch.equal(image, WIDE[number].flip(2) if flip else WIDE[number])


@pytest.mark.parametrize("labelled", [False, True])
def test_a_source_that_is_not_in_memory_gives_the_same(labelled):
    held, lazy = Loader(SOURCE, 8, 5, True).batch(2), Loader(Lazy(labelled), 8, 5, True).batch(2)
    assert torch.equal(held.image, lazy.image)
    assert torch.equal(held.label, lazy.label) if labelled else lazy.label is None


def test_no_labels():
    assert Loader(ArraySource(WIDE), 4).batch(0).label is None


def test_an_empty_batch():
    with pytest.raises(UsageError, match="a batch of 0 images is not possible; give at least 1"):
        Loader(SOURCE, 0)
