"""Pictures of results: grids of images, PNG bytes, and line plots as SVG text."""

import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin
from torch import Tensor

from undiffuse.errors import UsageError

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 84, 16, 34, 50  # margins around the axes
FIRST = 18  # the line of the title, where names begin
MOST = 4  # channels in a PNG
OTHER = {"PDF", "EPS", "ICO", "ICNS", "PALM", "MSP", "XBM"}  # documents, and what holds a smaller or a poorer picture
DRAWN = "undiffuse figure"  # what a figure says of itself, so that it is not taken for data
COLOURS = ("#3b6fd8", "#d9622b", "#2f9468", "#8a54c4", "#c2477f", "#8a7a1c", "#2a8fa8", "#7d5a48")

Number = float | int  # said in full, because the tests' type checker does not take an int for a float
Numbers = Sequence[Number]
Series = tuple[str, Numbers, Numbers]  # name ("" leaves it out of the legend), x, y


def beside(images: UInt8[Tensor, "n c h w"]) -> UInt8[Tensor, "n c2 h w2"]:
    """Of more channels than PNG has, grey pictures with all of them side by side, the first at the left."""
    n, c, h, w = images.shape
    return images if c <= MOST else images.transpose(1, 2).reshape(n, 1, h, c * w)


def picture(image: UInt8[Tensor, "c h w"]) -> Image.Image:
    """One channel as grey, 2 as grey with opacity, 3 as RGB, 4 as RGB with opacity; more side by side, in grey."""
    array = beside(image[None])[0].permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def grid(images: UInt8[Tensor, "n c h w"], columns: int | None = None, scale: int = 1) -> Image.Image:
    """The images row by row with a pixel of white between, as near to square as can be; each pixel `scale` wide."""
    images = beside(images)
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = torch.full((c, rows * (h + 1) + 1, columns * (w + 1) + 1), 255, dtype=torch.uint8, device="cpu")
    for i, image in enumerate(images):
        top, left = i // columns * (h + 1) + 1, i % columns * (w + 1) + 1
        sheet[:, top : top + h, left : left + w] = image
    whole = picture(sheet)
    return whole.resize((whole.width * scale, whole.height * scale), Image.Resampling.NEAREST)


def show(images: Any, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """A grid of uint8 images [n, c, h, w], small ones enlarged. As the last line of a notebook's cell it is shown.

    Raises UsageError for anything else.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4 or not images.numel():
        found = f"{type(images).__name__} {getattr(images, 'dtype', '')} {list(getattr(images, 'shape', ()))}"
        raise UsageError(f"{found} cannot be shown; give a torch tensor of uint8 images [n, c, h, w], as sample() does")
    return grid(images, columns, enlarged(images.shape[-1]) if scale is None else scale)


def written(channels: int) -> str:
    """How a PNG holds so many, where that is not plain; empty where it is."""
    if channels > MOST:
        return f"{channels} channels side by side in each PNG, in grey, the first at the left"
    return {2: "the second channel is written as opacity", 4: "the fourth channel is written as opacity"}.get(
        channels, ""
    )


def enlarged(width: int) -> int:
    """How often a pixel is repeated so that a picture is at least 56 pixels wide on a screen."""
    return max(1, -(-56 // width))


def png(picture: Image.Image, drawn: bool = False) -> bytes:
    """With `drawn` it says of itself that it is a figure, and no picture to train on."""
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if drawn:
        info.add_text("Software", DRAWN)
    picture.save(buffer, "PNG", optimize=True, pnginfo=info)
    return buffer.getvalue()


def kind_of(path: Path) -> str:
    """Pillow's name of the format that the ending says. Raises UsageError for one that cannot be written."""
    Image.init()
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE or kind in OTHER:
        stem = path.stem.strip(".") or "picture"
        raise UsageError(f'{path} has no ending of a picture that can be written; give one such as "{stem}.png"')
    return kind


def encoded(picture: Image.Image, path: Path) -> bytes:
    """The bytes of a figure in the format that the name says: PNG for `.png`, JPEG for `.jpg`. Raises UsageError."""
    kind, buffer = kind_of(path), io.BytesIO()
    if kind == "PNG":
        return png(picture, drawn=True)
    if kind == "JPEG" and picture.mode in ("LA", "RGBA"):  # it knows no opacity
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert(
            "RGB"
        )
    try:
        picture.save(buffer, kind, quality=95, comment=DRAWN.encode())
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} cannot be written as {kind}: {error}; give the name of a .png") from error
    return buffer.getvalue()


