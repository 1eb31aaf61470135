"""What a run needs of memory by estimate, beside what the profiler sees; and recomputation by level."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tests.training.test_loop import recipe
from undiffuse.data.source import ArraySource
from undiffuse.errors import UsageError
from undiffuse.machine import device as machine
from undiffuse.model.recipe import ModelConfig, Recipe, load_recipe
from undiffuse.network.base import Network, recompute
from undiffuse.training import loop
from undiffuse.training.distill import recipe_for
from undiffuse.training.memory import held, remedies
from undiffuse.training.need import Need, gigabytes, need
from undiffuse.training.trainer import Trainer

CPU = [ProfilerActivity.CPU]


def preset(name: str, side: int, settings: dict, channels: int = 3) -> tuple[Recipe, ModelConfig]:
    chosen = load_recipe(name, [f"train.{key}={value}" for key, value in settings.items()])
    return chosen, chosen.model((channels, side, side))


def trainer(name: str, side: int, settings: dict, channels: int = 3) -> Trainer:
    chosen, config = preset(name, side, settings, channels)
    images = torch.randint(256, (chosen.train.batch, channels, side, side), dtype=torch.uint8)
    return Trainer(chosen, config, ArraySource(images))


def peak(one: Trainer) -> int:
    """The most bytes of tensors in a step: what is held before it, and what the allocator tells the profiler."""
    one.update(10)  # makes the moments
    one.optimizer.zero_grad()
    before = held(one) + sum(weight.nbytes * len(one.optimizer.moments(weight)) for weight in one.weights)
    with profile(activities=CPU, profile_memory=True) as seen:
        one.update(10)
    assert seen.profiler is not None
    events = [each for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return before + highest


SETTINGS = [
    {},
    {"recompute": 1},
    {"recompute": "true"},
    {"precision": "bf16"},
    {"precision": "bf16", "recompute": "true"},
    {"micro_batch": 8},
    {"micro_batch": 8, "recompute": "true", "ema_profiles": "[0.1]"},
    {"optimizer": "muon"},
    {"exact_shards": 4},
    {"exact_shards": 2, "recompute": 1},
]


@pytest.mark.filterwarnings("ignore:.*Memory block of unknown size")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_estimate_is_what_the_profiler_sees(settings):
    """To 5 %: what an operator takes for itself is guessed at, and pixels, noise and their tables are left out."""
    one = trainer("digits", 8, {"batch": 32, "precision": "float32", **settings}, channels=1)
    said = need(one.recipe.train, one.config, one.micro)
    assert said.total == pytest.approx(peak(one), rel=0.05)


@pytest.mark.filterwarnings("ignore:.*Memory block of unknown size")
def test_the_estimate_of_a_distillation_is_what_the_profiler_sees():
    """Each image has a whole chain of the student, and the teacher is there too."""
    teacher = trainer("digits", 8, {"batch": 8, "precision": "float32"}, channels=1).model()
    chosen = recipe_for(teacher, (0.3, 1.0, 3.0, 80.0))
    chosen = replace(chosen, train=replace(chosen.train, batch=8, precision="float32", channels_last=False))
    images = ArraySource(torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8))
    one = Trainer(chosen, chosen.model((1, 8, 8)), images, teacher=teacher)
    said = need(one.recipe.train, one.config, one.micro, objective=one.recipe.objective)
    assert said.total == pytest.approx(peak(one), rel=0.05)
    assert said.total > 1.5 * need(one.recipe.train, one.config, one.micro).total


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Memory block of unknown size")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("levels", ["false", "true"])
@pytest.mark.parametrize("name, side, channels, batch", [("fashion-mnist", 28, 1, 32), ("emoji-32", 32, 3, 8)])
def test_the_estimate_of_presets_is_what_the_profiler_sees(name, side, channels, batch, precision, levels):
    one = trainer(name, side, {"batch": batch, "precision": precision, "recompute": levels}, channels)
    assert need(one.recipe.train, one.config, one.micro).total == pytest.approx(peak(one), rel=0.05)


def test_an_image_of_celebahq_256_keeps_over_two_gigabytes():
    """2.1 GB an image in float32, as saved tensors were counted in a real forward pass; half of it in bf16."""
    chosen, config = preset("celebahq-256", 256, {"batch": 64, "precision": "float32"})
    one, two = (need(chosen.train, config, micro) for micro in (1, 2))
    kept = two.activations - one.activations
    assert kept == pytest.approx(2.1e9, rel=0.05)
    assert one.state == 20 * 113_673_219
    half = replace(chosen.train, precision="bf16")
    assert need(half, config, 2).activations - need(half, config, 1).activations == pytest.approx(kept / 2, rel=0.1)
    assert kept > 60 * 1e9 / 64 * 2  # why micro_batch = "auto" in this preset: 64 at once want over 120 GB


@pytest.mark.parametrize("levels", ["false", "1"])
def test_activations_are_linear_in_the_images(levels):
    """To the 2 % that constant tensors, such as a sinusoid's frequencies, and gradients on their way are."""
    chosen, config = preset("digits", 8, {"batch": 128, "precision": "float32", "recompute": levels}, channels=1)
    at = {micro: need(chosen.train, config, micro).activations for micro in (16, 32, 64)}
    assert at[64] - at[32] == pytest.approx(2 * (at[32] - at[16]), rel=0.02)
    assert at[32] - at[16] > 4e6


