"""Samples of a shipped model with classes by the scale of their guidance: how near to real ones, and how various.

    python bench/guidance.py emoji-32 --data FOLDER [--guide FILE] [--steps N --solver NAME] [--grid NAME]

1,000 samples in bf16, of the default solver and its 10 steps on the fitted grid unless others are given, the classes as
often as in training, led away from the model's answer without a class or, with --guide, from that of worse weights of
it, are judged by the Fréchet distance on two extractors against the training images, and by precision and recall:
guidance is known to gain the first of these two at the cost of the other. What is there for the same weights, chain,
guide and scale is not done again. Writes `bench/guidance-NAME.json`, the table `guidance-NAME` of docs/benchmarks.md
and docs/images/NAME-guided.png, 16 samples of each class with a guidance of 2.
"""

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machine import DOCS, keep, machine, made_of, publish
from styles import BATCH, EXTRACTORS, features
from trial import read

import undiffuse
from undiffuse.data.source import open_source
from undiffuse.figure import enlarged, grid, png
from undiffuse.machine import disk
from undiffuse.machine.device import processor
from undiffuse.quality.feature.base import open_features
from undiffuse.quality.metric.base import Moments
from undiffuse.quality.metric.frechet import frechet_of_rows, root
from undiffuse.quality.metric.precision_recall import precision_recall

HERE, SAMPLES, SEED, K = Path(__file__).parent, 1000, 0, 3
SCALES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
OWN = "no class"
Row = dict[str, Any]


def digits(score: str) -> int:
    return {EXTRACTORS[0]: 2, EXTRACTORS[1]: 0}.get(score, 3)


def table(result: Row) -> str:
    scores = [*EXTRACTORS, *(f"{what}, {name}" for name in EXTRACTORS for what in ("precision", "recall"))]
    heads = [{"classifier-emoji": "FD-classifier", "efflite0": "FD-EffLite0"}.get(name, name) for name in scores]
    lines = [f"| led away from | guidance | steps | {' | '.join(heads)} |", "|---|---|---|" + "---|" * len(scores)]
    for row in sorted(result["rows"], key=lambda row: (row["chain"], row["scale"] > 1, row["guide"], row["scale"])):
        away = {OWN: "its answer without a class"}.get(row["guide"], f"weights `{row['guide']}`")
        head = f"| {away if row['scale'] > 1 else 'nothing'} | {row['scale']:g} | {row['chain']} "
        lines.append(f"{head}| {' | '.join(f'{row[name]:.{digits(name)}f}' for name in scores)} |")
    said = f"{SAMPLES:,} samples each, bf16, seed {SEED}; {machine()['processor']}, {result['date']}"
    return "\n".join([*lines, "", f"{said}; `{result['command']}`."])


def picture(name: str) -> None:
    """As `undiffuse sample NAME --label all -n 16 --guidance 2` draws it."""
    images = undiffuse.load(name, "cpu").variant(guidance=2).sample(16, seed=SEED, label="all")
    sheet = grid(images, 16, enlarged(images.shape[-1]))
    disk.write_atomic(DOCS / "images" / f"{name}-guided.png", png(sheet, drawn=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a shipped model with classes")
    parser.add_argument("--data", required=True, help="the folder of its data")
    parser.add_argument("--guide", help="worse weights of the same model")
    parser.add_argument("--scales", help="these alone, with commas")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--solver")
    parser.add_argument("--grid", default="fitted")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, path = undiffuse.load(given.name, "cpu").variant(precision="bf16"), HERE / f"guidance-{given.name}.json"
    weak = None if given.guide is None else undiffuse.load(given.guide, "cpu")
    real = open_source(given.data, channels=model.image_shape[0], split="train")
    images = real.gather(torch.arange(len(real), dtype=torch.int64, device="cpu"))[0]
    judges = {}
    for name in EXTRACTORS:
        extractor, moments = open_features(name, "cpu"), Moments()
        rows = features(extractor, images)
        moments.update(rows, torch.arange(len(rows), dtype=torch.int64, device="cpu"))
        judges[name] = (extractor, rows, moments.mean, root(moments.covariance))
    command = f"python bench/guidance.py {given.name} --data {given.data}"
    times, solver, _ = model.walk(given.steps, given.solver, grid=given.grid)
    chain = f"{len(times) - 1} of {given.solver or 'the default'}"
    chain += "" if given.grid == "fitted" else f" on {given.grid}"
    for scale in SCALES if given.scales is None else map(float, given.scales.split(",")):
        guide = OWN if weak is None or scale == 1 else weak.digest()[:12]
        own: Row = {"guide": guide, "scale": scale, "chain": chain, "weights": model.digest()[:16]}
        result = read(path)
        if any(own.items() <= row.items() for row in result["rows"]):
            continue
        row = own | {"processor": processor()}
        drawn = model.variant(guidance=scale, guide=weak).sample(SAMPLES, times, solver, SEED, BATCH, "random")
        for name, (extractor, known, mean, cov) in judges.items():
            seen = features(extractor, drawn)
            row[name] = frechet_of_rows(seen, mean, cov)
            row[f"precision, {name}"], row[f"recall, {name}"] = precision_recall(seen.double(), known.double(), K)
        print(json.dumps(row), file=sys.stderr, flush=True)
        result = {"rows": [*(old for old in result["rows"] if old["weights"] == own["weights"]), row]}
        result |= {"command": command, "date": date.today().isoformat(), "seed": SEED, "machine": machine()}
        result |= {"made_of": made_of(given.name, *EXTRACTORS)}
        keep(path, result)
        publish("benchmarks.md", f"guidance-{given.name}", table(result))
    picture(given.name)


if __name__ == "__main__":
    main()
