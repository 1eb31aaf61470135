"""What a network is: a frozen configuration that builds a module `(x, time, cond) -> output`."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import nn

from undiffuse.config import Table


class Network(ABC):
    """The configuration of a network, found by its class name.

    The module that it builds takes x float32 [b, c, h, w], time float32 [b] and cond int64 [b] or None, and returns
    [b, out, h, w]. `time` names what it is told: `index`, `logsnr` or `sigma` (see `denoiser.network_time`).
    """

    time: Literal["index", "logsnr", "sigma"]
    recomputed: ClassVar[tuple[type[nn.Module], ...]] = ()  # parts that train.recompute runs again in the backward pass

    @abstractmethod
    def build(self, image_channels: int, output_channels: int, classes: int | None = None) -> nn.Module:
        """A freshly initialised module, in training mode, from torch's global generator."""

    @abstractmethod
    def stride(self) -> int:
        """Height and width must be multiples of this."""


NETWORKS: Table[Network] = Table("network", Network, "undiffuse.network")
