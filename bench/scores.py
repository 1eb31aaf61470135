"""Scores of a shipped model on two extractors, for a short chain and for that of all steps.

    python bench/scores.py fashion-mnist --n 10000 --seeds 3 --batch 250 --work FOLDER [--only default-10 …]

`--data` is where the data is, if it has no name. Samples are drawn by `undiffuse sample` into `--work`, as
`NAME-WEIGHTS-CHAIN-TIMES-SEED.npz` with a JSON beside each that says how and where; of the chain of all steps those
of one seed. What is there is not drawn again, so that a card may draw them elsewhere, and a chain that was scored with
the same weights, times, number and seeds is not scored again. Writes `bench/scores-NAME.json`, with the protocol of
each row, and a table of docs/benchmarks.md.
"""

import argparse
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import keep, kept, machine, made_of, mark_of, publish

from undiffuse.data.source import open_source
from undiffuse.machine import disk
from undiffuse.measure.evaluate import Query, compared
from undiffuse.measure.scores import score
from undiffuse.measure.sets import Drawing, Samples, drawn_by, said_of
from undiffuse.model.load import load
from undiffuse.model.model import Model

HERE = Path(__file__).parent
FEATURES = {1: ("efflite0", "classifier-28"), 3: ("efflite0", "classifier-emoji")}  # by channels


class Chain(NamedTuple):
    """As `undiffuse sample` is asked for it, and how the table calls it."""

    name: str
    steps: int
    solver: str | None = None
    grid: str | None = None

    def drawing(self, model: Model) -> tuple[Drawing, str]:
        """With a mark of its times, which depend on the grid that is fitted to the model."""
        way = model.walk(self.steps, self.solver, grid=self.grid)
        return Drawing(way.times, way.sampler), mark_of(way.times.tolist())

    def words(self) -> list[str]:
        options = {"--steps": str(self.steps), "--solver": self.solver, "--grid": self.grid}
        return [word for name, value in options.items() if value is not None for word in (name, value)]


CHAINS = {
    "default-10": Chain("the default, 10 steps", 10),
    "default-50": Chain("the default, 50 steps", 50),
    "log-snr-50": Chain("unipc-2 on log-snr, 50 steps", 50, "unipc-2", "log-snr"),
    "ancestral": Chain("ancestral, 1,000 steps", 1000, "ancestral"),
}


def samples(
    model: Model, name: str, chain: str, n: int, seed: int, batch: int, work: Path
) -> tuple[Samples, dict[str, Any]]:
    """From a file, which is made where it is missing; and how it was made."""
    how, mark = CHAINS[chain].drawing(model)
    path = work / f"{name}-{model.digest()[:12]}-{chain}-{mark}-{seed}.npz"
    said = path.with_suffix(".json")
    if not path.exists():
        words = ["sample", name, "-n", n, *CHAINS[chain].words(), "--seed", seed, "--batch", batch]
        words += [] if model.classes is None else ["--label", "random"]
        began = time.monotonic()
        command = [sys.executable, "-m", "undiffuse", *map(str, words), "--npz", str(path)]
        subprocess.run(command, check=True)
        made = {"command": shlex.join(["undiffuse", *map(str, words)]), "seconds": round(time.monotonic() - began)}
        made |= {"device": machine()["processor"], "torch": torch.__version__, "precision": "float32"}
        disk.write_json(said, made)
    source = open_source(str(path))
    drawn = drawn_by(model, how, n, seed)
    return replace(drawn, images=lambda index: source.gather(index)[0], are_drawn=False), disk.read_json(said)


