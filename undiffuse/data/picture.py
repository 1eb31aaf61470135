"""One picture file to one uint8 array, and the crop and resize that LSUN was prepared with.

Whatever the file holds (palette, CMYK, 16 bits, alpha, an orientation tag, an animation), what comes out is grey or
RGB, upright, eight bits, the first frame.
"""

import io
import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor, ImageOps

from undiffuse.errors import DataError, UsageError

MAX_PIXELS = 2**26
MAX_BYTES = 2**30
# EPS runs an external program; the others are recognised by Pillow but not decoded.
UNREADABLE = {"EPS", "PDF", "MPEG", "HDF5", "GRIB", "BUFR", "WMF"}

Colour = tuple[int, int, int]


def suffixes() -> frozenset[str]:
    """The file endings of the formats that Pillow decodes, lower case."""
    registered = Image.registered_extensions()
    return frozenset(ext for ext, kind in registered.items() if kind in Image.OPEN and kind not in UNREADABLE)


def colour(name: str) -> Colour:
    """`white`, `#20a0ff` … as red, green and blue; UsageError for anything else."""
    try:
        red, green, blue, *_ = ImageColor.getrgb(name)
    except ValueError as error:
        raise UsageError(f'background "{name}" is not a colour; give a name such as white or #rrggbb') from error
    return red, green, blue


@dataclass(frozen=True)
class Reading:
    """How files become pixels, where they do not say it themselves: every reader of data is given one."""

    background: str = "white"  # the colour behind transparent pixels

    def __post_init__(self) -> None:
        colour(self.background)

    @cached_property
    def colour(self) -> Colour:
        """The background as red, green and blue."""
        return colour(self.background)


PLAIN = Reading()


def decode(data: bytes, reading: Reading = PLAIN) -> UInt8[np.ndarray, "h w c"]:
    """Pixels [h, w, 1 or 3] of a picture file's bytes; DataError with the bare reason if it cannot be decoded."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")  # remarks on metadata; what is wrong with the pixels raises
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
            image.load()
            return _pixels(ImageOps.exif_transpose(image), reading.colour)
    except DataError:
        raise
    except Exception as error:  # on damaged bytes Pillow's plugins raise nearly every type
        reason = "not a picture in a known format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise DataError(" ".join(str(reason).split()) or type(error).__name__) from error


def _pixels(image: Image.Image, background: Colour) -> UInt8[np.ndarray, "h w c"]:
    if image.mode.startswith("I"):
        return _sixteen_bits(np.asarray(image))
    if image.mode == "F":
        raise DataError("float pixels; expected 8 or 16 bits")
    grey = image.mode in ("1", "L", "LA")
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        plain = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(plain, image.convert("RGBA"))
        grey = grey and len(set(background)) == 1
    array = np.asarray(image.convert("L" if grey else "RGB"))
    return array[..., None] if grey else array


def _sixteen_bits(values: np.ndarray) -> UInt8[np.ndarray, "h w 1"]:
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"pixels from {values.min()} to {values.max()}; expected 8 or 16 bits")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)[..., None]


def fit(
    image: UInt8[np.ndarray, "h w c"], size: tuple[int, int] | None, channels: int | None
) -> UInt8[np.ndarray, "h2 w2 c2"]:
    """Centre-cropped to the aspect of `size` (height, width), Lanczos-resized to it, and turned to grey or RGB."""
    given = image.shape[2]
    if channels is not None and channels != given:
        if {channels, given} != {1, 3}:
            raise DataError(f"{given} channels cannot be turned into {channels}; only grey and RGB are converted")
        image = np.asarray(Image.fromarray(image).convert("L"))[..., None] if given == 3 else image.repeat(3, axis=2)
    if size is None or size == image.shape[:2]:
        return image
    image = _crop(image, *size)
    resized = [_resize(image[..., c], size) for c in range(image.shape[2])]
    return np.stack(resized, axis=-1)


def _crop(image: UInt8[np.ndarray, "h w c"], height: int, width: int) -> UInt8[np.ndarray, "h2 w2 c"]:
    """The largest centred part of that aspect; for a square, StyleGAN's crop to min(h, w)."""
    h, w = image.shape[:2]
    if h * width <= w * height:
        part = h, max(1, round(h * width / height))
    else:
        part = max(1, round(w * height / width)), w
    top, left = (h - part[0]) // 2, (w - part[1]) // 2
    return image[top : top + part[0], left : left + part[1]]


def _resize(plane: UInt8[np.ndarray, "h w"], size: tuple[int, int]) -> UInt8[np.ndarray, "h2 w2"]:
    picture = Image.fromarray(np.ascontiguousarray(plane))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.LANCZOS))
