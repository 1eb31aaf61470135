"""The quality of samples by solver, grid and number of evaluations of the network, beside diffusers' schedulers.

    python bench/solvers.py [--model fashion-mnist] [--n 1000] [--seed 0] [--evaluations 4,5,…] [NAME …]

Each name is a solver of ours on a grid, or a scheduler of diffusers around the same network, from the same noise at the
same seed; unless names are given, all of them. Samples are judged by the Fréchet distance on two extractors, with that
of real test images beside it, and by their mean grey level. What is there for the same weights, fitted grid, n and seed
is not done again. `--chain FILE` judges these samples alone. Writes `bench/solvers.json`, and the table and the plot of
docs/benchmarks.md.
"""

import argparse
import fcntl
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choose import EXTRACTORS, distances
from jaxtyping import UInt8
from machine import keep, machine, made_of, mark_of, publish
from torch import Tensor
from trial import read

import undiffuse
from undiffuse.data.source import open_source
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import TableProcess
from undiffuse.figure import line_plot
from undiffuse.key import Key
from undiffuse.machine import disk
from undiffuse.machine.device import processor
from undiffuse.model.model import Model, to_uint8

HERE = Path(__file__).parent
FEW, MANY = (4, 5, 6, 8, 10, 15, 20), (50, 250)
GRIDS = ("even", "quadratic", "log-snr", "karras", "fitted")
SOLVERS = ("ddim", "dpmpp-2", "dpmpp-3", "dpmpp-sde", "unipc-2", "unipc-3", "deis-3", "ipndm", "heun")
OURS = {f"{solver}, {grid}": (solver, grid) for grid in GRIDS for solver in SOLVERS}
OURS |= {f"{solver}, karras-few": (solver, "karras-few") for solver in ("unipc-2", "unipc-3", "dpmpp-2", "dpmpp-sde")}
TRAILING, KARRAS = {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "diffusers DDIM": ("DDIMScheduler", TRAILING),
    "diffusers DPM-Solver++(2M)": ("DPMSolverMultistepScheduler", TRAILING),
    "diffusers DPM-Solver++(2M), own spacing": ("DPMSolverMultistepScheduler", {}),
    "diffusers DPM-Solver++(2M), Karras": ("DPMSolverMultistepScheduler", KARRAS),
    "diffusers UniPC": ("UniPCMultistepScheduler", TRAILING),
    "diffusers UniPC, own spacing": ("UniPCMultistepScheduler", {}),
    "diffusers UniPC, Karras": ("UniPCMultistepScheduler", KARRAS),
}
LONG = ("ancestral, even", "ddim, even")
HALF = ", bf16"  # the network computes in it, as with --precision bf16
FREE = ", no clip"  # of x̂_0, as with --no-clip
SNAPPED = ", snapped"  # each time moved to the nearest of the table
OTHERWISE = tuple(f"{name}{FREE}" for name in ("unipc-2, fitted", "dpmpp-2, log-snr", "ddim, even", "unipc-3, fitted"))
OTHERWISE += tuple(f"{name}{SNAPPED}" for name in ("unipc-2, fitted", "unipc-2, log-snr", "dpmpp-3, log-snr"))
IN_HALF = tuple(
    f"{name}{HALF}" for name in ("unipc-2, fitted", "unipc-3, fitted", "dpmpp-2, fitted", "unipc-2, log-snr", *LONG)
)
BATCH = 125
REAL = "real images"
Row = dict[str, Any]


def ours(model: Model, solver: str, grid: str, evaluations: int, n: int, seed: int) -> UInt8[Tensor, "n c h w"] | None:
    """Of a chain that asks the network so often; None where there is none, as of a solver that asks twice a step."""
    steps = evaluations
    if solver == "heun":  # the last step asks once
        if evaluations % 2 == 0:
            return None
        steps = (evaluations + 1) // 2
    grid, snapped, _ = grid.partition(SNAPPED)
    times, total = model.times(steps, grid), model.process.steps or 1
    return model.sample(n, (times * total).round() / total if snapped else times, solver, seed, BATCH)


