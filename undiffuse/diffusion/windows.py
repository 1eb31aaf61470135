"""Images larger than those of training: windows of that size, whose estimates are averaged where they overlap."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.reverse import Prediction
from undiffuse.errors import UsageError
from undiffuse.network.base import NOTHING, Conditioning


def places(long: int, side: int) -> list[int]:
    """Where windows begin: evenly, so that neighbours overlap by half of a side, rounded, or more."""
    count = 1 + -(-2 * (long - side) // side)
    return [round(i * (long - side) / max(1, count - 1)) for i in range(count)]


@dataclass(frozen=True, eq=False)
class Windows:
    """`(x_t, t) -> Prediction` for images [b, c, H, W], by a denoiser of [b, c, h, w] with h ≤ H and w ≤ W.

    An estimate counts for less towards the border of its window, as a tent does, because nothing is known beyond it.
    That is no law of probability: each window is denoised as if it were a picture of its own. What a network says of
    means and variances beside x̂_0 is left out.
    """

    denoiser: Denoiser
    side: tuple[int, int]
    batch: int = 64

    def __call__(
        self, x_t: Float[Tensor, "b c hh ww"], t: Float[Tensor, "b"], cond: Conditioning = NOTHING
    ) -> Prediction:
        (h, w), (high, wide) = self.side, x_t.shape[2:]
        if high < h or wide < w:
            raise UsageError(f"images of {high}×{wide} are smaller than the windows of {h}×{w}; give larger ones")
        corners = [(i, j) for i in places(high, h) for j in places(wide, w)]
        parts = torch.cat([x_t[:, :, i : i + h, j : j + w] for i, j in corners])
        rows = torch.arange(len(x_t), dtype=torch.int64, device="cpu").repeat(len(corners))
        found = [
            self.denoiser(parts[k : k + self.batch], t[rows[k : k + self.batch]], cond.at(rows[k : k + self.batch]))
            for k in range(0, len(parts), self.batch)
        ]
        x_0, output = (torch.cat(parts) for parts in zip(*((each.x_0, each.output) for each in found), strict=True))
        return Prediction(self._laid(x_0, corners, x_t), self._laid(output, corners, x_t))

    def _laid(
        self, parts: Float[Tensor, "k c h w"], corners: list[tuple[int, int]], like: Float[Tensor, "b c hh ww"]
    ) -> Float[Tensor, "b c hh ww"]:
        tall, broad = (
            1 - torch.linspace(-1, 1, n + 2, dtype=like.dtype, device=like.device)[1:-1].abs() for n in self.side
        )
        tent = tall[:, None] * broad
        total, weight = torch.zeros_like(like), torch.zeros_like(like[:1, :1])
        for part, (i, j) in zip(parts.split(len(like)), corners, strict=True):
            area = (slice(None), slice(None), slice(i, i + self.side[0]), slice(j, j + self.side[1]))
            total[area] += tent * part
            weight[area] += tent
        return total / weight
