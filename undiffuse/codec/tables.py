"""Making the tables of a model's codec: x̂_0 is measured from noise to picture, and one dynamic programme chooses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log, log2, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from undiffuse.codec import tailfit
from undiffuse.codec.chain import hats, refuse_computing
from undiffuse.codec.container import Group, Header, parse_header
from undiffuse.codec.plan import KNOTS, MEMORY, SCALES, WASTE, Plan
from undiffuse.codec.stream import GROUP, Codec
from undiffuse.codec.tail import Tail
from undiffuse.config import parse
from undiffuse.diffusion.grid import LogSnr
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import Process
from undiffuse.errors import Corrupt, UsageError
from undiffuse.key import Key
from undiffuse.machine.tensorfile import refuse_newer
from undiffuse.model import fitted
from undiffuse.model.load import load, shipped
from undiffuse.model.model import Model, to_float
from undiffuse.network.base import NOTHING, Conditioning

NODES, IMAGES, STEPS, BATCH = 64, 256, 32, 64
FIRST, LAYER = 8, 4  # steps of the first layer, which has no scale, and of the others, at most
EARLY = 30.0  # bits; see `shortest`
FLOOR = 0.05  # of h: no value is sure
END = 0.6  # grey levels that x̂_0 is off at the end: below it the bits do little
CODED = 64  # images that are coded, for how many bits are usual and for the lossless end
ENDS = 7  # of the last steps, at which that may begin


@dataclass(frozen=True)
class Node:
    """What was measured at a time: the mean square of x_0 − x̂_0, h at the knots, and how often each is met."""

    t: float
    square: float
    shape: tuple[float, ...]
    mass: tuple[float, ...]

    def kl(self, rise: float, values: int, scale: int = 0) -> float:
        """Bits of an image for a step on which the SNR rises by so much."""
        v = self.square * 2 ** (scale / 4) * np.array(self.shape)
        return values / 2 * float(np.array(self.mass) @ np.log2(1 + rise * v))

    def kl_fitted(self, rise: float, values: int) -> float:
        """The same without h."""
        return values / 2 * log2(1 + rise * self.square)

    def kl_equal(self, rise: float, values: int) -> float:
        """The same where p has the variance of q, as in Eq. 5 of DDPM."""
        return values * rise * self.square / (2 * log(2))


@torch.no_grad()
def measured(
    model: Model,
    images: UInt8[Tensor, "n c h w"],
    cond: Conditioning = NOTHING,
    count: int = NODES,
    seed: int = 0,
    batch: int = BATCH,
    tick: Callable[[int], None] | None = None,
) -> list[Node]:
    """At `count` times, even in log-SNR, from the start of a chain to t_min: so many evaluations an image."""
    found = list[Node]()
    keys = Key(seed).fold("codec", "tables").rows(len(images), model.device)
    for number, t in enumerate(LogSnr().spread(model.process, count)):
        sums = torch.zeros(2, KNOTS, dtype=F64, device="cpu")  # of hats, and of hats times squares
        for i in range(0, len(images), batch):
            x_0 = to_float(images[i : i + batch].to(model.device))
            at, eps = t.expand(len(x_0)), keys[i : i + batch].fold(number).normal(*x_0.shape[1:])
            told = cond.at(slice(i, i + batch)).to(model.device)
            seen = model.denoiser(model.process.marginal(x_0, eps, at), at, told).x_0
            square = (seen - x_0).square().cpu().to(F64).flatten()
            below, share = (each.flatten() for each in hats(seen.cpu().to(F64)))
            for row, weight in enumerate((torch.ones_like(square), square)):
                sums[row].index_add_(0, below, weight * (1 - share)).index_add_(0, below + 1, weight * share)
            if tick is not None:
                tick(1)
        found.append(_node(float(t), sums, len(images) * prod(model.image_shape)))
    return found


def _node(t: float, sums: Tensor, total: int) -> Node:
    mass, mean = sums[0] / total, sums[1].sum() / total
    shape = torch.where(sums[0] > 0, sums[1] / sums[0].clamp(min=1e-12) / mean, 1).clamp(min=FLOOR)
    return Node(t, float(mean), tuple((shape / (mass @ shape)).tolist()), tuple(mass.tolist()))


def snr_of(process: Process, nodes: Sequence[Node]) -> list[float]:
    """At the time of each."""
    return process.logsnr(torch.tensor([node.t for node in nodes], dtype=F64, device="cpu")).exp().tolist()


Cost = Callable[[Node, float, int], float]


def shortest(
    nodes: Sequence[Node],
    process: Process,
    values: int,
    steps: int,
    cost: Cost = Node.kl,
    early: float | None = None,
) -> list[Node]:
    """The nodes that `steps` steps, from the first one to the last one, walk in the fewest bits.

    With `early`, a bit counts for less the more have been sent before, 1 / (early + bits), so that the first part of a
    file is near its bound as well as the whole.
    """
    snr, n = snr_of(process, nodes), len(nodes)
    sent = np.cumsum([0.0, *(node.kl(b - a, values) for node, (a, b) in zip(nodes, pairwise(snr), strict=False))])
    costs = np.full((n, n), np.inf)
    for i, node in enumerate(nodes):
        weight = 1.0 if early is None else 1 / (early + sent[i])
        for j in range(i + 1, n):
            costs[i, j] = weight * cost(node, snr[j] - snr[i], values)
    least, came = np.full(n, np.inf), list[np.ndarray]()
    least[0] = 0
    for _ in range(min(steps, n - 1)):
        sums = least[:, None] + costs
        came.append(sums.argmin(0))
        least = sums.min(0)
    path = [n - 1]
    for before in reversed(came):
        path.append(int(before[path[-1]]))
    return [nodes[i] for i in reversed(path)]


def ending(nodes: Sequence[Node]) -> int:
    """The first node at which x̂_0 is off by no more than END, or the last one."""
    return next((i for i, node in enumerate(nodes) if 127.5 * node.square**0.5 <= END), len(nodes) - 1)


def layers(steps: int) -> tuple[int, ...]:
    """Steps of each layer; the last step has a scale of its own, as it costs the most bits."""
    sizes, each = [min(FIRST, max(1, steps // 4))], min(LAYER, max(2, steps // 8))
    while (left := steps - sum(sizes)) > 0:
        sizes.append(min(each, left - 1) if left > 1 else 1)
    return tuple(sizes)


def plan(
    nodes: Sequence[Node],
    process: Process,
    weights: str,
    images: int,
    values: int,
    steps: int = STEPS,
    memory: int = MEMORY,
) -> Plan:
    """The tables of a chain that ends where x̂_0 is off by END, or at the last node."""
    end = ending(nodes)
    if end < steps:
        raise UsageError(f"{steps} steps are more than the {end} times that were measured; give fewer")
    waste = WASTE[memory]
    *walk, last = shortest(nodes[: end + 1], process, values, steps, early=EARLY)
    rises = [b - a for a, b in pairwise(snr_of(process, [*walk, last]))]
    costs = [
        [node.kl(rise, values, k) for k in range(-SCALES, SCALES + 1)] for rise, node in zip(rises, walk, strict=True)
    ]
    return Plan(
        weights,
        images,
        values,
        memory,
        tuple(node.t for node in [*walk, last]),
        tuple(node.square for node in [*walk, last]),
        tuple(node.shape for node in [*walk, last]),
        tuple(tuple(round((1 + waste) * each) for each in row) for row in costs),
        layers(steps),
        tuple(row[SCALES] for row in costs),
        usual=0,
        tail=tailfit.guess(steps, last.square, last.shape),
    )


def refuse(model: Model, steps: int, memory: int) -> None:
    """UsageError for what `fit` cannot do."""
    model.refuse_distilled("a codec")
    model.refuse_guided("a codec")
    refuse_computing(model)
    if model.config.parameterisation.needs_table:
        raise UsageError("mu prediction holds for steps of 1/T only, and files take few; train eps, x0 or v")
    if not 1 <= steps < NODES:
        raise UsageError(f"{steps} steps are not possible; give 1 to {NODES - 1}")
    if memory not in WASTE:
        raise UsageError(f"memory = {memory} is not possible; give {', '.join(map(str, WASTE))}")


def cost(images: int = IMAGES) -> str:
    """What `fit` takes, in words."""
    return f"{NODES} evaluations of each of {images} images"


def turns(images: int, steps: int = STEPS, batch: int = BATCH) -> int:
    """How often `fit` ticks."""
    return NODES * -(-images // batch) + steps * -(-min(images, CODED) // GROUP)


def fit(
    model: Model,
    images: UInt8[Tensor, "n c h w"],
    steps: int = STEPS,
    memory: int = MEMORY,
    tick: Callable[[int], None] | None = None,
    cond: Conditioning = NOTHING,
) -> Plan:
    """What `undiffuse codec fit` keeps, from images like those that the model was trained on.

    `cond` is what files will say of them: their classes, if the model was never trained without. Raises UsageError.
    """
    refuse(model, steps, memory)
    found, values = measured(model, images, cond, tick=tick), prod(model.image_shape)
    made = plan(found, model.process, model.digest(), len(images), values, steps, memory)
    codec, some = Codec(model, made), images[:CODED]
    seen = list[list[Float[Tensor, "b c h w"]]]()  # of each group x̂_0 before every step and after the last one
    header = Header(made.ident, made.steps, len(some), GROUP)
    groups = codec.groups(some, header, tick, seen, cond=cond.at(slice(0, CODED)))
    usual = int(np.percentile([n for group in groups for n in codec.bits(group, values)], 99))
    return replace(made, usual=usual, tail=ended(made, codec, some, groups, seen))


def ended(
    made: Plan,
    codec: Codec,
    images: UInt8[Tensor, "n c h w"],
    groups: Sequence[Group],
    seen: Sequence[Sequence[Float[Tensor, "_ c h w"]]],
) -> Tail:
    """The lossless end after the step at which chain and end together take the fewest bits, or hardly more."""
    pixels, found = images.numpy(), list[tuple[float, Tail]]()
    for step in range(max(1, made.steps - ENDS), made.steps + 1):
        parts, bits = list[tailfit.Seen](), 0
        for group, estimates in zip(groups, seen, strict=True):
            m = ((estimates[step] + 1) * 127.5).numpy()
            before = codec.first(group, step)
            bits += sum(codec.bits(before, made.values))
            parts += [tailfit.Seen(pixels[len(parts) + i], m[i], before.scales[-1][i]) for i in range(len(m))]
        tail = tailfit.fit(step, made.square[step], made.shape[step], parts)
        found.append((bits / len(parts) + tailfit.bits(tail, parts), tail))
    least = min(total for total, _ in found)
    return next(tail for total, tail in found if total <= 1.002 * least)


def for_file(data: bytes, model: Model | None = None, device: str = "cpu") -> Codec:
    """What reads a file: that of a model, or of the shipped one whose tables made it. Raises UsageError, Corrupt."""
    header, _ = parse_header(data)
    if model is not None:
        return Codec(model, of(model, header.ident))
    unread = list[Corrupt | UsageError]()
    for name in shipped():
        own = load(name, device)
        try:
            if own.meta.get("codec") and (plan := of(own, header.ident)).ident == header.ident:
                return Codec(own, plan)
        except (Corrupt, UsageError) as error:  # another model's kept tables
            unread.append(error)
    if unread:
        raise unread[0]
    raise UsageError(
        f"no shipped model made this file (tables {header.ident.hex()}; shipped: {', '.join(shipped())}); give the one "
        "that did with --model. One with other tables than the shipped ones comes from `undiffuse export`"
    )


def keep(plan: Plan, model: Model) -> Path:
    """Where fitted grids are kept. Raises StorageError."""
    return fitted.keep(plan, model.run, fitted.CODEC)


def of(model: Model, ident: bytes | None = None) -> Plan:
    """The tables that are kept for a model or are in its file; of both, those of that identifier, if one is given.

    Tables that were made anew do not hide those of an exported file, with which files may have been written. Raises
    UsageError where there are none.
    """
    path, found = fitted.found(model.run, model.digest(), fitted.CODEC), list[Plan]()
    if path is not None:
        found.append(_parsed(fitted.read(path), model, str(path)))
    if "codec" in model.meta and (path is None or ident not in (None, found[0].ident)):
        found.append(_parsed(model.meta["codec"], model, "the codec in the file of this model"))
    if not found:
        made = "no codec is fitted to this model; make its tables with `undiffuse codec fit MODEL DATA`"
        if ident is not None:
            made = (
                f"this model has not the tables that made this file ({ident.hex()}); give the run or file that has them"
            )
        raise UsageError(made)
    return next((plan for plan in found if plan.ident == ident), found[0])


def _parsed(found: Any, model: Model, where: str) -> Plan:
    if not isinstance(found, Mapping):
        raise Corrupt(f"{where} is damaged: it is no JSON object; make it anew with `undiffuse codec fit --overwrite`")
    refuse_newer(Path(where), found.get("format"))
    plan, digest = parse(Plan, found, where), model.digest()
    if plan.weights != digest:
        raise UsageError(
            f"{where} is of other weights ({plan.weights[:12]}) than those of this model ({digest[:12]}); make one "
            "with `undiffuse codec fit --overwrite`"
        )
    return plan.check(where)
