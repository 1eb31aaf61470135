"""One picture file to one uint8 array, and the crop and resize that LSUN was prepared with.

Whatever the file holds (palette, CMYK, 16 bits, alpha, a colour profile, an orientation tag, an animation), what comes
out is grey or RGB, with transparency only if it is wanted, upright, eight bits, the first frame.
"""

import importlib
import io
import math
import threading
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BufferedIOBase
from typing import IO, Literal, NamedTuple, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor, ImageFile, ImageOps, JpegImagePlugin

from undiffuse.data import deep, levels
from undiffuse.data.colour import to_srgb
from undiffuse.data.levels import Note, Own, Range
from undiffuse.errors import DataError, UsageError
from undiffuse.figure import DRAWN

MAX_PIXELS = 2**26
MAX_BYTES = 2**30
# EPS runs an external program; the others are recognised by Pillow but not decoded.
UNREADABLE = {"EPS", "PDF", "MPEG", "HDF5", "GRIB", "BUFR", "WMF"}
UNDER_ANOTHER = {"MPO": "JPEG"}  # formats that Pillow decodes by opening another one
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

SCALES = (2, 4, 8)  # by which a JPEG can be decoded smaller
KEEP_ALPHA = {2: "LA", 4: "RGBA"}
LAID = "with transparency laid on"
WIDE = "read from more than 8 bits"

Colour = tuple[int, int, int]
Axes = Literal["nhw", "nhwc", "nchw", "hwc", "chw"]


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
    readable = Image.OPEN.keys() - UNREADABLE
    return frozenset(ext for ext, kind in registered.items() if UNDER_ANOTHER.get(kind, kind) in readable)


def colour(name: str) -> Colour:
    """`white`, `#20a0ff` … as red, green and blue; UsageError for anything else."""
    try:
        red, green, blue, *_ = ImageColor.getrgb(name)
    except ValueError as error:
        raise UsageError(f'background "{name}" is not a colour; give a name such as white or #rrggbb') from error
    return red, green, blue


@dataclass(frozen=True)
class Reading:
    """How files become pixels, where they do not say it themselves: every reader of data is given one.

    `range` are the values that become 0 and 255. Of pictures `channels` 2 and 4 keep transparency. A JPEG of more than
    `max_pixels` is decoded at a half, a quarter or an eighth if that is at least `least` (height, width), to which it
    is reduced later. With `guess`, values of an unknown range are shown rather than refused.
    """

    background: str = "white"  # the colour behind transparent pixels
    picture: str = ""  # which, where an example has several
    range: Range | None = None
    axes: Axes | None = None
    channels: int | None = None
    max_pixels: int = MAX_PIXELS
    least: tuple[int, int] | None = None
    guess: bool = False

    def __post_init__(self) -> None:
        colour(self.background)
        if self.range is not None and not (all(map(math.isfinite, self.range)) and self.range[0] < self.range[1]):
            raise UsageError(
                f"data.range={levels.said(self.range)} is not possible; give two finite numbers, the lower one first"
            )

    @cached_property
    def colour(self) -> Colour:
        """The background as red, green and blue."""
        return colour(self.background)

    def to_levels(self, values: np.ndarray, whole: Range | None) -> tuple[UInt8[np.ndarray, "..."], Own, list[Note]]:
        """Values as levels of 0 to 255, what they were, and what was done to them.

        `whole` is the range of their type, None where it has none. Raises DataError.
        """
        found, notes = levels.own(values), list[Note]()
        span = self.range or whole
        if span is None:
            if not self.guess:
                raise DataError(levels.unsaid(found))
            span, notes = (found.least, max(found.most, found.least + 1)), [(levels.UNKNOWN, found.span)]
        return levels.stretch(values, *span), found, [*notes, *levels.clipped(found, *span)]


PLAIN = Reading()


def recognised(file: BufferedIOBase) -> str:
    """The usual ending of a file that begins as a picture does, empty for any other."""
    suffixes()  # makes Pillow load all that it has
    start = file.read(32)
    file.seek(0)
    # A format that knows no signature takes other files for its own.
    readable = [kind for kind, (_, accepts) in Image.OPEN.items() if kind not in UNREADABLE and accepts]
    try:
        with QUIET, _opened(file, readable) as image:
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
        with QUIET, _opened(io.BytesIO(data)) as image:
            return 1 if image.format in VARIANTS else getattr(image, "n_frames", 1)
    except Exception:  # damage after the first, which is all that is used
        return 1


class Picture(NamedTuple):
    """Pixels, what was done to get them, and the values that they were if those were not of 8 bits."""

    pixels: UInt8[np.ndarray, "h w c"]
    made: tuple[Note, ...] = ()
    own: Own | None = None


def decode(data: bytes, reading: Reading = PLAIN) -> UInt8[np.ndarray, "h w c"]:
    """Pixels [h, w, c] of a picture file's bytes; DataError with the bare reason if it cannot be decoded."""
    return read(data, reading).pixels


