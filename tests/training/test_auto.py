"""What `--preset auto` chooses, on what grounds, and that the same command goes on with it."""

import itertools
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import undiffuse
from undiffuse.config import plain
from undiffuse.data.source import ArraySource, open_raw
from undiffuse.diffusion.density import LogNormal
from undiffuse.diffusion.objective import P2, Hybrid, MinSnr, Simple
from undiffuse.errors import DataError, UsageError
from undiffuse.machine.device import choose as choose_device
from undiffuse.machine.store import Run
from undiffuse.training.auto import Facts, choose, look_at, recipe_of, resolved, to_look_at
from undiffuse.training.plan import Budget, shares

MIXED = ((480, 640), (300, 200), (90, 120))


def facts(images=40, sizes=MIXED, grey=False, has_test=False, device="cpu") -> Facts:
    return Facts(images, tuple(sizes), grey, 1 if grey else 3, has_test, device)


def test_forty_photographs_on_a_cpu():
    choice = choose(facts())
    data, train, network = (getattr(choice.recipe, name) for name in ("data", "train", "network"))
    assert (data.size, data.channels, data.flip, data.hold_out) == (32, 3, False, 0.1)
    assert (train.batch, train.patience, train.decay) == (32, 0.5, "constant")
    assert (network.channels, network.dropout, choice.recipe.objective) == (48, 0.2, MinSnr())
    first, second, third = choice.why
    assert first == (
        "auto: images of 32×32, RGB, because the pictures are in colour and of many sizes, half of them with a "
        "shorter side over 200; larger ones train slowly on cpu, --size 64 asks for them"
    )
    assert "preset emoji-32 with dropout 0.2, because 40 images are few; loss min-snr; batches of 32; cpu" in second
    assert "has not fallen for a third of the run, at most 9,375 steps" in third and "none is flipped" in third


def test_sixty_thousand_grey_pictures_keep_their_size_and_see_a_hundred_epochs_at_most():
    recipe = choose(facts(60_000, [(28, 28)], grey=True, has_test=True)).recipe
    assert (recipe.data.size, recipe.data.channels, recipe.data.hold_out) == (28, 1, 0.0)
    assert recipe.objective == Simple()
    assert (recipe.train.patience, recipe.train.decay, recipe.network.dropout) == (0.0, "cosine", 0.0)
    assert recipe.train.steps * recipe.train.batch == 2_000_000
    assert choose(facts(10_000, [(28, 28)], grey=True)).recipe.train.steps * 64 == pytest.approx(1_000_000, abs=64)


def test_a_card_takes_the_network_of_the_paper():
    recipe = choose(facts(50_000, [(32, 32)], device="cuda")).recipe
    assert (recipe.network.channels, recipe.train.batch, recipe.data.size) == (128, 128, 32)
    assert recipe.objective == Simple()
    assert choose(facts(50_000, device="cuda")).recipe.data.size == 64


SIDES = [(8, 8), (9, 9), (28, 28), (20, 36), (30, 30), (64, 48), (7, 5), (1000, 800)]


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_every_choice_can_be_built(device):
    """The strides divide the size, the levels have their attention, and the batch is not more than the images."""
    built: list[object] = []
    for size, images, grey in itertools.product(SIDES, (1, 2, 7, 4999, 5000, 10**6), (True, False)):
        recipe = choose(facts(images, [size], grey, device=device)).recipe
        side = recipe.data.size
        height, width = side if isinstance(side, tuple) else (side, side)
        assert recipe.train.batch <= max(4, images) and recipe.train.steps > 0
        assert recipe.data.hold_out == (0.1 if 1 < images < 5000 else 0.0)
        if (case := (side, recipe.data.channels, recipe.network)) in built:
            continue
        built.append(case)
        denoiser = recipe.model((recipe.data.channels, height, width)).build(clip=False, device="meta")
        with torch.device("meta"):
            out = denoiser.network(torch.empty(2, recipe.data.channels, height, width), torch.empty(2))
        assert out.shape == (2, recipe.data.channels, height, width)


@pytest.mark.parametrize(
    "images, device, channels, dropout, batch",
    [
        (999, "cpu", 48, 0.2, 64),
        (1000, "cpu", 48, 0.1, 64),
        (4999, "cpu", 48, 0.1, 64),
        (5000, "cpu", 48, 0.0, 64),
        (4999, "cuda", 48, 0.1, 128),
        (5000, "cuda", 128, 0.0, 128),
        (64, "cpu", 48, 0.2, 64),
        (63, "cpu", 48, 0.2, 32),
        (3, "cpu", 48, 0.2, 4),
    ],
)
def test_where_each_choice_changes(images, device, channels, dropout, batch):
    recipe = choose(facts(images, [(32, 32)], device=device)).recipe
    assert (recipe.network.channels, recipe.network.dropout, recipe.train.batch) == (channels, dropout, batch)


