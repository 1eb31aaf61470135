"""What `encode` says of pictures that a shipped model does not know, and that it says nothing of those that it does."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import undiffuse
from undiffuse.codec import tables
from undiffuse.codec.container import parse
from undiffuse.codec.plan import EXTRA
from undiffuse.codec.stream import Codec
from undiffuse.data.source import open_source

MODEL = "fashion-mnist"
WARNED = re.compile(
    r"warning: (?:(\d+) of (\d+) images take up to )?(\d+) bits for each 784 values, and 99 of 100 images like the "
    r"model's take at most (\d+): it does not know such images; a PNG takes ([\d,]+) bytes, and this file ([\d,]+)\n"
)
WORDS = {"all": [], "lossless": ["--lossless"], "28 steps": ["--steps", 28]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def codec() -> Codec:
    model = undiffuse.load(MODEL, "cpu")
    return Codec(model, tables.of(model))


@pytest.fixture(scope="module")
def known() -> torch.Tensor:
    """Test images of the data that the model was trained on."""
    return open_source("fashion-mnist-sample").images


def textured(seed: int, contrast: float) -> np.ndarray:
    """Noise whose spectrum falls as that of photographs, of that standard deviation in grey levels."""
    noise = np.random.default_rng(seed).standard_normal((28, 28))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(28), np.fft.fftfreq(28)))
    frequency[0, 0] = 1
    found = np.fft.ifft2(np.fft.fft2(noise) / frequency**1.5).real
    return (128 + contrast * (found - found.mean()) / found.std()).round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("seed, contrast", [(0, 20), (1, 50)])
def test_a_picture_of_another_kind_is_warned_of(call, tmp_path, codec, words, seed, contrast):
    Image.fromarray(textured(seed, contrast)).save(tmp_path / "a.png")
    code, _, err = call("encode", MODEL, tmp_path / "a.png", tmp_path / "x.udf", "--no-check", *WORDS[words])
    found, data = WARNED.search(err), (tmp_path / "x.udf").read_bytes()
    assert code == 0 and found and found[1] is None, err
    (group,) = parse(data, codec.plan, (1, 28, 28)).groups
    bits = sum(map(len, group.paths)) - EXTRA * len(group.paths)  # without what starts a path
    usual = codec.plan.usual_of(len(group.paths))
    assert int(found[3]) == bits > usual == pytest.approx(int(found[4]), abs=0.5)
    assert int(found[6].replace(",", "")) == len(data)
    assert words != "28 steps" or bits < codec.plan.usual  # what is usual in all steps would not have told


@pytest.mark.parametrize("words", WORDS)
def test_test_images_of_its_data_are_not_warned_of(call, tmp_path, known, words):
    for i in (2, 11):  # the ones that take the fewest bits and the most
        Image.fromarray(known[i, 0].numpy()).save(tmp_path / f"{i}.png")
        code, _, err = call("encode", MODEL, tmp_path / f"{i}.png", tmp_path / f"{i}.udf", "--no-check", *WORDS[words])
        assert code == 0 and "does not know" not in err
    code, _, err = call("encode", MODEL, "fashion-mnist-sample", tmp_path / "x", "-n", 5, "--no-check", *WORDS[words])
    assert code == 0 and "does not know" not in err


@pytest.mark.parametrize("many", [1, 2])
def test_of_a_set_more_than_one_in_ten_are_warned_of(call, tmp_path, known, many):
    (tmp_path / "set").mkdir()
    for i in range(11):
        values = textured(i, 50) if i < many else known[i, 0].numpy()
        Image.fromarray(values).save(tmp_path / "set" / f"{i:02d}.png")
    code, _, err = call("encode", MODEL, tmp_path / "set", tmp_path / "x.udf", "--no-check")
    found = WARNED.search(err)
    assert code == 0 and (found is None if many == 1 else found is not None and found.groups()[:2] == ("2", "11")), err


def test_what_is_usual_in_some_steps_follows_from_what_is_in_all(codec):
    """More than if the scales of all layers were alike, and less than if all that is unusual were in these steps."""
    plan = codec.plan
    whole = sum(row[16] for row in plan.bits)
    assert plan.usual_of(plan.steps) == pytest.approx(plan.usual)
    for steps in range(1, plan.steps):
        some = sum(row[16] for row in plan.bits[:steps])
        assert some * plan.usual / whole < plan.usual_of(steps) < some + plan.usual - whole
