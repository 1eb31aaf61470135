"""Random numbers as a pure function of names: Philox4x32-10 in torch integer operations.

Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A `Key` is a seed and a path of
names, hashed once to 64 bits. `Keys` are one key over many rows: the row of the global batch and the block are counter
words, so example 7 sees the same noise whatever the batch, the device or the number of processes.

Nothing is consumed: the same key gives the same numbers each time, so fold a fresh name for each use.
"""

import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from undiffuse.errors import UsageError, is_out_of_memory
from undiffuse.strict import whole
from undiffuse.timing import stage

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
NORMAL_TABLE_CRC32 = 0x546C8CB1
SQRT_HALF = 0.7071067690849304  # float32(1/√2), exactly

Seed = SupportsIndex | Sequence[SupportsIndex]  # of all images of a batch, or one of each
Rows = range | Tensor  # those of a range are known without being moved
Draw = Callable[[tuple[int, int], Rows, int, Tensor, float], Tensor]


def moved(values: Shaped[Tensor, "*n"], device: torch.device | str) -> Shaped[Tensor, "*n"]:
    """A few numbers on their way from the CPU, without waiting for what a card has still to do.

    CUDA takes them out of the memory that they are in before the call returns, so they may change afterwards.
    """
    device = torch.device(device)
    return values.to(device, non_blocking=device.type == "cuda" and values.device.type == "cpu")


