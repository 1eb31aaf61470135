"""What a run will need of memory, from its network: one micro-batch is run on tensors that have no values.

They have the device and the type that the run's would have, so that whatever depends on either is as there; how many
images there are costs no time. Counted are tensors. What a device keeps for itself comes on top: the code of its
kernels, and room between tensors.
"""

import weakref
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from undiffuse.diffusion.objective import Objective
from undiffuse.machine import dist
from undiffuse.machine.device import HALF
from undiffuse.model.recipe import ModelConfig, TrainConfig
from undiffuse.network.base import Conditioning, recompute
from undiffuse.training.optimizer import optimizer_of
from undiffuse.training.plan import shares


class Need(NamedTuple):
    """Bytes of a process at its peak: what there is of each weight, and the rest, nearly all of it activations."""

    state: int
    activations: int

    @property
    def total(self) -> int:
        return self.state + self.activations

    def __str__(self) -> str:
        return (
            f"{gigabytes(self.total)} of memory at the peak by estimate: {gigabytes(self.state)} for weights, "
            f"gradients, moments and averages, {gigabytes(self.activations)} for activations"
        )


def gigabytes(size: int | float) -> str:
    """`1.3 GB`, or MB below one."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and not yet freed, each storage once.

    An operator may need room beside its result: as much again, by what the profiler sees convolutions take.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [self.noted(part) for part in tree_leaves(result) if isinstance(part, Tensor)]
        largest = max(made, default=0)
        self.largest, self.peak = max(self.largest, largest), max(self.peak, self.now + largest)
        return result

    def noted(self, tensor: Tensor) -> int:
        """The bytes that are new with a tensor."""
        storage = tensor.untyped_storage()
        name, size = id(storage), storage.nbytes()
        if name in self.known:
            return 0
        self.known[name] = weakref.ref(storage, partial(self._freed, name, size))
        self.now += size
        return size

    def _freed(self, name: int, size: int, _: Any) -> None:
        del self.known[name]
        self.now -= size


def need(
    train: TrainConfig,
    config: ModelConfig,
    micro: int,
    device: str | torch.device = "cpu",
    objective: Objective | None = None,
) -> Need:
    """Of a process whose micro-batches have so many images; exact to some percent of what its tensors take.

    The objective says how often the network is asked for each of them, and whether a teacher is kept; once, and none.

    Gradients are there from the start where micro-batches or processes are summed; else they come as activations go.
    """
    share, shards = shares(train)[0], train.exact_shards
    stay = not shards and (micro < share or dist.size() > 1)
    asked, taught = (1, 0) if objective is None else (objective.evaluations, objective.taught)
    weights, moments, beside = _beside_weights(train, config, micro * asked, torch.device(device), stay)
    kept = 2 + len(train.ema_profiles) + (taught > 0)  # of the weights, themselves included
    averaged = weights * kept + moments
    copies = share // micro if shards else 1  # of the gradient, one a shard; they are added beside two more
    beside = max(beside + (copies - 1) * weights, (copies + 2) * weights if shards else 0)
    return Need(averaged + copies * weights, max(0, beside - copies * weights))


def _beside_weights(
    train: TrainConfig, config: ModelConfig, asked: int, device: torch.device, stay: bool
) -> tuple[int, int, int]:
    """The bytes of the weights and of their moments, and the peak of what one micro-batch makes beside them.

    Where all activations are kept, the peak is at the end of the forward pass; else the backward pass is run too.
    """
    device = device if device.type == "cuda" else torch.device("cpu")  # nothing else is known to take such tensors
    network = config.build(clip=False, device="meta").network
    with FakeTensorMode(allow_non_fake_inputs=True):
        _move(network, device)
        recompute(config.network, network, train.recompute, exact=False)
        with Alive() as alive:
            weights = sum(alive.noted(weight) for weight in network.parameters())
            kept = optimizer_of(train.optimizer, network, train.betas).moments
            moments = sum(weight.nbytes * len(kept(weight)) for weight in network.parameters())
            for weight in network.parameters():
                weight.grad = torch.empty_like(weight) if stay else None
            x = torch.empty(asked, *config.asked, dtype=torch.float32, device=device)
            time = torch.empty(asked, dtype=torch.float32, device=device)
            label = None if config.classes is None else torch.empty(asked, dtype=torch.int64, device=device)
            with torch.autocast(device.type, HALF.get(train.precision), enabled=train.precision in HALF):
                output = network(x, time, Conditioning(label=label))
                loss = (output - torch.empty_like(output)).square().mean()
            if not train.recompute:
                return weights, moments, max(alive.peak - weights, alive.now - weights + alive.largest, weights)
            loss.backward()
            return weights, moments, alive.peak - weights


def _move(network: nn.Module, device: torch.device) -> None:
    """Gives the weights and buffers a device. They were made on `meta`, for initial values take long."""
    moved: dict[int, Tensor] = {}  # a weight that is used twice stays one
    for module in network.modules():
        for name, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            new = torch.empty(old.shape, dtype=old.dtype, device=device)
            new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            setattr(module, name, moved.setdefault(id(old), new))
