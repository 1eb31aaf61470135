"""An evaluation of the network, compiled by torch, in the other layout, and as it is: what each gains.

    python bench/compiled.py [--threads 1] [--rounds 5]

Batches of 32 images of one shape, by turns, in float32 and bf16; the compiled network is one graph of fixed shapes, and
is refused if it is not. `pays from` says with how many images, of 10 evaluations each, as much time is saved as
compiling took. The other layout is channels_last, of weights and images.
Writes `bench/compiled.json` and the table of docs/benchmarks.md.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from layout import NETWORKS
from machine import keep, machine, publish
from torch import Tensor

from undiffuse.key import Key
from undiffuse.model.recipe import load_recipe
from undiffuse.network.base import NOTHING

HERE = Path(__file__).parent
PRESETS = ("fashion-mnist", "emoji-32", "cifar10")
BATCH, EVALUATIONS = 32, 10
Row = dict[str, Any]


def timed(call: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@torch.no_grad()
def row(preset: str, shape: tuple[int, int, int], precision: str, rounds: int) -> Row:
    network = load_recipe(preset).model(shape, None).build(clip=True).network.eval()
    for weight in network.parameters():  # a network begins with an answer of 0
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    x, index = Key(0).rows(BATCH).normal(*shape), torch.full((BATCH,), 500.0)
    compiled = torch.compile(network, fullgraph=True, dynamic=False)
    other = deepcopy(network).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def asked(of: Callable[..., Tensor], x: Tensor = x) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                return of(x, index, NOTHING)

        return call

    eager, fast, last = asked(network), asked(compiled), asked(other, x.to(memory_format=torch.channels_last))
    eager()
    last()
    making = timed(fast)
    torch.testing.assert_close(fast().float(), eager().float(), rtol=0.05, atol=0.05)
    taken = [(timed(eager), timed(fast), timed(last)) for _ in range(rounds)]
    before, after, _ = (statistics.median(each) for each in zip(*taken, strict=True))
    saved = (before - after) / BATCH * EVALUATIONS
    return {
        "preset": preset,
        "precision": precision,
        "eager": BATCH / before,
        "compiled": BATCH / after,
        "ratio": statistics.median(a / b for a, b, _ in taken),
        "channels_last": statistics.median(a / c for a, _, c in taken),
        "seconds": making - after,
        "pays_from": (making - after) / saved if saved > 0 else None,
    }


def table(result: Row) -> str:
    lines = [
        "| preset | precision | images/s | compiled | ratio | compiling, s | pays from, images | channels_last |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in result["rows"]:
        pays = "never" if each["pays_from"] is None else f"{each['pays_from']:,.0f}"
        rates = f"{each['eager']:.3g} | {each['compiled']:.3g} | {each['ratio']:.2f} | {each['seconds']:.0f}"
        lines.append(f"| {each['preset']} | {each['precision']} | {rates} | {pays} | {each['channels_last']:.2f} |")
    on = result["machine"]
    threads = f"{on['threads']} thread{'s' * (on['threads'] > 1)}"
    return "\n".join(
        [*lines, "", f"{on['processor']}, {threads}, torch {on['torch']}, {result['date']}; `{result['command']}`."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch._inductor.config.force_disable_caches = True  # what was compiled before would be found in no time
    rows = []
    for preset in PRESETS:
        for precision in ("float32", "bf16"):
            rows.append(row(preset, NETWORKS[preset], precision, given.rounds))
            print(json.dumps(rows[-1]), flush=True)
            torch.compiler.reset()
    command = f"python bench/compiled.py --threads {given.threads} --rounds {given.rounds}"
    result = {"command": command, "date": date.today().isoformat(), "seed": 0, "machine": machine(), "rows": rows}
    keep(HERE / "compiled.json", result)
    publish("benchmarks.md", "compiled", table(result))


if __name__ == "__main__":
    main()
