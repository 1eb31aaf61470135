"""Numbers of a process on their way to images: float64 on the CPU, until they are cast, and moved in a single copy."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.key import moved

F64 = torch.float64


def per_image(value: Float[Tensor, "b"], like: Float[Tensor, "b *x"]) -> Float[Tensor, "b *ones"]:
    """One number an image, shaped, cast and moved so that it multiplies a batch of images.

    Cast first: there are accelerators without float64.
    """
    return moved(value.to(like.dtype), like.device).reshape(-1, *(1,) * (like.ndim - 1))


def ready(like: Float[Tensor, "b *x"], *rows: Any) -> Any:
    """Named tuples of numbers, float64 on the CPU, made `per_image` in a single copy to the device.

    Each number is [b], or [1] for all images, and before that may come the steps of a chain, [n, b], of which
    `row(numbers, i)` is one. What is bool is a decision and stays on the CPU, as it is; so is what is None.
    """
    numbers = torch.broadcast_tensors(*(each for row in rows for each in row if _multiplies(each)))
    table = torch.stack(numbers) if numbers else torch.zeros(0, dtype=F64, device="cpu")
    found = iter(moved(table.to(like.dtype), like.device).reshape(*table.shape, *(1,) * (like.ndim - 1)))
    made = [type(row)(*(next(found) if _multiplies(each) else each for each in row)) for row in rows]
    return tuple(made) if len(made) > 1 else made[0]


def _multiplies(number: Tensor | None) -> bool:
    return number is not None and number.dtype != torch.bool


def row(numbers: Any, i: int) -> Any:
    """The numbers of step i of a chain: views, so that nothing is copied."""
    return type(numbers)(*(None if each is None else each[i] for each in numbers))


def combined(
    a: Float[Tensor, "*#x"], x: Float[Tensor, "*x"], b: Float[Tensor, "*#x"], y: Float[Tensor, "*x"]
) -> Float[Tensor, "*x"]:
    """a x + b y, as `added` has it."""
    return added(a * x, b, y)


def added(x: Float[Tensor, "*x"], b: Float[Tensor, "*#x"], y: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
    """x + b y; on the CPU the product is rounded before the sum, elsewhere both are one operation."""
    return x + b * y if x.device.type == "cpu" else torch.addcmul(x, b, y)