def low(words: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """The lower 32 bits of each int64, where they are in memory."""
    return words.view(torch.int32)[..., int(sys.byteorder == "big") :: 2]


def high(words: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """The upper 32 bits of each int64, where they are in memory."""
    return words.view(torch.int32)[..., int(sys.byteorder == "little") :: 2]


def philox(counter: Sequence[Int[Tensor, "*n"]], key: tuple[int, int], rounds: int = 10) -> list[Int[Tensor, "*n"]]:
    """Four random words from four counter words, each a 32-bit value in an int64 tensor.

    On a card each operation is a launch: a round is four, because both of its halves are in one tensor. What the second
    and the fourth word of the counter have above 32 bits is not read.
    """
    even, odd = torch.stack([counter[0], counter[2]]), torch.stack([counter[1], counter[3]])
    products, r = torch.empty_like(even), torch.arange(rounds, dtype=torch.int64, device=even.device)
    # Key r is key + r · Weyl mod 2^32; in the upper half of an int64, which wraps, it needs no mask.
    k0, k1 = (signed(word << 32) + r * signed(weyl << 32) for word, weyl in zip(key, WEYL, strict=True))
    for keys in torch.stack([k0, k1], dim=1).view(rounds, 2, *[1] * counter[0].ndim):
        # The product of two words fits 64 bits, so both of its halves are right though int64 wraps.
        torch.mul(even[1], MULTIPLIERS[1], out=products[0])
        torch.mul(even[0], MULTIPLIERS[0], out=products[1])
        products ^= keys
        torch.bitwise_xor(high(products), low(odd), out=low(even))
        odd, products = products, odd
    odd &= MASK
    return [even[0], odd[0], even[1], odd[1]]


def signed(bits: int) -> int:
    """The int64 that has these 64 bits."""
    return bits - (bits >> 63 << 64)


@cache
def normal_table(device: torch.device) -> Float[Tensor, "65536"]:
    """The normal quantiles at (u + 1/2) / 65536, rounded to 1/4096, so that every machine holds the same numbers."""
    u = torch.arange(65536, dtype=torch.float64, device="cpu")
    table = torch.round(4096 * torch.special.ndtri((u + 0.5) / 65536)).to(torch.int16)
    crc = zlib.crc32(table.numpy().astype("<i2").tobytes())
    if crc != NORMAL_TABLE_CRC32:
        raise RuntimeError(f"the normal table has CRC {crc:#x}, not {NORMAL_TABLE_CRC32:#x}: this torch's ndtri is off")
    return (table.to(torch.float32) / 4096).to(device)


def range_of(rows: Int[Tensor, "b"]) -> range | None:
    """Rows that follow one another, as two numbers, which a card is told without a copy; None of others."""
    if not len(rows):
        return range(0)
    first = int(rows[0])
    each = range(first, first + len(rows))
    if each.stop < 2**63 and torch.equal(rows, _index(each, torch.device("cpu"))):
        return each
    return None


def _index(rows: Rows, device: torch.device) -> Int[Tensor, "b"]:
    if isinstance(rows, range):
        end = max(rows.start, rows.stop)  # an empty slice may end before it begins
        return torch.arange(rows.start, end, rows.step, dtype=torch.int64, device=device)
    return moved(rows, device)


def draw_bits(words: tuple[int, int], rows: Int[Tensor, "b"], count: int) -> Int[Tensor, "b n"]:
    """At least `count` random words a row, a multiple of four, for the key of those two words."""
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=rows.device)
    shape, rows = (len(rows), len(blocks)), rows[:, None]
    counter = [blocks, torch.zeros_like(rows), rows & MASK, rows >> 32]
    return torch.stack(philox([word.expand(shape) for word in counter], words), dim=-1).flatten(1)


def draw(
    words: tuple[int, int], rows: Rows, count: int, table: Float[Tensor, "65536"], scale: float
) -> Float[Tensor, "b n"]:
    """[rows, count] normal numbers on the device of the table: the sum of two of its values, times `scale`."""
    bits = draw_bits(words, _index(rows, table.device), count)
    index = bits.flatten()
    total = table.index_select(0, index & 0xFFFF).add_(table.index_select(0, index >> 16))
    return total.view(bits.shape)[:, :count] * scale


@cache
def drawn_by(device: torch.device) -> tuple[Draw, str]:
    """What draws normal numbers on a device, and how `doctor` calls it: on a card a Triton kernel, else torch.

    The kernel is first tried. What Triton raises where a compiler, a driver or a header is missing has no common type,
    so each error but a lack of memory means torch, which draws the same bits in more launches; the reason is kept.
    """
    if device.type != "cuda":
        return draw, "torch"
    table = normal_table(device)
    others = torch.tensor([2**33, 7, 0], dtype=torch.int64, device=table.device)
    trials = (((1, MASK), range(MASK, MASK + 3), 48, table, SQRT_HALF), ((MASK, 3), others, 5, table, SQRT_HALF))
    try:
        from undiffuse.kernel import draw as launch

        if all(torch.equal(launch(*trial), draw(*trial)) for trial in trials):
            return launch, "Triton"
        return draw, "torch (the Triton kernel draws other numbers here)"
    except ImportError as error:
        return draw, f"torch (Triton cannot be imported: {error})"
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return draw, f"torch (the Triton kernel fails: {' '.join(f'{type(error).__name__}: {error}'.split())})"


@dataclass(frozen=True)
class Key:
    """The root of all randomness: `Key(seed).fold("train", "noise", step)`."""

    seed: SupportsIndex = 0
    names: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", whole("seed", self.seed))

    def fold(self, *names: str | int) -> "Key":
        """The key of a sub-purpose, by strings and integers: 1 and "1" differ."""
        return replace(self, names=(*self.names, *names))

    @property
    def words(self) -> tuple[int, int]:
        """The 64 bits as two words. JSON keeps types and borders: no two paths of names are the same text."""
        digest = hashlib.blake2b(json.dumps([self.seed, *self.names]).encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def rows(self, rows: int | Int[Tensor, "b"], device: torch.device | str = "cpu") -> "Keys":
        """The keys of rows 0 … n − 1, or of the rows given, whose numbers are drawn on that device.

        A tensor of rows is kept, and is not to be changed.
        """
        if isinstance(rows, int):
            rows = torch.arange(rows, dtype=torch.int64, device="cpu")
            return Keys(self, rows, torch.device(device), range(len(rows)))
        rows = rows.to(device="cpu", dtype=torch.int64)
        return Keys(self, rows, torch.device(device), range_of(rows))

    @staticmethod
    def each(seed: "Seed", n: int) -> "Keys":
        """The keys of n images: rows 0 … n − 1 of one seed, or row 0 of each of n seeds, which may be an array."""
        each: Any = seed.tolist() if getattr(seed, "ndim", 0) == 1 else seed  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(each, Sequence):
            return Key(each).rows(n)
        seeds = tuple(whole("seed", one) for one in each)
        if len(seeds) != n:
            raise UsageError(f"{len(seeds)} seeds were given for {n} images; give one for each, or a single one")
        rows = torch.zeros(n, dtype=torch.int64, device="cpu")
        return Keys(Key(), rows, torch.device("cpu"), seeds=seeds)

    def normal(self, *shape: int) -> Float[Tensor, "*shape"]:
        return self.rows(1).normal(*shape)[0]

    def uniform(self, *shape: int) -> Float[Tensor, "*shape"]:
        return self.rows(1).uniform(*shape)[0]

    def integer(self) -> int:
        """A seed for a generator that is not ours (63 bits)."""
        return self.words[0] | (self.words[1] & 0x7FFFFFFF) << 32


@dataclass(frozen=True, eq=False)
class Keys:
    """One key over a batch: row r draws what it would draw alone. `rows` stay on the CPU until bits are drawn.

    With `seeds` each row has the key of its own seed, of the same names.
    """

    key: Key
    rows: Int[Tensor, "b"]
    device: torch.device
    known: range | None = None  # the rows as a range, where they are one
    seeds: tuple[SupportsIndex, ...] | None = None

    def fold(self, *names: str | int) -> "Keys":
        """The keys of a sub-purpose: `key.rows(n).fold(x)` draws what `key.fold(x).rows(n)` does."""
        return replace(self, key=self.key.fold(*names))

    def __getitem__(self, part: slice) -> "Keys":
        known, seeds = (None if each is None else each[part] for each in (self.known, self.seeds))
        return replace(self, rows=self.rows[part], known=known, seeds=seeds)

    def _alone(self) -> "list[Keys]":
        """Of each seed its own."""
        ones = self.rows.split(1)
        keys = [replace(self.key, seed=seed) for seed in self.seeds or ()]
        return [replace(self, key=key, rows=row, seeds=None) for key, row in zip(keys, ones, strict=True)]

    def to(self, device: torch.device | str) -> "Keys":
        return replace(self, device=torch.device(device))

    def bits(self, count: int) -> Int[Tensor, "b n"]:
        """At least `count` random 32-bit words a row, a multiple of four."""
        if self.seeds:
            return torch.cat([one.bits(count) for one in self._alone()])
        return draw_bits(self.key.words, _index(self.rows if self.known is None else self.known, self.device), count)

    def normal(self, *shape: int) -> Float[Tensor, "b *shape"]:
        """Standard normal float32, bit-equal on every device: the sum of two table values over the root of two."""
        count = int(torch.Size(shape).numel())
        if self.seeds:
            return torch.cat([one.normal(*shape) for one in self._alone()])
        with stage("noise"):
            launch, _ = drawn_by(self.device)
            rows = moved(self.rows, self.device) if self.known is None else self.known
            z = launch(self.key.words, rows, count, normal_table(self.device), SQRT_HALF)
            return z.reshape(len(self.rows), *shape)

    def uniform(self, *shape: int) -> Float[Tensor, "b *shape"]:
        """Uniform on [0, 1), float64 with 53 bits, on the CPU: not every device has such numbers."""
        count = int(torch.Size(shape).numel())
        words = self.to("cpu").bits(2 * count)[:, : 2 * count].reshape(len(self.rows), count, 2)
        mantissa = (words[..., 0] >> 5) * 2**26 + (words[..., 1] >> 6)
        return (mantissa.to(torch.float64) / 2**53).reshape(len(self.rows), *shape)

    def integers(self, high: int) -> Int[Tensor, "b"]:
        """Uniform on 0 … high − 1, on the CPU."""
        return (self.uniform() * high).long().clamp_(max=high - 1)
