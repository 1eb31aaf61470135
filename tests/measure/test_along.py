"""Scores along the chain: networks whose x̂_0 is known at every t, and features whose distances are done by hand."""

import importlib
import json
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from tests.cli import toy
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.parameterisation import X0
from undiffuse.diffusion.process import Linear
from undiffuse.diffusion.reverse import FixedSmall
from undiffuse.errors import UsageError
from undiffuse.measure.along import evaluate_along, stops
from undiffuse.measure.evaluate import Query, evaluate
from undiffuse.model.model import Model
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.unet import UNet
from undiffuse.quality.feature.base import Extractor, FeatureExtractor
from undiffuse.quality.metric.base import Features

HERE = "tests.measure.test_along:Mean"
SEEN: list[int] = []  # images that the extractor was given at once


@dataclass(frozen=True)
class Mean(FeatureExtractor):
    """The mean pixel; of two classes both are as likely, whatever is seen."""

    title: ClassVar[str] = "FD-mean"

    def open(self, device: torch.device) -> Extractor:
        def network(images):
            SEEN.append(len(images))
            mean = images.double().mean((1, 2, 3)).float()[:, None]
            return Features(mean, mean.repeat(1, 2))

        return Extractor("mean", self.title, "0" * 64, "none", None, 1, {"pool": 1, "logits": 2}, network, device)


QUERY = Query((HERE,))


