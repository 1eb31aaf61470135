"""What a newcomer waits for: the first training on a folder of 40 pictures, and 64 samples of the shipped model.

    python bench/first_minute.py
    python bench/first_minute.py --long

Whole commands, `--runs` times each, by turns. The 40 pictures are drawn here, of mixed sizes, in colour. The parts of
the second command are timed in a process that does the same in Python. `--long` measures the demo and the fit of a grid
instead, once each, and keeps the rest. Writes `bench/first_minute.json` and the table of docs/benchmarks.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
from machine import keep, kept, machine, publish
from PIL import Image

from undiffuse.machine.device import processor

HERE = Path(__file__).parent
MINUTES = 1.0
PARTS = """
import json, sys, time
began = [time.perf_counter()]
import torch; began.append(time.perf_counter())
import undiffuse; from undiffuse.cli import sample; from undiffuse.figure import grid, picture, png
began.append(time.perf_counter())
model = undiffuse.load("fashion-mnist")
began.append(time.perf_counter())
images = model.sample(64); began.append(time.perf_counter())
files = [png(picture(image)) for image in images] + [png(grid(images))]; began.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip(began, began[1:])]))
"""
NAMES = ("import torch", "import undiffuse", "load the model", "10 evaluations of 64 images", "64 PNGs and a grid")


def draw(folder: Path) -> Path:
    """40 pictures of smooth colours, between 48 and 400 pixels a side."""
    folder.mkdir()
    for i in range(40):
        rng = np.random.default_rng(i)
        small = rng.integers(0, 255, (3, 3, 3), np.uint8)
        Image.fromarray(small).resize(tuple(rng.integers(48, 400, 2)), Image.Resampling.BICUBIC).save(
            folder / f"{i}.png"
        )
    return folder


def undiffuse(*words: object) -> float:
    """Seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "undiffuse", *map(str, words)], check=True, capture_output=True)
    return time.perf_counter() - began


def parts() -> dict[str, float]:
    """Seconds of each; what is left of the command is the start of Python, of the command line, and files."""
    done = subprocess.run([sys.executable, "-c", PARTS], check=True, capture_output=True, text=True)
    return dict(zip(NAMES, json.loads(done.stdout.splitlines()[-1]), strict=True))


def once(folder: Path, n: int) -> dict[str, float]:
    run = folder / f"run-{n}"
    undiffuse("train", folder / "photos", "--out", run, "--minutes", MINUTES, "--set", "train.sample_every=0")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return {
        "images_per_second": statistics.median(rates),
        "images_in_a_minute": max(row["images"] for row in rows if "images" in row),
        "seconds_to_sample_64": undiffuse("sample", "fashion-mnist", "-n", 64, "--out", folder / f"samples-{n}"),
        **parts(),
    }


def long(folder: Path) -> dict[str, float | str]:
    os.environ["UNDIFFUSE_CACHE"] = str(folder / "cache")  # where the grid of a shipped model would be kept
    fit = undiffuse("fit", "fashion-mnist", "--overwrite")
    return {"fit": fit, "demo": undiffuse("demo", "--out", folder / "demo"), "processor": processor()}


def table(result: dict) -> str:
    middle, more = result["median"], result.get("long")
    slow = (
        []
        if more is None
        else [
            f"| `fit fashion-mnist`, once on {more['processor']} | {more['fit']:.0f} s |",
            f"| `demo`, once on {more['processor']} | {more['demo'] / 60:.1f} min |",
        ]
    )
    return "\n".join(
        [
            "| what | median |",
            "|---|---|",
            f"| `train photos/ --out run`, images a second | {middle['images_per_second']:.0f} |",
            f"| the same, images seen in the first minute | {middle['images_in_a_minute']:,.0f} |",
            f"| `sample fashion-mnist -n 64`, the whole command | {middle['seconds_to_sample_64']:.1f} s |",
            *(f"| of this: {name} | {middle[name]:.2f} s |" for name in NAMES),
            *slow,
            "",
            f"{result['machine']['processor']}, {result['machine']['threads']} threads, torch "
            f"{result['machine']['torch']}, Python {result['machine']['python']}; {result['date']}. Made by "
            f"`{result['command']}`, {result['runs']} runs.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--long", action="store_true")
    given, path = parser.parse_args(), HERE / "first_minute.json"
    runs, before = given.runs, kept(path)
    if given.long:
        with tempfile.TemporaryDirectory() as name:
            before["long"] = long(Path(name)) | {"command": "python bench/first_minute.py --long"}
        before["long"]["date"] = str(date.today())
        keep(path, before)
        publish("benchmarks.md", "first-minute", table(before))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "photos")
        found = [once(folder, n) for n in range(runs)]
    median = {key: statistics.median(each[key] for each in found) for key in found[0]}
    result = {
        "command": "python bench/first_minute.py",
        "date": str(date.today()),
        "seed": 0,
        "runs": runs,
        "machine": machine(),
        "median": median,
        "each": found,
    }
    result |= {"long": before["long"]} if "long" in before else {}
    keep(path, result)
    publish("benchmarks.md", "first-minute", table(result))


if __name__ == "__main__":
    main()
