"""The scale of a loss whose gradients are float16, in which small ones are 0 (Micikevicius et al. 2018, §3.2).

The rule and its numbers are those of `torch.amp.GradScaler`. That class asks the device whether a gradient is finite;
here the step's own read of the norm tells, so that a step waits for the device no more often than without a scale.
"""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

START, INTERVAL = 2.0**16, 2000
# At 1 nothing is scaled, so that what overflows are the numbers themselves; it takes 16 overflows in a row from START.
FLOOR = 1.0


class LossScale:
    """Halved by a step that overflows, which is skipped; doubled by 2,000 in a row that do not. Without `on`, 1."""

    def __init__(self, on: bool):
        self.on, self.scale, self.good = on, START if on else FLOOR, 0  # good: steps since it changed

    def unscale(self, weights: Iterable[nn.Parameter]) -> None:
        """Makes gradients of the scaled loss those of the loss, exactly, for the scale is a power of 2."""
        if self.on:
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.scale)  # pyright: ignore[reportPrivateImportUsage]

    def passed(self) -> None:
        """Takes note of a step whose gradient is finite."""
        self.good += self.on
        if self.good == INTERVAL:
            self.scale, self.good = min(2 * self.scale, 2.0**127), 0  # the largest power of 2 in float32

    def overflowed(self) -> bool:
        """Takes note of a step whose gradient is not; whether a smaller scale may help, so that it is only skipped."""
        if self.scale <= FLOOR:
            return False
        self.scale, self.good = self.scale / 2, 0
        return True

    def told(self, skipped: bool) -> dict[str, float]:
        """What the log of a step has of it: nothing, unless it is on."""
        return {"skipped": float(skipped), "loss_scale": self.scale} if self.on else {}

    def tensors(self) -> dict[str, Shaped[Tensor, "..."]]:
        """The state for a checkpoint."""
        return {
            "scale": torch.tensor(self.scale, dtype=torch.float32, device="cpu"),
            "good": torch.tensor(self.good, dtype=torch.int64, device="cpu"),
        }

    def restore(self, tensors: Mapping[str, Shaped[Tensor, "..."]]) -> None:
        """Of a checkpoint from before there was a scale, nothing."""
        if self.on and tensors:
            self.scale, self.good = float(tensors["scale"]), int(tensors["good"])