def test_more_levels_keep_less():
    """The first of them most: it has most of the activations."""
    chosen, config = preset("celebahq-256", 256, {"batch": 2, "micro_batch": 1, "precision": "float32"})
    kept = [need(replace(chosen.train, recompute=levels), config, 1).activations for levels in (False, 1, 2, True)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] - kept[1] > 0.3 * kept[0]


def gradient(one: Trainer) -> torch.Tensor:
    one.update(6)
    return torch.cat([weight.grad.flatten() for weight in one.weights if weight.grad is not None])


def test_gradients_are_the_same_bits_whichever_levels_are_recomputed(data):
    def with_levels(levels: bool | int) -> torch.Tensor:
        chosen = recipe(train={"precision": "float32", "recompute": levels})
        return gradient(Trainer(chosen, chosen.model((1, 8, 8)), data))

    plain = with_levels(False)
    levels = len(recipe().network.multipliers)
    for each in (0, *range(1, levels + 1), True):
        assert torch.equal(plain, with_levels(each))


def test_what_a_level_is():
    """All parts belong to one, the middle to the last; a number means the parts of the first ones."""
    network = load_recipe("cifar10").network
    module = network.build(3, 3)
    every = [part for part in module.modules() if isinstance(part, network.recomputed)]
    levels = [[p for place in level for p in place.modules() if p in every] for level in network.levels(module)]
    assert sorted(map(id, every)) == sorted(id(part) for level in levels for part in level)
    recompute(network, module, 2)
    assert {id(part) for part in every if "forward" in vars(part)} == {id(part) for part in levels[0] + levels[1]}
    assert [len(level) for level in levels] == [5, 10, 5, 8]  # 2 + 3 blocks, at 16² with attention; 3 in the middle


def test_more_levels_than_there_are_are_refused(data, monkeypatch):
    chosen = recipe(train={"recompute": 9})
    said = (
        f"recompute = 9 is a number of levels, of which network unet has {len(chosen.network.multipliers)}; set at most"
    )
    with pytest.raises(UsageError, match=said):
        Trainer(chosen, chosen.model((1, 8, 8)), data)
    monkeypatch.setattr(type(chosen.network), "levels", lambda self, module: [])
    for levels, said in ((1, "of which network unet has none; set true or false"), (True, None)):
        flat = chosen.network.build(1, 1)
        with pytest.raises(UsageError, match=said) if said else nullcontext():
            recompute(chosen.network, flat, levels)


