"""A chain of the CIFAR-10 network beside that of diffusers' `DDPMPipeline`, with equal random weights.

    python bench/pipelines.py [--rounds 5] [--steps 20] [--batch 16]

The weights go to diffusers as `undiffuse export --to diffusers` writes them. Each takes `--steps` steps of the
ancestral chain of 1,000, all by turns in one process, and ratios are taken round by round; the time of 1,000 steps is
that of one, times 1,000. Our default chain is timed whole, with the mean it begins at. "Beside" is what a step takes
whose network returns its input: what our own code costs. Writes `bench/pipelines.json` and the table of
docs/benchmarks.md.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from machine import keep, machine, publish

from undiffuse.config import plain
from undiffuse.interop.diffusers import write_folder
from undiffuse.machine.device import native_precision
from undiffuse.model.load import as_written, from_weights
from undiffuse.model.model import Model
from undiffuse.model.recipe import load_recipe
from undiffuse.model.weights import weights_of
from undiffuse.network.base import NOTHING

HERE = Path(__file__).parent
SHAPE, CHAIN = (3, 32, 32), 1000
OURS, DEFAULT = "undiffuse, ancestral", "undiffuse, the default"
BESIDE = ("ancestral", "ddim", "unipc-2")
Run = Callable[[], object]


class Still(torch.nn.Module):
    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: Any = NOTHING) -> torch.Tensor:
        return x


def ours() -> Model:
    """The preset with random weights, in the last layer too, which a training begins at 0."""
    torch.manual_seed(0)
    config = load_recipe("cifar10").model(SHAPE)
    weights = weights_of(config.build(clip=True).network)
    weights = {k: w if w.any() else torch.randn_like(w) / 50 for k, w in weights.items()}
    return from_weights(config, weights, {})


def theirs(folder: Path, options: tuple[str, ...], steps: int, batch: int) -> Run:
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    pipe = DDPMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if "channels_last" in options:
        pipe.unet.to(memory_format=torch.channels_last)
    if "compile" in options:
        pipe.unet.forward = torch.compile(pipe.unet.forward, fullgraph=True, dynamic=False)

    def run() -> object:  # weights in bf16 would give it bf16 pictures, of which it can make no array
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options):
            return pipe(batch, num_inference_steps=steps, output_type="np")

    return run


def contenders(model: Model, folder: Path, steps: int, batch: int) -> dict[str, Run]:
    """What each does in a round."""
    runs: dict[str, Run] = {}
    for precision in dict.fromkeys(("float32", native_precision(model.device))):
        one = model.variant(precision=precision)
        runs[f"{OURS}, {precision}"] = lambda one=one: one.sample(batch, steps, "ancestral", batch=batch)
        # Another model each time, which does not know its mean yet.
        runs[f"{DEFAULT}, {precision}"] = lambda one=one: replace(one).sample(batch, batch=batch)
    for options in ((), ("bf16",), ("bf16", "channels_last"), ("bf16", "channels_last", "compile")):
        runs[f"diffusers DDPMPipeline, {', '.join(options) or 'float32'}"] = theirs(folder, options, steps, batch)
    return runs


def seconds(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def beside(model: Model, batch: int, repeats: int = 5) -> dict[str, float]:
    """Seconds of a step whose network returns its input."""
    still = replace(model, denoiser=model.variant().denoiser)
    still.denoiser.network = Still()
    found = {}
    for name in BESIDE:
        way = still.walk(60, name)
        run = partial(still.sample, batch, way.times, way.sampler, batch=batch)
        found[name] = statistics.median(seconds(run) for _ in range(repeats)) / 60
    return found


def table(result: dict[str, Any]) -> str:
    rows, middle = {row["name"]: row for row in result["rows"]}, statistics.median
    best = min((row for row in rows.values() if row["name"].startswith(OURS)), key=lambda row: middle(row["chains"]))
    lines = [
        f"| | evaluations | seconds for {result['batch']} images | over our best chain of {CHAIN:,} (min–max) |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        ratios = [its / own for its, own in zip(row["chains"], best["chains"], strict=True)]
        told = f"{whole:,.0f}" if (whole := middle(row["chains"])) >= 100 else f"{whole:.3g}"
        low, mid, high = min(ratios), middle(ratios), max(ratios)
        times = (
            f"{mid:.2f}× ({low:.2f}–{high:.2f})" if mid > 0.1 else f"1/{1 / mid:.0f} (1/{1 / high:.0f}–1/{1 / low:.0f})"
        )
        lines.append(f"| {row['name']} | {row['evaluations']:,} | {told} | {times} |")
    step = middle(best["chains"]) / CHAIN
    parts = ", ".join(f"{name} {1e3 * s:.2g} ms ({100 * s / step:.1f} %)" for name, s in result["beside"].items())
    ran = result["machine"]
    made = f"{ran['processor']}, {ran['threads']} threads, torch {ran['torch']}, diffusers {result['diffusers']}"
    return "\n".join(
        [
            *lines,
            "",
            f"A step takes {1e3 * step:.0f} ms in our best chain; without its evaluation: {parts}.",
            "",
            f"Medians of {result['rounds']} rounds, of {result['steps']} steps for a chain of {CHAIN:,}; {made}, "
            f"{result['date']}; made by `{result['command']}`.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of the chain of 1,000, in each round")
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    model = ours()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "exported"
        write_folder(folder, as_written(model, torch.float32), {"model": plain(model.config)})
        runs = contenders(model, folder, given.steps, given.batch)
        for run in runs.values():
            run()
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(given.rounds):
            for name, run in runs.items():
                taken[name].append(seconds(run))
                print(f"{name}: {taken[name][-1]:.2f} s", flush=True)
    rows = []
    for name, each in taken.items():
        count, parts = (len(model.walk().times) - 1, 1) if name.startswith(DEFAULT) else (CHAIN, CHAIN / given.steps)
        rows.append({"name": name, "evaluations": count, "chains": [parts * s for s in each]})
    result = {
        "command": f"python bench/pipelines.py --rounds {given.rounds} --steps {given.steps} --batch {given.batch}",
        "date": date.today().isoformat(),
        "seed": 0,
        "machine": machine(),
        "diffusers": version("diffusers"),
        "rounds": given.rounds,
        "steps": given.steps,
        "batch": given.batch,
        "beside": beside(model, given.batch),
        "rows": rows,
    }
    keep(HERE / "pipelines.json", result)
    publish("benchmarks.md", "pipelines", table(result))


if __name__ == "__main__":
    main()
