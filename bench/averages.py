"""How long an average of the weights should be, with a rate that falls and with one that does not.

    python bench/averages.py [--images 51200] [--seed 0]

`bench/small.toml` with Muon, trained once with each rate on one thread; then averages of other relative widths are
rebuilt from its EMA snapshots, as `undiffuse average` does, and 1,000 samples of each are judged as in
`bench/choose.py`. Writes `bench/averages.json` and the table of docs/benchmarks.md.
"""

import argparse
import json
import tempfile
from datetime import date
from pathlib import Path

import torch
from choose import EXTRACTORS, SAMPLES, STEPS, of_samples
from likelihood import MUON
from machine import keep, machine, made_of, publish
from trial import SMALL, Found

from undiffuse.data.source import open_source
from undiffuse.model.load import averaged
from undiffuse.model.model import Model
from undiffuse.model.recipe import load_recipe
from undiffuse.training.trainer import Trainer

DECAYS = ("cosine", "constant")
WIDTHS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
EVERY = 10  # steps between snapshots
OWN, RAW = "train.ema, with its ramp", "none: the last weights"


def trained(decay: str, images: int, seed: int, folder: Path) -> Trainer:
    """With snapshots in the folder."""
    own = [f"train.decay={decay}", "train.ema_profiles=[0.05,0.1]", "train.precision=float32", f"train.seed={seed}"]
    recipe = load_recipe(SMALL, [*MUON, *own])
    trainer = Trainer(recipe, recipe.model((1, 28, 28)), open_source("fashion-mnist"))
    last = images // recipe.train.batch
    for step in range(1, last + 1):
        trainer.update(last)
        if step % EVERY == 0 or step == last:
            trainer.profiles.snapshot(folder, step, trainer.names, trainer.meta())
    return trainer


def table(result: Found) -> str:
    lines = ["| average | " + " | ".join(f"rate {decay}" for decay in DECAYS) + " |", "|---|" + "---|" * len(DECAYS)]
    for name in (RAW, *map(str, WIDTHS), OWN):
        rows = [row for decay in DECAYS for row in result["rows"] if (row["average"], row["decay"]) == (name, decay)]
        cells = [f"{row['classifier-28']:.3f} / {row['efflite0']:.1f}" for row in rows]
        lines.append(f"| {name if name in (OWN, RAW) else f'sigma_rel {name}'} | {' | '.join(cells)} |")
    said = f"FD-classifier / FD-EffLite0 of {SAMPLES:,} samples in {STEPS} steps of DDIM, {result['images']:,} images"
    where = f"{result['machine']['processor']}, one thread, torch {result['machine']['torch']}, {result['date']}"
    return "\n".join([*lines, "", f"{said}, seed {result['seed']}. {where}; `{result['command']}`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=51_200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where features are kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Found] = []

    def note(decay: str, average: str, model: Model) -> None:
        more = {"error": model.meta["average"]["error"]} if "average" in model.meta else {}
        rows.append({"decay": decay, "average": average} | more | of_samples(model, given.work))
        print(json.dumps(rows[-1]), flush=True)

    for decay in DECAYS:
        with tempfile.TemporaryDirectory(dir=given.work) as folder:
            trainer = trained(decay, given.images, given.seed, Path(folder))
            note(decay, RAW, trainer.model(averaged=False))
            note(decay, OWN, trainer.model())
            for width in WIDTHS:
                note(decay, str(width), averaged(Path(folder), width))
    result: Found = {"rows": rows, "images": given.images, "seed": given.seed, "machine": machine()}
    result |= {"made_of": made_of(*EXTRACTORS), "date": date.today().isoformat()}
    result["command"] = f"python bench/averages.py --images {given.images}"
    keep(Path(__file__).with_suffix(".json"), result)
    publish("benchmarks.md", "averages", table(result))


if __name__ == "__main__":
    main()
