"""Colours of 16 bits, of which Pillow decodes either the upper bytes or the lower ones: both, in two turns."""

import sys
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

# Colours of 16 bits in a file, and as what Pillow reads the bytes that it leaves out: the mode, and how it is kept.
LOWER = {
    **{f"{mode};16{one}": (mode, f"{mode};16{two}") for mode in ("RGB", "RGBA") for one, two in ("BL", "LB")},
    **{f"{mode};16N": (mode, f"{mode};16{'B' if sys.byteorder == 'little' else 'L'}") for mode in ("RGB", "RGBA")},
    "LA;16B": ("RGBA", "RGBA"),
}


def kept(image: Image.Image) -> str:
    """How the file keeps its values, as Pillow calls it, such as `I;16B`; empty where 8 bits or fewer are read."""
    kinds = {str(tile[3] if isinstance(tile[3], str) else tile[3][0]) for tile in getattr(image, "tile", ())}
    wide = [kind for kind in sorted(kinds) if ";16" in kind or ";32" in kind]
    return wide[0] if wide else "I;16" if image.mode.startswith("I") and image.format == "PPM" else ""


def values(image: Image.Image, bits: str, again: ImageFile.ImageFile) -> np.ndarray:
    """Colours of 16 bits, with opacity if there is some; `again` is the same file, opened and not yet decoded."""
    mode, other = LOWER[bits]
    again._mode = mode  # as Pillow's readers set it; the bytes of a pixel are as many
    again.tile = [_kept_as(tile, other) for tile in again.tile]
    again.load()
    lower = np.asarray(ImageOps.exif_transpose(again)).astype(np.uint16)
    if bits == "LA;16B":  # taken as four bytes
        return lower[..., 0::2] << 8 | lower[..., 1::2]
    return np.asarray(image).astype(np.uint16) << 8 | lower


def _kept_as(tile: Any, kind: str) -> Any:
    """A part of a file, to be decoded as if it were kept in another way."""
    return tile._replace(args=kind if isinstance(tile.args, str) else (kind, *tile.args[1:]))
