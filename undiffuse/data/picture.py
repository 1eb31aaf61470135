"""One picture file to one uint8 array, and the crop and resize that LSUN was prepared with.

Whatever the file holds (palette, CMYK, 16 bits, alpha, an orientation tag, an animation), what comes out is grey or
RGB, upright, eight bits, the first frame.
"""

import importlib
import io
import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BufferedIOBase
from typing import IO, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor, ImageOps

from undiffuse.errors import DataError, UsageError

MAX_PIXELS = 2**26
MAX_BYTES = 2**30
# EPS runs an external program; the others are recognised by Pillow but not decoded.
UNREADABLE = {"EPS", "PDF", "MPEG", "HDF5", "GRIB", "BUFR", "WMF"}
VARIANTS = {"ICO", "ICNS", "PSD"}  # with several sizes, or layers, of one picture
HEAD = 2**20  # bytes in which a file says how many pictures it has
# Modules of the extra `pictures`, and the function in each that adds it to Pillow, where the import does not.
PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_jxl": ""}
# First bytes of what only a plugin decodes, after so many others, and the usual ending.
SIGNATURES = (
    *((4, b"ftyp" + brand, ".heic") for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")),
    (4, b"ftypavif", ".avif"),
    (0, b"\xff\x0a", ".jxl"),
    (4, b"JXL \x0d\x0a\x87\x0a", ".jxl"),
)

Colour = tuple[int, int, int]


@lru_cache(maxsize=1)
def add_plugins() -> None:
    """Makes Pillow read HEIC and JPEG XL where the extra `pictures` is installed."""
    for name, register in PLUGINS.items():
        try:
            module = importlib.import_module(name)
        except ImportError:  # it is an extra; whoever finds such a file says what to install
            continue
        if register:
            getattr(module, register)()


@lru_cache(maxsize=1)
def suffixes() -> frozenset[str]:
    """The file endings of the formats that Pillow decodes, lower case."""
    add_plugins()
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
    picture: str = ""  # which, where an example has several

    def __post_init__(self) -> None:
        colour(self.background)

    @cached_property
    def colour(self) -> Colour:
        """The background as red, green and blue."""
        return colour(self.background)


PLAIN = Reading()


def recognised(file: BufferedIOBase) -> str:
    """The usual ending of a file that begins as a picture does, empty for any other."""
    suffixes()  # makes Pillow load all that it has
    start = file.read(32)
    file.seek(0)
    # A format that knows no signature takes other files for its own.
    readable = [kind for kind, (_, accepts) in Image.OPEN.items() if kind not in UNREADABLE and accepts]
    try:
        with warnings.catch_warnings(), Image.open(cast(IO[bytes], file), formats=readable) as image:
            warnings.simplefilter("ignore")
            endings = [ext for ext, kind in Image.registered_extensions().items() if kind == image.format]
    except Exception:  # whatever it is, it is no picture
        endings = [ending for at, mark, ending in SIGNATURES if start[at : at + len(mark)] == mark]
    usual = [ext for ext in endings if ext in (".jpg", ".png", ".tif", ".gif", ".bmp", ".webp")]
    return (usual or endings or [""])[0]


def frames(data: bytes) -> int:
    """How many pictures are in a file whose first can be decoded: pages, or frames of an animation."""
    several = {b"\xff\xd8": b"MPF\0", b"\x89P": b"acTL"}.get(data[:2])
    if several and data.find(several, 0, HEAD) < 0:
        return 1  # nearly all files; to open each once more would cost a tenth of the time
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            return 1 if image.format in VARIANTS else getattr(image, "n_frames", 1)
    except Exception:  # damage after the first, which is all that is used
        return 1


def decode(data: bytes, reading: Reading = PLAIN) -> UInt8[np.ndarray, "h w c"]:
    """Pixels [h, w, 1 or 3] of a picture file's bytes; DataError with the bare reason if it cannot be decoded."""
    add_plugins()
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
