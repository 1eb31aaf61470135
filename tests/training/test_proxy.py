"""Proxy scores of a run on its way: what they are, what they cost, and that they leave the run as it is."""

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from tests.training.test_loop import assert_equal, recipe, run, state
from undiffuse.data.source import ArraySource
from undiffuse.diffusion.sampler.ddim import DDIM
from undiffuse.errors import DataError, NotFiniteError, UsageError
from undiffuse.key import Key
from undiffuse.machine.log import read_rows
from undiffuse.machine.sink import Nowhere
from undiffuse.machine.watch import Asked
from undiffuse.model.load import load
from undiffuse.model.model import to_uint8
from undiffuse.quality.feature.base import Extractor, FeatureExtractor
from undiffuse.quality.metric.base import Features
from undiffuse.training import loop, proxy
from undiffuse.training.plan import conflicts
from undiffuse.training.trainer import Trainer

HERE = "tests.training.test_proxy:Halves"
SCORED = {"eval_every": 2, "eval_images": 20, "eval_steps": 5, "eval_features": HERE}


@dataclass(frozen=True)
class Halves(FeatureExtractor):
    """The mean of the upper and of the lower half."""

    title: ClassVar[str] = "FD-halves"

    def open(self, device: torch.device) -> Extractor:
        def network(images):
            return Features(images.float().unflatten(2, (2, -1)).mean((1, 3, 4)) / 255)

        return Extractor("halves", self.title, "0" * 64, "none", (8, 8), 1, {"pool": 2}, network, device)


def scored(**changes):
    return recipe(train={**SCORED, **changes})


def rows_of(out) -> list[dict[str, Any]]:
    return [row for row in read_rows(out / "log.jsonl") if "proxy" in row]


def halves(images) -> np.ndarray:
    return (images.double().unflatten(2, (2, -1)).mean((1, 3, 4)) / 255).numpy()


def test_the_scores_are_those_of_samples_beside_training_images(tmp_path, data):
    """The Fréchet distance of two dimensions in closed form, and the kernel distance as a mean over pairs."""
    run(scored(), data, tmp_path)
    row, model = rows_of(tmp_path)[-1], load(tmp_path)
    x = model.chain(Key(0).fold("proxy").rows(20), model.times(5), DDIM())
    ours, real = halves(to_uint8(x)), halves(data.gather(torch.arange(64))[0])
    a, b = np.cov(ours.T), np.cov(real.T)
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))  # trace of a 2×2 matrix's root
    apart = ours.mean(0) - real.mean(0)
    assert row["proxy_fd"] == pytest.approx(apart @ apart + np.trace(a) + np.trace(b) - 2 * cross, rel=1e-5)

    def kernel(p, q):
        return (p @ q.T / 2 + 1) ** 3

    within = [(kernel(z, z).sum() - np.trace(kernel(z, z))) / len(z) / (len(z) - 1) for z in (ours, real)]
    assert row["proxy_kd"] == pytest.approx(sum(within) - 2 * kernel(ours, real).mean(), rel=1e-4)
    protocol = {"extractor": "halves", "sha256": "0" * 64, "resize": "none", "images": 20, "steps": 5}
    assert row["step"] == 6 and row["proxy"] == {**protocol, "solver": "ddim", "real": 64}


def test_a_run_has_the_same_bits_with_and_without(tmp_path, data):
    run(recipe(), data, tmp_path / "without")
    run(scored(eval_every=1), data, tmp_path / "with")
    assert_equal(state(tmp_path / "without", 6), state(tmp_path / "with", 6))


def test_a_run_that_goes_on_has_the_scores_of_an_unbroken_one(tmp_path, data):
    run(scored(), data, tmp_path / "whole")
    for last in (4, 6):
        run(scored(), data, tmp_path / "parts", budget=loop.Budget(steps=last))
    whole, parts = rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts")
    assert [row["step"] for row in whole] == [2, 4, 6] and parts == whole
    assert len({row["proxy_fd"] for row in whole}) == 3
    run(recipe(train={**SCORED, "eval_every": 0}), data, tmp_path / "parts", budget=loop.Budget(steps=8))
    assert rows_of(tmp_path / "parts") == whole  # how often to look may change


