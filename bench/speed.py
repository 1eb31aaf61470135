"""Training and evaluation speed beside diffusers and denoising-diffusion-pytorch, in one interleaved run.

    python bench/speed.py --peer PEER/bin/python

Each contender is a process of its own (`bench/contenders.py`); they take turns, one step each, `--rounds` times, and
the first two steps of each do not count. Ratios are taken round by round, so that a machine whose speed drifts does not
favour anyone; figures are medians. `--peer` is the Python of an environment with denoising-diffusion-pytorch:

    pip install torch==2.13.0 numpy pillow einops tqdm scipy accelerate
    pip install --no-deps denoising-diffusion-pytorch==2.3.4 ema-pytorch pytorch-fid torchvision==0.28.0

Writes `bench/speed.json` and the table of docs/benchmarks.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from machine import keep, machine, publish

HERE = Path(__file__).parent
RATE_BATCH = 32  # of the convolution that measures the machine
OWN, THEIRS, LUC = "ours", "diffusers", "denoising_diffusion_pytorch"
Setting = tuple[str, tuple[str, ...]]
BEST: tuple[Setting, ...] = (
    (THEIRS, ("bf16",)),
    (THEIRS, ("bf16", "channels_last")),
    (THEIRS, ("bf16", "compile")),
    (THEIRS, ("bf16", "channels_last", "compile")),
)


@dataclass(frozen=True)
class Part:
    """What runs in turns: the task, the batch, ours, and the others."""

    title: str
    task: str
    batch: int
    ours: tuple[str, ...]
    others: tuple[Setting, ...]
    forward: bool = False  # evaluations instead of steps


PARTS = {
    "cifar10-step": Part("CIFAR-10 U-Net, training step", "cifar10", 32, ("bf16",), ((THEIRS, ()), *BEST)),
    "cifar10-forward": Part(
        "CIFAR-10 U-Net, evaluation", "cifar10", 32, ("bf16",), ((THEIRS, ()), *BEST[:2]), forward=True
    ),
    "small-step": Part(
        "Network of bench/small.toml, training step",
        "small",
        64,
        ("bf16",),
        ((THEIRS, ()), *BEST, (LUC, ()), *((LUC, settings) for _, settings in BEST)),
    ),
}


class Contender:
    def __init__(self, stack: ExitStack, python: str, asked: dict[str, Any]):
        self.name, self.options, self.seconds = asked["name"], asked["options"], list[float]()
        command = [python, str(HERE / "contenders.py"), json.dumps(asked)]
        self.process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(self.process.kill)
        self.facts: dict[str, Any] = json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} {self.options} ended early, exit code {self.process.wait()}")
        return line

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.seconds.append(float(self._line()))


def measure(part: Part, rounds: int, peer: str | None) -> dict[str, Any]:
    """Images per second of each, and the ratio of ours to it at equal FLOPs, as median with minimum and maximum."""
    with ExitStack() as stack:

        def start(name: str, options: tuple[str, ...], batch: int = part.batch) -> Contender:
            print(f"{part.title}: starting {name} {' '.join(options)}", file=sys.stderr)
            asked = {"name": name, "task": part.task, "batch": batch}
            asked["options"] = [*options, *(["forward"] if part.forward else [])]
            return Contender(stack, peer if name == LUC and peer else sys.executable, asked)

        rate = start("convolution", (), RATE_BATCH)
        all_ = [start(OWN, part.ours), *(start(*other) for other in part.others if peer or other[0] != LUC)]
        for _ in range(rounds):
            for contender in (rate, *all_):
                contender.step()
    own, passes = all_[0], 1 if part.forward else 3
    # The yardstick: FLOPs of a round's convolutions over their time.
    machine_rate = statistics.median(rate.facts["flops"] * RATE_BATCH / s for s in rate.seconds)
    rows = []
    for c in all_:
        work, equal = passes * c.facts["flops"] * part.batch, own.facts["flops"] / c.facts["flops"]
        ratios = [equal * theirs / mine for theirs, mine in zip(c.seconds, own.seconds, strict=True)]
        rows.append(
            {
                "name": c.name,
                "options": [o for o in c.options if o != "forward"],
                "images_per_second": round(part.batch / statistics.median(c.seconds), 2),
                "gflop_per_image": round(c.facts["flops"] * passes / 1e9, 4),
                "share_of_convolution_rate": round(work / statistics.median(c.seconds) / machine_rate, 3),
                "ours_over_it": [round(f(ratios), 2) for f in (statistics.median, min, max)],
                "first_seconds": c.facts["first_seconds"],
                "versions": c.facts["versions"],
                "seconds": [round(s, 4) for s in c.seconds],
            }
        )
    about = {"title": part.title, "batch": part.batch, "convolution_gflop_per_second": round(machine_rate / 1e9)}
    return about | {"rows": rows}


def table(result: dict[str, Any]) -> str:
    lines = []
    for part in result["parts"].values():
        lines += [
            f"**{part['title']}**, batches of {part['batch']}. The machine's bf16 3×3 convolutions: "
            f"{part['convolution_gflop_per_second']} GFLOP/s.",
            "",
            "| | settings | images/s | GFLOP an image | of the convolution rate | ours is faster by (min–max) |",
            "|---|---|---|---|---|---|",
        ]
        for row in part["rows"]:
            ratio, low, high = row["ours_over_it"]
            name = {OWN: "undiffuse", LUC: "denoising-diffusion-pytorch"}.get(row["name"], row["name"])
            lines.append(
                f"| {name} | {', '.join(row['options']) or 'default (float32)'} | {row['images_per_second']} "
                f"| {row['gflop_per_image']:.3g} | {100 * row['share_of_convolution_rate']:.0f} % "
                f"| {'' if row['name'] == OWN else f'{ratio:.2f}× ({low:.2f}–{high:.2f})'} |"
            )
        lines.append("")
    versions = {k: v for part in result["parts"].values() for row in part["rows"] for k, v in row["versions"].items()}
    ran = result["machine"]
    lines.append(
        f"Medians of {result['rounds']} rounds on {ran['processor']}, {ran['threads']} threads, {result['date']}; "
        f"{', '.join(f'{k} {v}' for k, v in sorted(versions.items()))}. Made by `{result['command']}`."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="the Python of the environment of denoising-diffusion-pytorch; left out without")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS], help="the others keep their figures")
    given = parser.parse_args()
    target = HERE / "speed.json"
    parts = json.loads(target.read_text())["parts"] if target.exists() else {}
    parts |= {name: measure(PARTS[name], given.rounds, given.peer) for name in given.parts}
    result = {
        "command": f"python bench/speed.py --rounds {given.rounds}{' --peer PEER/bin/python' if given.peer else ''}",
        "date": date.today().isoformat(),
        "seed": 0,
        "machine": machine(),
        "rounds": given.rounds,
        "parts": {name: parts[name] for name in PARTS if name in parts},
    }
    keep(target, result)
    publish("benchmarks.md", "speed", table(result))


if __name__ == "__main__":
    main()
