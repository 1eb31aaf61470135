"""Every option of a command that draws or measures reaches the function: compared with the same call in Python."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.toy import save
from undiffuse.data.source import open_source
from undiffuse.diffusion.sampler.ddim import DDIM
from undiffuse.measure.nll import Nll, terms_of
from undiffuse.model.load import load
from undiffuse.quality.feature.base import open_features
from undiffuse.view import explore

CHAIN = ["--seed", 3, "--steps", 4, "--solver", "ddim", "--eta", 0.5]
SAME = {"seed": 3, "steps": 4, "solver": DDIM(0.5)}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "MODEL")


def pictures(folder: Path) -> tuple[Path, Path]:
    for i, name in enumerate("ab"):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(folder / f"{name}.png")
    return folder / "a.png", folder / "b.png"


def near(loaded, data, samples, **how) -> torch.Tensor:
    """Each sample and its nearest images."""
    index = explore.neighbours(samples, data, **how).indices
    return torch.cat([samples[:, None], data.images[index]], 1)


def test_images_that_share_a_latent_and_all_that_follows_are_said_to_be_the_same(model, call, tmp_path):
    """Below 1/20 there is no time but 0, and the one step from there adds no noise."""
    low = 1 / load(model).process.steps
    words = ("shared", model, "-n", 2, "--steps", 2, "--at", 0.9, "--at", low, "-o", tmp_path / "x.png")
    code, _, error = call(*words)
    assert code == 0 and "chains also stop at each --at" in error
    assert f"warning: at t = {low:g} all images are the same: no step below adds noise; give more --steps" in error


@pytest.mark.parametrize("command", ["progressive", "shared", "interpolate", "neighbours"])
def test_a_figure_is_the_one_of_python(call, model, tmp_path, command):
    loaded, (a, b) = load(model).variant(precision="bf16"), pictures(tmp_path)
    first, second = loaded.picture(a), loaded.picture(b)
    words, draw = {
        "progressive": (["-n", 2, "--slots", 3], lambda: explore.progressive(loaded, 2, slots=3, **SAME)[0]),
        "shared": (["-n", 2, "--at", 0.5], lambda: explore.shared(loaded, 2, at=(0.5,), **SAME)[0]),
        "interpolate": (
            [a, b, "--t", 0.25, "--t", 0.75, "--count", 3],
            lambda: explore.interpolate(loaded, first, second, (0.25, 0.75), (0.0, 0.5, 1.0), **SAME),
        ),
        "neighbours": (
            ["digits", "-n", 2, "-k", 3, "--crop", "2,1,5,6"],
            lambda: near(loaded, open_source("digits"), loaded.sample(2, **SAME), k=3, crop=(2, 1, 5, 6)),
        ),
    }[command]
    words += [*CHAIN, "--precision", "bf16", "--out", tmp_path / "found.png", "--json"]
    code, _, err = call(command, model, *words)
    assert code == 0, err
    explore.write_grid(draw(), tmp_path / "expected.png")
    assert (tmp_path / "found.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_samples_are_those_of_the_seed_however_many_at_a_time(call, model, tmp_path):
    drawn = load(model).sample(5, **SAME)
    for batch in (2, 64):
        words = ["-n", 5, "--batch", batch, *CHAIN, "--npz", tmp_path / f"{batch}.npz", "--out", tmp_path / f"{batch}"]
        code, _, err = call("sample", model, *words, "--json")
        assert code == 0, err
        with np.load(tmp_path / f"{batch}.npz") as arrays:
            found = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)
        assert (found.int() - drawn.int()).abs().max() <= 1  # convolutions may differ in the last bit by batch
        with Image.open(tmp_path / f"{batch}" / "0004.png") as picture:
            assert np.array_equal(np.asarray(picture), found[4, 0])
    assert not torch.equal(drawn, load(model).sample(5, **SAME | {"seed": 4}))


@pytest.mark.parametrize(
    "words, query, split",
    [
        (["-n", 3], Nll(3), "test"),
        (["-n", 3, "--split", "train"], Nll(3), "train"),
        (["-n", 3, "--seed", 2], Nll(3, seed=2), "test"),
        (["-n", 3, "--draws", 4], Nll(3, draws=4), "test"),
        (["-n", 3, "--steps", 5, "--batch", 2], Nll(3, steps=5, batch=2), "test"),
        (["-n", 3, "--steps", 5, "--grid", "karras"], Nll(3, steps=5, grid="karras"), "test"),
    ],
    ids=str,
)
def test_bits_per_dim_are_those_of_python(call, model, words, query, split):
    code, out, err = call("nll", model, "digits", *words, "--json")
    assert code == 0, err
    expected = terms_of(load(model), open_source("digits", split=split), query).summary()
    found = json.loads(out)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_neighbours_in_features_are_those_of_python(call, model, tmp_path):
    loaded, name = load(model), "tests.measure.test_memorise:Quarters"
    words = ["neighbours", model, "digits", "-n", 2, "-k", 3, "--features", name, *CHAIN, "--out", tmp_path / "x.png"]
    code, out, err = call(*words, "--json")
    assert code == 0, err
    found, data = json.loads(out), open_source("digits")
    near = explore.neighbours_in(open_features(name), loaded.sample(2, **SAME), data, 3)
    assert found["index"] == near.indices.tolist() and found["features"] == "quarters"
    np.testing.assert_allclose(found["distance_of_nearest"], near.distance[:, 0])
    explore.write_grid(torch.cat([loaded.sample(2, **SAME)[:, None], data.images[near.indices]], 1), tmp_path / "y.png")
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()
