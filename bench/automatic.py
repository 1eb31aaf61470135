"""Other objectives in what `--preset auto` chooses: the quality of samples after equal processor time.

    python bench/automatic.py [--seconds 300] [--seed 0] [NAME …]

The networks that auto chooses for pictures in colour (`emoji`, the folder of docs/benchmarks.md, or a link to it, where
this is called) and for grey ones, trained by the clock on one thread: the rate stays, and the weights are averaged.
1,000 samples of the default solver in 10 steps, on the grid of models without a fitted one, are judged by the Fréchet
distance on two extractors. What is there for the same seconds, seed and processor is not done again, unless other
extractors judged it. Writes `bench/automatic.json` and the table of docs/benchmarks.md.
"""

from functools import cache
from pathlib import Path

import torch
from choose import distance, reference
from trial import Found, made, run

from undiffuse.data.source import Source, open_source
from undiffuse.model.recipe import Recipe
from undiffuse.training.auto import choose, look_at
from undiffuse.training.plan import Budget
from undiffuse.training.trainer import Trainer

JUDGES = {"emoji": ("classifier-emoji", "efflite0"), "fashion-mnist": ("classifier-28", "efflite0")}
OBJECTIVES = {"simple": ["objective.name=simple"], "min-SNR": ["objective.name=min-snr"]}
CANDIDATES = {f"{data}, {name}": (data, settings) for data in JUDGES for name, settings in OBJECTIVES.items()}


@cache
def images(data: str) -> Source:
    return open_source(data, channels=3 if data == "emoji" else 1, split="train")


def chosen(data: str, settings: list[str]) -> tuple[Recipe, Source]:
    facts = look_at(images(data), data, torch.device("cpu"))
    settings = ["train.precision=bf16", "train.channels_last=true", *settings]
    return choose(facts, settings, Budget(minutes=1.0)).recipe, images(data)


def judged(trainer: Trainer, folder: Path) -> Found:
    model = trainer.model()
    data = "emoji" if model.image_shape[0] == 3 else "fashion-mnist"
    drawn, found = model.sample(1000, batch=250), dict[str, object](data=data)
    for name in JUDGES[data]:
        found[name] = distance(drawn, name, reference(name, folder, 10_000, data, f"automatic-{data}"))
    return found


def table(result: Found) -> str:
    lines = ["| seconds | data, objective | images seen | FD-classifier | FD-EffLite0 |", "|---|---|---|---|---|"]
    for row in sorted(result["rows"], key=lambda row: (row["data"], row["budget"], row["name"], row["seed"])):
        name = row["name"] + (f" (seed {row['seed']})" if row["seed"] else "")
        classifier, other = (row[judge] for judge in JUDGES[row["data"]])
        lines.append(f"| {row['budget']:g} | {name} | {row['images']:,} | {classifier:.3f} | {other:.1f} |")
    return "\n".join([*lines, "", made(result)])


if __name__ == "__main__":
    names = tuple(sorted({name for judges in JUDGES.values() for name in judges}))
    run(CANDIDATES, judged, table, names, budget=300.0, opened=chosen)
