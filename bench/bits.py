"""Bits a value of a shipped model on fewer steps, and those of lossless picture files of the same images.

    python bench/bits.py fashion-mnist-likelihood --data fashion-mnist

The bound of 1,000 steps on all test images and as many of the training set, from 10 stratified terms an image; that of
chains of 10 to 1,000 steps on the first 500 test images, of at most 40 terms. What is there is not done again. PNG,
WebP and JPEG XL (the extra `pictures`) without loss and at their greatest effort, of the first 96 test images as files
of their own and as one mosaic of 12 × 8, whole files counted; and the model's bound of these 96. 1,000 samples in 20
steps of UniPC are judged as in `bench/choose.py`. Writes `bench/bits-NAME.json`, and samples, curve and table
`bits-NAME` of docs/benchmarks.md.
"""

import argparse
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pillow_jxl  # noqa: F401  # gives Pillow the format JXL
import torch
from choose import EXTRACTORS, distances
from jaxtyping import UInt8
from machine import keep, kept, machine, made_of, publish
from torch import Tensor

import undiffuse
from undiffuse.codec.ledger import LOSSLESS, size
from undiffuse.data.source import Source, open_source
from undiffuse.figure import grid, line_plot, png
from undiffuse.machine import disk
from undiffuse.measure import nll

HERE = Path(__file__).parent
STEPS = (10, 20, 50, 100, 200, 500, 1000)
MOSAIC = (12, 8)
RIVALS = LOSSLESS | {"JXL": {"lossless": True, "effort": 9}}
Row = dict[str, Any]


def measured(model: undiffuse.Model, source: Source, images: int, draws: int | None, steps: int) -> Row:
    with tempfile.TemporaryDirectory() as scratch:
        query = nll.Nll(images=images, draws=None if draws is None else min(draws, steps), steps=steps, batch=100)
        return {"steps": steps, **nll.terms_of(model, source, query, Path(scratch)).summary()}


def rivals(images: UInt8[Tensor, "n c h w"]) -> dict[str, Row]:
    """Bits a value, of single files and of one mosaic."""
    columns, rows = MOSAIC
    n, c, h, w = images.shape
    sheet = images.reshape(rows, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)
    values = images.numel()
    return {
        kind: {
            "files": 8 * sum(size(image, kind, RIVALS[kind]) for image in images) / values,
            "mosaic": 8 * size(sheet, kind, RIVALS[kind]) / values,
        }
        for kind in RIVALS
    }


def table(result: dict[str, Any]) -> str:
    lines = ["| 1,000 steps | images | bits/dim | ± s.e. | prior | rate | decoder |", "|---|---|---|---|---|---|---|"]
    for split in ("test", "train"):
        row = result[split]
        lines.append(f"| {split} | {row['images']:,} | {_cells(row, 'prior', 'rate', 'decoder')} |")
    lines += ["", "| steps | bits/dim | ± s.e. | rate | decoder |", "|---|---|---|---|---|"]
    lines += [f"| {row['steps']:,} | {_cells(row, 'rate', 'decoder')} |" for row in result["curve"]]
    some, count = result["same_images"], np.prod(MOSAIC)
    lines += ["", f"| of the same {count} test images | bits a value, as files | as one mosaic |", "|---|---|---|"]
    lines += [f"| {kind} | {row['files']:.2f} | {row['mosaic']:.2f} |" for kind, row in result["rivals"].items()]
    lines += [f"| this model, the bound of 1,000 steps | {some['bits_per_dim']:.2f} ± {some['standard_error']:.2f} | |"]
    scores = ", ".join(f"{name} {value:.4g}" for name, value in result["samples"].items() if name in EXTRACTORS)
    lines += ["", f"Fréchet distance of 1,000 samples in 20 steps of UniPC: {scores}."]
    return "\n".join([*lines, "", f"{result['machine']['processor']}, {result['date']}; `{result['command']}`."])


def _cells(row: Row, *names: str) -> str:
    return " | ".join(f"{row[name]:.3f}" for name in ("bits_per_dim", "standard_error", *names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a shipped model")
    parser.add_argument("--data", help="the data, if the set has not the name of the model")
    parser.add_argument("--images", type=int, default=500, help="of the curve")
    parser.add_argument("--draws", type=int, default=40, help="terms of each image of the curve")
    parser.add_argument("--whole", type=int, default=10, help="terms of each image of the splits")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where features are kept")
    given = parser.parse_args()
    model, data = undiffuse.load(given.name, "cpu"), given.data or given.name
    test, train = (open_source(data, channels=model.image_shape[0], split=split) for split in ("test", "train"))
    count, images, path = int(np.prod(MOSAIC)), HERE.parent / "docs" / "images", HERE / f"bits-{given.name}.json"

    def samples() -> Row:
        drawn = model.sample(1000, 20, "unipc", batch=125)
        disk.write_atomic(images / f"{given.name}-samples.png", png(grid(drawn[:64], columns=16, scale=2)))
        return distances(drawn, given.work)

    def curve() -> list[Row]:
        rows = [measured(model, test, given.images, given.draws, steps) for steps in STEPS]
        line = ("bound", [float(row["steps"]) for row in rows], [row["bits_per_dim"] for row in rows])
        svg = line_plot([line], x="steps", y="bits/dim", title="Bits/dim of shorter chains", log_x=True)
        disk.write_atomic(images / f"{given.name}-bits.svg", svg.encode())
        return rows

    parts: dict[str, Callable[[], Any]] = {
        "samples": samples,
        "curve": curve,
        "same_images": lambda: measured(model, test, count, given.draws, 1000),
        "rivals": lambda: rivals(test.gather(torch.arange(count, dtype=torch.int64, device="cpu"))[0]),
        "test": lambda: measured(model, test, len(test), given.whole, 1000),
        "train": lambda: measured(model, train, len(test), given.whole, 1000),
    }
    of_weights, result = made_of(given.name, *EXTRACTORS), kept(path)
    result = result if result.get("made_of") == of_weights else {}
    for name, part in parts.items():
        if name not in result:
            result |= {name: part(), "seed": 0, "machine": machine(), "made_of": of_weights}
            result |= {"command": f"python bench/bits.py {given.name} --data {data}", "date": date.today().isoformat()}
            keep(path, result)
    publish("benchmarks.md", f"bits-{given.name}", table(result))


if __name__ == "__main__":
    main()
