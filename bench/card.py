"""The first ten minutes on a card: what must hold there, and what a step costs.

    python bench/card.py [--device cuda] [--parts noise samples …]

Each part says what was expected and what was found, and takes less than ten minutes; the JSON is written after each, so
that it may be stopped, and a part that is there is not run again unless it is named. On a machine without a card it
runs what it can on the CPU. It needs the repository and an installed undiffuse. Writes `bench/card.json` and the tables
of docs/benchmarks.md.
"""

import argparse
import gc
import hashlib
import importlib.util
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import keep, kept, machine, publish
from speed import Contender

import undiffuse
from undiffuse import key
from undiffuse.codec import tables
from undiffuse.codec.stream import Codec
from undiffuse.data.pack import open_data
from undiffuse.key import Key
from undiffuse.machine.device import choose, name_of, versions
from undiffuse.model.model import to_float
from undiffuse.model.recipe import load_recipe
from undiffuse.network.attention import attend
from undiffuse.training.memory import needed
from undiffuse.training.trainer import Trainer

HERE = Path(__file__).parent
MODEL, DATA, SHAPES = "fashion-mnist", "fashion-mnist-sample", "procedural:shapes"
DIGITS = ["train", "digits", "-p", "digits", "--set", "train.sample_every=0"]
CIFAR = ["train", SHAPES, "-p", "cifar10", "--profile", "--set", "train.batch=128"]
WAYS = {
    "float32": ["precision=float32"],
    "tf32": ["precision=tf32"],
    "float16": ["precision=float16"],
    "bf16": ["precision=bf16"],
    "bf16, channels_last": ["precision=bf16", "channels_last=true"],
    "bf16, compiled": ["precision=bf16", "compile=true"],
    "bf16, compiled, channels_last": ["precision=bf16", "compile=true", "channels_last=true"],
}
Found = dict[str, Any]