class Says(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls = answer, 0

    def forward(self, x, time, cond):
        self.calls += len(x)
        return self.answer(x, ((time.to(F64) + 1) / 100).reshape(-1, 1, 1, 1)).to(x)


def model(answer=lambda x, t: (2 * t - 1).expand_as(x)) -> Model:
    process = Linear(100, 0.001, 0.2)
    config = ModelConfig((1, 4, 4), process, X0(), FixedSmall(), UNet())
    return Model(config, Denoiser(Says(answer), process, X0(), FixedSmall()), {})


@pytest.fixture
def images(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (30, 1, 1, 1)).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    np.savez(tmp_path / "real.npz", values)
    return tmp_path / "real.npz", values[:, 0, 0, 0].astype(float)


def column(found, key, name="value"):
    return [next(row for row in point["scores"] if row["key"] == key)[name] for point in found.points]


def test_the_points_are_those_of_the_authors():
    assert stops(1000, 20) == [1 + 50 * k for k in range(19, -1, -1)]  # the indices 950, 900, …, 0, which count from 0
    assert stops(7, 7) == [7, 6, 5, 4, 3, 2, 1] and stops(50, 1) == [1]
    with pytest.raises(UsageError, match="^8 points along a chain of 7 steps are not possible; give 1 to 7$"):
        stops(7, 8)


def test_the_distance_at_each_point_is_the_closed_form(images):
    """x̂_0 at t is the grey 2t − 1, and Gaussians of one value have the distance (μ − m)² + v."""
    path, real = images
    found = evaluate_along(model(), path, QUERY, points=10, n=20, batch=8, solver="ancestral")
    assert [point["step"] for point in found.points] == list(range(10, 101, 10))
    times = [point["t"] for point in found.points]
    np.testing.assert_allclose(times, [0.91 - 0.1 * k for k in range(10)])
    grey = np.round(255 * np.array(times))
    np.testing.assert_allclose(column(found, "fd"), (grey - real.mean()) ** 2 + real.var(ddof=1), rtol=1e-9)
    np.testing.assert_allclose(column(found, "is"), 1)
    assert found.protocol["n"] == 20 and found.protocol["samples"]["evaluations"] == 109
    seen = importlib.import_module("tests.measure.test_along").SEEN  # where the extractor was imported from by name
    assert sum(seen) >= 200 and max(seen) <= 30  # not the ten points of a batch at once


def gaussian() -> Model:
    return model(lambda x, t: 0.3 * x + 0.1 * t)


@pytest.mark.parametrize("how", [{}, {"solver": "ddim", "steps": 20}])
def test_the_last_point_is_what_eval_measures_of_the_finished_samples(images, how):
    path, _ = images
    along = evaluate_along(gaussian(), path, QUERY, points=4, n=20, seeds=2, batch=7, **how)
    whole = evaluate(gaussian(), path, Query((HERE,), ("frechet",)), n=20, seeds=2, batch=7, **how)
    last = along.points[-1]["scores"][0]
    assert {name: last[name] for name in ("value", "sd", "each", "real", "real_n")} == {
        name: whole.rows[0][name] for name in ("value", "sd", "each", "real", "real_n")
    }
    values = column(along, "fd")
    assert len(set(values)) == 4


def test_more_samples_than_real_images_are_told_as_eval_tells_it(images):
    """The same score at the number of real images, and the warning on few samples."""
    path, _ = images
    along = evaluate_along(gaussian(), path, QUERY, points=2, n=60, batch=16)
    whole = evaluate(gaussian(), path, Query((HERE,), ("frechet",)), n=60, batch=16, memorisation=False)
    last = along.points[-1]["scores"][0]
    assert last["real_n"] < 60 and last["value_at_real_n"] != last["value"]
    assert last["value_at_real_n"] == whole.rows[0]["value_at_real_n"]
    assert along.notes == whole.notes and "60 samples are fewer than the 10,000" in along.notes[-1]


def test_it_goes_on_where_it_stopped(images, tmp_path):
    (path, _), how = images, {"solver": "ancestral"}
    once = evaluate_along(gaussian(), path, QUERY, points=4, n=20, batch=6, **how)
    first = evaluate_along(gaussian(), path, QUERY, points=4, n=20, batch=6, **how, out=tmp_path / "out")
    parts = sorted((tmp_path / "out" / "parts").rglob("part-*.npz"))
    assert len(parts) == 4
    parts[1].unlink()
    toy_model = gaussian()
    said = []
    how |= {"out": tmp_path / "out", "say": said.append}
    again = evaluate_along(toy_model, path, QUERY, points=4, n=20, batch=6, **how)
    assert any(line.startswith("14 chains (6 are there), 1,442 evaluations of the network: about ") for line in said)
    assert toy_model.denoiser.network.calls == 6 * (100 + 3)  # the last point is the sample
    assert column(once, "fd") == column(first, "fd") == column(again, "fd")
    with pytest.raises(UsageError, match="holds another measurement"):
        evaluate_along(gaussian(), path, QUERY, points=5, n=20, batch=6, out=tmp_path / "out")


def test_the_table_and_the_plots_say_the_same(images, tmp_path):
    path, _ = images
    found = evaluate_along(model(), path, QUERY, points=5, n=20, seeds=2, solver="ancestral", out=tmp_path / "out")
    head, *lines = [line.split("\t") for line in (tmp_path / "out" / "progressive.tsv").read_text().splitlines()]
    assert head == ["reverse_step", "t", "mean FD-mean", "mean FD-mean sd", "mean mean score", "mean mean score sd"]
    assert [int(line[0]) for line in lines] == [20, 40, 60, 80, 100]
    assert [float(line[2]) for line in lines] == column(found, "fd")
    assert found.lines()[0].split() == ["reverse", "step", "t", "FD-mean", "mean", "score"]
    assert re.match(r"\d+ real images", found.lines()[-1]) and len(found.lines()) == 7
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["points"] == found.points
    for name in ("mean-fd.svg", "mean-is.svg"):
        real, ours = re.findall(r'points="([^"]*)"', (tmp_path / "out" / name).read_text())
        assert len(ours.split()) == len(real.split()) == 5
        assert len({point.split(",")[1] for point in real.split()}) == 1


def test_the_command(call, images, tmp_path, monkeypatch):
    path, _ = images
    made = toy.save(tmp_path / "toy.safetensors")
    words = ["eval", made, path, "--features", HERE, "-n", 12, "--progressive", 3, "--solver", "ancestral"]
    code, out, err = call(*words, "--out", tmp_path / "out")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["4", "8", "12"] and "protocol:" in out
    assert (tmp_path / "out" / "mean-fd.svg").exists()
    code, out, _ = call(*words, "--json")
    assert code == 0 and len(json.loads(out)["points"]) == 3


@pytest.mark.parametrize(
    "words, said",
    [
        (["--progressive", 13], "13 points along a chain of 10 steps are not possible; give 1 to 10"),
        (["--progressive", 3, "--keep-images", "--out", "o"], "--keep-images and --progressive are not possible"),
        (["--progressive", 3, "--save-statistics", "s.npz"], "--save-statistics and --progressive are not possible"),
    ],
)
def test_what_is_refused(call, images, tmp_path, words, said):
    made = toy.save(tmp_path / "toy.safetensors")
    code, _, err = call("eval", made, images[0], "--features", HERE, "-n", 12, *words)
    assert code == 2 and said in err and not (tmp_path / "o").exists()


def test_pictures_have_no_chain(call, images):
    code, _, err = call("eval", images[0], images[0], "--features", HERE, "--progressive", 3)
    assert code == 2 and "--progressive follows the chain of a model" in err