def line_plot(series: Sequence[Series], x: str, y: str, title: str, log_x: bool = False, log_y: bool = False) -> str:
    """An SVG of one or more lines; a page around it may recolour the classes `line-1`, `name-1`, ….

    Points that are not finite, or not positive on a logarithmic axis, are left out; UsageError if none remains.
    """
    drawn = [(name, _points(xs, ys, log_x, log_y)) for name, xs, ys in series]
    points = [point for _, line in drawn for point in line]
    if not points:
        raise UsageError(f'plot "{title}" has no point that can be drawn; give finite numbers, positive on a log axis')
    across = _Axis([p[0] for p in points], log_x, LEFT, WIDTH - RIGHT)
    legend = _legend([name for name, _ in drawn], LEFT + 10 * len(title))
    top = TOP + max((y for _, y in legend), default=FIRST) - FIRST
    up = _Axis([p[1] for p in points], log_y, HEIGHT - BOTTOM, top)
    middle = (top + HEIGHT - BOTTOM) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="12" fill="currentColor">',
        _text(LEFT, FIRST, title, 'font-size="14" font-weight="600"'),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x, 'text-anchor="middle"'),
        _text(16, middle, y, f'text-anchor="middle" transform="rotate(-90 16 {middle:g})"'),
    ]
    for value in across.ticks:
        at = across.place(value)
        parts.append(_rule(at, top, at, HEIGHT - BOTTOM))
        parts.append(_text(at, HEIGHT - BOTTOM + 18, f"{value:g}", 'text-anchor="middle"'))
    for value in up.ticks:
        at = up.place(value)
        parts.append(_rule(LEFT, at, WIDTH - RIGHT, at))
        parts.append(_text(LEFT - 8, at + 4, f"{value:g}", 'text-anchor="end"'))
    for i, (name, line) in reversed(list(enumerate(drawn))):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{across.place(a):.1f},{up.place(b):.1f}" for a, b in line)
        kind = i % len(COLOURS) + 1
        style = f'class="line-{kind}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"'
        parts.append(f'<polyline points="{path}" {style}/>')
        if name:
            style = f'class="name-{kind}" fill="{colour}" text-anchor="end" font-weight="600"'
            parts.append(_text(*legend[i], name, style))
    return "\n".join([*parts, "</svg>\n"])


def _legend(names: Sequence[str], left: Number) -> list[tuple[Number, Number]]:
    """Where each name ends, the last at the right; in as many lines as they need, the first one not over the title."""
    x, y, found = WIDTH - RIGHT, FIRST, list[tuple[Number, Number]]()
    for name in reversed(names):
        width = 8 * len(name)
        if name and x - width < left and (x < WIDTH - RIGHT or left > 0):
            x, y, left = WIDTH - RIGHT, y + 16, 0
        found.append((x, y))
        x -= width + 14 * bool(name)
    return found[::-1]


class _Axis:
    """From values to places on the page, with round numbers to mark."""

    def __init__(self, values: Numbers, log: bool, start: Number, end: Number):
        self.log, self.start, self.end = log, start, end
        low, high = min(values), max(values)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.ticks = _log_ticks(low, high) if log else _ticks(low, high)
        self.low, self.high = (self._scale(v) for v in (min(low, self.ticks[0]), max(high, self.ticks[-1])))

    def _scale(self, value: Number) -> float:
        return math.log10(value) if self.log else value

    def place(self, value: Number) -> float:
        share = (self._scale(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _points(xs: Numbers, ys: Numbers, log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    points = [(float(a), float(b)) for a, b in zip(xs, ys, strict=True)]
    logs = (log_x, log_y)
    return [p for p in points if all(math.isfinite(v) and (v > 0 or not log) for v, log in zip(p, logs, strict=True))]


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine multiples of 1, 2 or 5 times a power of ten, the outer ones at or beyond the values."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, every so many over a wide range; with 2 and 5 between over a narrow one."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last - first > 2:
        every = math.ceil((last - first) / 8)
        return [10.0**i for i in range(last, first - 1, -every)][::-1]
    marks = [m * 10.0**i for i in range(first, last + 1) for m in (1, 2, 5)]
    inner = [m for m in marks if low * 0.999 <= m <= high * 1.001]
    return inner if len(inner) > 1 else [10.0**first, 10.0**last]


def _text(x: Number, y: Number, text: str, style: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>'


def _rule(x1: Number, y1: Number, x2: Number, y2: Number) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" stroke-opacity="0.14"/>'
    )
