"""Measures a shipped model: bits/dim, rate-distortion, samples; writes the JSON beside this script, the pictures of
docs/images and its table of docs/benchmarks.md.

    python bench/shipped.py fashion-mnist --whole 500 --draws 4 --run RUN

`--run` names the training run of the model; its log is thinned to one line per 100 steps and kept beside the JSON.
`--then K RUN` names the K-th run that went on from the weights of the one before it, with `--init`.
`--data` is where the data is, if it has no name. Each measurement is resumable: run the same command again after an
interruption.
"""

import argparse
import itertools
import json
import time
from datetime import date
from pathlib import Path

import numpy as np
from machine import keep, kept, machine, made_of, publish

import undiffuse
from undiffuse.data.source import open_source
from undiffuse.figure import grid, line_plot, png
from undiffuse.machine import disk, log
from undiffuse.measure import nll
from undiffuse.model import model
from undiffuse.view import explore

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"


def measure(loaded: model.Model, name: str, data: str, whole: int, draws: int, cache: Path) -> dict[str, object]:
    """bits/dim on both splits: the whole chain on the first `whole` images, stratified t on all of them."""
    result: dict[str, object] = {}
    for split in ("test", "train"):
        source = open_source(data, channels=loaded.image_shape[0], split=split)
        for how, query in {
            "whole_chain": nll.Nll(images=whole, batch=100),
            "stratified": nll.Nll(draws=draws, batch=1000),
        }.items():
            started, what = time.monotonic(), f"{split} {how}"
            with log.progress(nll.evaluations(loaded, source, query), what, True) as bar:
                terms = nll.terms_of(loaded, source, query, cache / f"{split}-{how}", bar.advance)
            entry = {**terms.summary(), "evaluations_per_image": terms.bits.shape[1]}
            entry["seconds"] = round(time.monotonic() - started, 1)
            if how == "whole_chain" and split == "test":
                result["rate_distortion"] = nll.table(terms)
                svg = (cache / f"{split}-{how}" / "rate-distortion.svg").read_bytes()
                disk.write_atomic(IMAGES / f"{name}-rate-distortion.svg", svg)
            result[f"{split}_{how}"] = entry
    return result


