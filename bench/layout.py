"""Steps of the shipped networks in both layouts of images, as `train.channels_last = "auto"` measures them.

    python bench/layout.py

On one thread. Rows of other processors stay. Writes `bench/layout.json` and the table of docs/benchmarks.md.
"""

import json
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machine import keep, machine, publish

from undiffuse.model.recipe import load_recipe
from undiffuse.training.layout import measured, processor

HERE = Path(__file__).parent
GREY, COLOUR = (1, 28, 28), (3, 32, 32)
NETWORKS = {"fashion-mnist": GREY, "fashion-mnist-likelihood": GREY, "emoji-32": COLOUR, "cifar10": COLOUR}
Row = dict[str, Any]


def table(result: Row) -> str:
    lines = [
        "| processor | preset | precision | images/s, channels_last | without | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda row: (row["processor"], row["preset"], row["precision"])):
        last, plain = row["channels_last"], row["plain"]
        rates = f"{last:.3g} | {plain:.3g} | {last / plain:.2f}"
        lines.append(f"| {row['processor']} | {row['preset']} | {row['precision']} | {rates} |")
    ran = f"One thread, batches of 16, torch {result['machine']['torch']}, {result['date']}; `{result['command']}`."
    return "\n".join([*lines, "", ran])


def main() -> None:
    torch.set_num_threads(1)
    path, device = HERE / "layout.json", torch.device("cpu")
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in before if row["processor"] != processor()]
    for name, shape in NETWORKS.items():
        config = load_recipe(name).model(shape, 4 if name == "emoji-32" else None)
        for precision in ("bf16", "float32"):
            found = measured(config, precision, 16, device)
            rows.append({"processor": processor(), "preset": name, "precision": precision, **found})
            print(json.dumps(rows[-1]), flush=True)
    result = {"command": "python bench/layout.py", "date": date.today().isoformat(), "seed": 0}
    result |= {"machine": machine(), "rows": rows}
    keep(path, result)
    publish("benchmarks.md", "layout", table(result))


if __name__ == "__main__":
    main()
