"""The held-out loss that a preset has on its way: what a run's own loss is judged by ("on track").

    python bench/curve.py [--steps 1000]

From the float32 runs of `bench/precision.json`, whose learning rate falls to 0 within 1,000 steps. With `--steps` also
from three seeds of preset `fashion-mnist` up to that step of its whole schedule, whose learning rate is that of a run
to the end. The band of a step is where the next seed is expected with 95 %, from the mean and the spread of three
(Student's t with two degrees of freedom), and at least 1 % to either side, for other machines and precisions. Writes
`bench/curve.json` and the tables at the end of the preset.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from machine import machine

from undiffuse.data.pack import open_data
from undiffuse.machine import disk
from undiffuse.machine.log import read_rows
from undiffuse.model.recipe import load_recipe

HERE = Path(__file__).parent
PRESET = HERE.parent / "undiffuse" / "presets" / "fashion-mnist.toml"
SEEDS = (0, 1, 2)
STUDENT = 4.303  # 97.5 % of Student's t with two degrees of freedom
LEAST = 0.01  # of the mean, to either side
Curve = dict[int, float]  # step: loss


def curve(out: Path, seed: int, steps: int) -> Curve:
    """The held-out losses of a run up to that step, which is then stopped as by a user."""
    found = losses(out)
    if steps not in found:
        words = ["train", "fashion-mnist", "-p", "fashion-mnist", "--out", str(out)]
        for setting in (f"seed={seed}", "held_out_every=100", "sample_every=0", "save_every=500"):
            words += ["--set", f"train.{setting}"]
        run = subprocess.Popen([sys.executable, "-m", "undiffuse", *words], stderr=subprocess.DEVNULL)
        while run.poll() is None and steps not in found:
            time.sleep(2)
            found = losses(out)
        run.send_signal(signal.SIGTERM)
        run.wait()
    return {step: loss for step, loss in losses(out).items() if step <= steps}


def losses(out: Path) -> Curve:
    return {row["step"]: row["held_out"] for row in read_rows(out / "log.jsonl") if "held_out" in row}


def band(values: list[float]) -> tuple[float, float]:
    """Lower and upper end, outwards to four digits after the point."""
    mean = statistics.mean(values)
    half = max(LEAST * mean, STUDENT * statistics.stdev(values) * (1 + 1 / len(values)) ** 0.5)
    return int((mean - half) * 1e4) / 1e4, -int(-(mean + half) * 1e4 - 1) / 1e4


def rows(curves: Iterable[Curve]) -> list[dict[str, Any]]:
    """One for each step, with the losses of all seeds and the band."""
    curves = list(curves)
    return [
        {"step": step, "held_out": (values := [each[step] for each in curves]), "band": band(values)}
        for step in curves[0]
    ]


def toml(curves: list[dict[str, Any]], fingerprint: str) -> str:
    """What stands in the preset, with what ends at which step of a run of how many."""
    lines = []
    for each in curves:
        bands = "".join(f"\n    [{row['step']}, {row['band'][0]}, {row['band'][1]}]," for row in each["rows"])
        lines += [*([""] if lines else []), "[[expected.curve]]  # by bench/curve.py: step, lower end, upper end"]
        lines += [f"steps = {each['steps']}", f'data = "{fingerprint}"', f"held_out = [{bands}\n]"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=0, help="of each of three runs; 0 makes none")
    parser.add_argument("--work", type=Path, default=Path("runs/curve"))
    given = parser.parse_args()
    short = json.loads((HERE / "precision.json").read_text())
    fell = [{row["step"]: row["float32"][seed] for row in short["rows"]} for seed in range(len(short["seeds"]))]
    curves = [{"steps": max(fell[0]), "from": short["command"], "machine": short["machine"], "rows": rows(fell)}]
    if given.steps:
        whole = [curve(given.work / f"seed-{seed}", seed, given.steps) for seed in SEEDS]
        last = load_recipe("fashion-mnist").train.steps
        curves.append({"steps": last, "machine": machine(), "rows": rows(whole)})
    result = {
        "command": "python bench/curve.py" + (f" --steps {given.steps}" if given.steps else ""),
        "date": date.today().isoformat(),
        "seeds": SEEDS,
        "curves": curves,
    }
    disk.write_atomic(HERE / "curve.json", (json.dumps(result, indent=1) + "\n").encode())
    before = PRESET.read_text().partition("\n[[expected.curve]]")[0]
    PRESET.write_text(before + "\n" + toml(curves, open_data("fashion-mnist", None, 1).fingerprint()) + "\n")


if __name__ == "__main__":
    main()
