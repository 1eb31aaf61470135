"""Parts of a page that the demonstration, the report of a run and a comparison share."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from undiffuse.data.source import Source
from undiffuse.figure import Numbers, enlarged, grid, line_plot, picture
from undiffuse.view import explore
from undiffuse.view.report import Figure, Section, Table

POINTS = 300  # of a line; more would not be seen, and would fill the page
HALF = "22rem"  # plots stand beside each other where each can be so wide
WIDE = 8
CELL = 84  # pixels of a picture in a strip, at least

Rows = Sequence[Mapping[str, Any]]
Line = tuple[Numbers, Numbers]


def seconds(rows: Rows) -> float:
    """How long training took, from its log, interruptions left out."""
    timed = [row for row in rows if "images_per_second" in row and "images" in row]
    images = [0, *(row["images"] for row in timed)]
    return sum((row["images"] - before) / row["images_per_second"] for row, before in zip(timed, images, strict=False))


def line(rows: Rows, key: str, images: int | None = None) -> Line:
    """What a log says of `key` at each step; over the images seen where it is said how many a step has."""
    points = [(float(row["step"]) * (images or 1), float(row[key])) for row in rows if _is_number(row.get(key))]
    return thinned(points)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def thinned(points: Sequence[tuple[float, float]]) -> Line:
    """At most `POINTS` points, each the mean of as many that follow one another."""
    every = -(-len(points) // POINTS) if points else 1
    parts = [points[i : i + every] for i in range(0, len(points), every)]
    return [fmean(x for x, _ in part) for part in parts], [fmean(y for _, y in part) for part in parts]


def loss(rows: Rows) -> Figure | None:
    """The objective over the steps of a run, with the band that a preset expects; None where its log has none."""
    lines = {
        name: line(rows, key)
        for name, key in (("on training batches", "loss"), ("on held-out images, by the averaged weights", "held_out"))
    }
    bands = [(float(row["step"]), *row["expected"]) for row in rows if "expected" in row]
    lines |= {
        "the least that the preset expects of it": thinned([(step, low) for step, low, _ in bands]),
        "and the most": thinned([(step, high) for step, _, high in bands]),
    }
    return plot(lines, "step", "loss", "Loss", "", log_y=True)


def loss_by_time(rows: Rows) -> Figure | None:
    """The training loss over the steps for each quarter of t; None where the log has none."""
    lines = {f"t from {(q - 1) / 4:g} to {q / 4:g}": line(rows, f"loss_q{q}") for q in range(1, 5)}
    caption = "The loss on training batches, by the times that they were noised to."
    return plot(lines, "step", "loss", "Loss by t", caption, log_y=True)


QUARTERS = frozenset(f"loss_q{q}" for q in range(1, 5))


def plot(
    lines: Mapping[str, Line], x: str, y: str, title: str, caption: str, log_x: bool = False, log_y: bool = False
) -> Figure | None:
    """Lines with a legend below, where they are named; None where no point can be drawn.

    `log_y` is for values of which the greatest is `WIDE` times the least: an axis of one decade would have no marks.
    """
    found = {name: (xs, ys) for name, (xs, ys) in lines.items() if _drawn(xs, ys, log_x, log_y)}
    if not found:
        return None
    values = [y for _, ys in found.values() for y in ys if 0 < y < float("inf")]
    log_y &= max(values, default=0.0) >= WIDE * min(values, default=1.0)
    svg = line_plot([("", xs, ys) for xs, ys in found.values()], x, y, title, log_x, log_y)
    return Figure(svg, caption, legend=tuple(filter(None, found)))


def _drawn(xs: Numbers, ys: Numbers, log_x: bool, log_y: bool) -> bool:
    """Whether a plot has a point of this line."""
    inf = float("inf")
    return any(
        abs(x) < inf and abs(y) < inf and (x > 0 or not log_x) and (y > 0 or not log_y)
        for x, y in zip(xs, ys, strict=True)
    )


def samples(images: UInt8[Tensor, "n c h w"], caption: str, columns: int | None = None, scale: int = 1) -> Figure:
    """A grid of images, as they came."""
    return Figure(grid(images, columns, scale * enlarged(images.shape[-1])), caption)


def progressive(images: UInt8[Tensor, "n slots c h w"], times: Float[Tensor, "slots"], scale: int = 1) -> Section:
    """What `explore.progressive` found."""
    return Section(
        "Progressive generation",
        "What the model expects the finished image to be, at several times along the reverse chain (Fig. 6 of the "
        "paper): large features come first, details last.",
        figures=(
            Figure(
                grid(images.flatten(0, 1), images.shape[1], scale * enlarged(images.shape[-1])),
                "One image a row; above each column the time t, from noise (1) to data (0).",
                columns=tuple(f"{t:.2f}" for t in times.tolist()),
            ),
        ),
    )


def interpolation(
    images: UInt8[Tensor, "at lambdas c h w"],
    what: str,
    at: Sequence[float | int],
    lambdas: Sequence[float | int],
    scale: int = 1,
) -> Section:
    """What `explore.interpolate` found between two images, which are `what`."""
    return Section(
        "Between two pictures",
        f"{what}, are noised to time t, mixed, and denoised (Figs. 8 and 9 of the paper). At t = 0 their pixels are "
        "mixed; the later the time, the more the model decides.",
        figures=(
            Figure(
                grid(images.flatten(0, 1), images.shape[1], scale * enlarged(images.shape[-1])),
                "Above each column the share λ of the second image.",
                columns=tuple(f"{value:.3g}" for value in lambdas),
                rows=tuple(f"t = {t:g}" for t in at),
            ),
        ),
    )


def closest(samples: UInt8[Tensor, "n c h w"], data: Source, count: int = 10, scale: int = 1) -> Figure:
    """The samples that are nearest to an image of the data, and that image below each."""
    index, distance = explore.neighbours(samples, data)
    order = distance[:, 0].argsort()[:count]
    pairs = torch.cat([samples[order], data.gather(index[order, 0])[0]])
    return Figure(
        grid(pairs, len(order), scale * enlarged(samples.shape[-1])),
        f"The {len(order)} samples that are nearest to a training image, pixel by pixel, that image below each, and "
        "their distance above (RMSE, 0–255).",
        columns=tuple(f"{float(d):.1f}" for d in distance[order, 0]),
        rows=("sample", "training"),
    )


def rate_distortion(curve: Rows, caption: str) -> Figure:
    """The curve of `Terms.rate_distortion`."""
    svg = line_plot(
        [("", [row["rate"] for row in curve], [row["rmse"] for row in curve])],
        x="rate (bits/dim)",
        y="distortion (RMSE, 0–255)",
        title="Rate-distortion",
    )
    return Figure(svg, caption)


def terms(summary: Mapping[str, Any]) -> Table:
    """Prior, rate and decoder of the bound, and their sum."""
    parts = tuple((name, f"{summary[name]:.4f}") for name in ("prior", "rate", "decoder"))
    error = summary["standard_error"]
    total = ("total", f"{summary['bits_per_dim']:.3f}" + ("" if error is None else f" ± {error:.3f}"))
    return Table(("term of the bound", "bits/dim"), (*parts, total), "± is the standard error over these images.")


def table_4(rows: Rows) -> Table:
    """Lines of the rate-distortion curve."""
    return Table(
        ("reverse steps", "rate (bits/dim)", "RMSE, 0–255"),
        tuple((f"{row['step']}", f"{row['rate']:.5f}", f"{row['rmse']:.5f}") for row in rows),
        "The curve in the form of the paper's Table 4.",
    )


def strip(rows: Sequence[UInt8[Tensor, "_ _ _ _"]]) -> Image.Image:
    """A row of pictures for each set of images, all in cells of one size, whatever that of the images is."""
    cells = [[picture(image) for image in images] for images in rows]
    modes = {cell.mode for row in cells for cell in row}
    mode = modes.pop() if len(modes) == 1 else "RGBA" if modes & {"LA", "RGBA"} else "RGB"
    width, height = (max(cell.size[i] for row in cells for cell in row) for i in range(2))
    scale = max(1, -(-CELL // width))
    width, height, columns = width * scale, height * scale, max(map(len, cells))
    sheet = Image.new(mode, (columns * (width + scale) + scale, len(cells) * (height + scale) + scale), _white(mode))
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            place = (scale + j * (width + scale), scale + i * (height + scale))
            sheet.paste(_fitted(cell.convert(mode), width, height), place)
    return sheet


def _white(mode: str) -> int | tuple[int, ...]:
    return 255 if mode == "L" else (255,) * len(mode)


def _fitted(cell: Image.Image, width: int, height: int) -> Image.Image:
    """Each pixel as a square where that is possible."""
    whole = width % cell.width == 0 and height % cell.height == 0
    return cell.resize((width, height), Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC)


def present(figures: Iterable[Figure | None]) -> tuple[Figure, ...]:
    """Those that could be drawn."""
    return tuple(figure for figure in figures if figure is not None)
