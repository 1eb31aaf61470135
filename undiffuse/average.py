"""The exponential moving average of the weights, without which DDPM's FID is four times worse."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """shadow ← decay · shadow + (1 − decay) · weight, every step, from a copy of the initial weights.

    With `ramp`, decay is at most (1 + n)/(10 + n) after n updates, so that a short run forgets its first weights.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, ramp: bool = False):
        self.shadow = [parameter.detach().clone() for parameter in parameters]
        self.decay, self.ramp = decay, ramp

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter], step: int) -> None:
        """`step` counts the updates made before this one."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay
        get_ema_multi_avg_fn(decay)(self.shadow, [parameter.detach() for parameter in parameters], None)
