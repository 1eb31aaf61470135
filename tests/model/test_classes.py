"""Labels: what may be said, what is drawn, and that every way to use a model tells the network the right ones."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.test_loop import recipe, run
from undiffuse.config import plain
from undiffuse.data.source import ArraySource, Item, Source
from undiffuse.data.subset import Subset
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.parameterisation import X0
from undiffuse.diffusion.process import Linear
from undiffuse.diffusion.reverse import FixedLarge
from undiffuse.errors import Corrupt, DataError, UsageError
from undiffuse.key import Key
from undiffuse.measure import nll
from undiffuse.model.classes import Classes, drawn, told, told_of
from undiffuse.model.load import load, save
from undiffuse.model.model import Model
from undiffuse.model.recipe import ModelConfig, parse
from undiffuse.network.base import Conditioning
from undiffuse.network.unet import UNet
from undiffuse.training import health, look
from undiffuse.training.trainer import Trainer
from undiffuse.view import explore

PETS = Classes(("cat", "dog", "2", "horse"), (10, 20, 10, 60), unlabelled=True)
RARE = Classes(PETS.names, (10, 0, 30, 60), unlabelled=False)  # no dog was trained on
ALWAYS = Classes(PETS.names, PETS.counts, unlabelled=False)
WORDS = Classes(("all", "none", "random"), (1, 1, 1), unlabelled=False)


@pytest.mark.parametrize(
    "classes, label, expected, words",
    [
        (PETS, None, None, "none"),
        (PETS, "none", None, "none"),
        (None, None, None, "none"),
        (None, "none", None, "none"),
        (PETS, "dog", [1] * 8, "1 dog"),
        (PETS, 1, [1] * 8, "1 dog"),
        (PETS, "3", [3] * 8, "3 horse"),
        (PETS, "2", [2] * 8, "2"),
        (Classes(("5", "2"), (1, 1), True), "2", [1] * 8, "1 2"),  # a name before a number
        (PETS, np.int64(3), [3] * 8, "3 horse"),
        (PETS, torch.tensor(3), [3] * 8, "3 horse"),
        (ALWAYS, "all", [0, 0, 1, 1, 2, 2, 3, 3], "all"),
        (PETS, [0, "none", None, "cat", 0, 0, 0, 0], [0, 4, 4, 0, 0, 0, 0, 0], "as given"),
        (PETS, [0, 1, "dog", 3, 3, 2, 1, 0], [0, 1, 1, 3, 3, 2, 1, 0], "as given"),
        (PETS, torch.arange(8) % 4, [0, 1, 2, 3] * 2, "as given"),
        (PETS, np.arange(8) % 4, [0, 1, 2, 3] * 2, "as given"),
        (WORDS, "all", [0] * 8, "0 all"),
        (WORDS, "none", [1] * 8, "1 none"),
        (WORDS, "random", [2] * 8, "2 random"),
    ],
)
def test_what_a_label_may_be(classes, label, expected, words):
    found = told(classes, label, 8)
    assert (found.label if found.label is None else found.label.tolist(), found.words) == (expected, words)


KNOWN = r"This model knows 0 cat, 1 dog, 2, 3 horse$"


@pytest.mark.parametrize(
    "classes, label, message",
    [
        (PETS, "hors", rf'label hors is not possible. Did you mean "horse"\? {KNOWN}'),
        (PETS, 4, rf"label 4 is not possible. {KNOWN}"),
        (PETS, "12", rf"label 12 is not possible. {KNOWN}"),
        (PETS, "", rf"label '' is not possible. {KNOWN}"),
        (PETS, True, rf"label True is not possible. {KNOWN}"),
        (RARE, "dog", "label 1 dog is not possible: no picture of that class was trained on"),
        (RARE, 1, "label 1 dog is not possible: no picture of that class was trained on"),
        (RARE, [0, 2, None, 3, 3, 2, 1, 0], rf"label none is not possible: this model was never trained so. {KNOWN}"),
        (PETS, "-1", rf"label -1 is not possible. {KNOWN}"),
        (PETS, [0.5] * 8, rf"label 0.5 is not possible. {KNOWN}"),
        (PETS, [1, 2], "2 labels were given for 8 images; give one for each, or a single one"),
        (ALWAYS, None, rf"this model was never trained without a label; give one, all or random. {KNOWN}"),
        (ALWAYS, "none", rf"label none is not possible: this model was never trained so. {KNOWN}"),
        (None, "dog", "label dog is not possible: this model was trained without labels"),
        (None, "all", "label all is not possible: this model was trained without labels"),
        (Classes(("a", "b", "c"), (1, 1, 1), True), "all", "8 images cannot be divided over 3 classes"),
        (Classes.unknown(1000, True), 1000, r"knows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 … 999 999$"),
    ],
)
def test_a_label_that_is_not_possible(classes, label, message):
    with pytest.raises(UsageError, match=message):
        told(classes, label, 8)


def test_random_labels_are_as_frequent_as_in_training():
    """By inversion of the distribution function, image by image."""
    uniform = Key(3).fold("label").rows(4000).uniform().numpy()
    expected = np.select([uniform < 0.1, uniform < 0.4], [0, 2], 3)
    found = drawn(RARE, 4000, seed=3).label
    assert found.tolist() == expected.tolist()
    assert found[:7].tolist() == told(RARE, "random", 7, seed=3).label.tolist()
    assert drawn(RARE, 4000, seed=4).label.tolist() != found.tolist()


def test_all_are_those_that_had_pictures():
    assert told(RARE, "all", 6).label.tolist() == [0, 0, 2, 2, 3, 3]
    assert listening(RARE)[0].count(2, "all") == 6 and listening(PETS)[0].count(2, "all") == 8
    assert RARE.untrained() == "1 dog" and PETS.untrained() == ""
    source = ArraySource(images(1), torch.tensor([0]), ("dog",))
    with pytest.raises(DataError, match='the data has classes that the model was not trained on: "dog". This model'):
        told_of(RARE, source, torch.tensor([0]))


def images(n: int = 8) -> torch.Tensor:
    return torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1).expand(n, 1, 4, 4).contiguous()


class Ours(Source):
    """A user's own source: labels, but no names of classes."""

    classes = None

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Item:
        return Item(images()[index], (index * 2) % 3)

    def fingerprint(self) -> str:
        return "0" * 64


