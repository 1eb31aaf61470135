"""What a run needs of memory by estimate, for each number of levels that train.recompute may have.

    python bench/memory.py

Nothing is trained. Writes `bench/memory.json` and the table of docs/scaling.md.
"""

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from machine import keep, machine, publish

from undiffuse.model.recipe import load_recipe
from undiffuse.training.need import need

HERE = Path(__file__).parent
PRESETS = {"celebahq-256": (3, 256, 256), "cifar10": (3, 32, 32)}
PRECISIONS = ("float32", "bf16")


def measured(name: str, levels: bool | int) -> dict[str, Any]:
    """Bytes of the state, and of the activations of one image more, by precision."""
    recipe, row = load_recipe(name), dict[str, Any](recompute=levels)
    for precision in PRECISIONS:
        train = replace(recipe.train, precision=precision, recompute=levels)
        two, three = (need(train, recipe.model(PRESETS[name]), micro) for micro in (2, 3))
        row |= {"state": two.state, precision: three.activations - two.activations}
    return row


def table(result: dict[str, Any]) -> str:
    lines = ["| preset | `train.recompute` | float32, MB an image | bf16, MB an image |", "|---|---|---|---|"]
    for name, rows in result["presets"].items():
        for row in rows:
            each = " | ".join(f"{row[precision] / 1e6:,.0f}" for precision in PRECISIONS)
            lines.append(f"| `{name}` | {str(row['recompute']).lower()} | {each} |")
    states = ", ".join(f"`{name}` {rows[0]['state'] / 1e9:.2f} GB" for name, rows in result["presets"].items())
    return "\n".join(
        [*lines, "", f"Beside them, whatever the batch: {states}. By estimate; made by `{result['command']}`."]
    )


def main() -> None:
    presets = {}
    for name in PRESETS:
        levels = len(load_recipe(name, []).network.multipliers)  # pyright: ignore[reportAttributeAccessIssue]
        presets[name] = [measured(name, each) for each in (False, *range(1, levels), True)]
    result = {
        "command": "python bench/memory.py",
        "date": date.today().isoformat(),
        "machine": machine(),
        "presets": presets,
    }
    keep(HERE / "memory.json", result)
    publish("scaling.md", "memory", table(result))


if __name__ == "__main__":
    main()
