"""What the trellis's state and the number of steps bring in whole archives: test images of bench/codec.py, with loss.

    python bench/codec_length.py fashion-mnist --data fashion-mnist

Tables are fitted anew to the first training images for each row, as `undiffuse codec fit --memory L --steps N` does;
nothing else differs. The size of the archive, header and checks counted, stands beside the model's bound for the same
distortion as in `bench/codec.py`, whose result is read; so does, of first parts of 10 to 50 bytes an image, the one
that is farthest above it, and the mean of all. Writes `bench/codec_length-NAME.json` and its table of docs/codec.md.
"""

import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bits import MOSAIC
from codec import bits_at, off, shorter
from machine import TABLES, asking, keep, machine, made_of, publish, shipped_codec

from undiffuse.codec import tables
from undiffuse.codec.plan import MEMORY, WASTE
from undiffuse.codec.stream import Codec
from undiffuse.data.source import open_source

HERE = Path(__file__).parent
SETTINGS = (*((tables.STEPS, memory) for memory in WASTE), *((steps, MEMORY) for steps in (16, 20, 24, 40, 48)))
Row = dict[str, Any]


def table(result: Row) -> str:
    heads = "steps | bits of a state | bytes an image | RMSE | over the bound of 1,000 steps | of continuous time"
    lines = [f"| {heads} | 10 to 50 bytes, at worst | mean | s for 96 |", "|---|---|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        both = " | ".join(f"{row['bytes'] * 8 / row['bound'][of]:.3f}" for of in ("1000 steps", "continuous"))
        early = f"{max(row['early']):.2f} | {np.mean(row['early']):.2f}"
        head = f"{row['steps']} | {row['memory']} | {row['bytes']:.1f} | {row['rmse']:.3f}"
        lines.append(f"| {head} | {both} | {early} | {row['seconds']:.0f} |")
    ran = f"{result['machine']['processor']}, one thread, torch {result['machine']['torch']}, {result['date']}"
    return "\n".join([*lines, "", f"`{result['name']}`; {ran}; `{result['command']}`."])


def main() -> None:
    given = asking(__doc__).parse_args()
    torch.set_num_threads(1)
    codec, images = shipped_codec(given.name, given.data, int(np.prod(MOSAIC)))
    bound = json.loads((HERE / f"codec-{given.name}.json").read_text())["bound"]["rows"]
    source = open_source(given.data, channels=codec.model.image_shape[0], split="train")
    some = source.gather(torch.arange(codec.plan.images, dtype=torch.int64, device="cpu"))[0]
    rows = []
    for steps, memory in SETTINGS:
        one = Codec(codec.model, tables.fit(codec.model, some, steps, memory))
        began = time.perf_counter()
        archive = one.encode(images)
        seconds, decoded = time.perf_counter() - began, one.decode(archive)
        rmse = float((127.5 * (decoded.estimate() + 1) - images).square().mean().sqrt())
        row = {"steps": steps, "memory": memory, "bytes": len(archive) / len(images), "rmse": rmse}
        row |= {"bound": {of: bits_at(bound, of, rmse) for of in ("1000 steps", "continuous")}, "seconds": seconds}
        parts = [(8 * size / len(images), off(found, images)) for size, found in shorter(one, images)]
        row["early"] = [bits / bits_at(bound, "1000 steps", rmse) for bits, rmse in parts if 80 <= bits <= 400]
        rows.append(row)
        print(json.dumps(row), flush=True)
    result = {
        "name": given.name,
        "rows": rows,
        "command": f"python bench/codec_length.py {given.name} --data {given.data}",
        "date": date.today().isoformat(),
        "seed": 0,
        "machine": machine(),
        "made_of": made_of(given.name, TABLES + given.name),
    }
    keep(HERE / f"codec_length-{given.name}.json", result)
    publish("codec.md", f"codec-length-{given.name}", table(result))


if __name__ == "__main__":
    main()
