"""How fast features are extracted, ours beside torch-fidelity's, and how far the resizes are from each other.

    python bench/features.py

Images in a second of processor time on one thread, so that other work on the machine matters little. Both Inceptions
have the same random weights, which `tests/quality/fidelity.py` draws; all contenders take turns, and each one's median
round counts. Writes `bench/features.json` and the table of docs/benchmarks.md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from machine import keep, machine, publish

from undiffuse.quality.feature.base import FEATURES
from undiffuse.quality.feature.inception import SIZE, InceptionNetwork
from undiffuse.quality.feature.resize import RESIZES
from undiffuse.quality.feature.weights import ready

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from tests.quality.fidelity import pictures, random_inception  # noqa: E402

CPU = torch.device("cpu")
THEIRS, OURS = "Inception, torch-fidelity", "Inception, ours"


def contenders() -> dict[str, Callable]:
    """By name, from uint8 [b, 3, 32, 32] to features."""
    theirs, network = random_inception(), InceptionNetwork()
    network.take(theirs.state_dict())
    ready(network, CPU)
    lite = {f"EfficientNet-Lite0, {size} px": {"name": "efflite0", "size": size} for size in (112, 224)}
    return {
        THEIRS: theirs,
        OURS: lambda images: network((RESIZES["tf1"](images, SIZE) - 128) / 128),
        **{name: FEATURES.build(spec).open(CPU) for name, spec in lite.items()},
    }


@torch.inference_mode()
def speeds(extractors: dict[str, Callable], rounds: int, images: int) -> dict[str, float]:
    """Images in a second of processor time, the median of the rounds after the first."""
    batch = pictures(4).repeat(images // 4, 1, 1, 1)
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name, extract in extractors.items():
            start = time.process_time()
            extract(batch)
            if number:
                seconds.setdefault(name, []).append(time.process_time() - start)
    return {name: len(batch) / statistics.median(each) for name, each in seconds.items()}


def resizes() -> dict[str, float]:
    """Mean absolute difference from `tf1`, in levels of 255, of parts of two photographs, 32×32 to 299×299."""
    made = {name: resize(pictures(), SIZE) for name, resize in RESIZES.items()}
    return {name: float((each - made["tf1"]).abs().mean()) for name, each in made.items() if name != "tf1"}


def table(result: dict) -> str:
    speed, ran = result["images_per_core_second"], result["machine"]
    lines = ["| network | images in a second of one core | beside torch-fidelity's |", "|---|---|---|"]
    for name, value in speed.items():
        ratio = f"{value / speed[THEIRS]:.2f}" if name in (THEIRS, OURS) else ""
        lines.append(f"| {name} | {value:.1f} | {ratio} |")
    apart = ", ".join(f"`{name}` {value:.1f}" for name, value in result["levels_from_tf1"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"{ran['processor']}, one thread, torch {ran['torch']}; {result['date']}. Made by `{result['command']}`.",
            "",
            f"Mean difference of the resized pictures from those of `tf1`, in levels of 255: {apart}.",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=16, help="in a batch, a multiple of 4")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "command": " ".join(["python", "bench/features.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "seed": 0,
        "machine": machine(),
        "images_per_core_second": speeds(contenders(), given.rounds, given.images),
        "levels_from_tf1": resizes(),
    }
    keep(HERE / "features.json", result)
    publish("benchmarks.md", "features", table(result))