@torch.no_grad()
def peer(
    model: Model, name: str, fields: dict[str, Any], evaluations: int, n: int, seed: int
) -> UInt8[Tensor, "n c h w"] | None:
    """diffusers' loop around our denoiser, x̂_0 clipped as ours."""
    import diffusers

    assert isinstance(table := model.process, TableProcess)
    scheduler = getattr(diffusers, name)(trained_betas=table.betas().numpy(), prediction_type="sample", **fields)
    images, keys = [], Key(seed).fold("sample").rows(n)
    for i in range(0, n, BATCH):
        scheduler.set_timesteps(evaluations)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # else it looks for its place by times that it has rounded to the same
        x = keys[i : i + BATCH].fold("x_T").normal(*model.image_shape)
        for index in scheduler.timesteps:
            t = ((index.to(F64) + 1) / table.steps).expand(len(x))
            x = scheduler.step(model.denoiser(x, t).x_0, index, x, return_dict=False)[0]
        images.append(to_uint8(x))
    return torch.cat(images)


def drawn(model: Model, name: str, evaluations: int, n: int, seed: int) -> UInt8[Tensor, "n c h w"] | None:
    if name.endswith(HALF):
        return drawn(model.variant(precision="bf16"), name.removesuffix(HALF), evaluations, n, seed)
    if name.endswith(FREE):
        return drawn(model.variant(clip=False), name.removesuffix(FREE), evaluations, n, seed)
    if name in PEERS:
        return peer(model, *PEERS[name], evaluations, n, seed)
    solver, _, grid = name.partition(", ")
    return ours(model, solver, grid, evaluations, n, seed)


def table(result: dict[str, Any]) -> str:
    """FD on the two extractors, mean over seeds; a column for each number of evaluations."""
    lines = []
    for n in sorted({row["n"] for row in result["rows"] if row["name"] != REAL}):
        rows = [row for row in result["rows"] if row["n"] == n and row["name"] != REAL]
        counts = sorted({row["evaluations"] for row in rows})
        lines += ["", f"{n:,} samples; FD-classifier / FD-EffLite0", ""]
        lines += [f"| | {' | '.join(map(str, counts))} |", "|---|" + "---|" * len(counts)]
        for name in sorted({row["name"] for row in rows}, key=lambda name: _best(rows, name)):
            found = [[row for row in rows if (row["name"], row["evaluations"]) == (name, k)] for k in counts]
            lines.append(f"| {name} | {' | '.join(_cell(each) for each in found)} |")
        floor = [row for row in result["rows"] if row["n"] == n and row["name"] == REAL]
        lines.append(f"| {REAL} | {' | '.join(_cell(floor) if i == 0 else '' for i in range(len(counts)))} |")
    each = Counter(row["processor"] for row in result["rows"]).most_common()
    on = each[0][0] if len(each) == 1 else ", ".join(f"{name} ({count} figures)" for name, count in each)
    ran = f"{on}, torch {result['machine']['torch']}, {result['date']}"
    return "\n".join([*lines[1:], "", f"{ran}; `{result['command']}`."])


def _best(rows: list[Row], name: str) -> float:
    return float(np.mean([np.log(row["efflite0"]) for row in rows if row["name"] == name]))


def _cell(rows: list[Row]) -> str:
    parts = []
    for name, digits in (("classifier-28", 3), ("efflite0", 1)):
        values = [row[name] for row in rows]
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        parts.append(f"{np.mean(values):.{digits}f}{spread}" if values else "")
    return " / ".join(part for part in parts if part)


