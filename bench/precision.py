"""Does bf16 train as float32 does? The held-out loss of `bench/small.toml`, three seeds in each.

    python bench/precision.py

The loss is taken in float32 from the averaged weights, on the same images with the same noise in all runs. The band is
what three float32 seeds span at a step. Runs that are finished in `--work` are not done again. Writes
`bench/precision.json` and the table of docs/benchmarks.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from machine import keep, machine, publish

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
Curve = dict[int, float]  # step: loss


def curve(work: Path, precision: str, seed: int, steps: int) -> Curve:
    out = work / f"{precision}-{seed}"
    fields = {
        "precision": precision,
        "seed": seed,
        "steps": steps,
        "held_out_every": steps // 10,
        "sample_every": 10**6,
    }
    words = ["train", "fashion-mnist", "-p", str(HERE / "small.toml"), "--out", str(out)]
    words += [word for name, value in fields.items() for word in ("--set", f"train.{name}={value}")]
    subprocess.run([sys.executable, "-m", "undiffuse", *words], check=True, capture_output=True)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["held_out"] for row in rows if "held_out" in row}


def summary(curves: dict[str, list[Curve]]) -> list[dict[str, Any]]:
    rows = []
    for step in curves["float32"][0]:
        exact, half = ([run[step] for run in curves[precision]] for precision in ("float32", "bf16"))
        middle = statistics.median(half)
        rows.append({"step": step, "float32": exact, "bf16": half, "inside": min(exact) <= middle <= max(exact)})
    return rows


def table(result: dict[str, Any]) -> str:
    lines = ["| step | float32, three seeds | bf16, three seeds | median of bf16 inside |", "|---|---|---|---|"]
    for row in result["rows"]:
        exact, half = (", ".join(f"{loss:.4f}" for loss in row[name]) for name in ("float32", "bf16"))
        lines.append(f"| {row['step']:,} | {exact} | {half} | {'yes' if row['inside'] else 'no'} |")
    inside, rows, ran = sum(row["inside"] for row in result["rows"]), len(result["rows"]), result["machine"]
    pairs = [abs(b / f - 1) for row in result["rows"] for f, b in zip(row["float32"], row["bf16"], strict=True)]
    seeds = [max(row["float32"]) / min(row["float32"]) - 1 for row in result["rows"]]
    return "\n".join(
        [
            *lines,
            "",
            f"Inside at {inside} of {rows} steps. From float32 to bf16 with one seed the loss moves by "
            f"{100 * statistics.median(pairs):.2f} % (median), the three float32 seeds span "
            f"{100 * statistics.median(seeds):.2f} %. {ran['processor']}, torch {ran['torch']}, {result['date']}; made "
            f"by `{result['command']}`.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of each of the six runs")
    parser.add_argument("--work", type=Path, default=Path("runs/precision"))
    given = parser.parse_args()
    curves: dict[str, list[Curve]] = {"float32": [], "bf16": []}
    for seed in SEEDS:
        for precision, runs in curves.items():
            print(f"seed {seed}, {precision}", file=sys.stderr)
            runs.append(curve(given.work, precision, seed, given.steps))
    result = {
        "command": f"python bench/precision.py --steps {given.steps}",
        "date": date.today().isoformat(),
        "seeds": SEEDS,
        "machine": machine(),
        "rows": summary(curves),
    }
    keep(HERE / "precision.json", result)
    publish("benchmarks.md", "precision", table(result))


if __name__ == "__main__":
    main()
