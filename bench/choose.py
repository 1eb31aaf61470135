"""Which network and recipe for Fashion-MNIST: the quality of samples after equal processor time.

    python bench/choose.py [--seconds 240] [--seed 0] [NAME …]

Each candidate is preset `fashion-mnist` with the settings of `CANDIDATES`, trained for so many seconds of processor
time on one thread (240 are two minutes of both threads of a small machine), with a rate that falls to 0 at their end.
2,000 samples of DDIM in 20 steps are judged by the Fréchet distance on two extractors. What is there for the same
seconds and seed is not done again. Writes `bench/choose.json` and the table of docs/benchmarks.md.
"""

import argparse
import json
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from candidates import CANDIDATES
from machine import machine, made_of, publish

from undiffuse.data.source import open_source
from undiffuse.machine import disk
from undiffuse.model.recipe import load_recipe
from undiffuse.quality.feature.base import open_features
from undiffuse.quality.metric.base import Moments
from undiffuse.quality.metric.frechet import frechet_of_rows, root
from undiffuse.training.plan import forward_flops
from undiffuse.training.trainer import Trainer

HERE = Path(__file__).parent
EXTRACTORS = {"classifier-28": 60_000, "efflite0": 10_000}  # of so many training images
SAMPLES, STEPS, WARM_UP = 2000, 20, 10
Found = dict[str, Any]


def trained(settings: list[str], seconds: float, seed: int) -> tuple[Trainer, Found]:
    recipe = load_recipe("fashion-mnist", ["train.precision=float32", *settings, f"train.seed={seed}"])
    trainer = Trainer(recipe, recipe.model((1, 28, 28)), open_source("fashion-mnist"))
    for _ in range(3):
        trainer.update(10**6)
    began = time.process_time()
    for _ in range(WARM_UP):
        trainer.update(10**6)
    last = trainer.step + int(WARM_UP * (seconds / (time.process_time() - began) - 1))
    losses = [trainer.update(last)["loss"] for _ in range(trainer.step, last)]
    return trainer, {
        "weights": sum(weight.numel() for weight in trainer.weights),
        "gflop": forward_flops(trainer.config) / 1e9,
        "steps": last,
        "images": last * recipe.train.batch,
        "seconds": round(time.process_time() - began, 1),
        "loss": sum(losses[-200:]) / len(losses[-200:]),
    }


def references(folder: Path) -> dict[str, Moments]:
    """Of the training images; their features are kept in the folder."""
    found = {}
    for name, count in EXTRACTORS.items():
        path, moments = folder / f"choose-{name}.npy", Moments()
        if not path.exists():
            extractor, images = open_features(name, "cpu"), open_source("fashion-mnist").images[:count]
            np.save(path, torch.cat([extractor(part).pool for part in images.split(250)]).numpy())
        features = torch.from_numpy(np.load(path))
        moments.update(features, torch.arange(len(features)))
        found[name] = moments
    return found


def judged(trainer: Trainer, known: dict[str, Moments]) -> Found:
    images = trainer.model().sample(SAMPLES, STEPS, "ddim", 0, 250)
    found = {}
    for name, moments in known.items():
        extractor = open_features(name, "cpu")
        rows = torch.cat([extractor(part).pool for part in images.split(250)])
        found[name] = frechet_of_rows(rows, moments.mean, root(moments.covariance))
    return found


def table(result: Found) -> str:
    lines = [
        "| candidate | weights | GFLOP an image | images seen | loss | FD-classifier | FD-EffLite0 |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = sorted(result["rows"], key=lambda row: row["efflite0"])
    for row in rows:
        size = f"{row['weights'] / 1e6:.2f} M | {row['gflop']:.3f}"
        scores = f"{row['classifier-28']:.3f} | {row['efflite0']:.1f}"
        lines.append(f"| {row['name']} | {size} | {row['images']:,} | {row['loss']:.4f} | {scores} |")
    ran = result["machine"]
    made = f"{ran['processor']}, one thread, torch {ran['torch']}, {result['date']}"
    return "\n".join([*lines, "", f"Of {rows[0]['budget']:g} s of processor time each. {made}; `{result['command']}`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="these alone")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = HERE / "choose.json"
    result: Found = json.loads(path.read_text()) if path.exists() else {"rows": []}
    known = references(given.work)
    if unknown := set(given.names) - CANDIDATES.keys():
        raise SystemExit(f"{', '.join(sorted(unknown))}: not a candidate; give some of {', '.join(CANDIDATES)}")
    for name in given.names or CANDIDATES:
        asked = {"name": name, "budget": given.seconds, "seed": given.seed}
        if any(asked.items() <= row.items() for row in result["rows"]):
            continue
        trainer, found = trained(CANDIDATES[name], given.seconds, given.seed)
        row = asked | {"settings": CANDIDATES[name]} | found | judged(trainer, known)
        print(json.dumps(row), file=sys.stderr, flush=True)
        result["rows"].append(row)
        result |= {"command": "python bench/choose.py", "date": date.today().isoformat(), "machine": machine()}
        result |= {"made_of": made_of(*EXTRACTORS)}
        disk.write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())
        publish("benchmarks.md", "choose", table(result))


if __name__ == "__main__":
    main()
