"""Which distance tells worse samples from better ones, with 1,000 or 2,000 of them?

    python bench/ranking.py

Real images of Fashion-MNIST are made worse by known grades, and each distance judges a draw of every grade; of two
grades that follow each other the worse must get the larger number. Writes the JSON beside it and the table of
docs/benchmarks.md after every draw, so that it may be stopped.

MIND is the Monge Inception Distance of Berthet et al. 2026 (arXiv 2605.06797): 3 d times the mean, over random unit
directions, of the squared Wasserstein distance of the features along each, of as many real images as samples.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
from machine import keep, machine, made_of, publish
from torch import Tensor

from undiffuse.data.source import open_source
from undiffuse.key import Key
from undiffuse.machine import log
from undiffuse.quality.feature.base import Extractor, open_features
from undiffuse.quality.metric.base import Moments
from undiffuse.quality.metric.frechet import frechet_of_rows, root

HERE = Path(__file__).parent
COUNTS, DIRECTIONS = (1000, 2000), 1000
NOISE = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0)  # standard deviation, of 255
BLUR = (0.0, 0.35, 0.4, 0.45, 0.5)  # standard deviation, in pixels
CLASSES = (10, 9, 8, 7, 6)  # the first of them; the others are not drawn
DISTINCT = (1.0, 0.8, 0.6, 0.4, 0.3)  # the share of images that are no copies of another
TITLES = {"noise": "noise", "blur": "blur", "classes": "fewer classes", "distinct": "repeated images"}


def noisy(images: Tensor, sd: float, key: Key) -> Tensor:
    noise = key.fold("noise", str(sd)).rows(len(images)).normal(*images.shape[1:])
    return (images + sd * noise).round().clamp(0, 255).to(torch.uint8)


def blurred(images: Tensor, sd: float) -> Tensor:
    line = torch.exp(-torch.arange(-2, 3, dtype=torch.float32).square() / (2 * sd * sd))
    line = line / line.sum()
    edged = torch.nn.functional.pad(images.to(torch.float32), (2, 2, 2, 2), mode="replicate")
    return torch.nn.functional.conv2d(edged, torch.outer(line, line)[None, None]).round().to(torch.uint8)


def mind(directions: Tensor, x: Tensor, y: Tensor) -> float:
    along = [(rows @ directions.T).sort(0).values for rows in (x, y)]
    return 3 * x.shape[1] * float((along[0] - along[1]).square().mean(dtype=torch.float64))


def distances(real: Tensor, key: Key) -> dict[str, Callable[[Tensor, Key], float]]:
    """Each of samples beside all real images, and MIND also as published, beside as many as there are samples."""
    known = Moments()
    known.update(real, torch.arange(len(real)))
    half = root(known.covariance)
    directions = key.fold("directions").normal(DIRECTIONS, real.shape[1])
    directions = directions / directions.norm(dim=1, keepdim=True)

    every = (real @ directions.T).sort(0).values

    def of_mind(rows: Tensor, draw: Key) -> float:
        return mind(directions, rows, real[draw.fold("real").uniform(len(real)).argsort()[: len(rows)]])

    def of_all(rows: Tensor, draw: Key) -> float:
        along = (rows @ directions.T).sort(0).values.repeat_interleave(len(real) // len(rows), 0)
        return 3 * real.shape[1] * float((along - every).square().mean(dtype=torch.float64))

    def of_kernel(rows: Tensor, draw: Key) -> float:
        """Without the term of the real images alone, which is the same for all samples."""
        within, across = (((rows @ other.T).to(torch.float64) / rows.shape[1] + 1) ** 3 for other in (rows, real))
        return float((within.sum() - within.trace()) / (len(rows) * (len(rows) - 1)) - 2 * across.mean())

    return {
        "Fréchet": lambda rows, draw: frechet_of_rows(rows, known.mean, half),
        "kernel": of_kernel,
        "MIND": of_mind,
        "MIND, all real": of_all,
    }


def drawn(grades: dict[str, list[Tensor]], labels: Tensor, n: int, key: Key) -> dict[str, list[Tensor]]:
    """n samples of each grade, of other images each time."""
    found: dict[str, list[Tensor]] = {}
    clean = grades["noise"][0]
    for kind in ("noise", "blur"):
        orders = [key.fold(kind, grade).uniform(len(clean)).argsort()[:n] for grade in range(len(grades[kind]))]
        found[kind] = [rows[order] for rows, order in zip(grades[kind], orders, strict=True)]
    found["classes"] = []
    for grade, classes in enumerate(CLASSES):
        order = key.fold("classes", grade).uniform(len(clean)).argsort()
        found["classes"].append(clean[order[labels[order] < classes][:n]])
    found["distinct"] = []
    for grade, share in enumerate(DISTINCT):
        order = key.fold("distinct", grade).uniform(len(clean)).argsort()[: round(share * n)]
        found["distinct"].append(clean[order[torch.arange(n) % len(order)]])
    return found


def extracted(
    extractor: Extractor, images: dict[str, list[Tensor]], real: Tensor
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    total = len(real) + sum(len(each) for grades in images.values() for each in grades)
    with log.progress(total, f"features of {extractor.name}", True) as bar:

        def features(pictures: Tensor) -> Tensor:
            made = []
            for part in pictures.split(64):
                made.append(extractor(part).pool)
                bar.advance(len(part))
            return torch.cat(made)

        reference = features(real)
        grades = {kind: [features(each) for each in images[kind]] for kind in images}
    grades["blur"] = [grades["noise"][0], *grades["blur"]]
    return reference, grades


def judged(extractor: Extractor, images: dict, real: Tensor, labels: Tensor, repeats: int, key: Key) -> Iterator[dict]:
    """What is known after each draw."""
    reference, grades = extracted(extractor, images, real)
    judges = distances(reference, key)
    result: dict = {"dimensions": reference.shape[1], "sha256": extractor.sha256, "resize": extractor.resize}
    for n in COUNTS:
        right, pairs = {judge: dict.fromkeys(TITLES, 0) for judge in judges}, dict.fromkeys(TITLES, 0)
        for repeat in range(repeats):
            draw = key.fold("draw", n, repeat)
            for kind, sets in drawn(grades, labels, n, draw).items():
                pairs[kind] += len(sets) - 1
                for judge, distance in judges.items():
                    values = [distance(rows, draw.fold(judge, kind, i)) for i, rows in enumerate(sets)]
                    right[judge][kind] += sum(a < b for a, b in zip(values, values[1:], strict=False))
            print(f"{extractor.name}, {n} samples, draw {repeat + 1}: {right}", file=sys.stderr, flush=True)
            result[str(n)] = {"draws": repeat + 1, "pairs": pairs, "right": right}
            yield result


def table(found: dict) -> str:
    lines = [
        "| features | samples | draws | distance | " + " | ".join(TITLES.values()) + " | all |",
        "|---|---|---|---|" + "---|" * (len(TITLES) + 1),
    ]
    for name, result in found.items():
        for n in (n for n in map(str, COUNTS) if n in result):
            for judge, right in result[n]["right"].items():
                pairs = result[n]["pairs"]
                shares = [f"{right[kind] / pairs[kind]:.0%}" for kind in TITLES]
                whole = f"{sum(right.values()) / sum(pairs.values()):.1%}"
                draws = result[n]["draws"]
                lines.append(f"| {name} | {int(n):,} | {draws} | {judge} | " + " | ".join([*shares, whole]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--features", nargs="+", default=["classifier-28", "efflite0"])
    parser.add_argument("--reference", type=int, default=6000, help="a multiple of 2,000")
    parser.add_argument("--pool", type=int, default=4000, help="held-out images that samples are drawn of")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    key = Key(arguments.seed).fold("ranking")
    real, _ = open_source("fashion-mnist", split="train").gather(torch.arange(arguments.reference))
    pool, labels = open_source("fashion-mnist", split="test").gather(torch.arange(arguments.pool))
    images = {
        "noise": [noisy(pool, sd, key) for sd in NOISE],
        "blur": [blurred(pool, sd) for sd in BLUR[1:]],
    }
    out = {
        "command": " ".join(["python", "bench/ranking.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": machine(),
        "made_of": made_of(*arguments.features),
        "options": vars(arguments) | {"directions": DIRECTIONS},
        "grades": {"noise": NOISE, "blur": BLUR, "classes": CLASSES, "distinct": DISTINCT},
        "features": {},
    }
    for name in arguments.features:
        for result in judged(open_features(name), images, real, labels, arguments.repeats, key):
            out["features"][name] = result
            keep(HERE / "ranking.json", out)
            publish("benchmarks.md", "ranking", table(out["features"]))


if __name__ == "__main__":
    main()
