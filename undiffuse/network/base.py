"""What a network is: a frozen configuration that builds a module `(x, time, cond) -> output`."""

from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from undiffuse.config import Table
from undiffuse.errors import UsageError


class Conditioning(NamedTuple):
    """What a network is told beside x and t. None is "not told", which a network takes for what it was trained with."""

    label: Int[Tensor, "b"] | None = None  # the class of each image; the number of classes itself says "no class"

    def to(self, device: torch.device | str) -> "Conditioning":
        return Conditioning(*(None if part is None else part.to(device) for part in self))

    def at(self, rows: slice | list[int] | Int[Tensor, "n"]) -> "Conditioning":
        """That of some images of the batch."""
        return Conditioning(*(None if part is None else part[rows] for part in self))


NOTHING = Conditioning()


class Network(ABC):
    """The configuration of a network, found by its class name.

    The module that it builds takes x float32 [b, c, h, w], time float32 [b] and a `Conditioning`, and returns
    [b, out, h, w]. `time` names what it is told: `index`, `logsnr` or `sigma` (see `denoiser.network_time`).
    """

    time: Literal["index", "logsnr", "sigma"]
    recomputed: ClassVar[tuple[type[nn.Module], ...]] = ()  # parts that train.recompute runs again in the backward pass

    @abstractmethod
    def build(self, image_channels: int, output_channels: int, classes: int | None = None, hints: int = 0) -> nn.Module:
        """A freshly initialised module, in training mode, from torch's global generator.

        `hints` are channels of x behind those of the image; there are none unless the parameterisation has them.
        """

    @abstractmethod
    def stride(self) -> int:
        """Height and width must be multiples of this."""

    def levels(self, module: nn.Module) -> list[list[nn.Module]]:
        """What of the module belongs to each resolution, from the largest; nothing where there are no such levels."""
        return []

    def meaning(self) -> dict[str, Any]:
        """The fields that its output depends on besides its weights, each made definite; so not those of training."""
        assert is_dataclass(self)
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "dropout"}


NETWORKS: Table[Network] = Table("network", Network, "undiffuse.network")


def recompute(network: Network, module: nn.Module, levels: bool | int, exact: bool = True) -> None:
    """Lets parts of its module keep no activations, but run again in the backward pass.

    All of them, or those of so many levels from the largest resolution; raises UsageError where there are not so many.
    Dropout is drawn again as it was, unless not `exact`, which is for tensors without values.
    """
    places = [module] if levels is True else []
    if not isinstance(levels, bool):
        there, name = network.levels(module), NETWORKS.name_of(network)
        if levels > len(there):
            has = f"{len(there)}; set at most {len(there)}, or true" if there else "none; set true or false"
            raise UsageError(f"train.recompute = {levels} is a number of levels, of which network {name} has {has}")
        places = [part for level in there[:levels] for part in level]
    for part in (part for place in places for part in place.modules()):
        if isinstance(part, network.recomputed):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=exact)
