"""FD-classifier: the shipped networks are the ones that were measured, and what their features tell apart."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from undiffuse.data.format.emoji import CATEGORIES, STYLES
from undiffuse.data.format.named import GARMENTS
from undiffuse.data.source import open_source
from undiffuse.errors import Corrupt, UsageError
from undiffuse.key import Key
from undiffuse.machine.tensorfile import read_weights, write_weights
from undiffuse.model.load import shipped
from undiffuse.quality.feature import classifier
from undiffuse.quality.feature.base import FEATURES, hash_of_file, open_features
from undiffuse.quality.metric.base import Moments
from undiffuse.quality.metric.frechet import frechet_distance

ROOT = Path(__file__).parents[2]
MEASURED = json.loads((ROOT / "bench" / "classifiers.json").read_text())
SHAPES = {"classifier-28": (1, 28, 28), "classifier-emoji": (3, 32, 32)}
NAMES = list(SHAPES)


def noise(count: int, *shape: int) -> torch.Tensor:
    return (256 * Key(0).fold("noise").rows(count).uniform(*shape)).to(torch.uint8)


def summed(pool: torch.Tensor) -> Moments:
    moments = Moments()
    moments.update(pool, torch.arange(len(pool)))
    return moments


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    a, b = summed(one), summed(other)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_the_one_that_was_measured(name):
    path, row = classifier.path_of(name), MEASURED[name]
    assert FEATURES.find(name).sha256 == hash_of_file(path) == row["sha256"]
    assert path.stat().st_size == row["bytes"] <= 500_000
    tensors, meta = read_weights(path)
    assert sum(tensor.numel() for tensor in tensors.values()) == row["parameters"] <= 250_000
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert (meta["train"], meta["seed"]) == (row["fingerprints"]["train"], row["seed"])
    assert name not in shipped()  # no model to sample from


@pytest.mark.parametrize("name", NAMES)
def test_what_an_extractor_says_of_itself_is_what_it_gives(name):
    extractor, shape = open_features(name), SHAPES[name]
    assert FEATURES.name_of(FEATURES.build(name)) == extractor.name == name
    assert extractor.identity == {"extractor": name, "sha256": MEASURED[name]["sha256"], "resize": "none"}
    assert (extractor.channels, *extractor.size) == shape
    assert extractor.named("{fd}") == "FD-classifier" and extractor.named("{is}") == "classifier score"
    features = extractor(noise(3, *shape))
    assert {part: features[part].shape[1] for part in features.parts()} == extractor.dimensions
    assert extractor.dimensions["pool"] == 128
    assert {features[part].dtype for part in features.parts()} == {torch.float32}


def test_the_logits_are_one_distribution_over_the_labels_of_the_set():
    _, garments = classifier.network_of(classifier.path_of("classifier-28"))
    _, emoji = classifier.network_of(classifier.path_of("classifier-emoji"))
    assert tuple(garments) == GARMENTS
    assert emoji == [f"{style.name} {category}" for style in STYLES for category in CATEGORIES]


def test_a_row_does_not_depend_on_its_batch():
    extractor, images = open_features("classifier-28"), noise(5, 1, 28, 28)
    torch.testing.assert_close(extractor(images).pool[3:4], extractor(images[3:4]).pool, rtol=1e-5, atol=1e-5)


def test_features_by_hand():
    """Zero convolutions leave their bias, ReLU cuts it at zero, and the head is linear in what is left."""
    network = classifier.Network(1, 2)
    with torch.no_grad():
        for number, conv in enumerate(network.convs):
            conv.weight.zero_()
            conv.bias.fill_(-1.0 if number % 2 else 0.5)
        network.convs[-1].bias.copy_(torch.linspace(-1, 1, 128))
        network.head.weight.zero_()
        network.head.weight[1, 127], network.head.bias[0] = 3.0, 7.0
        features = network(noise(2, 1, 28, 28))
    torch.testing.assert_close(features.pool, torch.linspace(-1, 1, 128).clamp(min=0).expand(2, -1))
    assert features.logits.flatten().tolist() == pytest.approx([7.0, 3.0 + network.head.bias[1].item()] * 2, abs=1e-5)
    assert features.spatial.shape == (2, 8 * 49) and not features.spatial.any()  # the first eight are cut


@pytest.mark.parametrize(
    "name, shape, said",
    [
        ("classifier-28", (1, 32, 32), "images of 32×32 cannot be seen by classifier-28, which takes 28×28 and resizes "
         "none; give --size 28 for pictures, or other --features"),
        ("classifier-emoji", (3, 32, 40), "images of 32×40 cannot be seen by classifier-emoji, which takes 32×32 and "
         "resizes none; give --size 32 for pictures, or other --features"),
        ("classifier-28", (3, 28, 28), "images of 3 channels cannot be seen by classifier-28, which takes grey images; "
         "give --set data.channels=1, or other --features"),
        ("classifier-emoji", (4, 32, 32), "images of 4 channels cannot be seen by classifier-emoji, which takes grey "
         "and RGB images; give --set data.channels=3, or other --features"),
    ],
)  # fmt: skip
def test_images_of_another_shape_are_refused(name, shape, said):
    with pytest.raises(UsageError) as caught:
        open_features(name)(noise(1, *shape))
    assert str(caught.value) == said


def test_grey_is_repeated_for_the_emoji():
    extractor, grey = open_features("classifier-emoji"), noise(2, 1, 32, 32)
    assert torch.equal(extractor(grey).pool, extractor(grey.repeat(1, 3, 1, 1)).pool)
    assert extractor.note(1) == "grey repeated to 3 channels"


def test_another_file_in_its_place_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "classifier-28.safetensors"
    monkeypatch.setattr(classifier, "path_of", lambda name: path)
    with pytest.raises(Corrupt, match=f"^{path} is missing, which undiffuse brings; install undiffuse again$"):
        open_features("classifier-28")
    shutil.copy(ROOT / "undiffuse/assets/features/classifier-28.safetensors", path)
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(Corrupt, match=f"^{path} is not the file that undiffuse brings: its sha256 is [0-9a-f]{{64}}, "):
        open_features("classifier-28")


def test_weights_of_another_network_are_refused(tmp_path):
    tensors, meta = read_weights(classifier.path_of("classifier-28"))
    for name, (changed, beside) in {
        "no classes": (tensors, {}),
        "one class less": (tensors, {"classes": meta["classes"][:-1]}),
        "no head": ({key: value for key, value in tensors.items() if "head" not in key}, meta),
    }.items():
        write_weights(tmp_path / name, changed, beside)
        with pytest.raises(Corrupt, match="holds no classifier of undiffuse; restore it from a copy"):
            classifier.network_of(tmp_path / name)


def test_the_shipped_sample_is_told_apart():
    """64 test images that come with the package: 92 % is 59 of them; chance is 6."""
    test = open_source("fashion-mnist-sample", split="test")
    found = open_features("classifier-28")(test.images).logits.argmax(1)
    assert int((found == test.labels).sum()) >= 56


@pytest.mark.data
@pytest.mark.slow
def test_the_accuracy_on_fashion_mnist_is_the_one_that_is_stated():
    test = open_source("fashion-mnist", split="test")
    extractor = open_features("classifier-28")
    features = [extractor(part) for part in test.images.split(1000)]
    logits, pool = torch.cat([each.logits for each in features]), torch.cat([each.pool for each in features])
    accuracy = float((logits.argmax(1) == test.labels).double().mean())
    assert accuracy == pytest.approx(MEASURED["classifier-28"]["test"]["accuracy"], abs=1e-3)
    assert accuracy >= 0.925
    floor = distance(pool[:5000], pool[5000:])
    assert distance(pool[:5000], extractor(test.images[5000:].flip(2)).pool) > 20 * floor  # upside down
    blurred = torch.nn.functional.avg_pool2d(test.images[5000:].float(), 3, 1, 1).to(torch.uint8)
    assert distance(pool[:5000], extractor(blurred).pool) > 20 * floor
    noisy = (test.images[5000:].float() + 25 * Key(0).rows(5000).normal(1, 28, 28)).clamp(0, 255).to(torch.uint8)
    assert distance(pool[:5000], extractor(noisy).pool) > 20 * floor
    missing = pool[5000:][test.labels[5000:] != 8]  # no bags
    assert distance(pool[:5000], missing) > 10 * floor


def test_the_page_states_what_was_measured():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for name, row in MEASURED.items():
        assert f"| `{name}` |" in text and f"{100 * row['test']['accuracy']:.2f} % of {row['test']['images']:,}" in text
        assert np.isclose(row["test"]["accuracy"], row["before_folding"]["accuracy"], atol=2e-3)
