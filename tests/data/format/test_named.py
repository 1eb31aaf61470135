"""The sets that are shipped or installed, against what is known of them."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from undiffuse.data.format.named import FASHION_MNIST_VARIABLE, GARMENTS
from undiffuse.data.picture import Reading
from undiffuse.data.source import open_raw, open_source
from undiffuse.errors import DataError


def test_digits_are_scikit_learn_s():
    train, test = open_source("digits"), open_source("digits", split="test")
    assert (len(train), len(test)) == (1500, 297)
    known = load_digits()
    levels = torch.cat([train.images, test.images])[:, 0].numpy()
    assert np.array_equal((levels.astype(int) * 16 + 127) // 255, known.images)  # the sixteen steps come back
    assert torch.cat([train.labels, test.labels]).tolist() == known.target.tolist()
    assert train.classes == tuple("0123456789")


@pytest.mark.parametrize("name", ["digits", "fashion-mnist-sample"])
def test_a_range_is_read_and_told(name):
    whole, part = open_raw(name), open_raw(name, reading=Reading(range=(0, 100)))
    stretched = (whole[3].image.double() / 100 * 255).clamp(max=255)
    assert (part[3].image - stretched).abs().max() <= 0.5 and (stretched == 255).any()
    assert name == "digits" or any("clipped to data.range=[0,100]" in what for what, *_ in part.made)


def test_the_sample_of_fashion_mnist():
    train, test = open_source("fashion-mnist-sample"), open_source("fashion-mnist-sample", split="test")
    assert (len(train), len(test)) == (16, 64)
    assert train.image_shape == (1, 28, 28)
    assert train.classes == GARMENTS
    assert test.labels[:4].tolist() == [9, 2, 1, 1]


def test_where_to_get_fashion_mnist(tmp_path, monkeypatch):
    monkeypatch.setenv(FASHION_MNIST_VARIABLE, str(tmp_path))
    advice = f"Install Debian's package dataset-fashion-mnist, or set {FASHION_MNIST_VARIABLE} to the folder"
    with pytest.raises(DataError, match=f"^fashion-mnist is not in {tmp_path}. {advice}"):
        open_source("fashion-mnist")


@pytest.mark.data
def test_fashion_mnist():
    train, test = open_source("fashion-mnist"), open_source("fashion-mnist", split="test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.labels.bincount().tolist() == [6000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    values = train.images.double() / 255
    assert round(float(values.mean()), 4) == 0.2860
    assert round(float(values.std()), 4) == 0.3530
    sample = open_source("fashion-mnist-sample"), open_source("fashion-mnist-sample", split="test")
    assert torch.equal(sample[0].images, train.images[:16]) and torch.equal(sample[1].images, test.images[:64])
    assert torch.equal(sample[0].labels, train.labels[:16]) and torch.equal(sample[1].labels, test.labels[:64])
