"""Fig. 10 of the paper for the shipped model: the scores of the predicted x_0 along the reverse chain.

    python bench/progressive.py --n 2000 --steps 1000 --batch 2000

Writes `bench/progressive.json`, with the protocol, the plots of docs/images and the table of docs/benchmarks.md.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from machine import keep, machine, made_of, publish

from undiffuse.machine import disk
from undiffuse.measure.along import Along, evaluate_along
from undiffuse.model.load import load

HERE = Path(__file__).parent
FEATURES = "classifier-28"


def table(result: dict[str, Any]) -> str:
    """A row for each point."""
    scores = [row["score"] for row in result["points"][0]["scores"]]
    lines = [f"| reverse step | t | {' | '.join(scores)} |", "|---|" + "---|" * (len(scores) + 1)]
    for point in result["points"]:
        cells = [f"{row['value']:.4g}" for row in point["scores"]]
        lines.append(f"| {point['step']} | {point['t']:.3f} | {' | '.join(cells)} |")
    real = [f"{row['real']:.4g}" for row in result["points"][-1]["scores"]]
    said, samples, ran = result["protocol"], result["protocol"]["samples"], result["machine"]
    threads = f"{ran['threads']} thread" + ("s" if ran["threads"] > 1 else "")
    where = f"{ran['processor']}, {threads}" if said["model"]["device"] == "cpu" else said["model"]["device"]
    return "\n".join(
        [
            *lines,
            f"| real images | | {' | '.join(real)} |",
            "",
            f"{said['n']:,} chains of {samples['steps']} steps ({samples['solver']}, seed {samples['seed']}) against "
            f"the {said['reference']['images']:,} training images on the features of `{FEATURES}`; real images are "
            f"{said['floor']}. {result['seconds']:,.0f} s on {where}, torch {ran['torch']}; {said['date']}. Weights "
            f"`{said['model']['sha256'][:16]}`. Made by `{result['command']}`.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=None, help="a folder in which a stopped run goes on")
    parser.add_argument("--table", action="store_true", help="only write the table and the plots again")
    given, path = parser.parse_args(), HERE / "progressive.json"
    if not given.table:
        began = time.monotonic()
        found = evaluate_along(
            load("fashion-mnist", given.device), "fashion-mnist", FEATURES, n=given.n, steps=given.steps,
            solver="ancestral", batch=given.batch, out=given.work, named="fashion-mnist", say=print,
        )  # fmt: skip
        command = f"python bench/progressive.py --n {given.n} --steps {given.steps} --batch {given.batch}"
        about = {"command": command, "machine": machine(), "made_of": made_of("fashion-mnist", FEATURES)}
        result = about | {"seconds": time.monotonic() - began} | found.plain()
        keep(path, result)
    result = json.loads(path.read_text())
    for name, text in Along(result["points"], result["notes"], result["protocol"]).plots().items():
        disk.write_atomic(HERE.parent / "docs" / "images" / f"fashion-mnist-progressive-{name}", text.encode())
    publish("benchmarks.md", "progressive", table(result))


if __name__ == "__main__":
    main()
