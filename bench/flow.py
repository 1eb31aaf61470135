"""The bound and the likelihood of the probability-flow ODE, of the shipped model on the same images.

    python bench/flow.py

Writes `bench/flow.json` and the table of docs/benchmarks.md.
"""

import argparse
from datetime import date
from pathlib import Path
from typing import Any

from machine import keep, machine, made_of, publish

import undiffuse

HERE = Path(__file__).parent
MODEL = DATA = "fashion-mnist"


def table(result: dict[str, Any]) -> str:
    lines = ["| | bits/dim ± standard error | evaluations an image |", "|---|---|---|"]
    lines += [
        f"| {name} | {row['bits_per_dim']:.3f} ± {row['standard_error']:.3f} | {row['evaluations']:.0f} |"
        for name, row in result["measured"].items()
    ]
    ran = result["machine"]
    made = f"{ran['processor']}, {ran['threads']} threads, torch {ran['torch']}, {result['date']}"
    return "\n".join([*lines, "", f"{result['images']} test images, seed {result['seed']}. {made}; made by "
                      f"`{result['command']}`."])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=64)
    count = parser.parse_args().n
    model = undiffuse.load(MODEL)
    given = {"images": count, "seed": 0}
    bound = undiffuse.nll(model, DATA, draws=None, **given)
    measured = {"the bound, all terms": bound | {"evaluations": model.process.steps}}
    for tolerance, probes in ((1e-3, 1), (1e-3, 4), (1e-5, 1)):
        words = f"the ODE, tolerance {tolerance:g}, {probes} probe{'s' if probes > 1 else ''}"
        measured[words] = undiffuse.nll_ode(model, DATA, tolerance=tolerance, probes=probes, **given)
    result = {
        "command": f"python bench/flow.py -n {count}",
        "date": date.today().isoformat(),
        "seed": 0,
        "machine": machine(),
        "made_of": made_of(MODEL),
        "images": count,
        "model": model.meta.get("step"),
        "measured": measured,
    }
    keep(HERE / "flow.json", result)
    publish("benchmarks.md", "flow", table(result))


if __name__ == "__main__":
    main()
