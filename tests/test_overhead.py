"""What is done beside the network, counted on `meta`, a device without data: kernels, copies to it, and reads back.

A card works through a queue. Each copy and each kernel beside the network costs the processor its time, and a read
makes it wait until the queue is empty.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.test_defaults import digits, model, without_kernels
from tests.training.test_loop import recipe
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.likelihood import bound
from undiffuse.diffusion.objective import OBJECTIVES, Trajectory
from undiffuse.diffusion.reverse import FixedSmall
from undiffuse.diffusion.sampler.ancestral import Ancestral
from undiffuse.diffusion.sampler.base import SAMPLERS
from undiffuse.diffusion.trajectory import Taught
from undiffuse.key import Key, Keys
from undiffuse.network.base import NOTHING
from undiffuse.training.trainer import Trainer

COPY, READ = torch.ops.aten._to_copy.default, torch.ops.aten._local_scalar_dense.default


class Counted(TorchDispatchMode):
    """Kernels on `meta`, views left out; how often it is given numbers; how often the processor waits for its own."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.copies, self.reads = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func is READ:
            self.reads += args[0].is_meta
            return torch.ones((), dtype=args[0].dtype).item() if args[0].is_meta else func(*args, **kwargs)
        to = kwargs.get("device") if func is COPY else None
        if to is not None and args[0].is_meta != (torch.device(to).type == "meta"):
            self.copies += not args[0].is_meta
            self.reads += args[0].is_meta
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=to)
        found = func(*args, **kwargs)
        there = any(isinstance(each, torch.Tensor) and each.is_meta for each in tree_leaves((args, kwargs, found)))
        self.launches += there and not func.is_view and "empty" not in str(func)
        return found


class Still(nn.Module):
    """A network that launches nothing."""

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return x.detach()


@pytest.fixture
def quiet(monkeypatch):
    """Noise in a single launch, as that of Triton's kernel is; tests of it count its own."""
    monkeypatch.setattr(Keys, "normal", lambda keys, *shape: torch.zeros(len(keys.rows), *shape, device=keys.device))


def there(**fields: Any) -> Denoiser:
    one = model().denoiser
    return Denoiser(Still(), one.process, one.parameterisation, fields.get("variance", FixedSmall()))


def test_the_count_sees_what_it_counts():
    x, few = torch.zeros(2, 3, device="meta"), torch.ones(3)
    with Counted() as counted:
        (x * few.to("meta")).reshape(3, 2).sum().item()
        x.cpu()
    assert (counted.launches, counted.copies, counted.reads) == (2, 1, 2)


def taken(solver: str, steps: int) -> Counted:
    one = replace(model(), denoiser=there(), device=torch.device("meta"))
    sampler, times = one.sampler(Ancestral(FixedSmall()) if solver == "ancestral" else solver), one.times(steps)
    with Counted() as counted:
        one.chain(Key(0).rows(2), times, sampler)
    return counted


# Of a deterministic step three make x̂_0 and two the step; noise adds itself, the standard deviation and the sum.
SOLVERS = {"ddim": (5, 1), "heun": (14, 2), "ancestral": (9, 1), "dpmpp": (6, 1), "dpmpp-sde": (8, 1), "unipc": (12, 1)}
SOLVERS |= {"deis": (10, 1), "ipndm": (11, 1)}


@pytest.mark.parametrize(("solver", "most", "evaluations"), [(name, *few) for name, few in SOLVERS.items()])
def test_a_sampling_step(solver, most, evaluations, quiet):
    """No copy, no read, and few kernels beside the network, however long the chain is."""
    few, many = taken(solver, 6), taken(solver, 8)
    launches = (many.launches - few.launches) / 2
    print(f"{solver}: {launches:g} launches a step beside {evaluations} evaluation(s); {many.copies} copies a chain")
    assert set(SAMPLERS.classes) == SOLVERS.keys()
    assert launches == most and (many.copies, many.reads) == (few.copies, few.reads)
    assert many.copies == 2  # what the denoiser knows of the times, and the sampler


@pytest.mark.parametrize("draws", [None, 3])
def test_a_term_of_the_bound(draws, quiet):
    found = []
    for count in (3, 4) if draws else (None,):
        with Counted() as counted:
            bound(there(), torch.zeros(2, 1, 8, 8, device="meta"), Key(0).rows(2, "meta"), draws=count)
        found.append(counted)
    terms = model().process.steps if draws is None else 4
    print(
        f"draws {draws}: {found[-1].launches / terms:.1f} launches a term, {found[-1].copies} copies for {terms} terms"
    )
    assert all((each.copies, each.reads) == (found[0].copies, 3) for each in found)  # prior, terms, errors
    assert found[0].copies <= 1 and found[-1].launches / terms <= 45


def of_update(trainer: Trainer) -> Counted:
    with Counted():
        trainer.update(6)
    with Counted() as counted:
        trainer.update(6)
    return counted


@pytest.fixture
def trainer(monkeypatch):
    without_kernels(monkeypatch)

    def made(**fields: Any) -> Trainer:
        chosen = recipe(train={"precision": "float32", "ema_profiles": [], **fields})
        return Trainer(chosen, chosen.model((1, 8, 8)), digits(), "meta")

    return made


def test_an_update_waits_for_the_device_once(trainer):
    """For the norm of its gradient and its losses, together; one number more that is asked for is seen."""
    one = trainer()
    counted = of_update(one)
    print(f"an update: {counted.copies} copies to the device, {counted.reads} back")
    assert (counted.copies, counted.reads) == (2, 1)  # the images, and what is known of their times
    whole = one.loss

    def asks(*given):
        loss, t = whole(*given)
        return loss, t + loss.mean().item()

    one.loss = asks
    assert of_update(one).reads == 2


def test_labels_are_one_copy_more(monkeypatch, trainer):
    chosen = recipe(train={"precision": "float32", "ema_profiles": []}, data={"labels": True})
    trainer()  # for what it patches
    counted = of_update(Trainer(chosen, chosen.model((1, 8, 8), 10), digits(), "meta"))
    assert (counted.copies, counted.reads) == (3, 1)


def test_each_micro_batch_is_sent_twice(trainer):
    counted = of_update(trainer(micro_batch=2))
    micros = recipe().train.batch // 2
    assert (counted.copies, counted.reads) == (2 * micros, 1)


@pytest.mark.parametrize("name", sorted(OBJECTIVES.classes))
def test_a_loss_beside_the_network(name, quiet):
    objective = OBJECTIVES.build(name)
    if objective.needs_learned:
        return
    objective = Taught(objective, there()) if isinstance(objective, Trajectory) else objective
    x_0 = torch.zeros(4, 1, 8, 8, device="meta")
    with Counted() as counted:
        objective(there(), x_0, NOTHING, Key(0).rows(4, "meta"))
    print(f"{name}: {counted.launches} launches, {counted.copies} copy")
    # A teacher's chain is told its times, and what its steps count.
    assert (counted.copies, counted.reads) == (3 if name == "trajectory" else 1, 0)
    most = {"trajectory": 45, "simple": 8, "min-snr": 9, "continuous-vlb": 9, "p2": 9, "sigmoid": 9, "vlb": 65}
    assert counted.launches <= most[name]
