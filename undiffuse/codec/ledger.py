"""What files cost beside what they must: whole files against the bound of the model that made them.

For any denoiser a step between SNR_t and SNR_s costs D (SNR_s − SNR_t) mse_t / (2 ln 2) bits with equal variances, so
that the curve of mse over SNR has the bound of every chain (Section 4.3 of DDPM; in continuous time it is
D/(2 ln 2) ∫ mse dSNR, Kingma et al. 2021).
"""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from undiffuse.codec import tables
from undiffuse.codec.container import Header
from undiffuse.codec.stream import GROUP, Codec
from undiffuse.codec.tables import Cost, Node, ending, shortest, snr_of
from undiffuse.diffusion.likelihood import chain
from undiffuse.diffusion.process import Process
from undiffuse.figure import picture

FINE = 20_000  # points of the integral
LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {"optimize": True},
    "WebP": {"lossless": True, "quality": 100, "method": 6},
}
WAYS: dict[str, Cost] = {"equal": Node.kl_equal, "fitted": Node.kl_fitted, "by_value": Node.kl}


@dataclass(frozen=True)
class Bound:
    """Bits of an image that were received, and how far x̂_0 is off then (RMSE in grey levels), from noise to picture."""

    bits: Float[np.ndarray, "n"]
    rmse: Float[np.ndarray, "n"]

    def at(self, rmse: float) -> float:
        """Bits at a distortion; of one that is not met those of the nearest that is."""
        return float(np.interp(-np.log(rmse), -np.log(np.minimum.accumulate(self.rmse)), self.bits))


@dataclass(frozen=True)
class Curve:
    """The mean square of x_0 − x̂_0 over log-SNR, which rises; logarithmic between nodes."""

    logsnr: Float[np.ndarray, "n"]
    square: Float[np.ndarray, "n"]
    values: int

    @classmethod
    def of(cls, nodes: Sequence[Node], process: Process, values: int) -> "Curve":
        return cls(np.log(snr_of(process, nodes)), np.array([node.square for node in nodes]), values)

    def at(self, logsnr: Float[np.ndarray, "m"]) -> Float[np.ndarray, "m"]:
        return np.exp(np.interp(logsnr, self.logsnr, np.log(self.square)))

    def continuous(self) -> Bound:
        """Of infinitely many steps."""
        fine = np.linspace(self.logsnr[0], self.logsnr[-1], FINE)
        slope, square = self.at(fine) * np.exp(fine), self.at(fine)
        bits = np.concatenate([[0], np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(fine))])
        return Bound(bits * self.values / (2 * np.log(2)), 127.5 * square**0.5)

    def stepped(self, process: Process, steps: int, fitted: bool = False) -> Bound:
        """Of the chain of so many steps that `undiffuse nll` measures, up to where the decoder of L_0 begins.

        p has the variance of q, as in the paper, or the `fitted` one (see `plan`).
        """
        times = chain(process, steps).flip(0)[:-1]  # the last one is 0, where nothing is left to send
        logsnr = process.logsnr(times).numpy().clip(-700)
        square, snr = self.at(logsnr), np.exp(logsnr)
        rates = np.diff(snr) * square[:-1]
        bits = np.concatenate([[0], np.cumsum(np.log1p(rates) if fitted else rates)])
        return Bound(bits * self.values / (2 * np.log(2)), 127.5 * square**0.5)


def totals(nodes: Sequence[Node], process: Process, values: int, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Bits an image of the best lists of so many steps to where tables end: of equal, fitted and varying variance."""
    some, rows = nodes[: ending(nodes) + 1], list[dict[str, Any]]()
    for count in counts:
        row: dict[str, Any] = {"steps": count}
        for name, cost in WAYS.items():
            walk = shortest(some, process, values, count, cost)
            snr = snr_of(process, walk)
            row[name] = sum(cost(node, b - a, values) for node, (a, b) in zip(walk, pairwise(snr), strict=False))
        rows.append(row)
    return rows


def files(
    codec: Codec,
    images: UInt8[Tensor, "n c h w"],
    group: int = GROUP,
    tick: Callable[[int], None] | None = None,
    label: int | None = None,
) -> dict[str, Any]:
    """Bytes an image of one file of these images, with loss and without, and how far the former is off."""
    n, began = len(images), time.perf_counter()
    header, seen = Header(codec.plan.ident, codec.plan.steps, n, min(group, n), label=label), list[list[Tensor]]()
    groups = codec.groups(images, header, tick, seen)
    lossy = codec.packed(images, header, groups, [estimates[-1] for estimates in seen])
    took, last = time.perf_counter() - began, codec.plan.tail.step
    header = replace(header, steps=last, lossless=True)
    cut = [codec.first(each, last) for each in groups]
    exact = codec.packed(images, header, cut, [estimates[last] for estimates in seen])
    square = sum(
        float((127.5 * (x_0.cpu().double() + 1) - images[some.start : some.stop]).square().sum())
        for some, x_0 in zip(header.groups(), (estimates[-1] for estimates in seen), strict=True)
    )
    return {
        "data": lossy.data,
        "bytes": len(lossy.data) / n,
        "lossless": len(exact.data) / n,
        "rmse": float((lossy.shown.double() - images.double()).square().mean().sqrt()),
        "rmse_of_mean": (square / images.numel()) ** 0.5,
        "encode_seconds": took / n,
    }


def turns(codec: Codec, n: int, group: int = GROUP) -> int:
    """How often `compared` ticks."""
    return tables.NODES * -(-n // tables.BATCH) + codec.turns(n, group=group) + codec.turns(n, group=1)


def compared(
    codec: Codec,
    images: UInt8[Tensor, "n c h w"],
    tick: Callable[[int], None] | None = None,
    label: int | None = None,
) -> dict[str, float | int | None]:
    """What `undiffuse codec bench` prints: bytes an image, their ratio to both bounds, bits a value, and seconds."""
    values, steps = images[0].numel(), codec.model.process.steps or 1000
    nodes = tables.measured(codec.model, images, codec.told(label, len(images)), tick=tick)
    curve = Curve.of(nodes, codec.model.process, values)
    together = files(codec, images, GROUP, tick, label)
    apart = [files(codec, image[None], 1, tick, label) for image in images]
    single = {name: float(np.mean([row[name] for row in apart])) for name in together if name != "data"}
    both = {"archive": together, "single": single}
    bounds = {f"{steps}_steps": curve.stepped(codec.model.process, steps), "continuous": curve.continuous()}
    found: dict[str, float | int | None] = {"images": len(images), "rmse": together["rmse"]}
    found |= {f"{name}_bytes": row["bytes"] for name, row in both.items()}
    for name, bound in bounds.items():
        found[f"bound_{name}_bytes"] = ideal = bound.at(together["rmse_of_mean"]) / 8
        found[f"archive_over_{name}"] = together["bytes"] / ideal if ideal else None
    found |= {f"{name}_lossless_bits": 8 * row["lossless"] / values for name, row in both.items()}
    for kind, options in LOSSLESS.items():
        found[f"{kind.lower()}_lossless_bits"] = (
            8 * sum(size(image, kind, options) for image in images) / images.numel()
        )
    began = time.perf_counter()
    codec.decode(apart[0]["data"]).mean()
    return found | {"encode_seconds": single["encode_seconds"], "decode_seconds": time.perf_counter() - began}


def size(image: UInt8[Tensor, "c h w"], kind: str, options: dict[str, Any]) -> int:
    """Bytes of a file of that format."""
    buffer = io.BytesIO()
    picture(image).save(buffer, kind, **options)
    return len(buffer.getvalue())
