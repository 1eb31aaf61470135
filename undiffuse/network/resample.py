"""From one resolution of an image to the next by a convolution."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.network.block import conv, doubled, initialised


class Downsample(nn.Module):
    """Stride 2 with TF's SAME padding: one row at the bottom, one column at the right; or centred, one on each side."""

    def __init__(self, channels: int, centred: bool = False):
        super().__init__()
        self.conv = initialised(nn.Conv2d(channels, channels, 3, stride=2))
        self.padding = (1, 1, 1, 1) if centred else (0, 1, 0, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Each pixel repeated 2×2, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(doubled(x))