def test_what_is_said(tmp_path, data):
    said: list[str] = []
    loop.train(scored(eval_every=1), data, tmp_path, say=said.append, show_progress=False)
    assert (
        "proxy scores every 1 steps: FD-halves and KD-halves of 20 samples in 5 steps of ddim, beside 64 training "
        "images; `undiffuse eval` measures in full"
    ) in said
    lines = [line for line in said if line.startswith("proxy at step ")]
    assert len(lines) == 6 and lines[0].startswith("proxy at step 1: FD-halves 0.") and ", KD-halves " in lines[0]
    assert ["it took" in line for line in lines] == [True, True, False, False, False, False]
    assert "with the features of the training images" in lines[0] and "with the features" not in lines[1]


def test_the_cost_is_a_share_of_the_whole_time():
    made = proxy.Proxy(Halves().open(torch.device("cpu")), 512, 20, 1000)
    made.costs += [20.0, 12.0]
    assert made.cost(0.138) == "it took 12 s, and every 1,000 steps that is 8.0% of the time"


def test_sinks_are_told_the_numbers_alone(tmp_path, data):
    run(scored(), data, tmp_path, logs=["tensorboard"])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [each.step for each in events.Scalars("proxy_fd")] == [2, 4, 6]
    assert not [name for name in events.Tags()["scalars"] if "images" in name and name.startswith("proxy")]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"eval_features": "no-such"}, 'train.eval_every = 2 is not possible: features "no-such" is not known'),
        ({"eval_features": "classifier-28"}, "images of 8×8 cannot be seen by classifier-28, which takes 28×28"),
        ({"eval_features": "classifier-emoji"}, "images of 8×8 cannot be seen by classifier-emoji"),
        ({"eval_images": 1}, "train.eval_images = 1 is too few for a distance; set 2 or more"),
        (
            {"eval_steps": 21},
            "train.eval_every = 2 is not possible: steps = 21 is not possible; this model takes 1 to 20",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(tmp_path, data, changes, said):
    with pytest.raises((UsageError, DataError)) as error:
        run(scored(**changes), data, tmp_path / "run")
    assert said in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_distance_that_is_rarer_than_the_run_is_long_is_said():
    train = scored(eval_every=500).train
    assert conflicts(train, 100)[-1] == (
        "train.eval_every = 500 is more than the 100 steps, so that samples are scored at the end alone; set "
        "train.eval_every=10"
    )
    assert not [line for line in conflicts(train, 500) if "eval_every" in line]


def test_samples_that_cannot_be_had_do_not_end_a_run(tmp_path, data, capsys):
    chosen = scored()
    trainer = Trainer(chosen, chosen.model((1, 8, 8)), data)
    made = proxy.prepare(trainer)
    with torch.no_grad():
        for shadow in trainer.ema.shadow:
            shadow.copy_(shadow.sign() * 1e30)
    said: list[str] = []
    with pytest.raises(NotFiniteError):
        proxy.score(made, trainer, lambda n: None)
    proxy.tell(made, trainer, Nowhere(), 1.0, lambda n: None, said.append)
    assert said == [] and "no proxy score at step 0: the chain ended" in capsys.readouterr().err


def test_a_signal_leaves_them_undone(tmp_path, data):
    chosen = scored()
    trainer = Trainer(chosen, chosen.model((1, 8, 8)), data)
    ticks: list[int] = []

    def tick(n: int) -> None:
        ticks.append(n)
        if sum(ticks) == 3:
            raise Asked

    made = proxy.prepare(trainer)
    with pytest.raises(Asked):
        proxy.score(made, trainer, tick)
    assert made.costs == [] and sum(ticks) == 3


@pytest.mark.slow
def test_one_process_of_two_scores(tmp_path):
    from tests.machine.test_dist import finish, preset, start

    name = preset(tmp_path, steps=3, held_out=16)
    settings = {"eval_every": 2, "eval_images": 20, "eval_steps": 5, "eval_features": HERE}
    words = [word for key, value in settings.items() for word in ("--set", f"train.{key}={value}")]
    ended = finish(start(2, "train", "digits", "--preset", name, "--out", str(tmp_path / "run"), *words))
    assert [code for code, _, _ in ended] == [0, 0], ended
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "proxy" in row] == [2, 3]
    assert sum(err.count("proxy at step 2") for _, _, err in ended) == 1


def test_one_training_image_is_too_few(data):
    chosen = recipe(train={"precision": "float32", "eval_every": 2, "eval_features": HERE})
    trainer = Trainer(chosen, chosen.model(data.image_shape), ArraySource(data.images[:1]))
    with pytest.raises(UsageError, match="train.eval_every = 2 is not possible: 1 training image is too few"):
        proxy.prepare(trainer)
