"""Do coded states look to the network like true ones? And what do pictures look like that are drawn on from them?

    python bench/codec_states.py fashion-mnist --data fashion-mnist --work FOLDER

1,000 test images as archives of groups of 32. At the end of some layers x_t is compared with a draw of q(x_t | x_0) at
the same t: the mean square of x_0 − x̂_0, and the Fréchet distance of what the default solver draws on in 10 steps.
Beside it, for the plot of realism over rate: the distance of the mean, of realism 0.5, and of the ancestral chain. On
two extractors, against the training images as in `bench/choose.py`; features are kept in the folder. Writes
`bench/codec_states-NAME.json`, the table `codec-states-NAME` and a plot of docs/codec.md.
"""

import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from choose import EXTRACTORS, distances
from jaxtyping import Float, UInt8
from machine import TABLES, asking, keep, kept, machine, made_of, publish, shipped_codec
from torch import Tensor

from undiffuse.codec.container import Parsed, pack, parse
from undiffuse.codec.stream import Codec, Decoded
from undiffuse.figure import line_plot
from undiffuse.key import Key
from undiffuse.machine import disk
from undiffuse.model.model import to_float

HERE, IMAGES, STEPS = Path(__file__).parent, 1000, (8, 12, 20, 32)
WAYS = {"mean": None, "half": ("unipc-2", 10, 0.5), "flow": ("unipc-2", 10, 1.0), "ancestral": ("ancestral", 50, 1.0)}
TITLES = {"mean": "mean", "half": "realism 0.5", "flow": "flow", "ancestral": "ancestral"}
Row = dict[str, Any]
Images = UInt8[Tensor, "n c h w"]


def true_states(found: Decoded, truth: Float[Tensor, "n c h w"]) -> Decoded:
    """The same with draws of q(x_t | x_0) for states."""
    process = found.model.process
    parts = truth.split([len(chain.x) for chain, _ in found.chains])
    noises = Key(1).fold("states").rows(len(truth)).normal(*truth.shape[1:]).split([len(part) for part in parts])
    for (chain, step), x_0, noise in zip(found.chains, parts, noises, strict=True):
        chain.x = process.marginal(x_0, noise, chain.times[step].expand(len(x_0)))
    return found


def error(found: Decoded, truth: Float[Tensor, "n c h w"]) -> Float[Tensor, "n"]:
    """The mean square of x_0 − x̂_0 of each image."""
    return (found.estimate() - truth).square().flatten(1).mean(1)


def at(codec: Codec, images: Images, whole: Parsed, steps: int, folder: Path) -> Row:
    """Of a file of so many steps."""
    groups = [codec.first(group, steps) for group in whole.groups]
    data, truth = pack(replace(whole.header, steps=steps), groups, codec.plan), to_float(images)
    found = codec.decode(data)
    row: Row = {"steps": steps, "bytes": len(data) / len(images)}
    row["rmse"] = float((found.mean().double() - images.double()).square().mean().sqrt())
    coded = error(found, truth)
    for name, how in WAYS.items():
        row[name] = distances(found.mean() if how is None else found.drawn(*how), folder)
        print(steps, name, row[name], flush=True)
    real = true_states(found, truth)
    true = error(real, truth)
    row["log_ratio"] = float((coded.mean() / true.mean()).log())
    row["log_ratio_se"] = float(((coded - true) / true.mean()).std() / len(images) ** 0.5)
    row["flow_of_true"] = distances(real.drawn(*WAYS["flow"] or ()), folder)
    return row


def table(result: Row) -> str:
    heads = "steps | bytes an image | RMSE | ln of mse, coded over true | FD of drawn on, coded | true"
    shown = ("flow", "flow_of_true", "mean", "half", "ancestral")
    lines = [f"| {heads} | {' | '.join(TITLES[way] for way in shown[2:])} |", "|---|---|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        both = [f"{row[way]['classifier-28']:.3f} / {row[way]['efflite0']:.1f}" for way in shown]
        ratio = f"{row['log_ratio']:+.3f} ± {row['log_ratio_se']:.3f}"
        lines.append(f"| {row['steps']} | {row['bytes']:.1f} | {row['rmse']:.2f} | {ratio} | {' | '.join(both)} |")
    real = f"{result['real']['classifier-28']:.3f} / {result['real']['efflite0']:.1f}"
    said = f"FD-classifier / FD-EffLite0 of {IMAGES:,} test images as they are decoded; the images themselves: {real}."
    return "\n".join([*lines, "", f"{said} {result['machine']['processor']}, {result['date']}; `{result['command']}`."])


def plot(result: Row) -> str:
    rows = result["rows"]
    lines = [(TITLES[way], [row["bytes"] for row in rows], [row[way]["efflite0"] for row in rows]) for way in WAYS]
    lines.append(("the images", [rows[0]["bytes"], rows[-1]["bytes"]], [result["real"]["efflite0"]] * 2))
    return line_plot(lines, x="bytes an image", y="FD-EffLite0", title="Realism over rate", log_x=True)


def main() -> None:
    parser = asking(__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where features are kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    codec, images = shipped_codec(given.name, given.data, IMAGES)
    path, of = HERE / f"codec_states-{given.name}.json", made_of(given.name, TABLES + given.name, *EXTRACTORS)
    result: Row = kept(path)
    if result.get("made_of") != of:
        result = {"made_of": of, "rows": [], "real": distances(images, given.work)}
    whole = parse(codec.encode(images), codec.plan, codec.model.image_shape)
    for steps in STEPS:
        if all(row["steps"] != steps for row in result["rows"]):
            result["rows"].append(at(codec, images, whole, steps, given.work))
            result |= {"machine": machine(), "seed": 0, "date": date.today().isoformat()}
            result["command"] = f"python bench/codec_states.py {given.name} --data {given.data}"
            keep(path, result)
    publish("codec.md", f"codec-states-{given.name}", table(result))
    disk.write_atomic(HERE.parent / "docs" / "images" / f"codec-{given.name}-realism.svg", plot(result).encode())


if __name__ == "__main__":
    main()