@pytest.mark.parametrize("side, size", [(8, 8), (9, 8), (11, 12), (27, 28), (29, 28), (31, 32), (33, 32), (500, 32)])
def test_a_small_size_that_all_have_is_kept_to_the_nearest_four(side, size):
    """500 is over what a CPU trains within a day, and 33 is too."""
    assert choose(facts(sizes=[(side, side)])).recipe.data.size == size


@pytest.mark.parametrize("coloured", [0, 1, 2])
def test_one_picture_in_colour_makes_all_of_them_rgb(coloured):
    images = torch.full((3, 3, 8, 8), 100, dtype=torch.uint8)
    assert look_at(ArraySource(images), None, torch.device("cpu")).grey
    images[coloured, 0, 7, 7] = 101
    assert not look_at(ArraySource(images), None, torch.device("cpu")).grey


def test_what_the_user_says_wins_and_a_run_without_a_known_end_keeps_its_rate():
    recipe = choose(facts(50_000), ["data.size=16", "train.batch=8", "data.flip=true", "network.dropout=0.3"]).recipe
    assert (recipe.data.size, recipe.train.batch, recipe.data.flip, recipe.network.dropout) == (16, 8, True, 0.3)
    for settings, objective in (
        (["objective.name=simple"], Simple()),
        (["objective.gamma=2"], MinSnr(2.0)),
        (["objective = {name='p2'}"], P2()),
        (["objective.density.name=log-normal"], MinSnr(density=LogNormal())),
        (["objective.name=hybrid", "variance.name=learned-range"], Hybrid()),
    ):
        assert choose(facts(50_000), settings).recipe.objective == objective
    assert choose(facts(50_000)).recipe.train.decay == "cosine"
    assert choose(facts(50_000), budget=Budget(minutes=5)).recipe.train.decay == "constant"
    assert choose(facts(), budget=Budget(steps=50)).recipe.train.warmup == 5
    for said in ("data.axes=nchw", 'data={axes="nchw"}', ' data = {axes="nchw"}'):
        assert to_look_at([said, "objective.gamma=2"]).axes == "nchw"
    with pytest.raises(UsageError, match='has no field "data.sise". Did you mean "size"'):
        choose(facts(), ["data.sise=16"])


def test_a_model_to_begin_with_decides_its_images_and_its_network():
    model = undiffuse.load("fashion-mnist")
    recipe = choose(facts(), init=model.config).recipe
    assert recipe.data.size == (28, 28) and recipe.data.channels == 1
    assert recipe.network == model.config.network and recipe.process == model.config.process
    assert recipe.objective == Simple()


def test_arrays_of_other_channels_keep_them():
    choice = choose(Facts(100, ((16, 16),), False, 4, False, "cpu"))
    assert choice.recipe.data.channels is None
    assert choice.why[0] == "auto: images of 16×16, 4 channels, because the pictures are of 4 channels and 16×16"


@pytest.mark.parametrize(
    "settings, has_test, said",
    [
        ([], False, "until the loss on 10% of the pictures, kept for this, has not fallen for a third of the run, at"),
        ([], True, "until the loss on the test split has not fallen for a third of the run, at most 9,375 steps"),
        (["train.patience=1"], True, "has not fallen for half of the run"),
        (["train.patience=3"], True, "has not fallen for 75% of the run"),
        (["data.hold_out=0.2"], True, "until the loss on 20% of the pictures, kept for this, has not"),
        (["train.patience=0", "train.steps=100"], True, "auto: trains 100 steps; none is flipped"),
    ],
)
def test_what_ends_the_run_is_said_of_what_was_asked(settings, has_test, said):
    assert said in choose(facts(40, has_test=has_test), settings).why[2]


def test_steps_among_the_settings_decide_what_depends_on_them():
    assert choose(facts(60_000), ["train.steps=100"]).recipe.train.warmup == 10
    assert choose(facts(60_000), ["train.steps=100"], budget=Budget(steps=50)).recipe.train.warmup == 5


