"""The held-out loss that a preset has on its way: what a run's own loss is judged by ("on track").

    python bench/curve.py PRESET LOG …

Each log is the `log.jsonl` of a run of the preset from untrained weights to its end, each of another seed. Where there
are three or more, the band of a step is where the next seed is expected with 95 % (Student's t, from their mean and
spread); in any case it is 1 % to either side at least, for other seeds, machines and precisions, and with one run alone
just that, so records from before the first thousand steps, where seeds differ by more, are left out of it. So are
records of steps before which a run had another learning rate than the preset within a quarter of its length. Writes
`bench/curve-PRESET.json` and the table at the end of the preset.
"""

import argparse
import statistics
from datetime import date
from pathlib import Path
from typing import Any

from machine import keep
from scipy.stats import t as student

from undiffuse.data.pack import open_data
from undiffuse.machine import disk
from undiffuse.machine.log import read_rows
from undiffuse.model.recipe import Recipe, learning_rate, load_recipe

HERE = Path(__file__).parent
LEAST = 0.01  # of the mean, to either side
SETTLED = 1000  # steps, from which seeds differ by less
SAME = 0.02  # of the highest rate: what a log's mean over its records, and a run's end that was moved, may differ by


def follows(recipe: Recipe, log: list[dict[str, Any]], step: int) -> bool:
    """Whether the rate of a run was the preset's at a step, and for a quarter of the preset's length before it."""
    train = recipe.train
    first = max(step - train.steps / 4, 2 * train.warmup)  # a record has the mean of its rates, which a warm-up bends
    rates = [(row["step"], row["lr"]) for row in log if "lr" in row and first <= row["step"] <= step]
    return all(abs(rate - learning_rate(train, at, train.steps)) <= SAME * train.lr for at, rate in rates)


def band(values: list[float]) -> tuple[float, float]:
    """Lower and upper end, outwards to four digits after the point."""
    n, mean, half = len(values), statistics.mean(values), 0.0
    if n > 2:
        half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) * (1 + 1 / n) ** 0.5
    half = max(LEAST * mean, half)
    return int((mean - half) * 1e4) / 1e4, -int(-(mean + half) * 1e4 - 1) / 1e4


def toml(rows: list[dict], steps: int, fingerprint: str) -> str:
    bands = "".join(f"\n    [{row['step']}, {row['band'][0]}, {row['band'][1]}]," for row in rows)
    lines = ["[[expected.curve]]  # by bench/curve.py: step, lower end, upper end"]
    return "\n".join([*lines, f"steps = {steps}", f'data = "{fingerprint}"', f"held_out = [{bands}\n]", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--data", help="the data, if the set has not the name of the preset")
    given = parser.parse_args()
    recipe = load_recipe(given.preset)
    logs = [list(read_rows(log)) for log in given.logs]
    runs = [{row["step"]: row["held_out"] for row in log if "held_out" in row} for log in logs]
    steps = [step for step in runs[0] if len(runs) > 2 or step >= SETTLED]
    steps = [step for step in steps if all(follows(recipe, log, step) for log in logs)]
    rows = [{"step": step, "held_out": (each := [run[step] for run in runs]), "band": band(each)} for step in steps]
    result = {"command": f"python bench/curve.py {given.preset} RUN/log.jsonl", "date": date.today().isoformat()}
    result |= {"steps": recipe.train.steps, "rows": rows}
    keep(HERE / f"curve-{given.preset}.json", result)
    images = open_data(given.data or given.preset, recipe.data.size, recipe.data.channels)
    path = HERE.parent / "undiffuse" / "presets" / f"{given.preset}.toml"
    before = path.read_text().partition("\n[[expected.curve]]")[0].rstrip("\n")
    text = before + "\n\n" + toml(rows, recipe.train.steps, images.fingerprint())
    disk.write_atomic(path, text.encode())


if __name__ == "__main__":
    main()
