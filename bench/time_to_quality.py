"""How long until samples of Fashion-MNIST are as good as those of denoising-diffusion-pytorch after an hour.

    python bench/time_to_quality.py --peer PEER/bin/python

The peer is trained once for 60 minutes (`bench/peer_training.py`), ours `--runs` times by `undiffuse train` for each
number of `--images` with the settings `OURS`, whole command timed, on an otherwise idle machine. Both are sampled by
DDIM of 30 evaluations, 2,000 images, and judged by the Fréchet distance of a classifier's 128 features to those of the
training set; beside it that of 2,000 real test images. Training must have the machine to itself. What is finished is
kept in `--work`, and not done again; in another folder the classifier is trained again, and is another judge by a few
per cent, as the distance of the real images tells. Rows of other judges stay. Writes `bench/time_to_quality.json` and
the table of docs/benchmarks.md. The environment of `--peer` is that of `bench/speed.py`.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from machine import keep, machine, publish
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.data.source import open_source

HERE = Path(__file__).parent
MINUTES = (15, 30, 60)  # the peer's samples, at each of these
COUNT, STEPS = 2000, 30
OURS = "train.batch=64", "train.lr=2e-3", "network.channels=48"  # of preset fashion-mnist, which is for hours
PEER = "denoising-diffusion-pytorch"
Row = dict[str, Any]


def classifier() -> nn.Sequential:
    """Its last layer but one gives the 128 features."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 9, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def inputs(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def trained(path: Path, epochs: int = 6) -> tuple[nn.Sequential, float]:
    """The classifier, from `path` if it is there, and its accuracy on the test set."""
    network = classifier()
    if path.exists():
        network.load_state_dict(safetensors.torch.load_file(path))
    else:
        torch.manual_seed(0)
        images, labels = whole("train")
        adam = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
        rate = torch.optim.lr_scheduler.OneCycleLR(adam, 4e-3, total_steps=epochs * (len(images) // 128))
        for _ in range(epochs):
            for rows in torch.randperm(len(images))[: len(images) // 128 * 128].view(-1, 128):
                F.cross_entropy(network(inputs(images[rows])), labels[rows]).backward()
                adam.step()
                adam.zero_grad()
                rate.step()
        safetensors.torch.save_file(network.state_dict(), path)
    images, labels = whole("test")
    network.eval()
    with torch.no_grad():
        said = torch.cat([network(inputs(part)).argmax(1) for part in images.split(1000)])
    return network, float((said == labels).double().mean())


def whole(split: str) -> tuple[Tensor, Tensor]:
    source = open_source("fashion-mnist", channels=1, split=split)
    images, labels = source.gather(torch.arange(len(source)))
    assert labels is not None
    return images, labels


@torch.no_grad()
def moments(network: nn.Sequential, images: Tensor) -> tuple[Tensor, Tensor]:
    features = torch.cat([network[:-1](inputs(part)) for part in images.split(1000)]).double()
    return features.mean(0), features.T.cov()


def frechet(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> float:
    """|μ1 − μ2|² + tr(Σ1 + Σ2 − 2 (Σ1 Σ2)^½), where the last trace is the sum of the roots of the eigenvalues."""
    roots = torch.linalg.eigvals(one[1] @ two[1]).real.clamp(min=0).sqrt().sum()
    return float((one[0] - two[0]).square().sum() + one[1].trace() + two[1].trace() - 2 * roots)


def ours(work: Path, preset: str, settings: Sequence[str], run: int, images: int) -> Row:
    """One run from the start of the command to its end, and where its samples are."""
    out = work / f"{Path(preset).stem}-{images}-{run}"
    facts, npz = out.with_suffix(".json"), out.with_suffix(".npz")
    if not facts.exists():
        shutil.rmtree(out, ignore_errors=True)  # one that was interrupted: the time of a whole run is what is asked
        words = ["train", "fashion-mnist", "-p", preset, "--out", str(out), "--images", str(images)]
        words += [word for each in (f"train.seed={run}", *settings) for word in ("--set", each)]
        started = time.perf_counter()
        command = [sys.executable, "-m", "undiffuse", *words, "--json"]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, seen = time.perf_counter() - started, json.loads(ended.stdout)["images_seen"]
        facts.write_text(json.dumps({"seconds": seconds, "images": seen, "seed": run}))
    if not npz.exists():
        draw = ["sample", str(out), "-n", str(COUNT), "--steps", str(STEPS), "--solver", "ddim", "--batch", "250"]
        draw += ["--npz", str(npz)]
        subprocess.run([sys.executable, "-m", "undiffuse", *draw], check=True, capture_output=True)
    return json.loads(facts.read_text()) | {"name": f"undiffuse, {preset}", "settings": list(settings), "samples": npz}


def table(result: Row) -> str:
    """A line for each number of images: medians over the seeds."""
    lines = [
        "| | training | images seen | Fréchet distance | of real test images |",
        "|---|---|---|---|---|",
    ]
    found = defaultdict[tuple[Any, ...], list[Row]](list)
    for row in result["rows"]:
        found[row["name"], row["images"], row["floor"]].append(row)
    for (name, images, floor), rows in sorted(found.items()):
        distances = [row["distance"] for row in rows]
        spread = f" ({min(distances):.1f}–{max(distances):.1f})" if len(rows) > 1 else ""
        times = [row["seconds"] / 60 for row in rows if row["seconds"] is not None]
        minutes = f"{statistics.median(times):.1f} min" if times else "not timed"
        values = f"{minutes} | {images:,} | {statistics.median(distances):.1f}{spread} | {floor:.2f}"
        lines.append(f"| {name} | {values} |")
    ran = result["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"{ran['processor']}, {ran['threads']} threads, torch {ran['torch']}; {result['date']}. "
            f"Made by `{result['command']}`.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", help="the Python of the peer's environment; without it what it left in --work is used"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--images", type=int, nargs="+", default=[51_200, 83_968], help="seen by each of our runs")
    parser.add_argument("--small", action="store_true", help="train bench/small.toml, which was the preset once")
    parser.add_argument("--shared", action="store_true", help="the machine is not idle: the time is not written down")
    parser.add_argument("--work", type=Path, default=Path("runs/time-to-quality"))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    network, accuracy = trained(given.work / "classifier.safetensors")
    assert accuracy >= 0.92, f"the classifier names only {accuracy:.3f} of the test images"
    train, test = whole("train")[0], whole("test")[0]
    truth = moments(network, train)
    pixels = given.work / "train.npy"
    if given.peer and not (given.work / f"{MINUTES[-1]}.npz").exists():
        np.save(pixels, train[:, 0].numpy())
        command = [given.peer, str(HERE / "peer_training.py"), str(pixels), str(given.work), *map(str, MINUTES)]
        subprocess.run(command, check=True)
    preset, settings = ("bench/small.toml", ()) if given.small else ("fashion-mnist", OURS)
    rows = [ours(given.work, preset, settings, run, images) for images in given.images for run in range(given.runs)]
    if given.shared:
        rows = [row | {"seconds": None} for row in rows]
    for minute in MINUTES:
        if (given.work / f"{minute}.npz").exists():
            with np.load(given.work / f"{minute}.npz") as drawn:
                seen = {"seconds": float(drawn["seconds"]), "images": int(drawn["seen"]), "seed": 0}
            rows.append({"name": PEER, **seen, "samples": given.work / f"{minute}.npz"})

    def distance(images: Tensor) -> float:
        return round(frechet(moments(network, images), truth), 3)

    judge = {"accuracy": round(accuracy, 4), "floor": distance(test[:COUNT])}
    for row in rows:
        with np.load(row.pop("samples")) as drawn:
            images = drawn["images"][:, None] if row["name"] == PEER else drawn["arr_0"].transpose(0, 3, 1, 2)
            row |= {"distance": distance(torch.from_numpy(images)), **judge, "date": date.today().isoformat()}
    path = HERE / "time_to_quality.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    now = {identity(row) for row in rows}
    small = " --small" * given.small + " --shared" * given.shared
    result = {
        "command": "python bench/time_to_quality.py --peer PEER/bin/python "
        f"--runs {given.runs} --images {' '.join(map(str, given.images))}{small}",
        "date": date.today().isoformat(),
        "machine": machine(),
        "seeds": sorted({row["seed"] for row in [*before, *rows]}),
        "rows": [*(row for row in before if identity(row) not in now), *rows],
    }
    keep(path, result)
    publish("benchmarks.md", "quality", table(result))


def identity(row: Row) -> tuple[Any, ...]:
    """What a row is of: one of the same replaces it."""
    return row["name"], tuple(row.get("settings", ())), row["images"], row["seed"], row["floor"]


if __name__ == "__main__":
    main()