def ran(*words: str | Path, limit: int = 300, several: int = 0) -> tuple[int, str]:
    """Exit code and what a command said, started several times by torchrun where that is asked."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(several)] if several else []
    command = [sys.executable, *start, "-m", "undiffuse", *map(str, words)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return 124, f"not done after {limit} s"
    return ended.returncode, ended.stdout + ended.stderr


def milliseconds(device: torch.device, work: Callable[[], object]) -> float:
    """The median time of what is done on the device, which is waited for."""
    taken, before, times = [], *((3, 20) if device.type == "cuda" else (0, 3))
    for _ in range(before + times):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken[before:])


def noise(device: torch.device) -> Found:
    """Noise is the same bits everywhere, by Triton and by torch; levels become numbers that round back to them."""
    levels, found = torch.arange(256, dtype=torch.uint8, device="cpu").reshape(1, 1, 16, 16), {}
    launch, by = key.drawn_by(device)
    for rows in (range(3), range(2**32 - 2, 2**32 + 3), [2**40, 7, 0]):
        keys = Key(0).fold("card").rows(torch.tensor(rows, dtype=torch.int64, device="cpu"))
        for count in (1001, 3072):
            there = keys.to(device).normal(count).cpu()
            found["equal"] = found.get("equal", True) and torch.equal(keys.normal(count), there)
    table, words = key.normal_table(device), Key(0).words
    for rows, shape in ((128, (3, 32, 32)), (64, (3, 256, 256))):
        given = words, range(rows), math.prod(shape), table, key.SQRT_HALF
        each = {"torch ms": milliseconds(device, lambda given=given: key.draw(*given))}
        if launch is not key.draw:
            each["Triton ms"] = milliseconds(device, lambda given=given: launch(*given))
            each["equal"] = torch.equal(launch(*given), key.draw(*given))
        found["×".join(map(str, (rows, *shape)))] = each
    far = (to_float(levels.to(device)).cpu() - to_float(levels)).abs().max()
    found |= {"by": by, "to_float differs by": float(far)}
    return {"expected": "Triton on a card; equal bits; 1.2e-7 at most", **found}


def samples(device: torch.device) -> Found:
    """Of 16 samples in 50 steps, at most a few levels."""
    found: Found = {"expected": "at most 2 levels"}
    for solver in ("ddim", "ancestral", "heun"):
        both = [undiffuse.load(MODEL, each).sample(16, 50, solver, 0).int() for each in ("cpu", str(device))]
        found[solver] = int((both[0] - both[1]).abs().max())
    return found


def drawing(device: torch.device) -> Found:
    """What --precision brings and costs: 256 samples in 50 steps of ddim, and bits/dim of 64 images."""
    found: Found = {"expected": "bf16 and float16 faster than float32; some levels; 1 % of bits/dim"}
    exact, exact_bits = None, 0.0
    for name in ("float32", "tf32", "bf16", "float16") if device.type == "cuda" else ("float32", "bf16"):
        model = undiffuse.load(MODEL, str(device)).variant(precision=name)
        model.sample(256, 2, "ddim", 0, 256)
        began = time.perf_counter()
        images = model.sample(256, 50, "ddim", 0, 256).float()
        each: Found = {"seconds": round(time.perf_counter() - began, 2)}
        bits = float(undiffuse.nll(model, DATA, images=64, draws=10)["bits_per_dim"])
        if exact is None:
            exact, exact_bits = images, bits
        else:
            off = (images - exact).abs()
            each |= {"levels off, most": int(off.max()), "mean": round(float(off.mean()), 3)}
        found[name] = each | {"bits/dim": round(bits, 4), "differs by": round(bits / exact_bits - 1, 5)}
    return found


def half(device: torch.device) -> Found:
    """Training in float16: steps that overflow are skipped until the scale of the loss fits; resume is exact."""
    found: Found = {"expected": "a finite loss near that of float32, equal weights"}
    with tempfile.TemporaryDirectory() as folder:
        for name, precision, lives in (
            ("float32", "float32", ("40",)),
            ("once", "float16", ("40",)),
            ("twice", "float16", ("20", "40")),
        ):
            out = Path(folder) / name
            how = ["--set", f"train.precision={precision}", "--set", "train.deterministic=true", "--set"]
            for steps in lives:
                code, said = ran(
                    *DIGITS, *how, "train.log_every=1", "--steps", steps, "--device", str(device), "-o", out
                )
                if code:
                    return found | {"failed": said[-300:]}
            rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            rows = [row for row in rows if "lr" in row]
            weights = (out / "step-000000040" / "model.safetensors").read_bytes()
            found[name] = {
                "loss": rows[-1].get("loss"),
                "skipped": sum(row.get("skipped", 0) for row in rows),
                "scale": rows[-1].get("loss_scale"),
                "weights": hashlib.sha256(weights).hexdigest()[:16],
            }
    return found


def estimate(device: torch.device) -> Found:
    """The memory that a run is said to need before step 0, and what its updates take."""
    found: Found = {"expected": "said within 10 % of taken"}
    for name, settings in (("float32", []), ("bf16", []), ("bf16", ["train.recompute=true"])):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        trainer = trainer_of(device, f"train.precision={name}", *settings)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            trainer.update(1000)
        wanted = needed(trainer)
        assert wanted is not None
        taken, said = torch.cuda.max_memory_allocated() - before, wanted.total
        found[" ".join([name, *settings])] = {"said GB": said / 1e9, "taken GB": taken / 1e9, "ratio": said / taken}
        del trainer
    return found


def rate(device: torch.device) -> Found:
    """The card's own rate in bf16, of a large product of matrices and of a convolution as in the network."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    x = torch.randn(128, 256, 16, 16, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    product = 2 * 8192**3 / milliseconds(device, lambda: a @ a) / 1e9
    flop = 2 * 128 * 16 * 16 * 256 * 256 * 9
    convolution = flop / milliseconds(device, lambda: torch.nn.functional.conv2d(x, w, padding=1)) / 1e9
    return {"expected": "a rate", "product TFLOP/s": product, "convolution TFLOP/s": convolution}


def likelihood(device: torch.device) -> Found:
    """bits/dim of 16 images, ten terms each."""
    both = [undiffuse.nll(undiffuse.load(MODEL, each), DATA, images=16, draws=10) for each in ("cpu", str(device))]
    found = [float(each["bits_per_dim"]) for each in both]
    return {"expected": "equal to 1e-4", "cpu": found[0], "here": found[1]}


def codec(device: torch.device) -> Found:
    """An archive, written here, and read here and on the CPU."""
    source = open_data(DATA, (28, 28), 1)
    images = source.gather(torch.arange(len(source)))[0]
    models = [undiffuse.load(MODEL, each) for each in (str(device), "cpu")]
    here, there = (Codec(model, tables.of(model)) for model in models)
    here.encode(images, steps=2)
    times = [time.perf_counter()]
    written = here.write(images)
    times.append(time.perf_counter())
    own = here.decode(written.data)
    times.append(time.perf_counter())
    other = there.decode(written.data).estimate()
    return {
        "expected": "what was written, and on the CPU within 0.05 grey levels",
        "images": len(images),
        "bytes": len(written.data),
        "write, s": round(times[1] - times[0], 2),
        "read, s": round(times[2] - times[1], 2),
        "as written": torch.equal(own.mean(), written.shown),
        "CPU, levels off": 127.5 * float((other - own.estimate()).square().mean().sqrt()),
    }


