"""What the processor does beside the network, for a sampling step, a term of the bound and an update, and did before;
and whether a CPU draws faster in bf16.

    python bench/overhead.py [--before COMMIT] [--rounds 5]

Each round measures both commits in fresh processes, one after the other, on one thread, in processor time. "Beside" is
a step whose network returns its input. Writes `bench/overhead.json` and the table of docs/benchmarks.md.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
BEFORE = "c3c0374"  # the last commit that sent each coefficient of a step by itself
STEPS, UPDATES, REPEATS = 60, 10, 5
PAPER = (("cifar10", (3, 32, 32), 8),)
ROWS = ("ddim", "ancestral", "heun", "a term of the bound")


def milliseconds(run: Callable[[], object], count: int, repeats: int = REPEATS) -> float:
    found = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        found.append(1000 * (time.process_time() - began) / count)
    return median(found)


def measure() -> dict[str, float]:
    """Of the undiffuse that is imported."""
    import torch

    from undiffuse.data.pack import open_data
    from undiffuse.diffusion.likelihood import bound
    from undiffuse.key import Key
    from undiffuse.model.recipe import load_recipe
    from undiffuse.training.trainer import Trainer

    class Still(torch.nn.Module):
        def forward(self, x: Any, time: Any, cond: Any = None) -> Any:
            return x

    recipe = load_recipe("digits", ["train.precision=float32"])
    trainer = Trainer(recipe, recipe.model((1, 8, 8)), open_data("digits", (8, 8), 1))
    for _ in range(3):
        trainer.update(1000)
    updates = milliseconds(lambda: [trainer.update(1000) for _ in range(UPDATES)], UPDATES)
    found = {"an update of preset digits": updates}
    model, keys = trainer.model(), Key(0).rows(4)
    for beside in (False, True):
        if beside:
            model.denoiser.network = Still()
        for name in ROWS[:3]:
            sampler, times = model.sampler(name), model.times(STEPS)
            model.chain(keys, times, sampler)
            label = f"{name}, beside" if beside else name
            found[label] = milliseconds(lambda sampler=sampler, times=times: model.chain(keys, times, sampler), STEPS)
    x_0 = torch.zeros(4, *model.image_shape, dtype=torch.float32)
    found[f"{ROWS[3]}, beside"] = milliseconds(lambda: bound(model.denoiser, x_0, keys, steps=STEPS), STEPS)
    return found


def halves() -> dict[str, list[float]]:
    """Seconds of four steps of ddim in float32 and bf16, taken in turns, of networks with random weights."""
    import torch

    from undiffuse.model.load import from_weights
    from undiffuse.model.recipe import load_recipe
    from undiffuse.model.weights import weights_of

    found = {}
    for preset, shape, images in (("fashion-mnist", (1, 28, 28), 64), ("emoji-32", (3, 32, 32), 32)) + PAPER:
        torch.manual_seed(0)
        config = load_recipe(preset).model(shape)
        model = from_weights(config, weights_of(config.build(clip=True).network), {})
        ways = [model.variant(precision=name) for name in ("float32", "bf16")]
        rounds = [[milliseconds(partial(way.sample, images, 4, "ddim"), 1, 1) for way in ways] for _ in range(4)]
        found[f"{preset}, {images} images"] = [median(each[i] for each in rounds[1:]) / 1000 for i in range(2)]
    return found


def measured(root: Path) -> dict[str, float]:
    where = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "overhead.py"), "--here"]
    return json.loads(subprocess.run(command, env=where, check=True, capture_output=True, text=True).stdout)


def table(result: dict[str, Any]) -> str:
    before, after = result["before"], result["after"]
    lines = ["| | before (ms) | now (ms) | times |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {before[name]:.3g} | {after[name]:.3g} | {before[name] / after[name]:.2f} |" for name in after
    ]
    ran = result["machine"]
    made = f"{ran['processor']}, one thread, torch {ran['torch']}, {result['date']}"
    lines += ["", f"Before is commit {result['commit']}.", ""]
    lines += ["| four steps of ddim | float32 (s) | bf16 (s) |", "|---|---|---|"]
    lines += [f"| {name} | {exact:.3g} | {half:.3g} |" for name, (exact, half) in result["halves"].items()]
    return "\n".join([*lines, "", f"{made}; made by `{result['command']}`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure()))
        return
    import torch
    from machine import keep, machine, publish

    torch.set_num_threads(1)
    archive = subprocess.run(
        ["git", "archive", given.before, "undiffuse"], cwd=HERE.parent, check=True, capture_output=True
    )
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        for _ in range(given.rounds):
            rounds.append((measured(Path(folder)), measured(HERE.parent)))
    sides = [[each[i] for each in rounds] for i in range(2)]
    before, after = ({name: median(each[name] for each in side) for name in side[0]} for side in sides)
    result = {
        "command": f"python bench/overhead.py --before {given.before} --rounds {given.rounds}",
        "date": date.today().isoformat(),
        "seed": 0,
        "machine": machine(),
        "commit": given.before,
        "rounds": given.rounds,
        "before": before,
        "after": after,
        "halves": halves(),
    }
    keep(HERE / "overhead.json", result)
    publish("benchmarks.md", "overhead", table(result))


if __name__ == "__main__":
    main()
