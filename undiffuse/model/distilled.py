"""What is particular to a distilled model: `bounds` are sigma/alpha at which its few steps begin, rising."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import Process
from undiffuse.errors import UsageError, counted
from undiffuse.strict import whole

Bounds = tuple[float, ...] | None


def refuse(bounds: Bounds, what: str) -> None:
    """UsageError for such a model, which has no x̂_0 but at the starts of its steps."""
    if bounds is not None:
        raise UsageError(
            f"{what} is not possible: this model is distilled to {counted(len(bounds), 'step')}; take the "
            "one that it was made of"
        )


def times(bounds: tuple[float, ...], process: Process, asked: Any) -> Float[Tensor, "times"]:
    """The times of its chain; `asked` is a list of these, their number, or None. Raises UsageError for others."""
    falling = torch.tensor(bounds, dtype=F64, device="cpu").flip(0)
    own = torch.cat([process.time_of_spread(falling).clamp(max=1), falling.new_zeros(1)])
    if asked is not None and not isinstance(asked, list):
        asked = whole("steps", asked)
    if asked not in (None, len(bounds), own.tolist()):
        refuse(bounds, "another number of steps or grid")
    return own
