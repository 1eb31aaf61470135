"""What one step tells the network, draws and minimises, each against a formula: never the run against itself."""

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from tests.training.test_loop import recipe
from undiffuse.diffusion.objective import Loss, Objective
from undiffuse.errors import NotFiniteError
from undiffuse.key import Key
from undiffuse.model.average import exponent
from undiffuse.model.model import to_float
from undiffuse.network.base import NOTHING
from undiffuse.training import health, look
from undiffuse.training.trainer import Trainer

PLAIN = {"network": {"dropout": 0.0}, "data": {"flip": False}}


@dataclass(frozen=True)
class Notes(Objective):
    """Runs no network: notes what it is given, and one number of the generator that dropout draws from."""

    seen: ClassVar[list[tuple[torch.Tensor, torch.Tensor | None, float]]] = []

    def __call__(self, denoiser, x_0, cond, keys):
        self.seen.append((x_0, cond.label, float(torch.rand(()))))
        nothing = sum(weight.sum() for weight in denoiser.network.parameters()) * 0
        return Loss(x_0.flatten(1).mean(1) + nothing, {}, torch.zeros(len(x_0)))


@pytest.fixture
def seen(monkeypatch):
    monkeypatch.setattr(Notes, "seen", [])
    return Notes.seen


def made(source, instead=None, **sections) -> Trainer:
    merged = {name: {**PLAIN.get(name, {}), **sections.get(name, {})} for name in PLAIN.keys() | sections.keys()}
    merged["train"] = {"precision": "float32", **merged.get("train", {})}
    chosen = recipe(**merged)
    chosen = chosen if instead is None else replace(chosen, objective=instead)
    return Trainer(chosen, chosen.model((1, 8, 8), len(source.classes)), source)


def told(trainer: Trainer, steps: int) -> torch.Tensor:
    """The labels that the network is told, [steps, batch]."""
    before = len(Notes.seen)
    for trainer.step in range(steps):
        trainer.loss(trainer.batches.at(trainer.step), slice(0, trainer.share))
    return torch.stack([label for _, label, _ in Notes.seen[before:]])


@pytest.mark.parametrize("micro", [8, 3])
@pytest.mark.parametrize("drop, kept", [(0.0, True), (1.0, False)])
def test_each_image_comes_with_its_own_label_or_with_none(data, seen, micro, drop, kept):
    """In every micro-batch, not in the first alone; with `drop_label` 1 all are told "no class", which is number 10."""
    one = made(data, Notes(), data={"labels": True}, train={"drop_label": drop, "micro_batch": micro})
    index = one.batches.at(0).index
    one.update(6)
    images, labels = (torch.cat([noted[part] for noted in seen]) for part in (0, 1))
    assert torch.equal(images, to_float(data.images[index]))
    assert torch.equal(labels, data.labels[index] if kept else torch.full((8,), 10))


def test_a_label_is_dropped_as_often_as_asked_and_not_always_of_the_same_rows(data, seen):
    """In 400 steps a row loses its label 80 times, give or take 4.5 standard deviations of 8."""
    dropped = told(made(data, Notes(), data={"labels": True}, train={"drop_label": 0.2}), 400) == 10
    assert ((dropped.sum(0) - 80).abs() < 4.5 * 8).all()
    rows = dropped.double() - 0.2
    assert (rows.T @ rows / 400 / 0.16 - torch.eye(8)).abs().max() < 0.25  # one row does not follow another


def test_fixed_images_come_with_their_own_labels(data, seen):
    """Held-out ones, spread over their set, and the first of the training set; none loses its label."""
    one = made(data, Notes(), data={"labels": True}, train={"drop_label": 1.0, "micro_batch": 5})
    look.held_out_loss(one, look.held_out_images(one, data))  # of 64 images 16, each with 16 noises
    images, labels = (torch.cat([noted[part] for noted in seen]) for part in (0, 1))
    index = 4 * (torch.arange(256) % 16)
    assert torch.equal(images, to_float(data.images[index])) and torch.equal(labels, data.labels[index])
    seen.clear()
    health.fixed_loss(one, averaged=False)
    images, labels = (torch.cat([noted[part] for noted in seen]) for part in (0, 1))
    assert torch.equal(images, to_float(data.images[:16])) and torch.equal(labels, data.labels[:16])


def test_without_labels_the_network_is_told_none(data, seen):
    one = made(data, Notes())
    one.update(6)
    assert seen[0][1] is None


