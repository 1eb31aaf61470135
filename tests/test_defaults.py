"""torch's global default type and device, which a user may have set for their own code, change nothing here.

Each part of the package is run under every default, and gives the bits that it gives without one. `meta` stands in for
another device: a tensor that is made there by mistake has no values, and so the mistake raises.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import undiffuse
from tests.training.test_loop import recipe
from undiffuse.config import plain
from undiffuse.data.format.procedural import PROCEDURAL, Law, level_probabilities
from undiffuse.data.inspect import inspect
from undiffuse.data.loader import Loader
from undiffuse.data.order import _tables
from undiffuse.data.pack import pack
from undiffuse.data.source import open_source
from undiffuse.data.subset import divide
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.density import DENSITIES
from undiffuse.diffusion.grid import GRIDS
from undiffuse.diffusion.numbers import ready
from undiffuse.diffusion.objective import OBJECTIVES, Trajectory
from undiffuse.diffusion.parameterisation import PARAMETERISATIONS, Eps
from undiffuse.diffusion.process import PROCESSES, Linear
from undiffuse.diffusion.reverse import VARIANCES, LearnedRange, Prediction, Step
from undiffuse.diffusion.sampler.base import SAMPLERS
from undiffuse.diffusion.trajectory import Taught
from undiffuse.figure import grid, png
from undiffuse.interop.diffusers import read_folder, write_folder
from undiffuse.key import Key, normal_table
from undiffuse.measure.flow import nll_ode
from undiffuse.measure.nll import nll
from undiffuse.model.average import fit
from undiffuse.model.load import averaged, load, save
from undiffuse.model.model import Model, to_float
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.base import Conditioning
from undiffuse.network.block import sinusoid
from undiffuse.network.unet import UNet
from undiffuse.training import loop
from undiffuse.training.plan import forward_flops
from undiffuse.training.trainer import Trainer
from undiffuse.view import explore
from undiffuse.view.demo import classifier

NETWORK = UNet(channels=8, multipliers=(1, 2), blocks=1, attention=(1,), dropout=0.1)
CONFIG = ModelConfig((1, 8, 8), Linear(8, 1e-2, 0.5), Eps(), LearnedRange(), NETWORK, classes=3)
DEFAULTS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64, "meta": "meta"}


def without_kernels(monkeypatch) -> None:
    """What of torch knows no device `meta`: the fused kernel of Adam, and autocast, which is off here."""
    begin = torch.optim.Adam.__init__

    def slow(self, *given, **fields):
        begin(self, *given, **{**fields, "fused": False})

    monkeypatch.setattr(torch.optim.Adam, "__init__", slow)
    monkeypatch.setattr(torch, "autocast", lambda *given, **fields: nullcontext())


def forget() -> None:
    """What was made under other defaults and kept."""
    normal_table.cache_clear()
    _tables.cache_clear()


@contextmanager
def default(name: str | None) -> Iterator[None]:
    """Inside, torch's default is that type or that device, and afterwards what it was."""
    wanted, dtype = DEFAULTS.get(name or ""), torch.get_default_dtype()
    forget()
    try:
        if isinstance(wanted, torch.dtype):
            torch.set_default_dtype(wanted)
        elif wanted is not None:
            torch.set_default_device(wanted)
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
        forget()


def model() -> Model:
    torch.manual_seed(0)
    denoiser = CONFIG.build(clip=True)
    with torch.no_grad():
        for i, weight in enumerate(denoiser.parameters()):  # at initialisation the network says almost nothing
            weight += 0.05 * Key(1).fold(i).normal(*weight.shape)
    return Model(CONFIG, denoiser.eval().requires_grad_(False), {})


def digits(n: int = 12):
    return open_source("digits").subset(slice(n))


CASES: dict[str, Callable[[Path], Any]] = {}