def plot(result: dict[str, Any]) -> str:
    """Of each grid and of diffusers the best of those that were run at the most numbers, of the fewest samples."""
    least = min(row["n"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["n"] == least and row["evaluations"] <= max(FEW)]
    names = {row["name"] for row in rows} - {REAL, *IN_HALF, *OTHERWISE}
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("diffusers" if name in PEERS else name.rpartition(", ")[2], []).append(name)
    series = []
    for group in sorted(groups):
        best = min(groups[group], key=lambda name: (-sum(row["name"] == name for row in rows), _best(rows, name)))
        points = sorted((row["evaluations"], row["efflite0"]) for row in rows if row["name"] == best)
        if len(points) < 2:
            continue
        series.append((best, [float(x) for x, _ in points], [y for _, y in points]))
    return line_plot(series, x="evaluations", y="FD-EffLite0", title="", log_x=True, log_y=True)


def put(
    path: Path, work: Path, row: Row, command: str, made: Callable[[], dict[str, str]], fit: Callable[[int], str]
) -> None:
    """Another process may be at work on other names."""
    print(json.dumps(row), file=sys.stderr, flush=True)
    with (work / "solvers.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = read(path)
        same = [each for each in result["rows"] if each["weights"] == row["weights"]]
        others = [each for each in same if "fit" not in each or each["fit"] == fit(each["evaluations"])]
        result = {"rows": [*others, row], "command": command, "date": date.today().isoformat()}
        result |= {"machine": machine(), "made_of": made()}
        keep(path, result)
        if row["name"] == REAL and len(result["rows"]) == 1:
            return
        publish("benchmarks.md", "solvers", table(result))
        disk.write_atomic(HERE.parent / "docs" / "images" / "solvers.svg", plot(result).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="these alone, such as 'unipc-2, fitted'")
    parser.add_argument("--model", default="fashion-mnist")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluations", default=",".join(map(str, FEW)))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where features are kept")
    parser.add_argument("--chain", type=Path, help="samples of the chain of all steps, as bench/scores.py keeps them")
    parser.add_argument("--json", type=Path, default=HERE / "solvers.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, known = undiffuse.load(given.model, "cpu"), [*OURS, *PEERS, *LONG, *IN_HALF, *OTHERWISE]
    if unknown := set(given.names) - set(known):
        raise SystemExit(f"{', '.join(sorted(unknown))}: not known; give some of {'; '.join(known)}")
    if model.fit is None:
        raise SystemExit(f"no grid is fitted to {given.model}; run `undiffuse fit {given.model}` first")
    weights, walks = model.digest()[:16], model.fit.grid.walks

    def fit(count: int) -> str:
        return mark_of(walks[min(count, len(walks)) - 1])  # more steps divide the longest

    command = f"python bench/solvers.py --model {given.model} --n {given.n}"

    def note(name: str, count: int, draw: Callable[[], UInt8[Tensor, "n c h w"] | None]) -> None:
        asked = {"name": name, "evaluations": count, "n": given.n, "seed": given.seed, "weights": weights}
        if ", fitted" in name:
            asked["fit"] = fit(count)
        if any(asked.items() <= row.items() for row in read(given.json)["rows"]):
            return
        began = time.monotonic()
        images = draw()
        if images is not None:
            seconds = {"seconds": round(time.monotonic() - began, 1)}
            found = {"grey": float(images.double().mean()), **distances(images, given.work)}
            found = {key: round(value, 6) for key, value in found.items()}
            row = asked | seconds | found | {"processor": processor()}
            put(given.json, given.work, row, command, lambda: made_of(given.model, *EXTRACTORS), fit)

    test = open_source("fashion-mnist", split="test").images[given.seed * given.n : (given.seed + 1) * given.n]
    if len(test) == given.n:  # there are no others for the seeds after
        note(REAL, 0, lambda: test)
    if given.chain is not None:
        every = open_source(str(given.chain)).images
        note("ancestral, even", model.process.steps or 0, lambda: every[: given.n])
        return
    for name, count in itertools.product(
        given.names or [*OURS, *PEERS, *OTHERWISE], map(int, given.evaluations.split(","))
    ):
        note(name, count, lambda name=name, count=count: drawn(model, name, count, given.n, given.seed))


if __name__ == "__main__":
    main()