def test_dropout_is_drawn_anew_in_each_micro_batch_and_step(data, seen):
    one = made(data, Notes(), train={"micro_batch": 2})
    for _ in range(2):
        one.update(6)
    assert len({number for *_, number in seen}) == len(seen) == 8
    again = made(data, Notes(), train={"micro_batch": 2})
    again.step = 1
    again.update(6)
    assert [number for *_, number in seen[8:]] == [number for *_, number in seen[4:8]]  # by the step alone
    other = made(data, Notes(), train={"micro_batch": 2, "seed": 1})
    other.update(6)
    assert seen[12][2] != seen[0][2]


def noise(seed: int, step: int, rows: int = 8):
    return Key(seed).fold("train", "noise", step).rows(rows)


@pytest.mark.parametrize("micro", [8, 3])
def test_the_loss_of_a_fresh_network_is_the_mean_square_of_the_noise(data, micro):
    """It answers nearly 0, so that nothing but eps is left, and that is keyed by seed, step and row."""
    one = made(data, train={"micro_batch": micro, "seed": 3, "lr": 1e-30})
    for step in range(2):
        expected = noise(3, step).fold("eps").normal(1, 8, 8).square().mean()
        assert one.update(6)["loss"] == pytest.approx(float(expected), rel=1e-5)


LEARNED = {"variance": {"name": "learned-range"}, "objective": {"name": "hybrid"}}


@pytest.mark.parametrize("sections", [{"objective": {"name": "vlb"}}, LEARNED], ids=["vlb", "hybrid"])
def test_the_bound_is_trained_without_clipping(data, sections):
    """The x̂_0 = x_t/alpha of a fresh network leaves [−1, 1], where a clipped one would have no gradient."""
    one = made(data, **sections)
    index = one.batches.at(0).index
    fresh = one.config.build(clip=False)
    fresh.network.load_state_dict(dict(zip(one.names, one.weights, strict=True)))
    found = []
    for fresh.clip in (False, True):
        loss = one.recipe.objective(fresh, to_float(data.images[index]), NOTHING, noise(0, 0))
        found.append(float(loss.per_example.detach().mean()))
    assert found[1] != pytest.approx(found[0], rel=1e-3)
    assert one.update(6)["loss"] == pytest.approx(found[0], rel=1e-5)


def begun(one: Trainer) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """The first weights, and those after each of three updates with their gradients."""
    first, history = [weight.detach().clone() for weight in one.weights], []
    for _ in range(3):
        one.update(6)
        history.append([(weight.detach().clone(), weight.grad.clone()) for weight in one.weights])
    return first, history


