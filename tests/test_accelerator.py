"""Nothing needs float64 on an accelerator, because MPS has none: `meta` stands in for one that would refuse it.

A tensor of `meta` has a type and a shape and no values, so whoever reads one here is told ones.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.test_defaults import CONFIG, HalfOf, digits, forget, model, without_kernels
from tests.training.test_loop import recipe
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.density import DENSITIES
from undiffuse.diffusion.grid import Even
from undiffuse.diffusion.likelihood import bound
from undiffuse.diffusion.numbers import per_image, ready
from undiffuse.diffusion.objective import OBJECTIVES, Trajectory
from undiffuse.diffusion.parameterisation import PARAMETERISATIONS
from undiffuse.diffusion.process import PROCESSES, Edm, Linear, Straight
from undiffuse.diffusion.reverse import VARIANCES, Step, bound_term
from undiffuse.diffusion.sampler.base import SAMPLERS
from undiffuse.diffusion.trajectory import Taught
from undiffuse.key import Key
from undiffuse.measure.nll import nll
from undiffuse.model.load import from_weights, load, save
from undiffuse.model.model import to_float
from undiffuse.network.base import Conditioning
from undiffuse.training import look
from undiffuse.training.trainer import Trainer
from undiffuse.view import explore

COPY, READ = torch.ops.aten._to_copy.default, torch.ops.aten._local_scalar_dense.default
F64 = torch.float64


class WithoutFloat64(TorchDispatchMode):
    """`meta` as such a device: an operator that has a tensor there, and float64 anywhere, raises."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func is READ and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is COPY and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
            refuse(func, (*args, kwargs.get("dtype")))
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        found = func(*args, **kwargs)
        refuse(func, (args, kwargs, found))
        return found


def refuse(func, values) -> None:
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    if any(t.is_meta for t in tensors) and (any(t.dtype == F64 for t in tensors) or F64 in tree_leaves(values)):
        raise AssertionError(f"{func} needs float64 on the accelerator")


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    without_kernels(monkeypatch)
    forget()
    with WithoutFloat64():
        yield
    forget()


def there(denoiser: Denoiser) -> Denoiser:
    return denoiser.to("meta")


class FirstOf(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, time, cond):
        return self.network(x[:, :1], time, cond)


