"""Algorithms 3 and 4 of DDPM with draws of q(x_s | x_t, x_0), where `undiffuse encode` takes the best of many.

Of candidates z_1, z_2, … from p and the arrivals T_1 < T_2 < … of a Poisson process, the one of the least
T_i p(z_i)/q(z_i) is a draw of q (the Poisson functional representation, Li & El Gamal 2018), and its index takes
KL(q ‖ p) + log2(KL + 1) + O(1) bits. A step is sent in pieces of few bits, because the candidates of a piece have to be
many more than 2^KL. It is a reference, slow and larger; `Ledger` has what was sent beside what it was worth.

What differs from the paper: x_T comes from the seed, so that L_T is not sent; the variance of p is that of the tables
(see `plan`), which bounds q/p, and scales are sent for it; the last step, of L_0, is left out, so that x̂_0 is what is
received; and there are 2^16 − 1 candidates, which cuts off the tail of the draws (of pieces of 8 bits 6 % of the
indices lie above 2^15).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import pairwise
from math import erf, log

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from undiffuse.codec.chain import Chain, Order
from undiffuse.codec.coder import TOTAL_BITS, Decoder, Encoder
from undiffuse.codec.container import Group
from undiffuse.codec.plan import DELTA_BITS, LEAST
from undiffuse.codec.stream import Codec, lead
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.model.model import to_float, to_uint8

PIECE = 8  # bits that a piece is worth, at most
OCTAVES = 16
CANDIDATES = (1 << OCTAVES) - 1  # whose numbers, from 1, have so many octaves
FINE = 4000  # points of an integral


@dataclass
class Ledger:
    """Of each piece: KL(q ‖ p), log2 q/p of what was taken, both in bits, and its index, counted from 1."""

    kl: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    index: list[int] = field(default_factory=list)


@cache
def octaves(bits: int) -> tuple[int, ...]:
    """Cumulative frequencies of ⌊log2 N⌋ for a piece that is worth so many bits.

    Given z, N − 1 is geometric of mean E_p (q/p(z) − q/p)₊, which for Gaussians of equal variance is
    r Φ(u) − Φ(u − δ) with r = q/p at u, the place along the difference of the means, and δ² = 2 KL in nats.
    """
    delta = (2 * bits * log(2)) ** 0.5
    along = np.linspace(-8, 8, FINE)  # u − δ, a standard normal number under q
    weight = np.exp(-np.square(along) / 2)
    normal = np.vectorize(lambda x: 0.5 * (1 + erf(x / 2**0.5)))
    mean = np.exp(delta * along + delta**2 / 2) * normal(along + delta) - normal(along)
    stays = np.clip(mean, 0, None) / (1 + np.clip(mean, 0, None))  # P(N > n + 1 | N > n)
    edges = [float((weight * stays ** (2**octave - 1)).sum() / weight.sum()) for octave in range(OCTAVES)] + [0.0]
    room = (1 << TOTAL_BITS) - OCTAVES  # each has at least one
    rises = [1 + round(room * (1 - edge)) - round(room * (1 - before)) for before, edge in pairwise(edges)]
    return tuple(np.cumsum([0, *rises]).tolist())


def pieces(bits: int, values: int, most: int = PIECE) -> tuple[list[slice], int]:
    """Of a step that is worth so many bits an image, and what each of them is worth, rounded up."""
    count = min(values, max(1, -(-bits // most)))
    ends = [values * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(ends)], -(-bits // count)


def candidates(step: int, rows: Tensor | int, values: int) -> Float[Tensor, "k values"]:
    """Those of a step, which encoder and decoder share: independent from piece to piece and from step to step."""
    return Key(0).fold("candidates", step).rows(rows).normal(values)


def picked(log_ratio: Float[np.ndarray, "k"], random: np.random.Generator) -> int:
    """The candidate that a Poisson process picks, whose arrivals the encoder alone needs to know."""
    return int(np.argmin(np.log(np.cumsum(random.exponential(size=len(log_ratio)))) - log_ratio))


Take = Callable[[int, int, int, Float[Tensor, "values"], Float[Tensor, "values"]], Float[Tensor, "values"]]


def walked(
    codec: Codec, images: UInt8[Tensor, "n c h w"], seed: int, told: Callable[[Group], None], take: Take
) -> Float[Tensor, "n c h w"]:
    """x̂_0 at the end of the chain that images lead to.

    z of a step, an image, so many bits, w₁ and w₂ is what `take` makes of them; `told` hears of new scales.
    """
    codec.refuse(images)
    if codec.model.classes is not None and not codec.model.classes.unlabelled:
        raise UsageError("this model was never trained without a class, and messages say none; use `encode`")
    if tuple(images.shape[1:]) != codec.model.image_shape:
        raise UsageError(f"images of {list(images.shape[1:])} were given; give {list(codec.model.image_shape)}")
    n, values, starts = len(images), codec.plan.values, codec.plan.starts()
    chain, found = Chain(codec.model, codec.plan, Key(seed).rows(n), codec.model.image_shape), Group()
    seen = list[Float[Tensor, "n c h w"]]()

    def each(
        number: int, order: Order, linear: Float[Tensor, "n values"], square: Float[Tensor, "n values"]
    ) -> Float[Tensor, "n values"]:
        if number in starts:
            told(found)
        budgets = [codec.plan.budget(number, scale, values) for scale in found.scales[-1]]
        every = zip(range(n), budgets, linear.cpu(), square.cpu(), strict=True)
        z = torch.stack([take(number, i, bits, w_1, w_2) for i, bits, w_1, w_2 in every]).to(chain.device)
        return order.back(z * order.signs)

    lead(chain, to_float(images.to(codec.model.device)), codec.plan.steps, found, each, seen)
    return seen[-1]


def send(codec: Codec, images: UInt8[Tensor, "n c h w"], seed: int = 0) -> tuple[list[bytes], Ledger]:
    """Algorithm 3: a message for each image, and what it was worth."""
    coders, ledger, values = [Encoder() for _ in images], Ledger(), codec.plan.values
    book = lru_cache(1)(lambda step: candidates(step, CANDIDATES, values))

    def told(found: Group) -> None:
        for coder, *scales in zip(coders, *found.scales[-2:], strict=True):
            if len(scales) > 1:
                coder.bits(scales[1] - scales[0] - LEAST, DELTA_BITS)

    def take(
        step: int, image: int, bits: int, w_1: Float[Tensor, "values"], w_2: Float[Tensor, "values"]
    ) -> Float[Tensor, "values"]:
        (every, worth), z = pieces(bits, values), torch.zeros(values, dtype=torch.float32, device="cpu")
        random = np.random.default_rng(Key(seed).fold("arrivals", step, image).integer())
        for part in every:
            some = book(step)[:, part]
            kl, ratio = weighed(some, w_1[part], w_2[part])
            taken = picked(ratio, random)
            z[part] = some[taken]
            _put(coders[image], taken, worth)
            ledger.index.append(taken + 1)
            ledger.ratio.append(float(ratio[taken]) / log(2))
            ledger.kl.append(kl / log(2))
        return z

    walked(codec, images, seed, told, take)
    return [coder.end() for coder in coders], ledger


def weighed(
    some: Float[Tensor, "k d"], w_1: Float[Tensor, "d"], w_2: Float[Tensor, "d"]
) -> tuple[float, Float[np.ndarray, "k"]]:
    """KL(q ‖ p) of a piece, and ln q/p of candidates, in nats."""
    rho, wide = (w_1.square() / (1 + w_2)).double(), w_2.double()  # (μ_q − μ_p)²/β̃, and s²/β̃ − 1
    ratio = (some @ w_1 - some.square() @ (w_2 / 2)).double() + (wide.log1p() - rho).sum() / 2
    return float((wide.log1p() - 1 + (1 + rho) / (1 + wide)).sum()) / 2, ratio.numpy()


def receive(codec: Codec, messages: list[bytes], seed: int = 0) -> UInt8[Tensor, "n c h w"]:
    """Algorithm 4: x̂_0 where the messages lead."""
    n, values, plan = len(messages), codec.plan.values, codec.plan
    keys, coders, scales = Key(seed).rows(n), [Decoder(message) for message in messages], [0] * n
    chain, starts = Chain(codec.model, plan, keys, codec.model.image_shape), plan.starts()
    for number in range(plan.steps):
        x_0 = chain.estimate(number)
        if number and number in starts:
            scales = [scale + coder.bits(DELTA_BITS) + LEAST for scale, coder in zip(scales, coders, strict=True)]
        order = Order.of(chain.keys, number, values)
        z = torch.zeros(n, values, dtype=torch.float32, device="cpu")
        for i, coder in enumerate(coders):
            every, worth = pieces(plan.budget(number, scales[i], values), values)
            taken = [_take(coder, worth) for _ in every]
            rows = candidates(number, torch.tensor(taken, dtype=torch.int64, device="cpu"), values)
            for row, part in zip(rows, every, strict=True):
                z[i, part] = row[part]
        chain.move(chain.step(number, x_0, scales), order.back(z.to(chain.device) * order.signs))
    return to_uint8(chain.estimate(plan.steps).cpu())


def _put(coder: Encoder, taken: int, bits: int) -> None:
    """The octave by its table, and what is below it as it is."""
    octave = (taken + 1).bit_length() - 1
    coder.put(octaves(bits), octave)
    if octave:
        coder.bits(taken + 1 - (1 << octave), octave)


def _take(coder: Decoder, bits: int) -> int:
    octave = coder.take(octaves(bits))
    return (1 << octave) - 1 + (coder.bits(octave) if octave else 0)
