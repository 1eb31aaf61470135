"""Real sets that go by a name: the digits inside the package, and Fashion-MNIST where it is installed."""

import os
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

from undiffuse.data.format.arrays import Idx, array_source, load_arrays
from undiffuse.data.picture import Reading
from undiffuse.data.source import ArraySource, Format, Source, Split
from undiffuse.errors import DataError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
FASHION_MNIST_VARIABLE = "UNDIFFUSE_FASHION_MNIST"
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def embedded(
    name: str, train: int, split: Split, reading: Reading, classes: tuple[str, ...] | None = None
) -> ArraySource:
    """An npz of `undiffuse/assets`, whose first `train` examples are the training split and the rest the test split."""
    with as_file(files("undiffuse") / "assets" / name) as path:
        arrays = load_arrays(path)
    part = slice(train) if split == "train" else slice(train, None)
    return array_source(arrays["images"][part], arrays["labels"][part], name, classes, reading)


class Digits(Format):
    """1,797 handwritten digits of 8x8 pixels (UCI, by way of scikit-learn); the last 297 are the test split."""

    names = ("digits",)

    @staticmethod
    def match(spec: str) -> int:
        return 2 if spec == "digits" else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        return embedded("digits.npz", 1500, split, reading)


class FashionMnistSample(Format):
    """The first 16 training and the first 64 test images of Fashion-MNIST, for a demonstration without the whole."""

    names = ("fashion-mnist-sample",)

    @staticmethod
    def match(spec: str) -> int:
        return 2 if spec == "fashion-mnist-sample" else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        return embedded("fashion-mnist-sample.npz", 16, split, reading, GARMENTS)


class FashionMnist(Format):
    """60,000 + 10,000 garments of 28x28 pixels (Zalando)."""

    names = ("fashion-mnist",)

    @staticmethod
    def match(spec: str) -> int:
        return 2 if spec == "fashion-mnist" else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        folder = Path(os.environ.get(FASHION_MNIST_VARIABLE, FASHION_MNIST))
        if not Idx.match(str(folder)):
            raise DataError(
                f"fashion-mnist is not in {folder}. Install Debian's package dataset-fashion-mnist, or set "
                f"{FASHION_MNIST_VARIABLE} to the folder with train-images-idx3-ubyte.gz and the other three"
            )
        found = Idx.read(str(folder), split, reading)
        assert isinstance(found, ArraySource)
        return replace(found, classes=GARMENTS)