NUMBERS = torch.arange(1, 3)
WRONG = {
    "moved as float64": lambda: NUMBERS.to(F64).to("meta"),
    "moved and cast at once": lambda: NUMBERS.to(F64).to(device="meta", dtype=torch.float32),
    "cast there": lambda: NUMBERS.to("meta").double(),
    "made there": lambda: torch.zeros(2, dtype=F64, device="meta"),
    "divided there": lambda: NUMBERS.to("meta") * torch.tensor(0.5, dtype=F64),
    "copied into": lambda: torch.zeros(2, device="meta").copy_(NUMBERS.to(F64)),
    "read as float64": lambda: NUMBERS.to("meta").to("cpu", F64),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_stand_in_refuses(name):
    with pytest.raises(AssertionError, match="needs float64 on the accelerator"):
        WRONG[name]()


def test_a_number_an_image_is_cast_before_it_is_moved():
    x = torch.zeros(2, 1, 4, 4, device="meta")
    found = per_image(NUMBERS.to(F64), x)
    assert (found.dtype, found.device.type, tuple(found.shape)) == (torch.float32, "meta", (2, 1, 1, 1))
    assert per_image(NUMBERS.to(F64), x.cpu()).flatten().tolist() == [1.0, 2.0]


def test_uniform_numbers_are_on_the_cpu_and_normal_ones_where_their_rows_are():
    keys = Key(0).rows(3, "meta")
    assert (keys.uniform(2).device.type, keys.uniform(2).dtype, keys.integers(5).device.type) == ("cpu", F64, "cpu")
    assert (keys.normal(2).device.type, keys.normal(2).dtype) == ("meta", torch.float32)


@pytest.mark.parametrize("process", [Linear(), Edm(), Straight()], ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("name", sorted(DENSITIES.classes))
def test_the_t_of_training_are_on_the_cpu(name, process):
    t = DENSITIES.build(name).t(process, Key(0).rows(3, "meta"))
    assert (t.device.type, t.dtype) == ("cpu", F64)


@pytest.mark.parametrize("name", sorted(OBJECTIVES.classes))
def test_a_loss_and_its_gradient(name):
    objective, one = OBJECTIVES.build(name), there(model().denoiser.requires_grad_(True))
    learned = objective.needs_learned is not False
    network, variance = (
        (one.network, one.variance) if learned else (HalfOf(one.network), VARIANCES.build("fixed-small"))
    )
    denoiser = Denoiser(network, one.process, one.parameterisation, variance, clip=False)
    objective = Taught(objective, denoiser) if isinstance(objective, Trajectory) else objective
    x_0, label = torch.zeros(4, 1, 8, 8, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    loss = objective(denoiser, x_0, Conditioning(label), Key(0).rows(4, "meta"))
    loss.per_example.sum().backward()
    assert (loss.per_example.device.type, loss.per_example.dtype) == ("meta", torch.float32)
    assert all(weight.grad is not None and weight.grad.is_meta for weight in one.network.parameters())


@pytest.mark.parametrize("process", sorted(PROCESSES.classes))
@pytest.mark.parametrize("name", sorted(PARAMETERISATIONS.classes))
def test_every_prediction_on_every_process(name, process):
    parameterisation, made = PARAMETERISATIONS.build(name), PROCESSES.build(process)
    if parameterisation.needs_table and made.steps is None:
        return
    network = HalfOf(FirstOf(there(model().denoiser).network))  # what is known of levels is a channel behind the image
    denoiser = Denoiser(network, made, parameterisation, VARIANCES.build("fixed-large"), time="logsnr")
    x, t = torch.zeros(2, 1, 8, 8, device="meta"), Even().times(made)[1:2].expand(2)
    assert denoiser(x, t).x_0.is_meta and denoiser.score(x, t).is_meta
    assert denoiser(x, t.to(torch.float32).to("meta")).x_0.is_meta


@pytest.mark.parametrize("variance", sorted(VARIANCES.classes))
def test_a_term_of_the_bound(variance):
    one, chosen = there(model().denoiser), VARIANCES.build(variance)
    network = one.network if chosen.learned else HalfOf(one.network)
    denoiser = Denoiser(network, one.process, one.parameterisation, chosen)
    x, t = torch.zeros(2, 1, 8, 8, device="meta"), Even().times(one.process)[-3:-1]
    step = ready(x, Step.between(one.process, t, t - one.process.t_min))
    term = bound_term(chosen, denoiser(x, t), x, x, step)
    assert (term.device.type, term.dtype) == ("meta", torch.float32)
    assert bound(denoiser, x, Key(0).rows(2, "meta"), draws=2 if chosen.learned else None).bits.dtype == "float64"


@pytest.mark.parametrize("solver", sorted(SAMPLERS.classes))
def test_a_chain(solver, tmp_path):
    save(model(), tmp_path / "m.safetensors")
    one = load(tmp_path / "m.safetensors", "meta")
    assert next(one.denoiser.parameters()).is_meta
    images = one.sample(2, solver=solver, label="all")
    assert (images.device.type, tuple(images.shape)) == ("cpu", (6, 1, 8, 8))


def test_a_chain_that_adds_noise_in_ddim_and_one_that_rises(tmp_path):
    one = replace(model(), denoiser=there(model().denoiser), device=torch.device("meta"))
    times = torch.tensor([1.0, 0.5, 0.75, 0.0], dtype=F64)
    assert one.chain(Key(0).rows(2), times, one.sampler("ddim", eta=0.5)).device.type == "cpu"


def test_the_figures_and_the_measures(tmp_path):
    one, data = replace(model(), denoiser=there(model().denoiser), device=torch.device("meta")), digits()
    explore.progressive(one, 2, slots=3)
    explore.shared(one, 2, steps=4)
    picture = data.images[0]
    explore.interpolate(one, picture.to("meta"), picture, steps=4)
    explore.neighbours(data.images[:2].to("meta"), data)
    score = one.denoiser.score
    explore.langevin(score, one.process, Key(0).rows(2, "meta"), (1, 8, 8), one.times(2)[:-1], repeats=1)
    assert nll(one, data, draws=3, label=1, out=tmp_path / "nll")["images"] == len(data)


@pytest.mark.parametrize("fields", [{}, {"exact_shards": 2}, {"recompute": True}], ids=str)
def test_training(fields):
    train = {"precision": "float32", "ema_profiles": [0.1], "batch": 4, **fields}
    chosen = recipe(train=train, data={"labels": True, "flip": True}, network={"dropout": 0.2})
    data = digits(20)
    trainer = Trainer(chosen, chosen.model((1, 8, 8), 10), data, "meta")
    for _ in range(2):
        trainer.update(3)
    other = Trainer(chosen, chosen.model((1, 8, 8), 10), data, "meta")
    saved = {part: {n: torch.ones(t.shape) for n, t in named.items()} for part, named in trainer.tensors().items()}
    other.restore(saved, 2)
    other.start_from(trainer.model())
    other.update(3)
    assert look.fixed_loss(other, data.images, Key(0), Conditioning(data.labels)) == 1.0


def test_weights_of_a_stranger_in_float64():
    weights = {name: tensor.double() for name, tensor in model().denoiser.network.state_dict().items()}
    assert next(from_weights(CONFIG, weights, {}, "meta").denoiser.parameters()).is_meta


def test_pictures_become_floats_there():
    assert to_float(digits().images.to("meta")).dtype == torch.float32
    assert Even().times(Linear(8)).dtype == F64
