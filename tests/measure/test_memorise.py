"""Copies are caught, new images are not, and the same in pixels, in features, in parts and in several processes."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.cli.toy import save
from tests.machine.test_dist import finish, start
from undiffuse.data.source import ArraySource, open_source
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.parameterisation import X0
from undiffuse.diffusion.process import Linear
from undiffuse.diffusion.reverse import FixedSmall
from undiffuse.figure import DRAWN
from undiffuse.measure.evaluate import Query, evaluate
from undiffuse.measure.memorise import FILE, memorise
from undiffuse.measure.passes import Judge, Reference, Seen
from undiffuse.measure.scores import Result, score
from undiffuse.measure.sets import Floor, given
from undiffuse.model.load import load
from undiffuse.model.model import Model, to_float
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.unet import UNet
from undiffuse.quality.feature.base import Extractor, FeatureExtractor
from undiffuse.quality.metric.base import Features, Rows
from undiffuse.training.start import train

NAME = "tests.measure.test_memorise:Quarters"


def quarters(images):
    """Means of quarters of an image: its look without its details."""
    pool = torch.nn.functional.adaptive_avg_pool2d(images.to(torch.float32), 4).flatten(1)
    return Features(pool)


@dataclass(frozen=True)
class Quarters(FeatureExtractor):
    """Sixteen features of grey images, of no weights."""

    title = "FD-quarters"

    def open(self, device):
        return Extractor("quarters", self.title, "0" * 64, "none", None, 1, {"pool": 16}, quarters, device)


@pytest.fixture(scope="module")
def digits():
    """(training images, held-out ones, others that nobody knows), mixed, since writers differ between the splits."""
    images = torch.cat([open_source("digits", split=split).images for split in ("train", "test")])
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return tuple(ArraySource(part) for part in images.split([1000, 400, len(images) - 1400]))


def judged(samples, data, floor=None, metrics=("frechet",), out=None) -> Result:
    judge = Judge.of(Quarters().open(torch.device("cpu")), metrics)
    return score([given(samples, None, "samples")], Reference("digits", "train", data), floor, [judge], out=out)


def beside(held_out) -> Floor:
    return Floor(len(held_out), "held-out digits", held_out)


def firsts(found: Result):
    assert found.memorisation is not None
    return {space.name: space.rates[0] for space in found.memorisation.spaces}


def test_new_images_are_not_called_copies(digits):
    data, held_out, new = digits
    found = judged(new, data, beside(held_out))
    for rate in firsts(found).values():
        assert not rate.is_more and rate.low <= rate.expected <= rate.high and rate.n == len(new)
    assert "Samples are not nearer to training images than images are" in found.memorisation.sentence()


def test_copies_move_the_memorisation_rate_alone(digits):
    """The Fréchet distance of copies is that of new images but for noise, beside that of images of another look."""
    data, held_out, new = digits
    copies = data.subset(slice(0, len(new)))
    fine, copied = judged(new, data, beside(held_out)), judged(copies, data, beside(held_out))
    other = judged(ArraySource(new.images.flip(2)), data, beside(held_out))
    for rate in firsts(copied).values():
        assert rate.rate == 1 and rate.low > 0.95 and rate.is_more and rate.p < 1e-20
    change = abs(copied.rows[0]["value"] - fine.rows[0]["value"])
    assert change < 0.1 * abs(other.rows[0]["value"] - fine.rows[0]["value"])
    assert not any(rate.is_more for rate in firsts(other).values())
    said = copied.memorisation.sentence()
    assert "the model probably copies" in said and f"{len(data):,} training images are few: give more" in said


def test_one_copy_in_ten_is_told(digits):
    data, held_out, new = digits
    images = new.images.clone()
    images[::10] = data.images[: len(images[::10])]
    found = firsts(judged(ArraySource(images), data, beside(held_out)))
    for rate in found.values():
        assert rate.is_more and 0.1 <= rate.rate < 0.15 and rate.low < 0.1 < rate.high


def test_without_another_split_each_training_image_stands_beside_the_others(digits):
    """By loops: the ratios of the images apart, and those of the samples against the whole set."""
    data, _, new = digits
    data = data.subset(slice(0, 90))
    apart = torch.arange(90) % 3 == 0
    floor = Floor(30, "30 images of the set", apart=apart)
    copies = torch.cat([data.images[[3, 4]], new.images[:18]])
    found = judged(ArraySource(copies), data, floor)
    assert found.memorisation.held_out == "30 images of the set, each against all the others"
    space = found.memorisation.spaces[0]
    assert space.around == 50 and space.training == 90

    points = data.images.flatten(1).to(F64)

    def ratio(x, left):
        distance = (points[left] - x).norm(dim=1)
        best = left[int(distance.argmin())]
        others = [j for j in left if j != best]
        return float(distance.min() / (points[others] - points[best]).norm(dim=1).sort().values[:50].mean())

    held_out = [ratio(points[i], [j for j in range(90) if j != i]) for i in torch.nonzero(apart)[:, 0].tolist()]
    assert space.rates[0].threshold == pytest.approx(min(held_out), rel=1e-5)
    expected = sorted(ratio(x, list(range(90))) for x in copies.flatten(1).to(F64))
    assert [each[2] for each in space.worst] == pytest.approx(expected[:16], rel=1e-5)
    assert {each[:2] for each in space.worst[:2]} == {(0, 3), (1, 4)}  # both, of which one stands apart


def test_few_training_images_are_told_of_what_can_be(digits):
    data, held_out, new = digits
    found = judged(new, data.subset(slice(0, 20)), beside(held_out))
    assert [space.around for space in found.memorisation.spaces] == [19, 19]
    found = judged(new, data.subset(slice(0, 200)), Floor(9, "nine images", held_out.subset(slice(0, 9))))
    assert found.memorisation.sentence().endswith("so few held-out images show only copying beyond 34 %.")
    alone = Reference("one", "train", data.subset(slice(0, 1)))
    assert memorise(new.images, {}, {}, alone, beside(held_out), torch.device("cpu")) is None


@pytest.mark.parametrize("case", ["test", "none held out"])
def test_nothing_is_said_where_there_is_no_training_set_or_nothing_held_out(digits, case):
    data, held_out, new = digits
    judge = Judge.of(Quarters().open(torch.device("cpu")), ("frechet",))
    reference = Reference("digits", "test" if case == "test" else "train", data)
    floor = beside(held_out) if case == "test" else None
    found = score([given(new, None, "samples")], reference, floor, [judge])
    assert found.memorisation is None and "memorisation" not in found.plain()


def test_the_worst_pairs_are_a_figure(digits, tmp_path):
    data, held_out, new = digits
    images = torch.cat([new.images[:40], data.images[[5]]])
    found = judged(ArraySource(images), data, beside(held_out), out=tmp_path / "out")
    worst = [space.worst for space in found.memorisation.spaces]
    assert all(pairs[0] == (40, 5, 0) and len(pairs) == 16 for pairs in worst)
    pictures = found.memorisation.pictures
    assert len(pictures) == 32 + 8 + 32 and torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[2], images[worst[0][1][0]]) and torch.equal(pictures[3], data.images[worst[0][1][1]])
    assert bool((pictures[32:40] == 255).all()) and torch.equal(pictures[40], data.images[5])
    with Image.open(tmp_path / "out" / FILE) as picture:
        assert picture.info["Software"] == DRAWN
        assert np.array_equal(np.asarray(picture), np.asarray(found.memorisation.picture()))
    saved = json.loads((tmp_path / "out" / "summary.json").read_text())["memorisation"]
    assert saved == found.memorisation.plain() and saved["spaces"][0]["worst"][0]["sample"] == 40


def test_a_stopped_evaluation_of_a_model_has_its_images_again(tmp_path, monkeypatch):
    model = load(save(tmp_path / "model"))
    query = Query((NAME,), ("frechet",))
    first = evaluate(model, "digits", query, n=8, steps=2, batch=4, out=tmp_path / "out")
    (tmp_path / "out" / "summary.json").unlink()
    drawn = []
    chain = type(model).chain
    monkeypatch.setattr(type(model), "chain", lambda *each: drawn.append(1) or chain(*each))
    again = evaluate(model, "digits", query, n=8, steps=2, batch=4, out=tmp_path / "out")
    assert drawn == [] and again.plain()["memorisation"] == first.plain()["memorisation"]
    (tmp_path / "out" / "parts").rename(tmp_path / "parts")
    evaluate(model, "digits", query, n=8, steps=2, batch=4, out=tmp_path / "out", memorisation=False)  # keeps no images
    assert len(drawn) == 2
    assert evaluate(model, "digits", query, n=8, steps=2, batch=4, out=tmp_path / "out").plain() == first.plain()
    assert len(drawn) == 4


def test_features_of_some_training_images_are_told(digits, monkeypatch):
    data, held_out, new = digits
    whole = Rows.__init__
    monkeypatch.setattr(Rows, "__init__", lambda self: whole(self, 100))
    found = judged(new, data, beside(held_out)).memorisation
    assert [space.training for space in found.spaces] == [1000, 63]
    assert "in quarters 63 of the 1,000 training images are compared, spread evenly" in found.lines()


def test_images_are_held_as_far_as_there_is_room(digits, monkeypatch):
    monkeypatch.setattr("undiffuse.measure.passes.MOST_SEEN_BYTES", 64 * 10)
    data, held_out, new = digits
    found = firsts(judged(new, data, beside(held_out)))
    assert found["pixels"].n == 10 and found["quarters"].n == len(new)
    seen = Seen(3)
    seen.update(new.images[2:5], torch.arange(2, 5))
    seen.update(new.images[:2], torch.arange(2))
    assert torch.equal(seen.everywhere(), new.images[:3])


@pytest.mark.slow
def test_several_processes_find_what_one_does(call, digits, tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=digits[2].images.permute(0, 2, 3, 1).numpy())
    words = ["eval", tmp_path / "samples.npz", "digits", "--features", NAME, "--metric", "frechet", "--json"]
    code, out, err = call(*words, "--out", tmp_path / "alone")
    assert code == 0, err
    ended = finish(start(3, *map(str, words), "--out", str(tmp_path / "three")))
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    one, three = json.loads(out)["memorisation"], json.loads(ended[0][1])["memorisation"]
    assert [each["worst"] for each in one["spaces"]] == [each["worst"] for each in three["spaces"]]
    assert one == three and (tmp_path / "three" / FILE).exists()


def test_the_command_says_it_or_leaves_it_out(call, tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=open_source("digits").images[:60].permute(0, 2, 3, 1).numpy())
    words = ["eval", tmp_path / "samples.npz", "digits", "--features", NAME, "--metric", "frechet"]
    code, out, err = call(*words)
    assert code == 0, err
    assert "memorisation: samples nearer to a training image than the closest 1 % of" in out
    assert "More samples are near to training images than new images would be (100 % in pixels where" in out
    code, out, _ = call(*words, "--no-memorisation")
    assert code == 0 and "memorisation" not in out


class Knows(nn.Module):
    """E[x_0 | x_t] of data that are these images, each with noise of `width`: it has learnt them by heart."""

    def __init__(self, process, images, width=0.03):
        super().__init__()
        self.process, self.images, self.width = process, to_float(images).flatten(1).to(F64), width

    def forward(self, x, time, cond):
        t = (time.to(F64) + 1) / self.process.steps
        alpha, sigma = self.process.alpha(t).reshape(-1, 1), self.process.sigma(t).reshape(-1, 1)
        flat, spread = x.flatten(1).to(F64), (alpha * self.width).square() + sigma.square()
        far = (flat[:, None] - alpha[:, None] * self.images).square().sum(2)
        share = (-far / (2 * spread)).softmax(1)
        x_0 = (share @ self.images * sigma.square() + alpha * self.width**2 * flat) / spread
        return x_0.reshape(x.shape).to(x)


@pytest.mark.parametrize("known", ["the training images", "other images"])
def test_a_model_that_knows_fifty_training_images_is_caught(digits, known):
    """And one that knows other images of the same law is not, though its samples are as sharp."""
    data, held_out, new = digits
    data, process = data.subset(slice(0, 50)), Linear(50, 0.002, 0.4)
    images = data.images if known == "the training images" else new.images
    network = Denoiser(Knows(process, images), process, X0(), FixedSmall())
    model = Model(ModelConfig((1, 8, 8), process, X0(), FixedSmall(), UNet()), network, {})
    found = firsts(judged(ArraySource(model.sample(300, seed=1)), data, beside(held_out)))
    for rate in found.values():
        if images is data.images:
            assert rate.rate > 0.9 and rate.low > 0.5 and rate.is_more and rate.p < 1e-20
        else:
            assert not rate.is_more and rate.low < rate.expected < rate.high


@pytest.mark.long
def test_a_model_that_was_trained_on_fifty_images_is_caught(digits, tmp_path):
    """And the same model after 60 steps, which has learnt little, is not."""
    data, held_out, _ = digits
    data = data.subset(slice(0, 50))
    settings = ["data.size=8", "network.channels=16", "train.batch=50", "train.held_out=0", "train.lr=2e-3"]
    settings += ["process.steps=50", "train.warmup=20", "train.ema=0.98", "train.precision=float32"]
    rates = {}
    for steps in (60, 1600):
        model = train(
            data, tmp_path / str(steps), "digits", steps=steps, settings=settings, device="cpu", show_progress=False
        )
        rates[steps] = firsts(judged(ArraySource(model.sample(200, seed=1)), data, beside(held_out)))
    for name, rate in rates[1600].items():
        assert rate.is_more and rate.rate > 0.5 and rate.low > rate.expected_high, (name, rate)
    assert not any(rate.is_more for rate in rates[60].values())