def table(result: dict[str, Any]) -> str:
    """A row for each score and a column for each chain; real images last."""
    chains = [chain.name for chain in CHAINS.values() if chain.name in result["chains"]]
    found = [result["chains"][name] for name in chains]
    keys = [(row["features"], row["score"]) for row in found[0]["scores"]]
    floor = found[0]["protocol"]["floor"]
    lines = [f"| | {' | '.join(chains)} | real images |", "|---|" + "---|" * (len(chains) + 1)]
    for features, key in keys:
        rows = [
            next(row for row in each["scores"] if (row["features"], row["score"]) == (features, key)) for each in found
        ]
        cells = [f"{row['value']:.4g}" + (f" ± {row['sd']:.2g}" if "sd" in row else "") for row in rows]
        name = key if features in key.lower() or key.startswith(("FD", "sFD")) else f"{key}, {features}"
        lines.append(f"| {name} | {' | '.join(cells)} | {rows[0]['real']:.4g} |")
    for i, space in enumerate(found[0]["memorisation"]["spaces"]):
        rates = [each["memorisation"]["spaces"][i]["rates"][0] for each in found]
        cells = [f"{rate['rate']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})" for rate in rates]
        new = f"{rates[0]['expected']:.1%} ({rates[0]['expected_low']:.1%} to {rates[0]['expected_high']:.1%})"
        lines.append(f"| memorisation rate, {space['space']} | {' | '.join(cells)} | {new} |")
    first = found[0]["protocol"]
    drawn = [
        f"{each['drawn']['seconds']:,} s on {each['drawn']['device']} in {each['drawn']['precision']}, torch "
        f"{each['drawn']['torch']} ({name}; seeds {', '.join(map(str, each['seeds']))})"
        for name, each in zip(chains, found, strict=True)
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"{first['n']:,} samples a seed (mean ± standard deviation over seeds, where there are several) against "
            f"the {first['reference']['images']:,} training images; real images are {floor}. Memorisation is that of "
            "the first seed, with its interval of 95 %, beside what new images show in 95 % of cases. Those of the "
            f"first seed took {' and '.join(drawn)}; judged {result['date']}. Weights "
            f"`{next(iter(result['made_of'].values()))[:16]}`. Made by `{result['command']}`.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", help="a shipped model")
    parser.add_argument("--data", help="the data, if the set has not the name of the model")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(CHAINS), default=list(CHAINS), help="these chains")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("runs/scores"), help="where samples are kept")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    options = parser.parse_args()
    out = HERE / f"scores-{options.name}.json"
    result: dict[str, Any] = kept(out)
    if not options.table:
        model, data = load(options.name, "cpu"), options.data or options.name
        features = FEATURES[model.image_shape[0]]
        command = f"python bench/scores.py {options.name} --n {options.n} --seeds {options.seeds}"
        of = made_of(options.name, *features)
        before = result["chains"] if (result.get("made_of"), result.get("n")) == (of, options.n) else {}
        command += "" if options.only == list(CHAINS) else f" --only {' '.join(options.only)}"
        result = {"command": command + (f" --data {data}" if options.data else ""), "date": date.today().isoformat()}
        result |= {"n": options.n, "made_of": of, "machine": machine(), "chains": before}
        options.work.mkdir(parents=True, exist_ok=True)
        for key in options.only:
            name, mark = CHAINS[key].name, CHAINS[key].drawing(model)[1]
            seeds = list(range(1 if CHAINS[key].steps == model.process.steps else options.seeds))
            if {"seeds": seeds, "times": mark}.items() <= before.get(name, {}).items():
                continue
            every = [samples(model, options.name, key, options.n, seed, options.batch, options.work) for seed in seeds]
            sets = [each for each, _ in every]
            reference, floor, judges = compared(data, Query(features), sets[0], model, model.device, print)
            about = {"model": said_of(model, options.name)}
            found = score(sets, reference, floor, judges, about=about, say=print)
            result["chains"][name] = found.plain() | {"seeds": seeds, "times": mark, "drawn": every[0][1]}
            print(found, flush=True)
        keep(out, result)
    publish("benchmarks.md", f"scores-{options.name}", table(result))


if __name__ == "__main__":
    main()
