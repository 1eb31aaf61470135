"""One picture file, made into an image of a shape."""

from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from undiffuse.data import picture
from undiffuse.data.made import Made, tally
from undiffuse.data.picture import Reading
from undiffuse.data.source import Wanted
from undiffuse.errors import DataError


def read_picture(path: Path, shape: tuple[int, int, int], reading: Reading) -> tuple[UInt8[Tensor, "c h w"], Made]:
    """The image of this shape (channels, height, width), and what was made of the picture. Raises DataError."""
    c, h, w = shape
    try:
        found = picture.read(path.read_bytes(), Wanted.of((h, w), c).reading(reading))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    notes = (*found.made, *picture.changes(found.pixels.shape, (h, w), c))
    return torch.from_numpy(picture.fit(found.pixels, (h, w), c).copy()).permute(2, 0, 1), tally(notes)
