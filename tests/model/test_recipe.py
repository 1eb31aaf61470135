"""The presets: each builds the network that it says, and the rows of Table 2 are the rows of Table 2."""

import tomllib
from contextlib import nullcontext
from dataclasses import replace

import pytest

from undiffuse.config import parse, to_toml
from undiffuse.diffusion.objective import Simple, Vlb
from undiffuse.diffusion.parameterisation import Eps, Mu
from undiffuse.diffusion.process import Linear
from undiffuse.diffusion.reverse import FixedLarge, FixedSmall, Learned
from undiffuse.errors import UsageError
from undiffuse.machine.tensorfile import read_weights
from undiffuse.model.load import shipped
from undiffuse.model.recipe import Recipe, load_recipe, presets

PAPER = ["celebahq-256", "cifar10", "lsun-bedroom", "lsun-bedroom-large", "lsun-cat", "lsun-church"]
TABLE_2 = {
    "cifar10-mu-l-learned": (Mu(), Vlb(), Learned(), 23.69),
    "cifar10-mu-l": (Mu(), Vlb(), FixedLarge(), 13.22),
    "cifar10-mu-mse": (Mu(), Simple(), FixedLarge(), None),
    "cifar10-eps-l-learned": (Eps(), Vlb(), Learned(), None),
    "cifar10-eps-l": (Eps(), Vlb(), FixedLarge(), 13.51),
    "cifar10": (Eps(), Simple(), FixedLarge(), 3.17),
}


def test_the_names():
    ours = ["fashion-mnist", "fashion-mnist-likelihood", "emoji-32", "digits"]
    assert presets() == sorted([*PAPER, *TABLE_2.keys() - {"cifar10"}, *ours])


@pytest.mark.parametrize("name", presets())
def test_a_preset_survives_its_file_and_builds_what_it_says(name):
    recipe = load_recipe(name)
    assert parse(Recipe, tomllib.loads(to_toml(recipe)), name) == recipe
    side = recipe.data.size or {"fashion-mnist": 28, "fashion-mnist-likelihood": 28, "digits": 8}[name]
    denoiser = recipe.model((recipe.data.channels, side, side)).build(clip=False, device="meta")
    recipe.objective.check(denoiser)
    count = sum(p.numel() for p in denoiser.parameters())
    assert count == recipe.expected["parameters"]
    assert recipe.about and recipe.expected.keys() & {"source", "measured_by", "measured_in"}


def test_the_files_in_the_package_say_their_recipe_in_words_of_this_version():
    """Else --init and `distill`, which read them strictly, refuse what the user has just installed."""
    assert set(shipped()) == {"emoji-32", "fashion-mnist", "fashion-mnist-likelihood"}
    for name, path in shipped().items():
        recipe = parse(Recipe, read_weights(path)[1]["recipe"], name)
        preset = load_recipe(name)  # but for dropout, which the last part of the training of emoji-32 had none of
        assert replace(recipe.network, dropout=preset.network.dropout) == preset.network
        assert recipe.process == preset.process


def test_the_files_in_the_package_stay_small():
    """In megabytes of a million bytes; whatever else lies in the folder counts too."""
    limits = {"fashion-mnist": 2.5, "fashion-mnist-likelihood": 3.0, "emoji-32": 5.0}
    sizes = {name: path.stat().st_size / 1e6 for name, path in shipped().items()}
    assert {name: size for name, size in sizes.items() if size > limits[name]} == {}
    folder = shipped()["fashion-mnist"].parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 16e6


@pytest.mark.parametrize("name", TABLE_2)
def test_the_rows_of_table_2(name):
    recipe = load_recipe(name)
    parameterisation, objective, variance, fid = TABLE_2[name]
    assert (recipe.parameterisation, recipe.objective, recipe.variance) == (parameterisation, objective, variance)
    assert recipe.expected.get("fid_train") == fid and (fid is None) == recipe.expected.get("unstable", False)
    assert recipe.process == Linear(1000, 1e-4, 0.02) and recipe.network == load_recipe("cifar10").network
    train = recipe.train
    assert (train.steps, train.batch, train.lr, train.warmup, train.ema) == (800_000, 128, 2e-4, 5000, 0.9999)
    assert recipe.data.flip and recipe.network.dropout == 0.1


def test_the_256_presets():
    expected = {
        "celebahq-256": (500_000, True, 113_673_219, None),
        "lsun-bedroom": (2_400_000, False, 113_673_219, 6.36),
        "lsun-bedroom-large": (1_150_000, False, 255_677_955, 4.90),
        "lsun-church": (1_200_000, True, 113_673_219, 7.89),
        "lsun-cat": (1_800_000, True, 113_673_219, 19.75),
    }
    for name, (steps, flip, parameters, fid) in expected.items():
        recipe = load_recipe(name)
        assert (recipe.train.steps, recipe.data.flip, recipe.expected["parameters"]) == (steps, flip, parameters)
        assert recipe.expected.get("fid") == fid and recipe.variance == FixedSmall()
        assert (recipe.train.batch, recipe.train.lr, recipe.network.dropout) == (64, 2e-5, 0)


def test_settings_reach_every_section(tmp_path):
    recipe = load_recipe("cifar10", ["train.lr=1e-3", "process.name=cosine", "process.steps=500"])
    assert recipe.train.lr == 1e-3 and (type(recipe.process).__name__, recipe.process.steps) == ("Cosine", 500)
    (tmp_path / "mine.toml").write_text('base = "cifar10"\n[train]\nbatch = 7\n')
    mine = load_recipe(tmp_path / "mine.toml")
    assert mine.train.batch == 7 and mine.train.warmup == 5000
    with pytest.raises(UsageError, match='recipe cifar10 has no field "trian". Did you mean "train"'):
        load_recipe("cifar10", ["trian.lr=1"])
    with pytest.raises(UsageError, match=r'preset "cifar" is not known. Did you mean "cifar10"\? Known: celebahq-256'):
        load_recipe("cifar")


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a": 'base = "a.toml"'}, r"preset a.toml is its own base \(a.toml -> a.toml\); name another base"),
        ({"a": 'base = "b.toml"', "b": 'base = "a.toml"'}, r"its own base \(a.toml -> b.toml -> a.toml\)"),
        ({"a": "base = 3"}, "a.toml: base = 3 is not possible; give the name of a preset, or a file in quotes"),
        ({"a": 'base = "b.toml"', "b": 'base = "digits"\nexpected = 3'}, '"expected" input should be'),
        (
            {"a": 'base = "b.toml"\n[train]\nbatch = 7', "b": "train = 3"},
            r"b.toml: train = 3 is not possible; give a",
        ),
    ],
)
def test_a_base_that_is_none_is_refused(tmp_path, monkeypatch, files, message):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / f"{name}.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_recipe("a.toml")


@pytest.mark.parametrize(
    "setting, taken",
    [("betas=[0.9, 1.0]", False), ("betas=[0, 0]", True), ("ema=1", True), ("ema=1.1", False), ("drop_label=0", True),
     ("drop_label=-0.1", False), ("batch=0", False), ("warmup=0", True), ("lr=0", False), ("keep=1", False)],
)  # fmt: skip
def test_the_ends_of_what_a_setting_may_be(setting, taken):
    with nullcontext() if taken else pytest.raises(UsageError, match=r'"train\..*" input should be '):
        load_recipe("digits", [f"train.{setting}"])
