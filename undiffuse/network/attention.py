"""Attention over all positions of an image."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.network.block import EPS, GROUPS, NEAR_ZERO, conv, norm


def attend(q: Float[Tensor, "b n c"], k: Float[Tensor, "b n c"], v: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
    """softmax(q kᵀ c^(−1/2)) v. On a CPU two products beat torch's kernel as long as the scores fit its cache."""
    if q.device.type == "cpu" and q.shape[1] <= 1024:
        scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[2] ** -0.5)  # (b, n, n)
        return torch.bmm(scores.softmax(-1), v)
    # Fused kernels take rows that are contiguous, and only those; MPS gave wrong values of others.
    q, k, v = (each[:, None].contiguous() for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[:, 0]


class Attention(nn.Module):
    """Heads of `head` channels over all positions, one of all channels unless given, with a residual connection.

    `groups` 0 is no norm; the sum is divided by `scale`.
    """

    def __init__(
        self,
        channels: int,
        groups: int = GROUPS,
        eps: float | int = EPS,
        head: int | None = None,
        scale: float | int = 1.0,
    ):
        super().__init__()
        self.heads, self.scale = channels // (head or channels), scale
        inner = self.heads * (head or channels)
        self.norm = norm(channels, groups, eps) if groups else nn.Identity()
        self.q, self.k, self.v = (conv(channels, inner, size=1) for _ in range(3))
        self.proj_out = conv(inner, channels, size=1, gain=NEAR_ZERO)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        batch, _, height, width = x.shape
        h = self.norm(x)
        parts = (layer(h).reshape(batch * self.heads, -1, height * width) for layer in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in parts)  # (b heads, hw, d)
        h = x + self.proj_out(attend(q, k, v).transpose(1, 2).reshape(batch, -1, height, width))
        return h if self.scale == 1 else h / self.scale
