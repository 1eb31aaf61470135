"""Bits a value of a shipped model on fewer steps, and those of lossless picture files of the same images.

    python bench/bits.py fashion-mnist-likelihood --data fashion-mnist [--images 500] [--draws 40]

The bound of chains of 10 to 1,000 steps, on the first test images, of at most so many stratified terms an image. PNG,
WebP and JPEG XL (the extra `pictures`) without loss and at their greatest effort, of the first 96 test images as files
of their own and as one mosaic of 12 × 8, whole files counted; and the model's bound of these 96. Writes
`bench/bits-NAME.json`, and the curve and the table `bits-NAME` of docs/benchmarks.md.
"""

import argparse
import io
import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pillow_jxl  # noqa: F401  # gives Pillow the format JXL
import torch
from jaxtyping import UInt8
from machine import machine, made_of, publish
from torch import Tensor

import undiffuse
from undiffuse.data.source import Source, open_source
from undiffuse.figure import line_plot, picture
from undiffuse.machine import disk
from undiffuse.measure import nll

HERE = Path(__file__).parent
STEPS = (10, 20, 50, 100, 200, 500, 1000)
MOSAIC = (12, 8)
RIVALS: dict[str, dict[str, object]] = {
    "PNG": {"optimize": True},
    "WebP": {"lossless": True, "quality": 100, "method": 6},
    "JXL": {"lossless": True, "effort": 9},
}
Row = dict[str, Any]


def measured(model: undiffuse.Model, source: Source, images: int, draws: int | None, steps: int) -> Row:
    with tempfile.TemporaryDirectory() as scratch:
        query = nll.Nll(images=images, draws=None if draws is None else min(draws, steps), steps=steps, batch=100)
        return {"steps": steps, **nll.terms_of(model, source, query, Path(scratch)).summary()}


def size(image: UInt8[Tensor, "c h w"], kind: str) -> int:
    """Bytes of a file."""
    buffer = io.BytesIO()
    picture(image).save(buffer, kind, **RIVALS[kind])
    return len(buffer.getvalue())


def rivals(images: UInt8[Tensor, "n c h w"]) -> dict[str, Row]:
    """Bits a value, of single files and of one mosaic."""
    columns, rows = MOSAIC
    n, c, h, w = images.shape
    sheet = images.reshape(rows, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)
    values = images.numel()
    return {
        kind: {
            "files": 8 * sum(size(image, kind) for image in images) / values,
            "mosaic": 8 * size(sheet, kind) / values,
        }
        for kind in RIVALS
    }


def table(result: dict) -> str:
    lines = ["| steps | bits/dim | ± s.e. | rate | decoder |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['steps']:,} | {row['bits_per_dim']:.3f} | {row['standard_error']:.3f} | {row['rate']:.3f} "
        f"| {row['decoder']:.3f} |"
        for row in result["curve"]
    ]
    some, count = result["same_images"], np.prod(MOSAIC)
    lines += ["", f"| of the same {count} test images | bits a value, as files | as one mosaic |", "|---|---|---|"]
    lines += [f"| {kind} | {row['files']:.2f} | {row['mosaic']:.2f} |" for kind, row in result["rivals"].items()]
    lines += [f"| this model, the bound of 1,000 steps | {some['bits_per_dim']:.2f} ± {some['standard_error']:.2f} | |"]
    lines += ["", f"{result['machine']['processor']}, {result['date']}; `{result['command']}`."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a shipped model")
    parser.add_argument("--data", help="the data, if the set has not the name of the model")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--draws", type=int, default=40)
    given = parser.parse_args()
    model, data = undiffuse.load(given.name, "cpu"), given.data or given.name
    source, count = open_source(data, channels=model.image_shape[0], split="test"), int(np.prod(MOSAIC))
    curve = [measured(model, source, given.images, given.draws, steps) for steps in STEPS]
    result = {
        "command": f"python bench/bits.py {given.name} --data {data} --images {given.images} --draws {given.draws}",
        "date": date.today().isoformat(),
        "machine": machine(),
        "made_of": made_of(given.name),
        "seed": 0,
        "curve": curve,
        "same_images": measured(model, source, count, given.draws, 1000),
        "rivals": rivals(source.gather(torch.arange(count, dtype=torch.int64, device="cpu"))[0]),
    }
    disk.write_atomic(HERE / f"bits-{given.name}.json", (json.dumps(result, indent=1) + "\n").encode())
    line = ("bound", [float(row["steps"]) for row in curve], [row["bits_per_dim"] for row in curve])
    svg = line_plot([line], x="steps", y="bits/dim", title="Bits/dim of shorter chains", log_x=True)
    disk.write_atomic(HERE.parent / "docs" / "images" / f"{given.name}-bits.svg", svg.encode())
    publish("benchmarks.md", f"bits-{given.name}", table(result))


if __name__ == "__main__":
    main()