def case(run: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CASES[run.__name__] = run
    return run


@case
def keys(path: Path) -> Any:
    one = Key(3).rows(5)
    return one.normal(2, 3), one.uniform(4), one.integers(7), Key(3).normal(6), Key(3).uniform(2), one.bits(3)


@case
def processes(path: Path) -> Any:
    made = [PROCESSES.build(name) for name in sorted(PROCESSES.classes)]
    t = Key(0).uniform(9)
    curves = [(p.logsnr(t), p.alpha(t), p.sigma(t), p.time(p.logsnr(t)), p.variance_floor()) for p in made]
    grids, keys = [GRIDS.build(name) for name in sorted(GRIDS.classes)], Key(0).rows(5)
    densities = [DENSITIES.build(name) for name in sorted(DENSITIES.classes)]
    return curves, [grid.times(p, 7) for p in made for grid in grids], [d.t(p, keys) for p in made for d in densities]


@case
def coefficients(path: Path) -> Any:
    process, t, x = Linear(10), Key(0).uniform(4), Key(1).rows(4).normal(1, 2, 2)
    rows = [PARAMETERISATIONS.build(name) for name in sorted(PARAMETERISATIONS.classes)]
    said, s = Prediction(x, x, x), t * 0
    others = [VARIANCES.build(name) for name in sorted(VARIANCES.classes.keys() - {"learned"})]
    return [tuple(each.coefficients(process, t)) for each in rows], [
        v.log_variance(ready(x, Step.between(process, t, end)), said) for v in others for end in (s, t / 2)
    ]


@case
def a_new_network(path: Path) -> Any:
    torch.manual_seed(0)
    network = CONFIG.build(clip=False).network
    time = Key(0).uniform(4).float() * 20
    return network.state_dict(), sinusoid(time, 9), network(Key(0).rows(4).normal(1, 8, 8), time), forward_flops(CONFIG)


@case
def losses(path: Path) -> Any:
    x_0, found = to_float(digits().images), []
    for name in sorted(OBJECTIVES.classes):
        objective, one = OBJECTIVES.build(name), model().denoiser
        variance = one.variance if objective.needs_learned is not False else VARIANCES.build("fixed-small")
        network = one.network if variance.learned else HalfOf(one.network)
        denoiser = Denoiser(network, one.process, one.parameterisation, variance)
        objective = Taught(objective, denoiser) if isinstance(objective, Trajectory) else objective
        found.append(objective(denoiser, x_0, Conditioning(digits().labels % 3), Key(2).rows(len(x_0))))
    return [tuple(loss) for loss in found]


class HalfOf(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, time, cond):
        return self.network(x, time, cond).chunk(2, dim=1)[0]


@case
def steps_of_training(path: Path) -> Any:
    train = {"precision": "float32", "ema_profiles": [0.1], "micro_batch": 2, "batch": 4}
    chosen = recipe(train=train, data={"labels": True, "flip": True}, network={"dropout": 0.2})
    trainer = Trainer(chosen, chosen.model((1, 8, 8), 10), digits(20))
    said = [trainer.update(3) for _ in range(3)]
    return said, trainer.tensors(), trainer.model().sample(2, label="all")


@case
def a_run(path: Path) -> Any:
    """With a held-out loss, previews and checkpoints; broken off and taken up again, its average rebuilt."""
    train = {"precision": "float32", "ema_profiles": [0.05, 0.1], "ema_snapshot_every": 2, "micro_batch": "auto"}
    chosen = recipe(train=train | {"held_out": 4, "held_out_every": 2, "sample_every": 3, "save_every": 2})
    shown = {"say": lambda text: None, "show_progress": False}
    loop.train(chosen, digits(16), path / "run", open_source("digits", split="test"), budget=loop.Budget(3), **shown)
    done = loop.train(chosen, digits(16), path / "run", open_source("digits", split="test"), **shown)
    losses = [row for row in (path / "run" / "log.jsonl").read_text().splitlines() if "held_out" in row]
    assert len(losses) >= 2
    pictures = [np.asarray(Image.open(file)) for file in sorted((path / "run").rglob("*.png"))]
    assert len(pictures) >= 2
    rebuilt = averaged(path / "run", 0.08)
    return done.denoiser.state_dict(), load(path / "run", "cpu").sample(2), pictures, rebuilt.denoiser.state_dict()


@case
def samples(path: Path) -> Any:
    one = model()
    found = [one.sample(3, 4, solver=name, label="random") for name in sorted(SAMPLERS.classes)]
    return found, one.sample(2, solver="ddim", label=[0, 2], steps=[1.0, 0.5]), one.sample(1, label="all", batch=2)


@case
def looks(path: Path) -> Any:
    one, data = model(), digits()
    x = one.sample(2, 3)
    walk = explore.langevin(one.denoiser.score, one.process, Key(0).rows(2), (1, 8, 8), one.times(2)[:-1], repeats=2)
    return (
        explore.progressive(one, 2, slots=3),
        explore.shared(one, 2, steps=5),
        explore.interpolate(one, data.images[0], data.images[1], at=(0.5, 1.0), steps=5),
        explore.neighbours(x, data, 2),
        walk,
        png(grid(x)),
    )


@case
def bits(path: Path) -> Any:
    whole = {"draws": None, "out": path / "nll"}
    found = nll(model(), digits(), label=1, **whole), nll(model(), digits(), label="none", draws=3)
    return found, (path / "nll" / "rate-distortion.tsv").read_bytes()


@case
def ode(path: Path) -> Any:
    return nll_ode(model(), digits(), label=1, tolerance=1e-2, out=path / "ode")


@case
def files(path: Path) -> Any:
    one = model()
    save(one, path / "m.safetensors")
    save(one, path / "half.safetensors", torch.float16)
    other = ModelConfig((3, 8, 8), Linear(), Eps(), VARIANCES.build("fixed-large"), UNet(32, (1, 1), 1, ()))
    torch.manual_seed(0)
    write_folder(path / "theirs", other.build(clip=True).network.state_dict(), {"model": plain(other)})
    read = [load(path / name, "cpu").denoiser.state_dict() for name in ("m.safetensors", "half.safetensors", "theirs")]
    return read, read_folder(path / "theirs")[0], load("fashion-mnist", "cpu").sample(1, 2), fit([(5, 0.1)], 5, 0.05)


@case
def data(path: Path) -> Any:
    drawn = [PROCEDURAL.build(name) for name in sorted(PROCEDURAL.classes)]
    images = [rule.draw(Key(0).rows(3)) for rule in drawn]
    laws = [rule for rule in drawn if isinstance(rule, Law)]
    x = Key(0).rows(2).normal(1, 8, 8)
    scores = [(law.score(x, 0.9, 0.4), law.entropy_bits_per_dim()) for law in laws]
    for i, image in enumerate(digits().images):
        (path / "photos" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path / "photos" / str(i % 2) / f"{i}.png")
    folder, packed = undiffuse.open_data(path / "photos"), pack(path / "photos", path / "packed")
    batch = Loader(packed, 5, flip=True).batch(3)
    summary = inspect(folder)
    parts = [part.gather(torch.arange(len(part), dtype=torch.int64, device="cpu")) for part in divide(folder, 0.3)]
    return (
        images,
        scores,
        level_probabilities(0.1, 0.2),
        (batch.image, batch.label, batch.index),
        parts,
        (summary.mean, summary.std),
    )


@case
def a_classifier(path: Path) -> Any:
    return classifier(digits(64), 2, lambda n: None).state_dict()


def flat(value: Any) -> list[tuple[Any, ...]]:
    """Types, shapes and bits of whatever a case returned."""
    if isinstance(value, torch.Tensor):
        assert value.device.type == "cpu"
        return [(str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes())]
    if isinstance(value, np.ndarray):
        return [(str(value.dtype), value.shape, value.tobytes())]
    if is_dataclass(value) and not isinstance(value, type):
        return flat(asdict(value))
    if isinstance(value, dict):
        return [(name, *each) for name in value for each in flat(value[name])]
    if isinstance(value, (list, tuple)):
        return [each for part in value for each in flat(part)]
    return [(type(value).__name__, repr(value))]


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory) -> Callable[[str], list[tuple[Any, ...]]]:
    """What a case gives under torch's own defaults."""

    @cache
    def result(name: str) -> list[tuple[Any, ...]]:
        with default(None):
            return flat(CASES[name](tmp_path_factory.mktemp(name)))

    return result


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("name", CASES)
def test_a_default_of_torch_changes_nothing(name, kind, unchanged, tmp_path):
    expected = unchanged(name)
    assert len(expected) >= 4
    with default(kind):
        found = flat(CASES[name](tmp_path))
    assert [i for i, (one, two) in enumerate(zip(expected, found, strict=True)) if one != two] == []


def test_the_defaults_are_what_they_were_after_a_network_is_built():
    with default("float64"):
        CONFIG.build(clip=True)
        assert torch.get_default_dtype() == torch.float64
        with pytest.raises(undiffuse.Error):
            ModelConfig((1, 7, 7), Linear(), Eps(), LearnedRange(), NETWORK).build(clip=True)
        assert torch.get_default_dtype() == torch.float64
    with default("meta"):
        assert next(CONFIG.build(clip=True).parameters()).device.type == "cpu"
        assert torch.empty(1).device.type == "meta"
    assert next(CONFIG.build(clip=True, device="meta").parameters()).device.type == "meta"