def read(data: bytes, reading: Reading = PLAIN) -> Picture:
    """As `decode`, with what was done. Grey or RGB, or with transparency as well if `reading.channels` is 2 or 4."""
    add_plugins()
    try:
        with QUIET, _opened(io.BytesIO(data)) as image:
            if DRAWN in (image.info.get("Software"), _text(image.info.get("comment"))):
                raise DataError("a figure that undiffuse drew, and no picture")
            made = _scaled(image, reading)
            kind = deep.kept(image)
            image.load()
            found = _pixels(ImageOps.exif_transpose(image), reading, kind, data)
            return found._replace(made=(*made, *found.made))
    except DataError:
        raise
    except Exception as error:  # on damaged bytes Pillow's plugins raise nearly every type
        reason = "not a picture in a known format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise DataError(" ".join(str(reason).split()) or type(error).__name__) from error


def _text(value: object) -> object:
    return value.decode("latin-1") if isinstance(value, bytes) else value


class _Quiet:
    """No remarks on metadata while any thread is inside; what is wrong with the pixels raises.

    Where several threads use Python's own `catch_warnings`, one of them restores what another had set.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.stack = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.stack.close()


QUIET, OPENING = _Quiet(), threading.Lock()


def _opened(file: BufferedIOBase, formats: list[str] | None = None) -> ImageFile.ImageFile:
    """The header alone, for which Pillow's limit is set aside: `max_pixels` is ours, and its message names it."""
    with OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(cast(IO[bytes], file), formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _scaled(image: Image.Image, reading: Reading) -> tuple[Note, ...]:
    """Prepares a JPEG of too many pixels to be decoded at a lower resolution. DataError for what is too large."""
    width, height = image.size
    if width * height <= reading.max_pixels:
        return ()
    is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)
    for scale in SCALES if is_jpeg and reading.least else ():
        small = (width // scale, height // scale)
        if math.prod(small) <= reading.max_pixels and min(small) >= max(reading.least or small):
            image.draft(None, small)
            return (("decoded at a lower resolution", f"{width}×{height}"),)
    smaller = f", or give a {'smaller ' if reading.least else ''}--size" if is_jpeg else ""
    raise DataError(
        f"{width}x{height} is more than {reading.max_pixels} pixels; "
        f"allow it with --set data.max_pixels={width * height}{smaller}"
    )


def _pixels(image: Image.Image, reading: Reading, bits: str, data: bytes) -> Picture:
    grey, own, made = image.mode == "F" or image.mode.startswith("I"), None, ()
    if grey or bits in deep.LOWER:
        values = np.asarray(image) if grey else deep.values(image, bits, _opened(io.BytesIO(data)))
        # By the type that the file declares: a dark picture of 32 bits is none of 16.
        is_short = not grey or (";16" in bits or image.mode.startswith("I;16")) and not bits.endswith("S")
        image, made, own = _wide(image, values, is_short, reading)
    elif bits and reading.range is not None:
        raise DataError(f"16 bits a colour as {bits}, of which only the upper 8 are read; for data.range give an array")
    else:
        ranged = image.mode != "1" and reading.range is not None
        image = _plain(image)
        if ranged and image.mode != "CMYK":
            image, made, own = _ranged(image, reading)
    image, converted = to_srgb(image)
    image = image.convert("RGB") if image.mode == "CMYK" else image
    image, flat = _with_channels(image, reading)
    array = np.asarray(image)
    array = array if array.ndim == 3 else array[..., None]
    made = (*made, *converted, *flat)
    return Picture(array, (*made, *_looks(array, made, own, reading)), own)


def _looks(
    array: UInt8[np.ndarray, "h w c"], made: tuple[Note, ...], own: Own | None, reading: Reading
) -> tuple[Note, ...]:
    """What looks wrong: the levels, and of what was laid on a background whether it is seen."""
    low, high = (int(edge[0]) for edge in levels.extent(array.transpose(2, 0, 1)[None]))
    is_wide = any(what == WIDE for what, _ in made) and reading.range is None
    span = (own or Own(low, high, 0.0, "uint8")).span
    if any(what.startswith(LAID) for what, _ in made):
        ground = Image.new("RGB", (1, 1), reading.colour).convert("L" if array.shape[2] == 1 else "RGB")
        if (np.abs(array.astype(np.int16) - np.asarray(ground)) <= levels.FEW).all():
            return ((levels.HIDDEN, reading.background),)
        # What is drawn in black may be meant; what is nearly so, in 16 bits, hardly.
        high = own.most // 257 if is_wide and own is not None and own.most > 0 else 255
        return levels.near(0, int(high), levels.QUARTER, span)
    return levels.near(low, high, levels.QUARTER if is_wide else levels.FEW, span)


def _wide(
    image: Image.Image, values: np.ndarray, is_short: bool, reading: Reading
) -> tuple[Image.Image, tuple[Note, ...], Own]:
    """Values of more than 8 bits as grey or colours, and with opacity if they have it."""
    clear, through = values.ndim == 3 and values.shape[2] in (2, 4), image.info.get("transparency")
    colours = values[..., :-1] if clear else values
    colours = colours.astype(np.uint16) if is_short and colours.dtype != np.uint16 else colours
    pixels, found, made = reading.to_levels(colours, (0, 65535) if is_short else None)
    if clear:
        pixels = np.dstack([pixels, values[..., -1] >> 8]).astype(np.uint8)
    elif isinstance(through, tuple if values.ndim == 3 else int):
        same = (values == np.array(through)).reshape(*values.shape[:2], -1).all(-1)
        pixels = np.dstack([pixels, np.where(same, 0, 255)]).astype(np.uint8)
    plain = Image.fromarray(pixels)
    plain.info = image.info
    wide = (WIDE, f"{levels.shown(found.least)} to {levels.shown(found.most)}")
    return plain, (wide, *made), found


def _plain(image: Image.Image) -> Image.Image:
    """Palettes, bits, rarer modes and transparent colours as L, LA, RGB, RGBA or CMYK."""
    clear = image.mode.endswith(("A", "a")) or "transparency" in image.info
    if image.mode in ("1", "L", "LA", "La"):
        return image.convert("LA" if clear else "L")
    return image if image.mode == "CMYK" else image.convert("RGBA" if clear else "RGB")


def _ranged(image: Image.Image, reading: Reading) -> tuple[Image.Image, tuple[Note, ...], Own]:
    """Bytes of another range than 0 to 255; transparency stays as it is."""
    assert reading.range is not None
    low, high = reading.range
    colours = [image.getchannel(band) for band in image.getbands() if band != "A"]
    found = levels.own(np.stack([np.asarray(band) for band in colours]))
    table = levels.stretch(np.arange(256), low, high).tolist()
    alpha = list(range(256)) if len(colours) < len(image.getbands()) else []
    return image.point(table * len(colours) + alpha), levels.clipped(found, low, high), found


def _with_channels(image: Image.Image, reading: Reading) -> tuple[Image.Image, tuple[Note, ...]]:
    """With transparency if it is wanted, else laid on the background."""
    clear, grey = image.mode in ("LA", "RGBA"), image.mode in ("L", "LA")
    if reading.channels in KEEP_ALPHA:
        return image.convert(KEEP_ALPHA[reading.channels]), () if clear else (("taken as opaque", ""),)
    if not clear:
        return image, ()
    seen_through = image.getchannel("A").getextrema()[0] != 255
    plain = Image.new("RGBA", image.size, (*reading.colour, 255))
    flat = Image.alpha_composite(plain, image.convert("RGBA"))
    grey = grey and len(set(reading.colour)) == 1
    made = ((f"{LAID} {reading.background}", ""),) if seen_through else ()
    return flat.convert("L" if grey else "RGB"), made


def fit(
    image: UInt8[np.ndarray, "h w c"], size: tuple[int, int] | None, channels: int | None
) -> UInt8[np.ndarray, "h2 w2 c2"]:
    """Centre-cropped to the aspect of `size` (height, width), Lanczos-resized to it, and turned to grey or RGB."""
    given = image.shape[2]
    if channels is not None and channels != given:
        if {channels, given} != {1, 3}:
            raise DataError(
                f"{given} channels cannot be turned into {channels}, only grey and RGB into each other; "
                f"keep them with --set data.channels={given}"
            )
        image = np.asarray(Image.fromarray(image).convert("L"))[..., None] if given == 3 else image.repeat(3, axis=2)
    if size is None or size == image.shape[:2]:
        return image
    height, width = part = _part(image.shape[0], image.shape[1], *size)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    image = image[top : top + height, left : left + width]
    if part == size:
        return image
    resized = [_resize(image[..., c], size) for c in range(image.shape[2])]
    return np.stack(resized, axis=-1)


def changes(shape: tuple[int, ...], size: tuple[int, int] | None, channels: int | None) -> tuple[Note, ...]:
    """What `fit` does to an image of shape (height, width, channels)."""
    height, width, given = shape
    made = []
    if channels not in (None, given):
        made.append(("made grey" if channels == 1 else "made RGB", ""))
    if size not in (None, (height, width)):
        part, whole = _part(height, width, *size), f"{width}×{height}"
        if part != (height, width):
            made.append(("cropped", whole))
        if part != size:
            made.append(("enlarged" if part[0] < size[0] or part[1] < size[1] else "reduced", whole))
    return tuple(made)


def _part(h: int, w: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the largest part of that aspect; for a square, StyleGAN's crop to min(h, w)."""
    if h * width <= w * height:
        return h, max(1, round(h * width / height))
    return max(1, round(w * height / width)), w


def _resize(plane: UInt8[np.ndarray, "h w"], size: tuple[int, int]) -> UInt8[np.ndarray, "h2 w2"]:
    picture = Image.fromarray(np.ascontiguousarray(plane))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.LANCZOS))
