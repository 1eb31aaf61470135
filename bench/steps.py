"""Where a step goes, and how long it takes in 1, 2 and 4 processes: `undiffuse train --profile`, arrangement by turns.

    python bench/steps.py

`bench/small.toml` on 4,096 pictures of noise of its size. Writes `bench/steps.json` and the tables of
docs/benchmarks.md and docs/scaling.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from machine import keep, machine, publish
from trial import SMALL

HERE = Path(__file__).parent
CORES = os.cpu_count() or 1
ARRANGEMENTS: dict[str, tuple[int, list[str]]] = {  # processes, settings
    "1 process": (1, []),
    "1 process, two EMA profiles": (1, ["train.ema_profiles=[0.05,0.1]"]),
    "2 processes": (2, []),
    "2 processes, exact_shards = 4": (2, ["train.exact_shards=4"]),
    "4 processes": (4, []),
}


def profile(folder: Path, processes: int, settings: list[str]) -> dict[str, Any]:
    """What `--profile` writes, for the command of docs/scaling.md on one machine, all cores used by all together."""
    with tempfile.TemporaryDirectory() as out:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        words = ["train", str(folder), "-p", SMALL, "--out", out, "--profile"]
        words += [word for setting in settings for word in ("--set", setting)]
        threads = {"OMP_NUM_THREADS": str(max(1, CORES // processes))}
        command = [sys.executable, *launch, "-m", "undiffuse", *words]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **threads})
        return json.loads((Path(out) / "profile.json").read_text())


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of the median step time, and all step times."""
    times = [run["milliseconds_per_step"] for run in runs]
    return {**runs[times.index(statistics.median_low(times))], "all_milliseconds": times}


def budget(result: dict[str, Any]) -> str:
    first, profiles = result["arrangements"]["1 process"], result["arrangements"]["1 process, two EMA profiles"]
    operators = ", ".join(f"{name} {ms:.1f}" for name, ms in first["operators_ms"].items())
    convolutions = sum(ms for name, ms in first["operators_ms"].items() if "convolution" in name)
    lines = ["| part of a step | ms | share |", "|---|---|---|"]
    lines += [f"| {name} | {part['ms']:.2f} | {100 * part['share']:.1f} % |" for name, part in first["parts"].items()]
    return "\n".join(
        [
            *lines,
            "",
            f"{first['milliseconds_per_step']:.0f} ms a step of {first['micro_batch']} images, "
            f"{first['images_per_second']:.0f} images/s, {first['gflop_per_second']:.0f} GFLOP/s, "
            f"{first['peak_memory_mb']} MB at the peak. With two EMA profiles "
            f"(`train.ema_profiles`) averaging takes {profiles['parts']['ema']['ms']:.2f} ms, "
            f"{100 * profiles['parts']['ema']['share']:.1f} %. {made(result)}",
            "",
            f"The longest operators of a step, in ms: {operators}. The convolutions, which torch has "
            f"from oneDNN, are {100 * convolutions / first['milliseconds_per_step']:.0f} % of the step.",
        ]
    )


def scaling(result: dict[str, Any]) -> str:
    lines = ["| | threads each | ms a step (all runs) | images/s |", "|---|---|---|---|"]
    for name, (processes, _) in ARRANGEMENTS.items():
        row = result["arrangements"][name]
        times = ", ".join(f"{t:.0f}" for t in row["all_milliseconds"])
        threads = max(1, result["cores"] // processes)
        lines.append(
            f"| {name} | {threads} | {row['milliseconds_per_step']:.0f} ({times}) | {row['images_per_second']:.0f} |"
        )
    return "\n".join([*lines, "", f"{result['cores']} cores in all. {made(result)}"])


def made(result: dict[str, Any]) -> str:
    ran = result["machine"]
    return f"{ran['processor']}, torch {ran['torch']}, {result['date']}; made by `{result['command']}`."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ARRANGEMENTS}
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(256, size=(4096, 28, 28), dtype=np.uint8)
        np.save(Path(folder) / "noise.npy", pixels)
        for turn in range(given.rounds):
            for name, (processes, settings) in ARRANGEMENTS.items():
                print(f"round {turn + 1}: {name}", file=sys.stderr)
                runs[name].append(profile(Path(folder) / "noise.npy", processes, settings))
    result = {
        "command": f"python bench/steps.py --rounds {given.rounds}",
        "date": date.today().isoformat(),
        "seed": 0,
        "machine": machine(),
        "cores": CORES,
        "arrangements": {name: middle(of) for name, of in runs.items()},
    }
    keep(HERE / "steps.json", result)
    publish("benchmarks.md", "budget", budget(result))
    publish("scaling.md", "scaling", scaling(result))


if __name__ == "__main__":
    main()
