"""What a run may begin with: a model that is the same function, with other labels, image sizes or dropout at most."""

from dataclasses import replace

import diffusers
import pytest
import torch

from undiffuse.config import parse, plain
from undiffuse.data.source import ArraySource
from undiffuse.errors import Corrupt, UsageError
from undiffuse.interop.diffusers import read_folder
from undiffuse.model.load import from_weights, load, parse_model, save
from undiffuse.model.model import Model
from undiffuse.model.recipe import ModelConfig, Recipe
from undiffuse.network.base import Conditioning
from undiffuse.training import loop
from undiffuse.training.resume import refuse_changes
from undiffuse.training.start import train
from undiffuse.training.trainer import Trainer
from undiffuse.training.tune import begin_with, refuse_another

NETWORK = {"name": "unet", "channels": 16, "multipliers": [1, 2], "blocks": 1, "attention": [1]}
MODEL = {
    "image": [3, 8, 8],
    "process": {"name": "linear", "steps": 20},
    "parameterisation": {"name": "eps"},
    "variance": {"name": "fixed-large"},
    "network": NETWORK,
}


def config(**sections) -> ModelConfig:
    parts = {
        name: {**MODEL[name], **each} if isinstance(each, dict) and "name" not in each else each
        for name, each in sections.items()
    }
    return parse(ModelConfig, {**MODEL, **parts}, "test")