def pictures(loaded: model.Model, name: str) -> dict[str, object]:
    """The sample grid (all steps; with classes, as many of each), and progressive generation."""
    told = None
    if loaded.classes is not None:
        told = [number for number in loaded.classes.trained for _ in range(64 // len(loaded.classes.trained))]
    started = time.monotonic()
    with log.progress(len(loaded.times()) - 1, "samples", True) as bar:
        samples = loaded.sample(64 if told is None else len(told), solver="ancestral", label=told, progress=bar.advance)
    seconds = round(time.monotonic() - started, 1)
    disk.write_atomic(IMAGES / f"{name}-samples.png", png(grid(samples, columns=16, scale=2)))
    steps, _ = explore.progressive(loaded, 6, slots=16, solver="ancestral")
    explore.write_grid(steps, IMAGES / f"{name}-progressive.png")
    return {"images": len(samples), "steps": len(loaded.times()) - 1, "seconds": seconds, "seed": 0}


def log_of(name: str, number: int = 0) -> Path:
    """Where the thinned log of the first training run is kept, or of the one of this number that went on from it."""
    return HERE / f"shipped-{name}{f'-then-{number}' if number else ''}.log.jsonl"


def keep_log(run: Path, place: Path) -> dict[str, object]:
    """The thinned log of a training run, and what it cost."""
    rows = log.read_rows(run / "log.jsonl")
    losses = [row for row in rows if "loss" in row]
    kept = [row for row in rows if "held_out" in row or row["step"] % 100 == 0]
    disk.write_atomic(place, "".join(json.dumps(row) + "\n" for row in kept).encode())
    held = [(row["step"], row["held_out"]) for row in rows if "held_out" in row]
    last = held[-1][0]
    before = float(np.interp(0.8 * last, *zip(*held, strict=True)))  # between the two records around it
    images = [b["images"] - a["images"] for a, b in zip([{"images": 0}, *losses], losses, strict=False)]
    seconds = sum(n / row["images_per_second"] for n, row in zip(images, losses, strict=True))
    return {
        "steps": last,
        "images_seen": losses[-1]["images"],
        "seconds": round(seconds),
        "held_out_loss": held[-1][1],
        "held_out_loss_at_four_fifths": before,
        "fall_over_the_last_fifth": round(1 - held[-1][1] / before, 5),
    }


def then(name: str, before: list[dict], number: str, run: str) -> list[dict]:
    """What all runs cost that went on from the first."""
    if not 1 <= int(number) <= len(before) + 1:
        raise SystemExit(f"--then {number}: {name} has {len(before)} such runs; give 1 to {len(before) + 1}")
    return [*before[: int(number) - 1], keep_log(Path(run), log_of(name, int(number))), *before[int(number) :]]


def curve(name: str) -> None:
    """The plot of the held-out loss, over the steps of all runs where one went on from the other."""
    steps, losses = list[int](), list[float]()
    for place in itertools.takewhile(Path.exists, (log_of(name, number) for number in itertools.count())):
        before = steps[-1] if steps else 0
        held = [row for row in log.read_rows(place) if "held_out" in row]
        steps += [before + row["step"] for row in held]
        losses += [row["held_out"] for row in held]
    svg = line_plot([("held out", steps, losses)], x="step", y="loss", title="Held-out loss")
    disk.write_atomic(IMAGES / f"{name}-loss.svg", svg.encode())


def words(training: dict) -> str:
    return (
        f"{training['steps']:,} steps, {training['images_seen']:,} images seen, {training['seconds']:,} s; held-out "
        f"loss {training['held_out_loss']:.5f}, which fell by {100 * training['fall_over_the_last_fifth']:.2f} % over "
        "the last fifth (from a value at four fifths that lies between two records of the log)."
    )


def table(result: dict) -> str:
    """The generated block of docs/benchmarks.md."""
    lines = [
        "| split | how | images | bits/dim | ± s.e. | prior | rate | decoder |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in ("test_whole_chain", "train_whole_chain", "test_stratified", "train_stratified"):
        e = result["bits_per_dim"][key]
        how = "all terms" if "whole" in key else f"{e['evaluations_per_image']} stratified terms"
        lines.append(
            f"| {key.split('_')[0]} | {how} | {e['images']:,} | {e['bits_per_dim']:.3f} | {e['standard_error']:.3f} "
            f"| {e['prior']:.5f} | {e['rate']:.3f} | {e['decoder']:.3f} |"
        )
    lines += ["", "| reverse step | rate (bits/dim) | RMSE [0, 255] |", "|---|---|---|"]
    for row in result["bits_per_dim"]["rate_distortion"]:
        lines.append(f"| {row['step']} | {row['rate']:.5f} | {row['rmse']:.3f} |")
    lines += [
        "",
        f"Training: {words(result['training'])}",
        *(f"Then, from those weights: {words(each)}" for each in result["then"]),
        f"Sampling 64 images in {result['samples']['steps']} steps: {result['samples']['seconds']} s.",
        f"Machine: {result['machine']['processor']}, {result['machine']['threads']} threads, torch "
        f"{result['machine']['torch']}, Python {result['machine']['python']}; {result['date']}. "
        f"Made by `{result['command']}`.",
        *(["", result["note"]] if result["note"] else []),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a shipped model")
    parser.add_argument("--data", help="the data, if the set has not the name of the model")
    parser.add_argument("--whole", type=int, default=500, help="images of each split measured with every term")
    parser.add_argument("--draws", type=int, default=4, help="stratified terms an image, on the whole splits")
    parser.add_argument("--run", type=Path, help="the training run, for its log; kept from the last time unless given")
    parser.add_argument("--then", nargs=2, metavar=("K", "RUN"), help="the K-th that went on from it; kept likewise")
    parser.add_argument("--cache", type=Path, default=Path("runs/nll"), help="where terms are kept")
    parser.add_argument(
        "--note", help="anything a reader of the figures must know; kept from the last time unless given"
    )
    given = parser.parse_args()
    name, data = given.name, given.data or given.name
    target = HERE / f"shipped-{name}.json"
    before = kept(target)
    loaded = undiffuse.load(name)
    result = {
        "command": f"python bench/shipped.py {name} --data {data} --whole {given.whole} --draws {given.draws}",
        "date": date.today().isoformat(),
        "machine": machine(),
        "made_of": made_of(name),
        "model": {"parameters": loaded.parameters(), "train_command": f"undiffuse train {data} -p {name}"},
        "seed": 0,
        "note": given.note or before.get("note", ""),
        "training": keep_log(given.run, log_of(name)) if given.run else before.get("training"),
        "then": then(name, before.get("then", []), *given.then) if given.then else before.get("then", []),
        "samples": pictures(loaded, name),
        "bits_per_dim": measure(loaded, name, data, given.whole, given.draws, given.cache / loaded.digest()[:16]),
    }
    curve(name)
    keep(target, result)
    publish("benchmarks.md", name, table(result))


if __name__ == "__main__":
    main()
