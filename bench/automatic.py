"""Other objectives in what `--preset auto` chooses: the quality of samples after equal processor time.

    python bench/automatic.py [--seconds 600] [--seed 0] [NAME …]

The networks that auto chooses for pictures in colour (`emoji`, the folder of docs/benchmarks.md, or a link to it, where
this is called) and for grey ones, trained by the clock on one thread: the rate stays, and the weights are averaged.
1,000 samples of the default solver in 10 steps, on Karras's times because no grid is fitted, and of 50 ancestral steps
are judged by the Fréchet distance on two extractors. What is there for the same seconds, seed and processor is not done
again, unless other extractors judged it. Writes `bench/automatic.json` and the table of docs/benchmarks.md.
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
CHAINS = {"10 of the default": (None, None), "50 ancestral": (50, "ancestral")}
OBJECTIVES = {
    "simple": [],
    "min-SNR": ["objective.name=min-snr"],
    "log-normal sigma": ["objective.density.name=log-normal"],
}
CANDIDATES = {f"{data}, {name}": (data, settings) for data in JUDGES for name, settings in OBJECTIVES.items()}


@cache
def images(data: str) -> Source:
    return open_source(data, channels=3 if data == "emoji" else 1, split="train")


def chosen(data: str, settings: list[str]) -> tuple[Recipe, Source]:
    facts = look_at(images(data), data, torch.device("cpu"))
    settings = ["train.precision=bf16", "train.channels_last=true", *settings]
    return choose(facts, settings, Budget(minutes=1.0)).recipe, images(data)


def judged(trainer: Trainer, folder: Path) -> Found:
    model, found = trainer.model(), {}
    data = "emoji" if model.image_shape[0] == 3 else "fashion-mnist"
    for chain, (steps, solver) in CHAINS.items():
        drawn = model.sample(1000, steps, solver, 0, 250)
        for name in JUDGES[data]:
            known = reference(name, folder, 10_000, data, f"automatic-{data}")
            found[f"{chain}, {name}"] = distance(drawn, name, known)
    return {"data": data, **found}


def table(result: Found) -> str:
    heads = [f"{chain}: {score}" for chain in CHAINS for score in ("FD-classifier", "FD-EffLite0")]
    lines = [f"| seconds | data, objective | images seen | {' | '.join(heads)} |", "|---|---|---|---|---|---|---|"]
    for row in sorted(result["rows"], key=lambda row: (row["data"], row["budget"], row["name"], row["seed"])):
        name = row["name"] + (f" (seed {row['seed']})" if row["seed"] else "")
        scores = [
            f"{row[f'{chain}, {judge}']:.{digits}f}"
            for chain in CHAINS
            for judge, digits in zip(JUDGES[row["data"]], (3, 1), strict=True)
        ]
        lines.append(f"| {row['budget']:g} | {name} | {row['images']:,} | {' | '.join(scores)} |")
    return "\n".join([*lines, "", made(result)])


if __name__ == "__main__":
    names = tuple(sorted({name for judges in JUDGES.values() for name in judges}))
    run(CANDIDATES, judged, table, names, budget=600.0, opened=chosen)