@pytest.mark.parametrize("free", [None, 10**12, 10**6])
def test_a_run_says_before_step_0_whether_it_fits(tmp_path, data, monkeypatch, capsys, free):
    monkeypatch.setattr(machine, "free_bytes", lambda device: free)
    said = []
    chosen = recipe(train={"precision": "float32", "steps": 1})
    loop.train(chosen, data, tmp_path, say=said.append, show_progress=False)
    (line,) = [text for text in said if "of memory at the peak by estimate: " in text]
    assert ("there are 1,000.0 GB" in line) is (free == 10**12)
    warned = [text for text in capsys.readouterr().err.splitlines() if "may not fit into memory" in text]
    assert len(warned) == (free == 10**6)


def test_what_is_advised_does_fit():
    one = trainer("digits", 8, {"batch": 64, "precision": "float32"}, channels=1)
    train, config = one.recipe.train, one.config
    there = int(0.8 * need(train, config, 64).total)
    micro, levels = remedies(one, there)
    size = int(micro.removeprefix("train.micro_batch=").split()[0])
    assert 1 < size < 64
    assert need(replace(train, micro_batch=size), config, size).total <= there
    assert levels.startswith("train.recompute=2 ") or levels.startswith("train.recompute=true ")
    assert need(replace(train, recompute=True), config, 64).total <= there
    assert [*remedies(one, 10**6)] == []


def test_the_words_of_an_estimate():
    assert str(Need(2_000_000_000, 134_000_000)) == (
        "2.1 GB of memory at the peak by estimate: 2.0 GB for weights, gradients, moments and averages, 134 MB for "
        "activations"
    )
    assert gigabytes(999) == "0.000999 MB"


def test_the_memory_of_a_machine_is_shared_by_its_processes(monkeypatch, tmp_path):
    there = tmp_path / "meminfo"
    there.write_text("MemTotal:  16000000 kB\nMemAvailable:   8000000 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", there)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.free_bytes(torch.device("cpu")) == 8_192_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.free_bytes(torch.device("cpu")) == 2_048_000_000
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "none")
    assert machine.free_bytes(torch.device("cpu")) is machine.free_bytes(torch.device("mps")) is None
    for name, bytes_ in (("memory_reserved", 30), ("memory_allocated", 10)):
        monkeypatch.setattr(torch.cuda, name, lambda bytes_=bytes_: bytes_)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 200))
    assert machine.free_bytes(torch.device("cuda:0")) == 120


@pytest.mark.parametrize(
    "files, left",
    [
        ({"memory.max": "3000000000\n", "memory.current": "1000000000\n"}, 2_000_000_000),
        ({"memory.max": "max\n", "memory.current": "1000000000\n"}, 8_192_000_000),
        ({"memory/memory.limit_in_bytes": "3000000", "memory/memory.usage_in_bytes": "1000000"}, 2_000_000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "1"}, 8_192_000_000),
    ],
)
def test_a_container_has_what_it_may_take(monkeypatch, tmp_path, files, left):
    (tmp_path / "meminfo").write_text("MemAvailable:   8000000 kB\n")
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.free_bytes(torch.device("cpu")) == left
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\n")
    assert machine.free_bytes(torch.device("cpu")) is None


KEPT: dict[int, torch.Tensor] = {}


@dataclass(frozen=True)
class Keeps(Network):
    """Of a user's own, which keeps a tensor from its first call for the others."""

    time: Literal["index", "logsnr", "sigma"] = "index"

    def build(self, image_channels: int, output_channels: int, classes: int | None = None) -> nn.Module:
        return Kept(image_channels, output_channels)

    def stride(self) -> int:
        return 1


class Kept(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, time, cond=None):
        if x.is_meta:  # as operations are counted
            return self.conv(x)
        scale = KEPT.setdefault(0, torch.ones(1))
        return self.conv(x) * float(scale)


def test_a_network_that_an_estimate_could_break_is_not_estimated(tmp_path, data):
    said = []
    chosen = replace(recipe(train={"precision": "float32", "steps": 2}), network=Keeps())
    loop.train(chosen, data, tmp_path, say=said.append, show_progress=False)
    assert not any("by estimate" in text for text in said) and any("GFLOP" in text for text in said)
