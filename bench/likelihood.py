"""What fewer bits come from: preset `fashion-mnist-likelihood`, and what it is without its parts, at equal time.

    python bench/likelihood.py [--seconds 240] [--seed 0] [NAME …]

Each candidate is trained on one thread for so many seconds of processor time, as in `bench/choose.py`. Measured is the
bound of 1,000 steps on the first 500 test images, from 40 stratified terms an image that are the same for all, so that
differences are surer than values. What is there for the same seconds, seed and processor is not done again. Writes
`bench/likelihood.json` and the table of docs/benchmarks.md.
"""

import tempfile
from pathlib import Path

import numpy as np
from trial import SMALL, Found, made, run

from undiffuse.data.source import open_source
from undiffuse.measure import nll
from undiffuse.training.trainer import Trainer

QUERY = nll.Nll(images=500, draws=40, steps=1000, batch=250)
BOTH = "the bound, both"
MUON = ["train.channels_last=true", "train.optimizer=muon"]


# The network of `bench/small.toml`, instead of the larger one of the preset that is shipped.
NETWORK = ["network.channels=48", "network.attention=[1]", "network.middle=attention", "network.modulation=shift"]


def bound(*settings: str) -> tuple[str, list[str]]:
    return "fashion-mnist-likelihood", [*MUON, *NETWORK, *settings]


PLAIN, FEW = 'parameterisation={name="v"}', "network.fourier=[]"
CANDIDATES: dict[str, tuple[str, list[str]]] = {
    "L_simple on the cosine table": (SMALL, MUON),
    "the bound": bound(PLAIN, FEW),
    "the bound, Fourier features": bound(PLAIN),
    "the bound, lattice": bound(FEW),
    BOTH: bound(),
    "both, Adam": bound("train.optimizer=adam"),
    "both, no attention": bound("network.attention=[]", "network.middle=plain"),
    "both, twice as wide below": bound("network.multipliers=[1,2]"),
    "both, 64 channels": bound("network.channels=64"),
    "both, two blocks a level": bound("network.blocks=2"),
    "both, a level of 16 channels at 28×28": bound(
        "network.patch=1", "network.multipliers=[0.3333,1,1]", "network.attention=[2]"
    ),
}


def measured(trainer: Trainer, folder: Path) -> Found:
    """Bits/dim of each image."""
    source = open_source("fashion-mnist", channels=1, split="test")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        terms = nll.terms_of(trainer.model(), source, QUERY, Path(scratch))
    return {"bits": terms.totals().round(5).tolist()}


def table(result: Found) -> str:
    lines = [
        "| seconds | trained for | weights | images seen | bits/dim | ± s.e. | more than both | ± s.e. | processor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    alike = ("budget", "seed", "processor")
    both = {tuple(map(row.get, alike)): np.array(row["bits"]) for row in result["rows"] if row["name"] == BOTH}
    for row in sorted(result["rows"], key=lambda row: (row["budget"], row["processor"], np.mean(row["bits"]))):
        bits, other = np.array(row["bits"]), both.get(tuple(map(row.get, alike)))
        more = "– | –" if other is None else f"{(bits - other).mean():+.3f} | {error(bits - other):.3f}"
        size = f"{row['weights'] / 1e6:.2f} M | {row['images']:,}"
        found = f"{bits.mean():.3f} | {error(bits):.3f} | {more}"
        lines.append(f"| {row['budget']:g} | {row['name']} | {size} | {found} | {row['processor']} |")
    return "\n".join([*lines, "", made(result)])


def error(bits: np.ndarray) -> float:
    return float(bits.std(ddof=1) / len(bits) ** 0.5)


if __name__ == "__main__":
    run(CANDIDATES, measured, table)