def drawn(chosen: ModelConfig, seed: int = 0, meta=None) -> Model:
    """Weights that all matter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = chosen.build(clip=True).network.state_dict()
    tensors = {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in shapes.items()}
    return from_weights(chosen, tensors, meta or {})


def fresh(chosen: ModelConfig) -> dict[str, torch.Tensor]:
    return chosen.build(clip=True).network.state_dict()


@torch.no_grad()
def answer(chosen: ModelConfig, tensors, label=None):
    x = torch.randn(2, *chosen.image, generator=torch.Generator().manual_seed(9))
    label = None if label is None else torch.full((2,), label)
    return from_weights(chosen, tensors, {}).denoiser.network(x, torch.tensor([3.0, 15.0]), Conditioning(label=label))


@pytest.mark.parametrize(
    "there, here, message",
    [
        ({"network": {"groups": 2}}, {}, "network.groups is 2 there and 4 here; give --set network.groups=2, or no"),
        ({}, {"network": {"groups": 8}}, "network.groups is 4 there and 8 here"),
        ({"network": {"eps": 1e-5}}, {}, "network.eps is 1e-05 there and 1e-06 here"),
        ({"network": {"head": 8}}, {}, "network.head is 8 there and unset here; give --set network.head=8"),
        ({}, {"network": {"head": 8}}, "network.head is unset there and 8 here; give another model"),
        ({"network": {"frequency_shift": 0}}, {}, "network.frequency_shift is 0 there and 1 here"),
        ({"network": {"activation": "gelu"}}, {}, "network.activation is gelu there and silu here"),
        ({"network": {"centred": True}}, {}, "network.centred is true there and false here"),
        ({"network": {"middle_scale": 1.5}}, {}, "network.middle_scale is 1.5 there and 1.0 here"),
        ({"network": {"time": "logsnr"}}, {}, "network.time is logsnr there and index here"),
        ({"network": {"patch": 2}}, {}, "network.patch is 2 there and 1 here"),
        (
            {"network": {"multipliers": [1, 3]}},
            {},
            r"network.multipliers is \[1,3\] there and \[1,2\] here; give --set 'network.multipliers=\[1,3\]', or",
        ),
        (
            {"network": {"channels": 8}},
            {},
            "network.channels is 8 there and 16 here; give --set network.channels=8, or",
        ),
        ({"network": {"attention": [0]}}, {}, r"network.attention is \[0\] there and \[1\] here"),
        (
            {"process": {"name": "cosine", "steps": 20}},
            {},
            "process.name is cosine there and linear here; give --set process.name=cosine --set process.offset=0.008 "
            "--set process.beta_max=0.999, or",
        ),
        ({"process": {"steps": 1000}}, {}, "process.steps is 1000 there and 20 here; give --set process.steps=1000"),
        ({"process": {"beta_end": 0.3}}, {}, "process.beta_end is 0.3 there and 0.02 here"),
        ({"parameterisation": {"name": "v"}}, {}, "parameterisation.name is v there and eps here"),
        ({"variance": {"name": "learned"}}, {}, "variance.name is learned there and not learned here"),
        (
            {"variance": {"name": "learned"}},
            {"variance": {"name": "learned-range"}},
            "name is learned there and learned-",
        ),
        ({"image": [1, 8, 8]}, {}, "image channels is 1 there and 3 here; give another model, or no preset"),
    ],
)
def test_another_function_is_refused_and_both_sides_are_named(there, here, message):
    with pytest.raises(UsageError, match=f"the model to begin with is another function: .*{message}") as caught:
        refuse_another(config(**there), config(**here))
    assert "\n" not in str(caught.value)


def test_every_field_of_a_network_is_compared_but_dropout():
    """So a new one has to be compared, or to be named here."""
    assert set(plain(config().network)) - {"name"} <= config().network.meaning().keys() | {"dropout"}
    assert "dropout" not in config().network.meaning()


@pytest.mark.parametrize(
    "there, here",
    [
        ({"network": {"groups": 4}}, {}),  # as it is by default
        ({"network": {"embedding": 64, "attention_up": [1], "middle_groups": 4}}, {}),
        ({"network": {"multipliers": [1.0, 2.0]}}, {}),
        ({"network": {"attention": [1, 0]}}, {"network": {"attention": [0, 1]}}),
        ({"variance": {"name": "fixed-small"}}, {}),
        ({"process": {"beta_start": 1e-4}}, {}),
    ],
)
def test_the_same_function_in_other_words_is_not_refused(there, here):
    refuse_another(config(**there), config(**here))


def test_the_advice_is_followed_to_the_letter(tmp_path, data):
    """The settings that the message names make the run one that the model fits."""
    base = ["network.channels=16", "network.multipliers=[1,2]", "network.attention=[]", "network.blocks=1"]
    grey = replace(data, images=data.images[:, :1])
    first = config(image=[1, 8, 8], process={"name": "cosine", "steps": 20}, network={"groups": 2, "attention": []})
    model = drawn(first)

    def begin(out, settings):
        more = ["train.batch=8", "train.sample_every=0", "network.patch=1", *settings]
        return train(
            grey, out, "digits", steps=1, settings=more, init=model, show_progress=False, say=lambda text: None
        )

    with pytest.raises(UsageError, match="network.groups is 2 there and 4 here") as caught:
        begin(tmp_path / "a", base)
    advice = str(caught.value).split("give ")[1].split(",")[0]
    settings = advice.removeprefix("--set ").split(" --set ")
    assert begin(tmp_path / "b", [*base, *settings]).meta["step"] == 1


def test_a_model_of_diffusers_with_other_groups_is_refused(tmp_path):
    """32 channels in 16 groups, where a recipe that does not say has 8."""
    fields = {"sample_size": 8, "block_out_channels": (32, 64), "norm_num_groups": 16, "layers_per_block": 1}
    network = diffusers.UNet2DModel(**fields, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    network.save_pretrained(tmp_path)
    model = parse_model(*read_folder(tmp_path), "test")
    chosen = {"channels": 32, "multipliers": [1, 2], "blocks": 1, "attention": []}
    asked = replace(model.config, network=config(network=chosen).network)
    with pytest.raises(UsageError, match="network.groups is 16 there and 8 here"):
        begin_with(model, asked, {}, fresh(asked))
    assert begin_with(model, model.config, {}, fresh(model.config))[1] == []


def test_other_sizes_and_dropout_are_taken_and_said():
    model = drawn(config())
    asked = config(image=[3, 16, 8], network={"dropout": 0.2})
    weights, said = begin_with(model, asked, {}, fresh(asked))
    assert said == ["init: the images are 16×8 here, and were 8×8", "init: dropout is 0.2 here, and was 0"]
    assert all(torch.equal(weights[n], t) for n, t in model.denoiser.network.state_dict().items())


# --- labels ---


def test_an_unlabelled_model_gets_a_new_label_embedding():
    model, asked = drawn(config()), config(classes=3)
    start = fresh(asked)
    weights, said = begin_with(model, asked, {}, start)
    assert said == ["init: the model was trained without labels, so the embedding of 3 classes is new"]
    assert torch.equal(weights["label.weight"], start["label.weight"])
    assert all(torch.equal(weights[n], t) for n, t in model.denoiser.network.state_dict().items())


def test_a_labelled_model_goes_on_without_labels_as_it_is_for_no_class():
    model, asked = drawn(config(classes=3)), config()
    given = model.denoiser.network.state_dict()
    weights, said = begin_with(model, asked, {}, fresh(asked))
    assert said == ['init: the model was trained with labels, and goes on as it is for "no class"']
    torch.testing.assert_close(answer(asked, weights), answer(model.config, given), rtol=1e-5, atol=1e-5)
    assert (answer(asked, weights) - answer(model.config, given, 0)).abs().max() > 0.01


@pytest.mark.parametrize(
    "meta", [{"recipe": {"train": {"drop_label": 0.0}}}, {"classes": {"names": ["a", "b", "c"], "unlabelled": False}}]
)
def test_without_labels_there_must_have_been_training_without(meta):
    model = drawn(config(classes=3), meta=meta)
    with pytest.raises(UsageError, match="has labels and was never trained without; give --set data.labels=true"):
        begin_with(model, config(), {}, fresh(config()))


def names(*given):
    return {"classes": {"names": list(given), "unlabelled": True}}


@pytest.mark.parametrize(
    "before, now, rows",
    [
        (("cat", "dog", "owl"), ("cat", "dog", "owl"), {0: 0, 1: 1, 2: 2, 3: 3}),
        (("cat", "dog", "owl"), ("owl", "cat"), {0: 2, 1: 0, 2: 3}),
        (("cat", "dog", "owl"), ("ant", "cat", "dog", "owl"), {1: 0, 2: 1, 3: 2, 4: 3}),
        (("cat", "dog", "owl"), ("dog", "cat", "owl"), {0: 1, 1: 0, 2: 2, 3: 3}),
        (("cat", "dog", "owl"), ("a", "b", "c"), {3: 3}),
        (None, ("a", "b", "c"), {0: 0, 1: 1, 2: 2, 3: 3}),
        (None, ("a", "b"), {2: 3}),
    ],
)
def test_rows_of_labels_are_taken_where_the_names_agree(before, now, rows):
    model = drawn(config(classes=3), meta=None if before is None else names(*before))
    asked = config(classes=len(now))
    start = fresh(asked)
    weights, said = begin_with(model, asked, names(*now), start)
    given = model.denoiser.network.state_dict()["label.weight"]
    for row in range(len(now) + 1):
        expected = given[rows[row]] if row in rows else start["label.weight"][row]
        assert torch.equal(weights["label.weight"][row], expected)
    same = before == now or (before is None and len(now) == 3)
    kept = len(rows) - 1
    assert said == ([] if same else [f"init: of {len(now)} classes {kept} are the model's too; the embeddings of the "
                                     "others are new"])  # fmt: skip


def test_labels_that_are_told_as_numbers_begin_anew_with_other_classes():
    there, asked = config(classes=3, network={"label": "sinusoid"}), config(classes=2, network={"label": "sinusoid"})
    model, start = drawn(there), fresh(asked)
    weights, _ = begin_with(model, asked, {}, start)
    assert torch.equal(weights["label.dense.0.weight"], start["label.dense.0.weight"])
    weights, _ = begin_with(model, there, {}, fresh(there))
    assert torch.equal(weights["label.dense.0.weight"], model.denoiser.network.state_dict()["label.dense.0.weight"])


# --- in a run ---


def recipe(**sections) -> Recipe:
    chosen = {"process": MODEL["process"], "network": NETWORK,
              "train": {"steps": 1, "batch": 8, "warmup": 2, "sample_every": 0}}  # fmt: skip
    return parse(Recipe, {**chosen, **sections}, "test")


def test_a_labelled_run_begins_with_an_unlabelled_model(tmp_path, data):
    labelled = ArraySource(data.images, torch.arange(len(data)) % 3, ("a", "b", "c"))
    model, said = drawn(config(image=[1, 8, 8])), []
    tuned = loop.train(
        recipe(data={"labels": True}), labelled, tmp_path, init=model, say=said.append, show_progress=False
    )
    assert "init: the model was trained without labels, so the embedding of 3 classes is new" in said
    assert tuned.config.classes == 3
    before, after = model.denoiser.network.state_dict(), tuned.denoiser.network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())  # the first update has rate 0


def test_what_the_weights_had_seen_is_kept(tmp_path, data):
    """Through a run, its resume, and one that begins from it: 8 and 16 images, and 5 before both."""
    model = drawn(config(image=[1, 8, 8]))
    model.meta["images"] = 5
    quiet = {"say": lambda text: None, "show_progress": False}
    for steps in (1, 2):
        tuned = loop.train(recipe(train={"steps": steps, "batch": 8}), data, tmp_path / "first", init=model, **quiet)
        assert (tuned.meta["images"], tuned.meta["images_before"]) == (8 * steps, 5)
        assert load(tmp_path / "first").meta["images_before"] == 5
    again = loop.train(recipe(), data, tmp_path / "second", init=tuned, **quiet)
    assert (again.meta["images"], again.meta["images_before"]) == (8, 21)
    assert again.facts()["trained on"] == "8 images in 1 step after the 21 of the weights that it began from"
    fresh = loop.train(recipe(), data, tmp_path / "fresh", init=drawn(config(image=[1, 8, 8])), **quiet)
    assert "images_before" not in fresh.meta and fresh.facts()["trained on"] == "8 images in 1 step"


def test_a_run_goes_on_with_the_weights_that_it_began_from_or_none(tmp_path, data):
    """Another --init would be left out in silence, although it was asked for."""
    first, other = drawn(config(image=[1, 8, 8])), drawn(config(image=[1, 8, 8]))
    with torch.no_grad():
        other.denoiser.network.conv_in.bias[0] += 1
    save(first, tmp_path / "first.safetensors")
    how = {"device": "cpu", "say": lambda text: None, "show_progress": False}
    for steps, init in enumerate((first, tmp_path / "first.safetensors", None), 1):
        tuned = train(data, tmp_path / "run", recipe(), steps=steps, init=init, **how)
        assert (tuned.meta["init"], tuned.meta["step"]) == (first.digest(), steps)
    with pytest.raises(UsageError, match="run holds a run that did not begin from the model that is given; leave"):
        train(data, tmp_path / "run", recipe(), steps=4, init=other, **how)
    train(data, tmp_path / "bare", recipe(), steps=1, **how)
    with pytest.raises(UsageError, match="did not begin from .*first.safetensors; leave --init out to go on"):
        train(data, tmp_path / "bare", recipe(), steps=2, init=tmp_path / "first.safetensors", **how)


def test_a_time_that_the_process_lacks_is_refused_before_anything_is_written(tmp_path, data):
    edm = recipe(process={"name": "edm"}, parameterisation={"name": "v"})
    with pytest.raises(UsageError, match='time = "index" needs a β-table, and edm has none'):
        train(data, tmp_path / "run", edm, steps=1, device="cpu", say=lambda text: None, show_progress=False)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_finite_is_not_begun_with(tmp_path, data):
    model = drawn(config(image=[1, 8, 8]))
    with torch.no_grad():
        model.denoiser.network.conv_in.bias[0] = float("inf")
    with pytest.raises(Corrupt, match="the model to begin with cannot be used: conv_in.bias holds NaN or infinity"):
        loop.train(recipe(), data, tmp_path / "run", init=model, say=lambda text: None, show_progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method`:DeprecationWarning"
)  # of torch's compiler, when it is loaded
def test_a_compiled_model_is_begun_with(data):
    model = drawn(config(image=[1, 8, 8]))
    before = {name: tensor.clone() for name, tensor in model.denoiser.network.state_dict().items()}
    model.denoiser.network = torch.compile(model.denoiser.network)
    trainer = Trainer(recipe(), model.config, data)
    trainer.start_from(model)
    assert all(torch.equal(w, before[n]) for n, w in zip(trainer.names, trainer.weights, strict=True))


def test_a_network_setting_that_is_younger_than_the_run_had_its_default():
    """A run from before the options of the network goes on."""
    now = {"model": plain(config()), "recipe": plain(recipe())}
    old = {"name", "channels", "multipliers", "blocks", "attention", "dropout", "patch", "time"}
    saved = {
        part: {**each, "network": {n: v for n, v in each["network"].items() if n in old}} for part, each in now.items()
    }
    refuse_changes(saved, now)
    now["recipe"] = {**now["recipe"], "network": {**now["recipe"]["network"], "eps": 1e-5}}
    with pytest.raises(UsageError, match="network.eps: 1e-06 -> 1e-05"):
        refuse_changes(saved, now)
