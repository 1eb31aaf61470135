"""Candidates trained for equal time or images, each judged and kept: what `choose.py` and its like share."""

import argparse
import fcntl
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machine import keep, kept, machine, made_of, publish

from undiffuse.data.source import Source, open_source
from undiffuse.machine.device import processor
from undiffuse.model.recipe import Recipe, load_recipe
from undiffuse.training.plan import forward_flops
from undiffuse.training.trainer import Trainer

Found = dict[str, Any]
SECONDS, IMAGES = "seconds", "images"
SMALL = str(Path(__file__).with_name("small.toml"))  # what all are variations of


def opened(preset: str, settings: list[str]) -> tuple[Recipe, Source]:
    return load_recipe(preset, ["train.precision=float32", *settings]), open_source("fashion-mnist")


def trained(recipe: Recipe, source: Source, budget: float, unit: str) -> tuple[Trainer, Found]:
    """A rate that falls is 0 at the end of the budget: seconds of processor time, whatever a step costs, or images."""
    trainer = Trainer(recipe, recipe.model(source.image_shape), source)
    for _ in range(3):
        trainer.update(10**6)
    losses, began, spent = list[float](), time.process_time(), 0.0
    while spent < budget:
        last = 10**6 if spent < budget / 50 else round(len(losses) * budget / spent) + 3
        losses.append(trainer.update(last)["loss"])
        spent = time.process_time() - began if unit == SECONDS else len(losses) * recipe.train.batch
    return trainer, {
        "weights": sum(weight.numel() for weight in trainer.weights),
        "gflop": forward_flops(trainer.config) / 1e9,
        "steps": trainer.step,
        "images": trainer.step * recipe.train.batch,
        "loss": sum(losses[-200:]) / len(losses[-200:]),
    }


def read(path: Path) -> Found:
    return {"rows": [], **kept(path)}


def command(budget: float, unit: str) -> tuple[argparse.ArgumentParser, str]:
    """What all take."""
    script = Path(sys.argv[0])
    parser = argparse.ArgumentParser(prog=f"python bench/{script.name}")
    parser.add_argument("names", nargs="*", metavar="NAME", help="these alone")
    parser.add_argument(f"--{unit}", dest="budget", type=float, default=budget, help="for each; seconds of a processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where work is kept")
    return parser, script.stem


def judged(path: Path) -> list[Found]:
    """The rows that are there, each with its extractors: while rows are done again they are not all of the same."""
    result = read(path)
    return [{"made_of": result.get("made_of", {}), **row} for row in result["rows"]]


def run(
    candidates: dict[str, tuple[str, list[str]]],
    judge: Callable[[Trainer, Path], Found],
    table: Callable[[Found], str],
    extractors: Sequence[str] = (),
    budget: float = 240.0,
    unit: str = SECONDS,
    opened: Callable[[str, list[str]], tuple[Recipe, Source]] = opened,
) -> None:
    """A candidate is a preset with settings, which `opened` makes a recipe and images of.

    What is there for the same budget and seed, and if it is of time also of the same processor, is not done again,
    unless other extractors judged it: such rows are, if no names are given, and until then stay out of the table.
    """
    parser, mark = command(budget, unit)
    given, path = parser.parse_args(), Path(__file__).with_name(f"{mark}.json")
    torch.set_num_threads(1)
    if unknown := set(given.names) - candidates.keys():
        raise SystemExit(f"{', '.join(sorted(unknown))}: not a candidate; give some of {', '.join(candidates)}")
    today, keys = made_of(*extractors), ("name", "budget", "seed")
    here: Found = {"processor": processor()}
    timed = here if unit == SECONDS else {}  # other processors see other numbers of images in it
    asked = [dict(zip(keys, (name, given.budget, given.seed), strict=True)) for name in given.names or candidates]
    if not given.names:
        old = [row for row in judged(path) if row["made_of"] != today and row["name"] in candidates]
        asked += [{key: row[key] for key in keys} for row in old]
    for each in asked:
        own = each | timed | {"made_of": today}
        if any(own.items() <= row.items() for row in judged(path)):
            continue
        preset, settings = candidates[each["name"]]
        recipe, source = opened(preset, [*settings, f"train.seed={each['seed']}"])
        trainer, found = trained(recipe, source, each["budget"], unit)
        row = own | here | {"preset": Path(preset).name, "settings": settings}
        row |= found | judge(trainer, given.work)
        print(json.dumps(row)[:1000], file=sys.stderr, flush=True)
        with (given.work / f"{mark}.lock").open("w") as lock:  # another may be at work on other names
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = [old for old in judged(path) if old["made_of"] == today or old["name"] in candidates]
            again = [old for old in rows if each.items() <= old.items()]
            gone = [old for old in again if old["made_of"] != today or timed.items() <= old.items()]
            rows = [*(old for old in rows if old not in gone), row]
            others = [old["made_of"] for old in rows if old["made_of"] != today]  # with which `refresh.py` goes on
            result = {"rows": rows, "command": parser.prog, "date": date.today().isoformat(), "unit": unit}
            result |= {"machine": machine(), "made_of": others[0] if others else today}
            keep(path, result)
            publish("benchmarks.md", mark, table({**result, "rows": [r for r in rows if r["made_of"] == today]}))


def made(result: Found) -> str:
    """Below a table: what its figures are of. Where rows were run on several processors, a column names them."""
    spent = " or ".join(f"{budget:,.0f}" for budget in sorted({row["budget"] for row in result["rows"]}))
    spent += " s of processor time" if result["unit"] == SECONDS else " images"
    ran = " or ".join(sorted({row["processor"] for row in result["rows"]}))
    ran += f", one thread, torch {result['machine']['torch']}"
    return f"Of {spent} each. {ran}, {result['date']}; `{result['command']}`."
