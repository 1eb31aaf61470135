"""The resizes by name, against torch-fidelity's function, Pillow and the half-pixel rule written out."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.quality.fidelity import pictures, resize_of_tensorflow
from undiffuse.quality.feature.resize import RESIZES, text

SHAPES = [(32, 32, 299, 299), (28, 28, 112, 112), (90, 61, 24, 50), (7, 5, 3, 9), (1, 1, 4, 4), (5, 3, 5, 3)]


@pytest.fixture(params=SHAPES, ids=str)
def case(request):
    height, width, *size = request.param
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, tuple(size)


def by_pillow(image, size):
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def test_tf1_is_torch_fidelitys_to_the_last_bit(case):
    images, size = case
    assert torch.equal(RESIZES["tf1"](images, size), resize_of_tensorflow(images.float(), size, align_corners=False))


def test_pil_is_pillows_of_floats(case):
    images, size = case
    wanted = [[by_pillow(plane.float().numpy(), size) for plane in image] for image in images]
    assert np.abs(RESIZES["pil"](images, size).numpy() - np.array(wanted)).max() < 0.01


def test_pil_uint8_is_pillows_of_pictures(case):
    images, size = case
    wanted = np.array([by_pillow(image.permute(1, 2, 0).numpy(), size) for image in images])
    made = RESIZES["pil-uint8"](images, size)
    assert made.dtype == torch.float32 and np.array_equal(made.permute(0, 2, 3, 1).numpy(), wanted)


def test_torch_reads_between_the_centres_of_pixels(case):
    images, size = case
    wanted = images.double().numpy()
    for axis in (2, 3):
        given, new = images.shape[axis], size[axis - 2]
        places = (np.arange(new) + 0.5) * given / new - 0.5
        wanted = np.apply_along_axis(lambda line, at=places: np.interp(at, np.arange(len(line)), line), axis, wanted)
    assert np.abs(RESIZES["torch"](images, size).numpy() - wanted).max() < 1e-3


def test_no_two_of_them_are_the_same():
    made = {name: resize(pictures(), (299, 299)) for name, resize in RESIZES.items()}
    apart = {(a, b): float((made[a] - made[b]).abs().mean()) for a in made for b in made if a < b}
    assert min(apart.values()) == apart["pil", "pil-uint8"] > 0.1
    assert min(value for pair, value in apart.items() if pair != ("pil", "pil-uint8")) > 0.5


@pytest.mark.parametrize("name", RESIZES)
def test_grey_none_and_the_same_size(name):
    grey, resize = pictures()[:, :1], RESIZES[name]
    assert torch.equal(resize(grey, (40, 50)), resize(grey.repeat(1, 3, 1, 1), (40, 50))[:, 1:2])
    assert resize(grey[:0], (40, 50)).shape == (0, 1, 40, 50)
    assert (resize(grey, (32, 32)) - grey).abs().max() < 1e-3


def test_how_it_is_named():
    assert text("tf1", (299, 300)) == "tf1 299x300"
