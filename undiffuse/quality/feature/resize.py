"""How images become those that a network was trained on, by name: scores of two resizes are not comparable.

The names are of the tools that made them usual. All but `pil-uint8` take the images where they are and give floats that
are not rounded; the bicubic ones may leave 0 to 255 a little.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

Resize = Literal["tf1", "pil", "pil-uint8", "torch"]
Size = tuple[int, int]  # height and width


def tf1(images: UInt8[Tensor, "b c h w"], size: Size) -> Float[Tensor, "b c H W"]:
    """Bilinear as in TensorFlow 1, which the networks of FID were published with: pixel i is read at i · h/H.

    So the origin is a corner, without the half pixel that any later resize adds, and nothing is averaged.
    """
    rows = _between(images.float(), 3, size[1])
    return _between(rows, 2, size[0])


def _between(values: Float[Tensor, "b c h w"], axis: int, size: int) -> Float[Tensor, "b c H W"]:
    """Along one axis: each new place lies between the two old ones that it falls among."""
    given = values.shape[axis]
    # In float32, as the source has it: at large sizes another precision falls among other neighbours.
    place = torch.arange(size, dtype=torch.float32, device=values.device) * torch.tensor(
        given / size, dtype=torch.float32, device=values.device
    )
    low = place.long()
    share = (place - low).view(-1, *[1] * (3 - axis))
    near, far = values.index_select(axis, low), values.index_select(axis, (low + 1).clamp(max=given - 1))
    return near + (far - near) * share


def pil(images: UInt8[Tensor, "b c h w"], size: Size) -> Float[Tensor, "b c H W"]:
    """Pillow's bicubic of each channel in float, antialiased: what clean-fid calls "clean"."""
    return interpolate(images.float(), size, mode="bicubic", antialias=True)


def pil_uint8(images: UInt8[Tensor, "b c h w"], size: Size) -> Float[Tensor, "b c H W"]:
    """Pillow's bicubic of 8-bit pictures, rounded and clipped: what dgm-eval does before DINOv2."""
    height, width = size
    made = np.empty((*images.shape[:2], height, width), np.uint8)
    for at, plane in zip(np.ndindex(*images.shape[:2]), images.cpu().flatten(0, 1).numpy(), strict=True):
        made[at] = np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(made).to(images.device).float()


def half_pixel(images: UInt8[Tensor, "b c h w"], size: Size) -> Float[Tensor, "b c H W"]:
    """torch's bilinear, without antialiasing, as pytorch-fid has it."""
    return interpolate(images.float(), size, mode="bilinear")


RESIZES: dict[str, Callable[[Tensor, Size], Tensor]] = {
    "tf1": tf1,
    "pil": pil,
    "pil-uint8": pil_uint8,
    "torch": half_pixel,
}


def text(name: str, size: Size) -> str:
    """How a resize is named where statistics say what they were made with: `tf1 299x299`."""
    return f"{name} {size[0]}x{size[1]}"
