"""Scores of a shipped model: `undiffuse eval` on two extractors, for chains of several lengths.

    python bench/scores.py fashion-mnist --n 10000 --seeds 3 --batch 2500

`--data` is where the data is, if it has no name. Writes `bench/scores-NAME.json`, with the protocol of each row, and a
table of docs/benchmarks.md. A chain that is there already, of the same weights and the same settings, is not drawn
again.
"""

import argparse
import json
import shlex
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from machine import machine, made_of, publish

from undiffuse.machine import disk
from undiffuse.machine.device import choose, name_of
from undiffuse.measure.evaluate import Query, evaluate
from undiffuse.model.load import load

HERE = Path(__file__).parent
CHAINS = {
    "ancestral, 50 steps": {"steps": 50, "solver": "ancestral"},
    "ddim, 50 steps": {"steps": 50, "solver": "ddim"},
    "ancestral, 1,000 steps": {"steps": None, "solver": "ancestral"},
}
FEATURES = {1: ("efflite0", "classifier-28"), 3: ("efflite0", "classifier-emoji")}  # by channels


def table(result: dict[str, Any]) -> str:
    """A row for each score and a column for each chain; real images last."""
    chains, found = list(result["chains"]), result["chains"].values()
    keys = [(row["features"], row["score"]) for row in next(iter(found))["scores"]]
    floor = next(iter(found))["protocol"]["floor"]
    lines = [f"| | {' | '.join(chains)} | real images |", "|---|" + "---|" * (len(chains) + 1)]
    for features, score in keys:
        rows = [
            next(row for row in each["scores"] if (row["features"], row["score"]) == (features, score))
            for each in found
        ]
        cells = [f"{row['value']:.4g}" + (f" ± {row['sd']:.2g}" if "sd" in row else "") for row in rows]
        name = score if features in score.lower() or score.startswith(("FD", "sFD")) else f"{score}, {features}"
        lines.append(f"| {name} | {' | '.join(cells)} | {rows[0]['real']:.4g} |")
    for i, space in enumerate(next(iter(found))["memorisation"]["spaces"]):
        rates = [each["memorisation"]["spaces"][i]["rates"][0] for each in found]
        cells = [f"{rate['rate']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})" for rate in rates]
        new = f"{rates[0]['expected']:.1%} ({rates[0]['expected_low']:.1%} to {rates[0]['expected_high']:.1%})"
        lines.append(f"| memorisation rate, {space['space']} | {' | '.join(cells)} | {new} |")
    first = next(iter(found))["protocol"]
    seeds = first["samples"]["seed"]
    return "\n".join(
        [
            *lines,
            "",
            f"{first['n']:,} samples for each of {len(seeds)} seeds (mean ± standard deviation over them) against the "
            f"{first['reference']['images']:,} training images; real images are {floor}. Memorisation is that of the "
            "first seed, with its interval of 95 %, beside what new images show in 95 % of cases. Drawn on "
            f"{result['device']}, torch {result['torch']}, {result['date']}; the whole evaluation took "
            + ", ".join(f"{each['seconds']:.0f} s ({name})" for name, each in result["chains"].items())
            + f". Weights `{next(iter(result['made_of'].values()))[:16]}`. Made by `{result['command']}`.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", help="a shipped model")
    parser.add_argument("--data", help="the data, if the set has not the name of the model")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="bench/scores-NAME.json unless given")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    options = parser.parse_args()
    out = options.out or HERE / f"scores-{options.name}.json"
    result = json.loads(out.read_text()) if out.exists() else {}
    if not options.table:
        model = load(options.name, options.device)
        features = FEATURES[model.image_shape[0]]
        asked = {"n": options.n, "seeds": options.seeds, "made_of": made_of(options.name, *features)}
        if {key: result.get(key) for key in asked} != asked:
            result = {"chains": {}}
        result |= asked | {"command": shlex.join(["python", *sys.argv]), "date": date.today().isoformat()}
        result |= machine() | {"device": name_of(choose(options.device))}
        for name, how in CHAINS.items():
            if name in result["chains"]:
                continue
            began = time.monotonic()
            found = evaluate(
                model,
                options.data or options.name,
                Query(features),
                n=options.n,
                seeds=options.seeds,
                batch=options.batch,
                named=options.name,
                say=print,
                **how,
            )
            result["chains"][name] = found.plain() | {"seconds": time.monotonic() - began}
            disk.write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())
            print(found, flush=True)
    if out.resolve().parent == HERE:
        publish("benchmarks.md", f"scores-{options.name}", table(result))


if __name__ == "__main__":
    main()