def test_the_classes_of_a_training_set():
    source = ArraySource(images(), torch.tensor([0, 0, 2, 2, 2, 1, 0, 2]), ("a", "b", "c", "d"))
    assert Classes.of(source, False) == Classes(("a", "b", "c", "d"), (3, 1, 4, 0), False)
    assert Classes.of(Subset(source, torch.tensor([5, 2])), True).counts == (0, 1, 1, 0)
    assert Classes.of(Ours(), True) == Classes(("0", "1", "2"), (2, 1, 1), True)
    assert Classes.of(ArraySource(images()), True) is None
    with pytest.raises(DataError, match="labels 0 to 2 for 2 classes; number them from 0"):
        Classes.of(ArraySource(images(), source.labels, ("a", "b")), True)


def test_the_labels_of_measured_data_are_matched_by_name():
    other = ArraySource(images(4), torch.tensor([2, 0, 1, 2]), ("horse", "2", "cat"))
    found = told_of(PETS, other, torch.tensor([0, 1, 3]))
    assert (found.label.tolist(), found.words) == ([0, 3, 0], "of the data")
    assert told_of(PETS, other, torch.arange(4), "dog").label.tolist() == [1] * 4
    assert told_of(None, other, torch.arange(4)).label is None
    bare = ArraySource(images(4))
    assert told_of(PETS, bare, torch.arange(4)).words == "none"
    found = told_of(ALWAYS, bare, torch.arange(4), seed=5)
    assert found.label.tolist() == drawn(ALWAYS, 4, 5).label.tolist() and found.words.startswith("random")
    strange = ArraySource(images(4), torch.tensor([2, 0, 1, 2]), ("horse", "cow", "cat"))
    assert told_of(PETS, strange, torch.tensor([0, 1])).label.tolist() == [0, 3]
    with pytest.raises(DataError, match=r'the data has classes that the model was not trained on: "cow". This model'):
        told_of(PETS, strange, torch.arange(4))
    for labels in ([0, -1], [0, 2]):
        from_python = ArraySource(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor(labels), ("cat", "dog"))
        with pytest.raises(DataError, match=f"data has labels {min(labels)} to {max(labels)} for 2 classes; num"):
            told_of(PETS, from_python, torch.arange(2))


