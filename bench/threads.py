"""A training alone and beside one busy process, on one thread and two, with threads that spin and threads that sleep.

    python bench/threads.py

Machines are shared: each variant is a process that is asked for a second of steps again and again, all in turn, and
what other processes took meanwhile, in cores, is measured beside it, and kept with whether a busy process of our own
ran. "Beside" are spans in which it ran, or others took at least half a core: beside two threads on two cores what would
take a whole one gets 0.6 to 0.8. "Alone" are those in which it did not and others took under 0.15. Runs until each has
so many spans, or its minutes are over. Writes `bench/threads.json` and the table of docs/scaling.md.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from machine import keep, machine, publish
from trial import SMALL

HERE = Path(__file__).parent
WAITING, SPINS = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}, "1000"  # some tens of µs
RECIPES = {"digits": ("digits", 8), "bench/small.toml": (SMALL, 28)}  # by what the table calls them; size of images
WAITS = {"spins": {}, "sleeps": {"GOMP_SPINCOUNT": SPINS}}  # how long a thread spins: as libgomp has it, and little
VARIANTS = [(1, "spins"), (2, "spins"), (2, "sleeps")]
ALONE, BESIDE = "alone", "beside"
NOBODY, SOMEBODY = 0.15, 0.5  # the cores that others take: less, and there are none; as much, and there is one at least


Span = dict[str, Any]


def busy() -> float:
    """Seconds that all processors have worked since the machine was started, for whomever; of Linux."""
    fields = [int(each) for each in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # without idle and waiting for disks


def steps(preset: str, seconds: float) -> None:
    """A process of its own: for each line that it is sent, a span of steps, and how busy it and all others were."""
    import torch

    from undiffuse.data.source import ArraySource
    from undiffuse.key import Key
    from undiffuse.model.recipe import load_recipe
    from undiffuse.training.trainer import Trainer

    path, size = RECIPES[preset]
    recipe = load_recipe(path)
    images = Key(0).rows(256).bits(size * size)[:, : size * size].remainder(256).to(torch.uint8)
    trainer = Trainer(recipe, recipe.model((1, size, size)), ArraySource(images.reshape(-1, 1, size, size)))
    for _ in range(2):
        trainer.update(10_000)
    print(hashlib.sha256(b"".join(w.detach().numpy().tobytes() for w in trainer.weights)).hexdigest(), flush=True)
    for _ in sys.stdin:
        count, wall, own, all_ = 0, time.perf_counter(), time.process_time(), busy()
        while count == 0 or time.perf_counter() - wall < seconds:
            trainer.update(10_000)
            count += 1
        wall, own, all_ = time.perf_counter() - wall, time.process_time() - own, busy() - all_
        print(json.dumps({"seconds": wall / count, "own": own / wall, "others": (all_ - own) / wall}), flush=True)


def kind(span: Span) -> str | None:
    """Neither, if others took something and less than half a core. What others took alone judges spans of before it was
    kept whether our busy process ran."""
    if span.get("spinner", False) or span["others"] >= SOMEBODY:
        return BESIDE
    return ALONE if span["others"] < NOBODY else None


class Asked:
    """One variant, in a process that works only when it is asked to."""

    def __init__(self, preset: str, threads: int, wait: str, seconds: float):
        env = {name: value for name, value in os.environ.items() if name not in WAITING}
        self.names = {"preset": preset, "threads": threads, "wait": wait}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--steps-of", preset, "--seconds", str(seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**env, "OMP_NUM_THREADS": str(threads), **WAITS[wait]},
        )  # fmt: skip
        self.weights = self._line()
        self.spans: list[Span] = []

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, spinner: bool) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.spans.append({**json.loads(self._line()), "spinner": spinner})


def idle(seconds: float = 0.5) -> float:
    """The cores that others take now."""
    before = busy()
    time.sleep(seconds)
    return (busy() - before) / seconds


def measured(variants: list[Asked], spans: int, minutes: float) -> None:
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end and any(
        [kind(span) for span in each.spans].count(which) < spans for each in variants for which in (ALONE, BESIDE)
    ):
        for each in variants:
            each.ask(spinner=False)
        if idle() < SOMEBODY:
            spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                for each in variants:
                    each.ask(spinner=True)
            finally:
                spinner.kill()
                spinner.wait()


def table(result: dict[str, Any]) -> str:
    lines = [
        "| preset | threads | one that waits | alone, ms a step (spans) | beside a busy process | times |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        word = {"spins": "spins", "sleeps": f"sleeps (`GOMP_SPINCOUNT={SPINS}`)"}[row["wait"]]
        waits = "–" if row["threads"] == 1 else word
        parts = [[s["seconds"] for s in row["spans"] if kind(s) == which] for which in (ALONE, BESIDE)]
        cells = [f"{1e3 * median(part):,.0f} ({len(part)})" if part else "–" for part in parts]
        cells.append(f"{median(parts[1]) / median(parts[0]):.2f}" if all(parts) else "–")
        lines.append(f"| `{row['preset']}` | {row['threads']} | {waits} | {' | '.join(cells)} |")
    spans, ran = [span for row in result["rows"] for span in row["spans"]], result["machine"]
    how = f"Medians of spans. Alone: others took under {NOBODY} cores. Beside: "
    if all("spinner" in span for span in spans):
        how += f"a busy process of our own ran, or others took at least {SOMEBODY} cores"
    else:
        how += f"others took at least {SOMEBODY} cores; in which spans our busy process ran was not kept yet"
    left = sum(kind(span) is None for span in spans)
    how += f". Between the two are {left} of {len(spans)} spans, which are left out."
    made = f"{ran['processor']}, {result.get('cores', ran['threads'])} cores, torch {ran['torch']}, {result['date']}"
    return "\n".join([*lines, "", f"{how} {made}; made by `{result['command']}`."])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spans", type=int, default=9, help="of each variant, alone and beside")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--steps-of", choices=list(RECIPES))
    given = parser.parse_args()
    if given.steps_of:
        steps(given.steps_of, given.seconds)
        return
    variants = [Asked(preset, *variant, given.seconds) for preset in RECIPES for variant in VARIANTS]
    try:
        measured(variants, given.spans, given.minutes)
    finally:
        for each in variants:
            each.process.kill()
    for preset in RECIPES:
        of_two = {v.weights for v in variants if v.names["preset"] == preset and v.names["threads"] == 2}
        if len(of_two) != 1:
            raise SystemExit(f"{preset}: how threads wait changed the weights: {sorted(of_two)}")
    result = {
        "command": f"python bench/threads.py --spans {given.spans} --minutes {given.minutes:g}",
        "date": date.today().isoformat(),
        "machine": machine(),
        "cores": os.cpu_count(),
        "rows": [{**each.names, "weights": each.weights, "spans": each.spans} for each in variants],
    }
    keep(HERE / "threads.json", result)
    publish("scaling.md", "threads", table(result))


if __name__ == "__main__":
    main()