def test_a_micro_batch_that_shards_decide_stays_so_on_resume():
    chosen = choose(facts(), ["train.exact_shards=4", 'train.micro_batch="auto"', "train.precision=float32"]).recipe
    then = {"micro_batch": "auto", "exact_shards": 4, "precision": "float32"}
    again = resolved(chosen, then, torch.device("cpu"), chosen.model((3, 8, 8)), print)
    assert again.train.micro_batch == "auto" and shares(again.train)[1] == chosen.train.batch // 4
    free = replace(chosen, train=replace(chosen.train, exact_shards=None))
    known = resolved(free, {**then, "micro_batch": 8}, torch.device("cpu"), free.model((3, 8, 8)), print)
    assert known.train.micro_batch == 8


def test_what_ends_the_run_is_said_as_it_is():
    assert "trains 7 steps; " in choose(facts(9000), budget=Budget(steps=7)).why[2]
    assert choose(facts(9000), budget=Budget(images=640)).recipe.train.steps == 10
    alone = choose(facts(1))
    assert (alone.recipe.data.hold_out, alone.recipe.train.patience) == (0.0, 0.0)
    assert "as many as a day allows" in alone.why[2]
    assert choose(facts(), ["data.hold_out=0"]).recipe.train.patience == 0.0
    assert choose(facts(), ["data.size=64"]).why[0] == "auto: images of 64×64, RGB, as asked"


def test_code_that_only_a_checkpoint_names_is_not_run():
    saved = plain(choose(facts()).recipe)
    assert recipe_of(saved).train == choose(facts()).recipe.train
    saved["network"] = {"name": "os:path"}
    with pytest.raises(UsageError, match='network "os:path" is code outside undiffuse'):
        recipe_of(saved)
    with pytest.raises(UsageError, match='network "os:path" is not a frozen dataclass'):
        recipe_of(saved, ["network.name=os:path"])  # which the user names himself


def test_all_of_it_is_definite():
    chosen, said = choose(facts()).recipe, []
    recipe = resolved(chosen, None, torch.device("cpu"), chosen.model((1, 8, 8)), said.append)
    sections = [section for section in plain(recipe).values() if isinstance(section, dict)]
    left = [name for section in sections for name, value in section.items() if value == "auto"]
    assert left == ["eval_features"]  # which decides nothing of the run, and is what is there when it is asked for
    assert recipe.train.precision in ("bf16", "float32")


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (9 + i, 12, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def test_the_pictures_are_looked_at(photos):
    found = look_at(open_raw(photos), str(photos), torch.device("cpu"))
    assert found == Facts(
        12, tuple((9 + i, 12) for i in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)), False, 3, False, "cpu"
    )
    assert found.side == 12 and found.common is None
    grey = look_at(undiffuse.open_data("digits"), "digits", torch.device("cpu"))
    assert (grey.images, grey.common, grey.grey, grey.has_test) == (1500, (8, 8), True, True)
    for path in photos.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of 12 pictures can be read; `undiffuse data check` says why"):
        look_at(open_raw(photos), str(photos), torch.device("cpu"))


SMALL = ["network.channels=8", "process.steps=4", "train.sample_every=0", "data.size=8"]


@pytest.mark.slow
def test_the_same_command_goes_on_with_what_was_chosen(photos, tmp_path):
    said: list[str] = []

    def once(steps: int, settings=SMALL):
        return undiffuse.train(photos, tmp_path / "run", steps=steps, settings=settings, device="cpu", say=said.append,
                               show_progress=False)  # fmt: skip

    assert once(2).meta["step"] == 2
    assert [line[:5] for line in said[:3]] == ["auto:"] * 3
    assert "held out: 3 of them; trained on: 9" in said
    assert said[-1] == "finished at step 2: all 2 steps are done"
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert config["network"]["channels"] == 8 and config["data"]["hold_out"] == 0.1
    said.clear()
    once(2)
    assert said[-1] == f"{tmp_path / 'run'} is finished already, at step 2"
    assert not [line for line in said if line.startswith("auto:")]
    (photos / "more.png").write_bytes((photos / "0.png").read_bytes())
    with pytest.raises(UsageError, match="the data has changed since this run began"):
        once(3)
    (photos / "more.png").unlink()
    with pytest.raises(UsageError, match=r"other settings \(network.channels: 8 -> 16\)"):
        once(3, [*SMALL, "network.channels=16"])
    assert once(3).meta["step"] == 3
    assert Run(tmp_path / "run").latest() == 3


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match=r'device "tpu" cannot be used here \(.*\); try --device cpu'):
        choose_device("tpu")