def test_the_weights_move_as_adam_moves_them(data):
    """Kingma & Ba 2015, Algorithm 1, with the rates of the warm-up: 0, half and the whole of it."""
    one = made(data, train={"lr": 1e-2, "warmup": 2, "betas": [0.8, 0.95]})
    first, history = begun(one)
    for i, weight in enumerate(first):
        w, m, v = weight.double(), 0.0, 0.0
        for t, rate in enumerate((0.0, 0.5e-2, 1e-2), 1):
            gradient = history[t - 1][i][1].double()
            m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
            w = w - rate * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        torch.testing.assert_close(history[2][i][0].double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ramp", [False, True])
def test_the_average_after_three_updates_by_formula(data, ramp):
    """With the ramp 1/10, 2/11 and 3/12 of the average stay; else 0.9 each time."""
    one = made(data, train={"lr": 1e-2, "warmup": 0, "ema": 0.9, "ema_ramp": ramp, "ema_profiles": [0.1]})
    shadow, history = begun(one)
    for n, after in enumerate(history):
        decay = (1 + n) / (10 + n) if ramp else 0.9
        shadow = [decay * old + (1 - decay) * weight for old, (weight, _) in zip(shadow, after, strict=True)]
    for expected, found in zip(shadow, one.ema.shadow, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    share = [(k / 3) ** (exponent(0.1) + 1) for k in range(4)]  # of the profile: that of the first k updates
    for i, found in enumerate(one.profiles.shadows[0.1]):
        expected = sum((share[k + 1] - share[k]) * after[i][0] for k, after in enumerate(history))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_norm_that_is_told_is_that_before_clipping(data):
    free, bound = (made(data, train={"clip_norm": bound}) for bound in (1e9, 1e-3))
    told = [one.update(6)["grad_norm"] for one in (free, bound)]
    squares = sum(weight.grad.double().square().sum() for weight in free.weights)
    assert told == pytest.approx([float(squares.sqrt())] * 2, rel=1e-5)


@dataclass(frozen=True)
class Odd(Objective):
    """An infinite loss with a gradient of 0, or the other way round."""

    kind: str = ""

    def __call__(self, denoiser, x_0, cond, keys):
        weight = denoiser.network.conv_in.weight.sum() * 0
        extra = {"loss": weight + float("inf"), "gradient": weight.abs().sqrt(), "": weight}[self.kind]
        return Loss(x_0.flatten(1).mean(1) + extra, {}, torch.zeros(len(x_0)))


@pytest.mark.parametrize("kind, message", [("loss", "the loss is inf and"), ("gradient", "and the gradient norm nan")])
def test_a_loss_and_a_gradient_that_is_not_finite_each_stop_the_step(data, kind, message):
    one = made(data, Odd(kind))
    with pytest.raises(NotFiniteError, match=message):
        one.update(6)
    assert one.step == 0 and not one.optimizer.state


@dataclass(frozen=True)
class Bad(Objective):
    """A loss that is NaN for the black images."""

    def __call__(self, denoiser, x_0, cond, keys):
        black = x_0.flatten(1).amax(1) == -1
        weight = denoiser.network.conv_in.weight.sum()
        return Loss(torch.where(black, float("nan"), weight * 1.0), {}, torch.zeros(len(x_0)))


@pytest.mark.parametrize("micro", [8, 3])
def test_the_examples_whose_loss_is_not_finite_are_named_and_no_others(data, micro):
    images = data.images.clone()
    images[[5, 40]] = 0
    one = made(replace(data, images=images), Bad(), train={"micro_batch": micro})
    one.step = next(step for step in range(8) if {5, 40} & set(one.batches.at(step).index.tolist()))
    bad = [i for i in one.batches.at(one.step).index.tolist() if i in (5, 40)]
    with pytest.raises(NotFiniteError, match=re.escape(f"examples {bad}") + "$"):
        one.update(6)


def test_the_first_weights_follow_from_the_seed_alone(data):
    firsts = []
    for seed, before in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(before)
        firsts.append(made(data, train={"seed": seed}).weights[0].detach())
    assert torch.equal(firsts[0], firsts[1]) and not torch.equal(firsts[0], firsts[2])


def test_fine_tuning_begins_with_the_average_of_the_other_in_both(data):
    """Its own average too: else a short run would be averaged with weights that were never trained."""
    one, other = made(data), made(data, train={"seed": 1, "ema": 0.5, "warmup": 0})
    other.update(6)
    one.start_from(other.model())
    for weight, shadow, expected in zip(one.weights, one.ema.shadow, other.ema.shadow, strict=True):
        assert torch.equal(weight, expected) and torch.equal(shadow, expected)
    assert not torch.equal(other.weights[0], other.ema.shadow[0])


@pytest.mark.parametrize("precision, type", [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_is_that_of_the_products(data, monkeypatch, precision, type):
    """Of those of the network; its answer and all around it are float32."""
    one, seen = made(data, train={"precision": precision}), []
    for layer in one.denoiser.network.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            layer.register_forward_hook(lambda layer, given, found: seen.append(found.dtype))
    whole, losses = one.loss, []
    one.loss = lambda *given: losses.append(whole(*given)) or losses[-1]
    one.update(6)
    assert set(seen) == {type} and losses[0][0].dtype == torch.float32


def test_what_is_restored_is_each_tensor_that_was_saved(data):
    """With a number of its own in each, so that none can stand for another."""
    one = made(data, train={"ema_profiles": [0.05, 0.1]})
    one.update(6)
    shapes = {part: {name: t.shape for name, t in named.items()} for part, named in one.tensors().items()}
    assert {part: len(named) for part, named in shapes.items()} == {
        "model": (n := len(one.weights)), "ema": n, "adam": 3 * n, "profiles": 2 * n
    }  # fmt: skip
    numbers = iter(range(1, 1000))
    saved = {
        part: {name: torch.full(s, next(numbers) / 8) for name, s in named.items()} for part, named in shapes.items()
    }
    one.restore(saved, 41)
    assert one.step == 41
    for part, named in one.tensors().items():
        assert named.keys() == saved[part].keys()
        assert [name for name, tensor in named.items() if not torch.equal(tensor, saved[part][name])] == []


@pytest.mark.parametrize(
    "given, micro", [({}, 8), ({"micro_batch": 3}, 3), ({"micro_batch": 99}, 8), ({"exact_shards": 4}, 2)]
)
def test_the_environment_names_the_micro_batch_that_is_run(data, seen, given, micro):
    one = made(data, Notes(), train=given)
    one.update(6)
    assert one.environment()["micro_batch"] == one.micro == len(seen[0][0]) == micro
