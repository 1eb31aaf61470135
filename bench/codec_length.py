"""What the length of the trellis's state brings in whole archives: of the test images of bench/codec.py, with loss.

    python bench/codec_length.py fashion-mnist --data fashion-mnist

Tables of each length are fitted anew to the first training images, as `undiffuse codec fit --memory L` does; nothing
else differs. The size of the archive, header and checks counted, stands beside the model's bound for the same
distortion as in `bench/codec.py`, whose result is read. Writes `bench/codec_length-NAME.json` and its table of
docs/codec.md.
"""

import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bits import MOSAIC
from codec import bits_at, off
from machine import TABLES, asking, machine, made_of, publish, shipped_codec

from undiffuse.codec import tables
from undiffuse.codec.plan import WASTE
from undiffuse.codec.stream import Codec
from undiffuse.data.source import open_source
from undiffuse.machine import disk

HERE = Path(__file__).parent
Row = dict[str, Any]


def table(result: Row) -> str:
    lines = [
        "| bits of a state | bytes an image | RMSE | over the bound of 1,000 steps | of continuous time | s for 96 |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        both = " | ".join(f"{row['bytes'] * 8 / row['bound'][of]:.3f}" for of in ("1000 steps", "continuous"))
        lines.append(f"| {row['memory']} | {row['bytes']:.1f} | {row['rmse']:.3f} | {both} | {row['seconds']:.0f} |")
    ran = f"{result['machine']['processor']}, one thread, torch {result['machine']['torch']}, {result['date']}"
    return "\n".join([*lines, "", f"`{result['name']}`; {ran}; `{result['command']}`."])


def main() -> None:
    given = asking(__doc__).parse_args()
    torch.set_num_threads(1)
    codec, images = shipped_codec(given.name, given.data, int(np.prod(MOSAIC)))
    known = json.loads((HERE / f"codec-{given.name}.json").read_text())
    shape = codec.model.image_shape
    source = open_source(given.data, channels=shape[0], split="train")
    some = source.gather(torch.arange(codec.plan.images, dtype=torch.int64, device="cpu"))[0]
    rows = []
    for memory in WASTE:
        one = Codec(codec.model, tables.fit(codec.model, some, codec.plan.steps, memory))
        began = time.perf_counter()
        archive = one.encode(images)
        seconds, decoded = time.perf_counter() - began, one.decode(archive)
        rmse = float((127.5 * (decoded.estimate() + 1) - images).square().mean().sqrt())
        row = {
            "memory": memory,
            "bytes": len(archive) / len(images),
            "rmse": rmse,
            "rounded": off(decoded.mean(), images),
        }
        row |= {"bound": {of: bits_at(known["bound"]["rows"], of, rmse) for of in ("1000 steps", "continuous")}}
        rows.append(row | {"seconds": seconds})
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "name": given.name,
        "rows": rows,
        "command": f"python bench/codec_length.py {given.name} --data {given.data}",
        "date": date.today().isoformat(),
        "seed": 0,
        "machine": machine(),
        "made_of": made_of(given.name, TABLES + given.name),
    }
    disk.write_atomic(HERE / f"codec_length-{given.name}.json", (json.dumps(result, indent=1) + "\n").encode())
    publish("codec.md", f"codec-length-{given.name}", table(result))


if __name__ == "__main__":
    main()