def trainer_of(device: torch.device, *settings: str) -> Trainer:
    recipe = load_recipe("cifar10", ["train.batch=128", *settings])
    return Trainer(recipe, recipe.model((3, 32, 32)), open_data(SHAPES, (32, 32), 3), device)


def waits(device: torch.device) -> Found:
    """How often an update of the paper's CIFAR-10 network waits for the card, and how many kernels it starts."""
    trainer = trainer_of(device, "train.precision=bf16")
    for _ in range(3):
        trainer.update(1000)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.update(1000)
    torch.cuda.set_sync_debug_mode("default")
    where = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in said)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        trainer.update(1000)
        torch.cuda.synchronize()
    events = profiler.key_averages()
    kernels = sum(event.count for event in events if event.device_type == torch.autograd.DeviceType.CUDA)
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:12]
    return {
        "expected": "1 wait",
        "waits": len(said),
        "where": dict(where.most_common()),
        "kernels": kernels,
        "device ms": sum(event.self_device_time_total for event in events) / 1e3,
        "longest": {event.key[:80]: [event.count, round(event.self_device_time_total)] for event in longest},
    }


def attention(device: torch.device) -> Found:
    """Attention over 256 positions with 256 channels, as in the CIFAR-10 network, beside its formula in float64."""
    q, k, v = (torch.randn(128, 256, 256, device=device, dtype=torch.bfloat16) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        out = attend(*(each.transpose(1, 2).contiguous().transpose(1, 2) for each in (q, k, v)))
        torch.cuda.synchronize()
    exact = torch.softmax(q.double() @ k.double().transpose(1, 2) / 16, -1) @ v.double()
    names = [
        event.key[:60] for event in profiler.key_averages() if re.search("sdpa|flash|fmha|gemm|softmax", event.key)
    ]
    far = float((out.double() - exact).norm() / exact.norm())
    return {"expected": "a fused kernel (flash, efficient, cudnn)", "kernels": names, "relative error": far}


def resume(device: torch.device) -> Found:
    """40 steps at once, and 20 and 20 more: equal bits are promised with train.deterministic."""
    found: Found = {"expected": "equal with deterministic"}
    for deterministic in ("true", "false"):
        with tempfile.TemporaryDirectory() as folder:
            hashes = []
            for name, lives in (("once", ("40",)), ("twice", ("20", "40"))):
                out = Path(folder) / name
                for steps in lives:
                    how = ["--set", f"train.deterministic={deterministic}", "--steps", steps, "--device", str(device)]
                    code, said = ran(*DIGITS, *how, "-o", str(out))
                    if code:
                        return found | {"failed": said[-300:]}
                weights = (out / "step-000000040" / "model.safetensors").read_bytes()
                hashes.append(hashlib.sha256(weights).hexdigest()[:16])
            found[f"deterministic {deterministic}"] = hashes
    return found


def processes(device: torch.device) -> Found:
    """More processes than cards train on the CPU, and are refused in one line on cards."""
    found: Found = {"expected": "code 0 on cpu; one line on cards (torchrun's own code is 1)"}
    more = torch.cuda.device_count() + 1
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cpu", "cuda"):
            code, said = ran(*DIGITS, "--steps", "3", "--device", name, "-o", f"{folder}/{name}", several=more)
            lines = [line for line in said.splitlines() if line.startswith("undiffuse: ")]
            found[name] = {"code": code, "said": lines[:2]}
    code, said = ran("doctor", "--json")
    return found | {"doctor": code}


def speed(way: str, device: torch.device) -> Found:
    """Images a second of the paper's CIFAR-10 network, batch 128, by `train --profile`."""
    with tempfile.TemporaryDirectory() as folder:
        how = [word for setting in WAYS[way] for word in ("--set", f"train.{setting}")]
        code, said = ran(*CIFAR, *how, "--device", str(device), "-o", f"{folder}/run", limit=500)
        path = Path(folder) / "run" / "profile.json"
        return json.loads(path.read_text()) if path.exists() else {"code": code, "said": said[-300:]}


def peer(device: torch.device) -> Found:
    """A step of our network and of diffusers' of the same shape, batch 128, in turns; the median of 20 rounds."""
    found: Found = {"expected": "ours in less time, plain and compiled"}
    if importlib.util.find_spec("diffusers") is None:
        return found | {"left out": "diffusers is not installed"}
    ways = [(name, options) for options in (("bf16",), ("bf16", "compile")) for name in ("ours", "diffusers")]
    with ExitStack() as stack:
        every = [
            Contender(stack, sys.executable, {"name": name, "task": "cifar10", "batch": 128, "options": [*how, "cuda"]})
            for name, how in ways
        ]
        for _ in range(25):
            for one in every:
                one.step()
    for one, (name, how) in zip(every, ways, strict=True):
        found[f"{name} {' '.join(how)}, images/s"] = round(128 / statistics.median(one.seconds[5:]))
    return found


def memory(device: torch.device) -> Found:
    """Two steps of the paper's 256² network, batch 64, with a micro-batch that fits."""
    how = [
        "--steps",
        "2",
        "--set",
        "train.micro_batch=auto",
        "--set",
        "train.precision=bf16",
        "--set",
        "train.sample_every=0",
    ]
    with tempfile.TemporaryDirectory() as folder:
        code, said = ran(
            "train", SHAPES, "-p", "celebahq-256", *how, "--device", str(device), "-o", f"{folder}/run", limit=200
        )
    return {
        "expected": "code 0",
        "code": code,
        "said": [line for line in said.splitlines() if line.startswith("micro-batches")],
    }


EVERY = (
    noise,
    samples,
    likelihood,
    codec,
    drawing,
    resume,
    half,
    processes,
    waits,
    attention,
    rate,
    estimate,
    memory,
    peer,
)
PARTS: dict[str, Callable[[torch.device], Found]] = {each.__name__: each for each in EVERY}
PARTS |= {f"speed, {way}": partial(speed, way) for way in WAYS}
CARD_ONLY = PARTS.keys() - {"noise", "samples", "likelihood", "codec", "drawing", "resume"}


def short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {short(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(short, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def table(result: Found) -> str:
    lines = ["| part | expected | found |", "|---|---|---|"]
    for name, found in result["parts"].items():
        if not name.startswith("speed"):
            rest = {
                key: value for key, value in found.items() if key not in ("expected", "seconds", "longest", "where")
            }
            lines.append(f"| {name} | {found.get('expected', '')} | {short(rest)} |")
    speeds = {name: result["parts"].get(f"speed, {name}") for name in WAYS}
    if any(speeds.values()):
        lines += [
            "",
            "| CIFAR-10, batch 128 | images/s | ms a step | TFLOP/s | of the rate in bf16 | memory at the peak, GB | "
            "800,000 steps, hours |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in WAYS:
            each = speeds[name] or {}
            if "images_per_second" in each:
                rate, peak = each["gflop_per_second"] / 1e3, each["peak_memory_mb"] / 1e3
                step = each["milliseconds_per_step"]
                most = result["parts"].get("rate", {}).get("product TFLOP/s")
                share, hours = "–" if most is None else f"{rate / most:.0%}", 800_000 * step / 3.6e6
                lines.append(
                    f"| {name} | {each['images_per_second']:,.0f} | {step:.1f} | {rate:.1f} | {share} | {peak:.1f} | "
                    f"{hours:.1f} |"
                )
    ran_on = f"{result['device']}, torch {result['machine']['torch']}, CUDA {result['versions'].get('cuda')}"
    return "\n".join([*lines, "", f"{ran_on}; {result['date']}. Made by `{result['command']}`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="these, also where they are there already")
    parser.add_argument("--out", type=Path, default=HERE / "card.json")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    given = parser.parse_args()
    result = {"parts": {}, **kept(given.out)}
    if not given.table:
        device = choose(given.device)
        if device.type != "cuda":
            print(f"there is no card here: {', '.join(sorted(CARD_ONLY))} are left out")
        here = {"device": name_of(device), "versions": versions(device)}
        there = {name: result.get(name, value) for name, value in here.items()}
        if there != here:  # a table has one machine
            raise SystemExit(f"{given.out} is of {there}, and this is {here}; give another --out")
        result |= {"command": "python bench/card.py", "date": date.today().isoformat(), "machine": machine(), **here}
        for name in given.parts or [name for name in PARTS if name not in result["parts"]]:
            if device.type != "cuda" and name in CARD_ONLY:
                continue
            began = time.monotonic()
            result["parts"][name] = PARTS[name](device) | {"seconds": round(time.monotonic() - began, 1)}
            keep(given.out, result)
            print(name, short(result["parts"][name]), flush=True)
    if given.out.resolve().parent == HERE and result.get("versions"):
        publish("benchmarks.md", "card", table(result))


if __name__ == "__main__":
    main()
