"""What other losses gain: `bench/small.toml` with other weights, densities of t and a learned variance, at equal
numbers of images.

    python bench/objectives.py [--images 51200] [--seed 0] [NAME …]

Measured are the Fréchet distance of 1,000 samples in 50 ancestral steps on two extractors, and bits/dim as in
`bench/likelihood.py`. What is there for the same images and seed is not done again, unless other extractors
judged it. Writes `bench/objectives.json` and the table of docs/benchmarks.md.
"""

from pathlib import Path

import numpy as np
from choose import EXTRACTORS, of_samples
from likelihood import MUON, error, measured
from trial import IMAGES, SMALL, Found, made, run

from undiffuse.training.trainer import Trainer


def preset(*settings: str) -> tuple[str, list[str]]:
    return SMALL, [*MUON, *settings]


LEARNED = "variance.name=learned-range"
CANDIDATES: dict[str, tuple[str, list[str]]] = {
    "simple, v": preset(),
    "simple, v, log-normal σ/α": preset("objective.density.name=log-normal"),
    "min-SNR": preset("objective.name=min-snr"),
    "P2": preset("objective.name=p2"),
    "sigmoid": preset("objective.name=sigmoid"),
    "simple, v, importance": preset("objective.density.name=importance"),
    "hybrid, learned range": preset("objective.name=hybrid", LEARNED),
    "hybrid, learned range, importance": preset("objective.name=hybrid", LEARNED, "objective.density.name=importance"),
    "vlb, learned range, importance": preset("objective.name=vlb", LEARNED, "objective.density.name=importance"),
}


def all_of(trainer: Trainer, folder: Path) -> Found:
    return {**of_samples(trainer.model(), folder, 50, "ancestral"), **measured(trainer, folder)}


def table(result: Found) -> str:
    lines = ["| objective | FD-classifier | FD-EffLite0 | bits/dim | ± s.e. | processor |", "|---|---|---|---|---|---|"]
    for row in sorted(result["rows"], key=lambda row: row["efflite0"]):
        bits, name = np.array(row["bits"]), row["name"] + (f" (seed {row['seed']})" if row["seed"] else "")
        scores = f"{row['classifier-28']:.3f} | {row['efflite0']:.1f}"
        lines.append(f"| {name} | {scores} | {bits.mean():.3f} | {error(bits):.3f} | {row['processor']} |")
    return "\n".join([*lines, "", made(result)])


if __name__ == "__main__":
    run(CANDIDATES, all_of, table, tuple(EXTRACTORS), 51_200, IMAGES)
