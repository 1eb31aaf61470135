"""Samples of distilled models, beside those that their teacher draws in as many evaluations.

    undiffuse distill fashion-mnist fashion-mnist --steps 4 --out runs/four
    python bench/distilled.py runs/four

1,000 samples of each, judged as in `bench/choose.py`. The teacher is the shipped model as `undiffuse sample --steps N`
draws; the chains that were learned from stand beside. Rows of other runs stay, as those of consistency tuning and of
single steps, which `distill` did before. Writes `bench/distilled.json` and the table `distilled` of docs/benchmarks.md.
"""

import argparse
import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from choose import EXTRACTORS, distances
from machine import keep, kept, machine, made_of, mark_of, publish
from torch import Tensor

import undiffuse
from undiffuse.config import parse
from undiffuse.diffusion.objective import Trajectory
from undiffuse.diffusion.trajectory import SOLVER, Taught
from undiffuse.model.recipe import Recipe

HERE = Path(__file__).parent
TEACHER, SAMPLES, BATCH = "fashion-mnist", 1000, 125
BESIDE = (2, 4, 8, 50)
Row = dict[str, Any]


def trained(model: undiffuse.Model) -> Row:
    """What it has seen in distillation."""
    meta, each = model.meta, len(model.times()) - 1  # an image has a whole chain
    return {"images": meta["images"], "asked": each * meta["images"], "updates": meta["step"]}


def table(result: Row) -> str:
    lines = [
        "| evaluations | model | images seen in distillation | student's evaluations | FD-classifier | FD-EffLite0 |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda row: (row["evaluations"], row["model"])):
        seen = f"{row['images']:,} | {row.get('asked', row['images']):,}" if row.get("images") else " | "
        scores = f"{row['classifier-28']:.3f} | {row['efflite0']:.1f}"
        lines.append(f"| {row['evaluations']} | {row['model']} | {seen} | {scores} |")
    ran = f"{result['machine']['processor']}, torch {result['machine']['torch']}, {result['date']}"
    return "\n".join([*lines, "", f"{SAMPLES:,} samples each; {ran}; `{result['command']}`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where features are kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    path, of = HERE / "distilled.json", made_of(TEACHER, *EXTRACTORS)
    result: Row = kept(path)
    result = result if result.get("made_of") == of else {"rows": []}
    teacher = undiffuse.load(TEACHER, "cpu")

    def note(
        model: undiffuse.Model, name: str, steps: int, more: Row, times: Tensor | None = None, solver: Any = None
    ) -> None:
        way = model.walk(steps if times is None else times, solver)
        asked = {"model": name, "evaluations": steps, "weights": model.digest()[:16]}
        own = asked | {"walk": mark_of(way.times.tolist())}
        if any(own.items() <= row.items() for row in result["rows"]):
            return
        result["rows"] = [row for row in result["rows"] if not asked.items() <= row.items()]  # of another grid
        images = model.sample(SAMPLES, way.times, way.sampler, batch=BATCH)
        row = own | more | distances(images, given.work)
        print(json.dumps(row), flush=True)
        result["rows"].append(row)
        result.update({"made_of": of, "machine": machine(), "seed": 0, "date": date.today().isoformat()})
        result["command"] = "python bench/distilled.py RUN …"
        keep(path, result)
        publish("benchmarks.md", "distilled", table(result))

    for run in given.runs:
        model = undiffuse.load(run, "cpu")
        steps = len(model.times()) - 1
        note(model, "distilled by trajectories", steps, trained(model))
        objective = parse(Recipe, model.meta["recipe"], "the recipe of a run").objective
        assert isinstance(objective, Trajectory)
        learned = Taught(objective, teacher.denoiser).times(teacher.process)
        name = f"teacher, as learned from for {steps} step{'s' * (steps > 1)}"
        note(teacher.variant(clip=False), name, len(learned) - 1, {}, learned, SOLVER)
    for steps in BESIDE:
        note(teacher, "teacher", steps, {})


if __name__ == "__main__":
    main()
