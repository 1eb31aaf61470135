"""Which network and recipe for Fashion-MNIST: the quality of samples after equal processor time.

    python bench/choose.py [--seconds 240] [--seed 0] [NAME …]

Each candidate is `bench/small.toml` with the settings of `CANDIDATES`, trained for so many seconds of processor
time on one thread (240 are two minutes of both threads of a small machine), with a rate that falls to 0 at their end.
1,000 samples of DDIM in 20 steps are judged by the Fréchet distance on two extractors. What is there for the same
seconds, seed and processor is not done again, unless other extractors judged it. Writes `bench/choose.json` and the
tables of docs/benchmarks.md: of all rows, and of the means of candidates with several seeds.
"""

from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from candidates import CANDIDATES
from trial import SMALL, Found, made, run

from undiffuse.data.source import open_source
from undiffuse.model.model import Model
from undiffuse.quality.feature.base import open_features
from undiffuse.quality.metric.base import Moments
from undiffuse.quality.metric.frechet import frechet_of_rows, root
from undiffuse.training.trainer import Trainer

EXTRACTORS = {"classifier-28": 60_000, "efflite0": 10_000}  # of so many training images
SAMPLES, STEPS = 1000, 20


@cache
def reference(name: str, folder: Path, count: int, data: str = "fashion-mnist", mark: str = "choose") -> Moments:
    """Of so many training images; their features are kept in the folder, by the extractor's weights."""
    extractor, moments = open_features(name, "cpu"), Moments()
    path = folder / f"{mark}-{name}-{extractor.sha256[:16]}.npy"
    if not path.exists():
        images = open_source(data).images[:count]
        np.save(path, torch.cat([extractor(part).pool for part in images.split(250)]).numpy())
    features = torch.from_numpy(np.load(path))
    moments.update(features, torch.arange(len(features)))
    return moments


def judged(trainer: Trainer, folder: Path) -> Found:
    return of_samples(trainer.model(), folder)


def of_samples(model: Model, folder: Path, steps: int = STEPS, solver: str = "ddim") -> Found:
    return distances(model.sample(SAMPLES, steps, solver, 0, 250), folder)


def distances(images: torch.Tensor, folder: Path) -> Found:
    """The Fréchet distance of images [n, c, h, w] on each extractor."""
    return {name: distance(images, name, reference(name, folder, count)) for name, count in EXTRACTORS.items()}


def distance(images: torch.Tensor, name: str, known: Moments) -> float:
    extractor = open_features(name, "cpu")
    rows = torch.cat([extractor(part).pool for part in images.split(250)])
    return frechet_of_rows(rows, known.mean, root(known.covariance))


def table(result: Found) -> str:
    lines = [
        "| seconds | candidate | weights | GFLOP an image | images seen | loss | FD-classifier | FD-EffLite0 "
        "| processor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda row: (row["budget"], row["processor"], row["efflite0"])):
        name = row["name"] + (f" (seed {row['seed']})" if row["seed"] else "")
        size = f"{row['weights'] / 1e6:.2f} M | {row['gflop']:.3f} | {row['images']:,}"
        scores = f"{row['loss']:.4f} | {row['classifier-28']:.3f} | {row['efflite0']:.1f}"
        lines.append(f"| {row['budget']:g} | {name} | {size} | {scores} | {row['processor']} |")
    return "\n".join([*lines, "", *of_seeds(result["rows"]), "", made(result)])


def of_seeds(rows: list[Found]) -> list[str]:
    """The means of the candidates with several seeds, and their range."""
    alike = defaultdict[tuple[float, str, str], list[Found]](list)
    for row in rows:
        alike[row["budget"], row["processor"], row["name"]].append(row)
    lines = [
        "| seconds | candidate | seeds | images seen | FD-classifier | FD-EffLite0 | processor |",
        "|---|---|---|---|---|---|---|",
    ]
    for (budget, ran, name), some in sorted(alike.items()):
        if len(some) > 1:
            cells = [f"{budget:g}", name, str(len(some)), f"{mean(row['images'] for row in some):,.0f}"]
            for extractor, digits in (("classifier-28", 3), ("efflite0", 1)):
                values = [row[extractor] for row in some]
                cells.append(f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})")
            lines.append(f"| {' | '.join([*cells, ran])} |")
    return lines


if __name__ == "__main__":
    candidates = {name: (SMALL, settings) for name, settings in CANDIDATES.items()}
    run(candidates, judged, table, tuple(EXTRACTORS))
