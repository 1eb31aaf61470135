"""Weight files of networks that others have trained: found, checked against a pinned sha256, read as data only."""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.errors import Corrupt, UsageError
from undiffuse.interop.torchfile import read_tensors
from undiffuse.machine.disk import cache_folder
from undiffuse.quality.feature.base import hash_of_file


def weights_folder() -> Path:
    """Where files that the user brings are looked for: `weights` in the cache folder."""
    return cache_folder() / "weights"


def in_cache(names: tuple[str, ...]) -> Path | None:
    """The first of these files that is there."""
    paths = [weights_folder() / name for name in names]
    return next((path for path in paths if path.is_file()), None)


def read_pinned(path: Path, sha256: str, what: str) -> dict[str, Tensor]:
    """The tensors of the file. Raises UsageError for a missing one and Corrupt for one with another sha256."""
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is missing"
        raise UsageError(f"{path} {kind}; give the file with the weights of {what}, sha256 {sha256}")
    try:
        found = hash_of_file(path)
    except OSError as error:
        raise Corrupt(f"{path} cannot be read: {error.strerror}; restore it from a copy") from error
    if found != sha256:
        raise Corrupt(
            f"{path} has sha256 {found}, and the weights of {what} have {sha256}; it is damaged or another file; "
            "get it anew"
        )
    return read_tensors(path, True)  # as a pickle if it is one: its bytes are known, and the reader executes none


class Unit(nn.Module):
    """A convolution with its batch-norm folded in, and what follows it."""

    def __init__(self, conv: nn.Conv2d, after: nn.Module):
        super().__init__()
        self.conv, self.after = conv, after

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        return self.after(self.conv(x))


def fold(unit: Unit, tensors: Mapping[str, Tensor], conv: str, norm: str, eps: float) -> None:
    """Gives a unit the weights of a bare convolution and of the batch-norm behind it, in float64 until it is done."""
    weight, gamma, beta, mean, variance = (
        tensors[name].double()
        for name in (
            f"{conv}.weight",
            *(f"{norm}.{each}" for each in ("weight", "bias", "running_mean", "running_var")),
        )
    )
    scale = gamma / (variance + eps).sqrt()
    with torch.no_grad():
        unit.conv.weight.copy_(weight * scale.view(-1, 1, 1, 1))
        assert unit.conv.bias is not None
        unit.conv.bias.copy_(beta - mean * scale)


def ready(network: nn.Module, device: torch.device) -> nn.Module:
    """For extraction only: no gradients, and channels last, which is the faster layout here on every device."""
    network.eval().requires_grad_(False)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network.to(device)