class Listener(nn.Module):
    """Says nothing, and writes down what it is told of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[list[int] | None] = []

    def forward(self, x, time, cond):
        assert isinstance(cond, Conditioning)
        self.heard.append(None if cond.label is None else cond.label.tolist())
        return torch.zeros_like(x)


def listening(classes: Classes = ALWAYS) -> tuple[Model, list[Any]]:
    config = ModelConfig(
        (1, 4, 4), Linear(6, 0.01, 0.5), X0(), FixedLarge(), UNet(8, (1,), attention=()), len(classes.names)
    )
    network = Listener()
    denoiser = Denoiser(network, config.process, config.parameterisation, config.variance).eval()
    return Model(config, denoiser, {"classes": plain(classes)}), network.heard


def test_every_chain_tells_the_network_its_labels():
    model, heard = listening()
    model.sample(5, steps=2, batch=3, label=["cat", "dog", 3, 2, "cat"])
    assert heard == [[0, 1, 3]] * 2 + [[2, 0]] * 2
    heard.clear()
    assert len(model.sample(2, steps=1, label="all")) == 8 and heard == [[0, 0, 1, 1, 2, 2, 3, 3]]
    for draw in (
        lambda **told: explore.progressive(model, 2, steps=3, slots=2, **told),
        lambda **told: explore.shared(model, 2, at=(0.5,), steps=3, **told),
        lambda **told: explore.interpolate(model, *images(2), at=(0.5,), steps=3, **told),
    ):
        heard.clear()
        draw(label="horse")
        assert heard and all(labels and set(labels) == {3} for labels in heard)
        heard.clear()
        with pytest.raises(UsageError, match="never trained without a label; give one, all or random"):
            draw()
        assert heard == []
    for draw in (explore.shared, lambda model, n, label: explore.interpolate(model, *images(2), label=label)):
        with pytest.raises(UsageError, match="label all is not possible here, where all images come of one latent"):
            draw(model, 2, label="all")
    heard.clear()
    pictures, _ = explore.progressive(model, 1, steps=2, slots=1, label="all")
    assert len(pictures) == 4 and all(labels == [0, 1, 2, 3] for labels in heard)


def test_where_no_class_was_trained_none_is_said():
    model, heard = listening(PETS)
    model.sample(2, steps=1)
    explore.shared(model, 2, at=(0.5,), steps=2)
    assert set(map(str, heard)) == {"None"}


def test_bits_per_dim_are_those_of_the_labels(tmp_path):
    model, heard = listening()
    source = ArraySource(images(5), torch.tensor([1, 0, 0, 1, 1]), ("dog", "horse"))
    query = nll.Nll(draws=2, batch=3)
    terms = nll.terms_of(model, source, query, tmp_path)
    assert heard == [[3, 1, 1]] * 2 + [[3, 3]] * 2
    assert nll.summary(terms, model, source, query)["labels"] == "of the data"
    assert json.loads((tmp_path / "summary.json").read_text())["labels"] == "of the data"
    with pytest.raises(UsageError, match=r"holds another measurement \(other labels\)"):
        nll.terms_of(model, source, nll.Nll(draws=2, batch=3, label="cat"), tmp_path)
    heard.clear()
    nll.terms_of(model, source, nll.Nll(draws=1, label="cat"))
    assert heard == [[0] * 5]
    heard.clear()
    nll.terms_of(model, ArraySource(images(50)), nll.Nll(draws=1, seed=9))
    assert heard == [drawn(ALWAYS, 50, 9).label.tolist()]


def test_what_a_run_looks_at_is_told_too(data, monkeypatch, tmp_path):
    """The held-out loss is the objective's own, by hand; previews draw labels as often as in training."""
    chosen = recipe(data={"labels": True}, train={"drop_label": 0.0, "held_out": 6})
    digits = ArraySource(data.images[:40], data.labels[:40], tuple("0123456789"))
    trainer = Trainer(chosen, chosen.model((1, 8, 8), 10), digits)
    redraw(trainer)
    held = look.held_out_images(trainer, digits)
    index = [i * 40 // 6 for i in range(6)]
    assert torch.equal(held.images, digits.images[index]) and torch.equal(held.cond.label, digits.labels[index])
    rows = torch.arange(6 * -(-look.TERMS // 6))
    denoiser = trainer.model().denoiser
    denoiser.clip = False
    x_0 = held.images[rows % 6].float() / 127.5 - 1
    for cond, same in ((held.cond.at(rows % 6), True), (Conditioning(), False)):
        expected = chosen.objective(denoiser, x_0, cond, Key(0).fold("held out").rows(rows)).per_example.mean()
        assert (look.held_out_loss(trainer, held) == pytest.approx(float(expected), rel=1e-5)) == same
    heard = []

    def chain(self, keys, times, sampler, cond, progress):
        heard.append(cond.label)
        return torch.zeros(len(keys.rows), 1, 8, 8)

    monkeypatch.setattr(Model, "chain", chain)
    look.save_grids(trainer, tmp_path, look.sink.Nowhere(), lambda n: None)
    counts = Classes.of(digits, False)
    half = len(heard) // 2  # the averaged weights, then the raw ones
    assert torch.cat(heard[:half]).tolist() == drawn(counts, 64).label.tolist()
    assert health.fixed_loss(trainer, True) > 0


def redraw(trainer: Trainer) -> None:
    """Weights that answer differently for each class."""
    with torch.no_grad():
        for i, weight in enumerate(trainer.weights):
            weight.add_(Key(i).normal(*weight.shape), alpha=0.2)
        for weight, shadow in zip(trainer.weights, trainer.ema.shadow, strict=True):
            shadow.copy_(weight)


@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_a_model_remembers_its_classes(tmp_path, data, drop):
    named = ArraySource(data.images[:30], data.labels[:30], tuple(f"digit {i}" for i in range(10)))
    chosen = recipe(data={"labels": True}, train={"drop_label": drop, "steps": 1, "sample_every": 0})
    run(chosen, named, tmp_path / "run")
    save(load(tmp_path / "run"), tmp_path / "one.safetensors")
    for where in ("run", "one.safetensors"):
        model = load(tmp_path / where)
        assert model.classes.names[3] == "digit 3" and model.classes.unlabelled is (drop > 0)
        assert model.classes.counts == tuple(data.labels[:30].bincount(minlength=10).tolist())
        assert "0 digit 0, 1 digit 1" in model._repr_html_()
        assert torch.equal(model.sample(1, steps=2, label="digit 3"), model.sample(1, steps=2, label=3))


def test_metadata_that_contradicts_itself_is_refused():
    model, _ = listening()
    broken = Model(model.config, model.denoiser, {"classes": plain(Classes(("a",), (1,), True))})
    with pytest.raises(Corrupt, match="this model has 4 classes and names for 1; it is damaged"):
        _ = broken.classes
    old = Model(model.config, model.denoiser, {"recipe": {"train": {"drop_label": 0.0}}})
    assert old.classes == Classes(("0", "1", "2", "3"), (1, 1, 1, 1), False)


def test_labels_without_names_are_trained(tmp_path):
    chosen = recipe(data={"labels": True, "size": 4}, train={"steps": 1, "batch": 2, "sample_every": 0, "held_out": 0})
    assert run(chosen, Ours(), tmp_path).config.classes == 3
    with pytest.raises(UsageError, match="data.labels is on, but this data has no labels; use two or more folders of"):
        run(chosen, ArraySource(images()), tmp_path / "bare")
    assert parse(Classes, plain(PETS), "here") == PETS
