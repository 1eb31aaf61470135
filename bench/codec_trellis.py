"""What a path wastes on Gaussian noise, by the bits of its states: the trellis of the codec alone, without a network.

    python bench/codec_trellis.py

A residual of 784 standard normal values is searched for with n bits, at the weights of a step of so many bits. With ρ
the correlation of z with it, z is worth −784/2 log2(1 − ρ²) bits, and what n is above that is wasted. Beside it is what
tables allow for: 3 bits of a path, and a share of its worth (`WASTE` in undiffuse/codec/plan.py). Writes
`bench/codec_trellis.json` and the table `codec-trellis` of docs/codec.md.
"""

import time
from datetime import date
from math import log2, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import keep, machine, publish

from undiffuse.codec.plan import EXTRA, WASTE
from undiffuse.codec.trellis import Problem, edges, read, search

HERE, VALUES, BITS, RUNS, PARTS = Path(__file__).parent, 784, (24, 48, 96, 192, 384), 160, 8
Row = dict[str, Any]


def wasted(memory: int, bits: int) -> Row:
    """The share of bits above what z is worth, its standard error over parts of the runs, and seconds of a search."""
    random, y = np.random.default_rng(0), 2 ** (2 * bits / VALUES) - 1
    ends, shares, took = edges(VALUES, [bits], memory), list[float](), 0.0
    for _ in range(PARTS):
        sums = np.zeros(3)
        for q in random.standard_normal((RUNS // PARTS, VALUES)):
            linear = torch.from_numpy(q * sqrt(y * (1 + y))).float()
            problem = Problem(linear, torch.full((VALUES,), y, dtype=torch.float32, device="cpu"), ends, bits)
            began = time.perf_counter()
            (path,) = search([problem], memory)
            took += time.perf_counter() - began
            z = read(path, ends, memory)
            sums += z @ q, z @ z, q @ q
        shares.append(bits / (-VALUES / 2 * log2(1 - sums[0] ** 2 / (sums[1] * sums[2]))) - 1)
    error = float(np.std(shares, ddof=1) / sqrt(PARTS))
    return {"memory": memory, "bits": bits, "waste": float(np.mean(shares)), "error": error, "seconds": took / RUNS}


def allowed(memory: int, bits: int) -> float:
    """What tables allow for, of a step that is given so many bits."""
    return bits * (1 + WASTE[memory]) / (bits - EXTRA) - 1


def table(result: Row) -> str:
    found = {(row["memory"], row["bits"]): row for row in result["rows"]}
    heads = " | ".join(f"L = {memory}" for memory in WASTE)
    lines = [f"| bits of a path | {heads} |", "|---|" + "---|" * len(WASTE)]
    for bits in BITS:
        cells = [f"{100 * found[each, bits]['waste']:.1f} ({100 * allowed(each, bits):.1f})" for each in WASTE]
        lines.append(f"| {bits} | {' | '.join(cells)} |")
    times = " | ".join(f"{1000 * found[each, BITS[-1]]['seconds']:.0f}" for each in WASTE)
    lines.append(f"| ms of a search, {BITS[-1]} bits | {times} |")
    worst = 100 * max(row["error"] for row in result["rows"])
    said = "Per cent above the worth of z, and in brackets what tables allow for; standard errors are at most "
    said += f"{worst:.1f}. {RUNS} residuals of {VALUES} values, one seed, one thread."
    return "\n".join([*lines, "", f"{said} {result['machine']['processor']}, {result['date']}; `{result['command']}`."])


def main() -> None:
    torch.set_num_threads(1)
    rows = [wasted(memory, bits) for memory in WASTE for bits in BITS]
    result: Row = {"rows": rows, "machine": machine(), "seed": 0, "date": date.today().isoformat()}
    result["command"] = "python bench/codec_trellis.py"
    keep(HERE / "codec_trellis.json", result)
    publish("codec.md", "codec-trellis", table(result))


if __name__ == "__main__":
    main()
