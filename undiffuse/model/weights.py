"""The weights of a network by name, whatever it is wrapped in, and the hash that stands for them."""

import hashlib
import re
from collections.abc import Mapping

from torch import Tensor, nn


def clean(name: str) -> str:
    """The name of a weight without what `torch.compile` and the wrappers for several processes put into it."""
    return re.sub(r"^(?:module\.)+", "", re.sub(r"(?:^|(?<=\.))_orig_mod\.", "", name))


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network by their own names."""
    return {clean(name): tensor for name, tensor in network.state_dict().items()}


def digest_of_weights(weights: Mapping[str, Tensor], before: bytes = b"") -> str:
    """sha256 of what stands before, and of the weights by name."""
    found = hashlib.sha256(before)
    for name, tensor in sorted(weights.items()):
        found.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
