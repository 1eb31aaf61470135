"""What is not encoded: steps that the tables lack, images that are none of the model, and more than a file holds."""

from dataclasses import replace

import pytest
import torch

from tests.codec.plans import gaussian, gaussian_images, gaussian_plan, pictures
from undiffuse.codec import container, exact, tables
from undiffuse.codec.stream import Codec
from undiffuse.errors import UsageError

SHAPE = (1, 12, 12)
MODEL = gaussian(SHAPE)
PLAN = gaussian_plan(MODEL)
CODEC = Codec(MODEL, PLAN)


@pytest.mark.parametrize("steps", [0, -1, 9])
def test_steps_that_the_tables_lack_are_refused(steps):
    with pytest.raises(UsageError, match=f"^{steps} steps are not possible; the tables of this model have 1 to 8$"):
        CODEC.encode(gaussian_images(1), steps)


@pytest.mark.parametrize(
    "images",
    [pictures(2, 3, 12, 12), pictures(0, 1, 12, 12), pictures(1, 1, 0, 5)],
    ids=["channels", "none", "empty"],
)
def test_images_that_are_none_of_the_model_are_refused(images):
    with pytest.raises(UsageError, match=r"cannot be encoded by this model; give uint8 of shape \[n, 1, h, w\]$"):
        CODEC.encode(images)


def test_more_images_than_a_file_holds_are_refused():
    with pytest.raises(
        UsageError, match="^5000 × 12×12 .width × height. is more than a file holds: 4096 images, sides of 16384, "
    ):
        CODEC.encode(torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(5000, 1, 12, 12))
    with pytest.raises(UsageError, match="1 × 16385×2 .width × height. is more than a file holds"):
        CODEC.encode(torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(1, 1, 2, 16385))


def test_more_values_than_a_file_may_have_are_refused(monkeypatch):
    """Else there would be a file that nobody reads."""
    monkeypatch.setattr(container, "MOST_VALUES", 300)
    assert CODEC.decode(CODEC.encode(gaussian_images(2), 1)).mean().shape == (2, *SHAPE)
    with pytest.raises(
        UsageError, match="^3 × 12×12 .width × height. is more than a file holds: 4096 images, sides of 16384, and 300 "
    ):
        CODEC.encode(gaussian_images(3), 1)


@pytest.mark.parametrize("group", [0, -1, 65])
def test_groups_that_no_file_has_are_refused(group):
    with pytest.raises(UsageError, match=f"^group = {group} is not possible; give 1 to 64$"):
        CODEC.encode(gaussian_images(1).expand(70, -1, -1, -1), 1, group=group)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_no_file_has_are_refused(seed):
    with pytest.raises(UsageError, match=f"^seed = {seed} is not possible; give 0 to 4294967295$"):
        CODEC.encode(gaussian_images(1), 1, seed=seed)


def test_a_class_that_the_model_lacks_is_refused():
    """Of a model without classes, or of one with fewer."""
    with pytest.raises(UsageError, match="^class = 3 is not possible; this model was trained without classes$"):
        CODEC.encode(gaussian_images(1), 1, label=3)
    model = replace(MODEL, config=replace(MODEL.config, classes=2))
    with pytest.raises(UsageError, match="^class = 3 is not possible; give 0 to 1$"):
        Codec(model, PLAN).encode(gaussian_images(1), 1, label=3)


def test_a_model_that_was_never_trained_without_a_class_needs_one():
    meta = {"classes": {"names": ["a", "b"], "counts": [1, 1], "unlabelled": False}}
    model = replace(MODEL, config=replace(MODEL.config, classes=2), meta=meta)
    with pytest.raises(UsageError, match="^this model was never trained without a class; give a label. This model"):
        Codec(model, PLAN).encode(gaussian_images(1), 1)
    assert Codec(model, PLAN).encode(gaussian_images(1), 1, label=1)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"precision": "bf16"},
            r"^precision bf16 .* read in float32; give variant\(precision=.float32.\)$",
        ),
        ({"clip": False}, r"^clip=False .* written and read with x̂_0 clipped; give variant\(clip=True\)$"),
    ],
)
def test_a_model_that_computes_otherwise_is_refused(changes, message):
    """To write, to read and to make tables: no check of a file would tell its pictures from the right ones."""
    images, data, other = gaussian_images(1), CODEC.encode(gaussian_images(1), 2), MODEL.variant(**changes)
    codec = Codec(other, PLAN)
    for work in (
        lambda: codec.encode(images),
        lambda: codec.decode(data),
        lambda: exact.send(codec, images),
        lambda: exact.receive(codec, [b""]),
        lambda: tables.fit(other, images, 2),
    ):
        with pytest.raises(UsageError, match=message):
            work()
    back = other.variant(precision="float32", clip=True, variance="fixed-large")  # of which files know nothing
    assert Codec(back, PLAN).encode(images, 2) == data
