"""How long a whole evaluation takes, ours beside torch-fidelity's: FID, Inception score and KID of the same pictures.

    python bench/evaluation.py

Seconds of processor time on one thread, so that other work on the machine matters little; both Inceptions have the same
random weights, the two take turns, and the median round counts. Ours also measures real images beside the samples, from
the same pass. Writes `bench/evaluation.json` and the table of docs/benchmarks.md.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from machine import keep, machine, publish
from torch import Tensor

import undiffuse
from undiffuse.quality.feature.base import Extractor, FeatureExtractor
from undiffuse.quality.feature.inception import SIZE, InceptionNetwork
from undiffuse.quality.feature.resize import RESIZES
from undiffuse.quality.feature.weights import ready

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from tests.quality.fidelity import metrics_of_fidelity, photographs, random_inception  # noqa: E402

THEIRS, OURS = "torch-fidelity", "ours"
METRICS = ("frechet", "inception-score", "kernel")
NAMES = {"frechet_inception_distance": "fd", "inception_score_mean": "is", "kernel_inception_distance_mean": "kd"}


@dataclass(frozen=True)
class Random(FeatureExtractor):
    """Inception of random weights: those of FID are pinned, and no file of them is here."""

    title = "FD-random"

    def open(self, device: torch.device) -> Extractor:
        network = InceptionNetwork()
        network.take(random_inception().state_dict())
        ready(network, device)
        dimensions = {"pool": 2048, "logits": 1008, "spatial": 2023}
        return Extractor(
            "random", self.title, "0" * 64, "tf1", None, 3, dimensions,
            lambda images: network((RESIZES["tf1"](images, SIZE) - 128) / 128), device,
        )  # fmt: skip


def ours(folder: Path) -> dict[str, float]:
    samples, data = (folder / f"{name}.npz" for name in ("samples", "data"))
    query = undiffuse.Query(("evaluation:Random",), METRICS)
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, {"UNDIFFUSE_CACHE": cache}):
        found = undiffuse.evaluate(samples, data, query, memorisation=False, device="cpu")
    return {row["key"]: row["value"] for row in found.rows}


def theirs(samples: Tensor, data: Tensor) -> dict[str, float]:
    found = metrics_of_fidelity(samples, data)
    return {ours: found[name] for name, ours in NAMES.items()}


def timed(both: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, list[tuple[float, dict]]]:
    """Seconds and numbers of each, by turns."""
    found: dict[str, list[tuple[float, dict]]] = {name: [] for name in both}
    for _ in range(rounds):
        for name, run in both.items():
            began = time.process_time()
            numbers = run()
            found[name].append((time.process_time() - began, numbers))
            print(name, found[name][-1], file=sys.stderr, flush=True)
    return found


def table(result: dict) -> str:
    ran, seconds = result["machine"], result["seconds"]
    lines = ["| | seconds (all rounds) | images/s | FID | Inception score | KID |", "|---|---|---|---|---|---|"]
    for name, each in seconds.items():
        numbers, speed = result["numbers"][name], 2 * result["images"] / statistics.median(each)
        rounds = ", ".join(f"{value:.1f}" for value in each)
        values = " | ".join(f"{numbers[key]:.5g}" for key in NAMES.values())
        lines.append(f"| {name} | {rounds} | {speed:.2f} | {values} |")
    ratio = statistics.median(seconds[THEIRS]) / statistics.median(seconds[OURS])
    return "\n".join(
        [
            *lines,
            "",
            f"torch-fidelity takes {ratio:.2f} times as long; its Inception score is of shuffled samples. "
            f"{result['images']} samples and as many real images of 32×32, on one thread of {ran['processor']}, "
            f"torch {ran['torch']}; {result['date']}. Made by `{result['command']}`.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=128, help="in each of the two sets")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pictures = photographs(2 * given.images)
    sets = {"samples": pictures[::2], "data": pictures[1::2]}
    with tempfile.TemporaryDirectory() as folder:
        for name, images in sets.items():
            np.savez(Path(folder) / f"{name}.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
        found = timed(
            {
                THEIRS: lambda: theirs(**sets),
                OURS: lambda: ours(Path(folder)),
            },
            given.rounds,
        )
    result = {
        "command": " ".join(["python", "bench/evaluation.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "seed": 0,
        "machine": machine(),
        "images": given.images,
        "seconds": {name: [seconds for seconds, _ in each] for name, each in found.items()},
        "numbers": {name: each[-1][1] for name, each in found.items()},
    }
    keep(HERE / "evaluation.json", result)
    publish("benchmarks.md", "evaluation", table(result))


if __name__ == "__main__":
    main()
