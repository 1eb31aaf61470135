"""Other rules for the same steps: which candidate a step takes, on a shipped model and its own tables.

    python bench/codec_rules.py fashion-mnist --data fashion-mnist

Bits of an image (scales counted, no header) and RMSE at the end of all steps, over the model's bound at that RMSE:

- the trellis of `undiffuse encode`, files of one image, of 16 and of 32;
- the best of 2^k candidates for each k bits, 12 or fewer, as DDCM takes it: the index is sent as it is;
- candidates drawn with pieces of at most 14 bits and 2^16 candidates, as DiffC does it; the index is sent by its
  octave, which is cheaper than DiffC's Zipf code;
- the same with pieces of at most 8 bits: Algorithm 3 as it is written (`undiffuse/codec/exact.py`).

All but the trellis are written here for this comparison alone. The first 32 test images. Writes
`bench/codec_rules-NAME.json` and the table `codec-rules-NAME` of docs/codec.md.
"""

from collections.abc import Callable
from datetime import date
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from machine import TABLES, asking, keep, kept, machine, made_of, publish, shipped_codec
from torch import Tensor

from undiffuse.codec import exact, tables
from undiffuse.codec.coder import TOTAL_BITS
from undiffuse.codec.container import Group, Header
from undiffuse.codec.ledger import Curve
from undiffuse.codec.plan import DELTA_BITS
from undiffuse.codec.stream import Codec
from undiffuse.key import Key

HERE, IMAGES, BLOCK = Path(__file__).parent, 32, 12
Row = dict[str, Any]
Values = Float[Tensor, "values"]
Pick = Callable[[Float[np.ndarray, "k"], int, np.random.Generator], tuple[int, float]]  # which, and its bits


def trellis(codec: Codec, images: UInt8[Tensor, "n c h w"], group: int) -> Row:
    """Of files."""
    header, seen = Header(codec.plan.ident, codec.plan.steps, len(images), group), list[list[Tensor]]()
    groups = codec.groups(images, header, None, seen, last=True)
    bits = sum(sum(codec.bits(each, codec.plan.values)) for each in groups)
    bits += DELTA_BITS * len(images) * (len(codec.plan.layers) - 1)
    return {"bits": bits / len(images), "rmse": off(torch.cat([x_0 for (x_0,) in seen]), images)}


def by_rule(codec: Codec, images: UInt8[Tensor, "n c h w"], most: int, candidates: int, pick: Pick) -> Row:
    """Of pieces of at most so many bits."""
    values, spent = codec.plan.values, list[float]()
    book = lru_cache(1)(lambda step: exact.candidates(step, candidates, values))

    def told(found: Group) -> None:
        spent.append(DELTA_BITS * len(images) if len(found.scales) > 1 else 0)

    def take(step: int, image: int, bits: int, w_1: Values, w_2: Values) -> Values:
        z, random = torch.zeros(values), np.random.default_rng(Key(0).fold("rule", step, image).integer())
        every, worth = exact.pieces(bits, values, most)
        for part in every:
            _, ratio = exact.weighed(book(step)[:, part], w_1[part], w_2[part])
            taken, cost = pick(ratio, worth, random)
            z[part] = book(step)[taken, part]
            spent.append(cost)
        return z

    x_0 = exact.walked(codec, images, 0, told, take)
    return {"bits": sum(spent) / len(images), "rmse": off(x_0, images)}


def best(ratio: Float[np.ndarray, "k"], bits: int, random: np.random.Generator) -> tuple[int, float]:
    return int(ratio[: 1 << bits].argmax()), bits


def drawn(ratio: Float[np.ndarray, "k"], bits: int, random: np.random.Generator) -> tuple[int, float]:
    taken, table = exact.picked(ratio, random), exact.octaves(bits)
    octave = (taken + 1).bit_length() - 1
    return taken, octave + TOTAL_BITS - log2(table[octave + 1] - table[octave])


def off(x_0: Float[Tensor, "n c h w"], images: UInt8[Tensor, "n c h w"]) -> float:
    """Root mean square, in grey levels."""
    return float((127.5 * (x_0.double() + 1) - images).square().mean().sqrt())


def table(result: Row) -> str:
    lines = [
        "| rule | bits an image | RMSE | over the bound of 1,000 steps | of continuous time |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        over = f"{row['bits'] / row['stepped']:.3f} | {row['bits'] / row['continuous']:.3f}"
        lines.append(f"| {name} | {row['bits']:.0f} | {row['rmse']:.3f} | {over} |")
    said = f"The first {IMAGES} test images, {result['model']}, one seed, no headers."
    return "\n".join([*lines, "", f"{said} {result['machine']['processor']}, {result['date']}; `{result['command']}`."])


def main() -> None:
    given = asking(__doc__).parse_args()
    torch.set_num_threads(1)
    codec, images = shipped_codec(given.name, given.data, IMAGES)
    process = codec.model.process
    curve = Curve.of(tables.measured(codec.model, images, count=128), process, codec.plan.values)
    bounds = {"stepped": curve.stepped(process, 1000), "continuous": curve.continuous()}
    path, of = HERE / f"codec_rules-{given.name}.json", made_of(given.name, TABLES + given.name)
    result: Row = kept(path)
    result = result if result.get("made_of") == of else {"made_of": of, "rows": {}}
    rules: dict[str, Callable[[], Row]] = {
        "trellis, 32 images a path": lambda: trellis(codec, images, 32),
        "trellis, 16 images a path": lambda: trellis(codec, images, 16),
        "trellis, one image": lambda: trellis(codec, images, 1),
        "best of 2^k for k bits, at most 12 (DDCM)": lambda: by_rule(codec, images, BLOCK, 1 << BLOCK, best),
        "drawn, pieces of 14 bits (DiffC)": lambda: by_rule(codec, images, 14, exact.CANDIDATES, drawn),
        "drawn, pieces of 8 bits (Algorithm 3)": lambda: by_rule(codec, images, 8, exact.CANDIDATES, drawn),
    }
    for name, rule in rules.items():
        if name not in result["rows"]:
            row = rule()
            result["rows"][name] = row | {way: bound.at(row["rmse"]) for way, bound in bounds.items()}
            print(name, result["rows"][name], flush=True)
            result |= {"model": given.name, "machine": machine(), "seed": 0}
            result |= {"command": f"python bench/codec_rules.py {given.name} --data {given.data}"}
            result |= {"date": date.today().isoformat()}
            keep(path, result)
    publish("codec.md", f"codec-rules-{given.name}", table(result))


if __name__ == "__main__":
    main()
