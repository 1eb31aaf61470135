"""Random numbers as a pure function of names: Philox4x32-10 in torch integer operations.

Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A `Key` is a seed and a path of
names, hashed once to 64 bits. `Keys` are one key over many rows: the row of the global batch and the block are counter
words, so example 7 sees the same noise whatever the batch, the device or the number of processes.

Nothing is consumed: the same key gives the same numbers each time, so fold a fresh name for each use.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.profiler import record_function

from undiffuse.strict import whole

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
NORMAL_TABLE_CRC32 = 0x546C8CB1
SQRT_HALF = 0.7071067690849304  # float32(1/√2), exactly


def moved(values: Shaped[Tensor, "*n"], device: torch.device | str) -> Shaped[Tensor, "*n"]:
    """A few numbers on their way from the CPU, without waiting for what a card has still to do.

    CUDA takes them out of the memory that they are in before the call returns, so they may change afterwards.
    """
    device = torch.device(device)
    return values.to(device, non_blocking=device.type == "cuda" and values.device.type == "cpu")


def philox(counter: Sequence[Int[Tensor, "*n"]], key: tuple[int, int], rounds: int = 10) -> list[Int[Tensor, "*n"]]:
    """Four random words from four counter words, each a 32-bit value in an int64 tensor."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The product of two words fits 64 bits; int64 wraps, so both halves are right once they are masked.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]


@cache
def normal_table(device: torch.device) -> Float[Tensor, "65536"]:
    """The normal quantiles at (u + 1/2) / 65536, rounded to 1/4096, so that every machine holds the same numbers."""
    u = torch.arange(65536, dtype=torch.float64, device="cpu")
    table = torch.round(4096 * torch.special.ndtri((u + 0.5) / 65536)).to(torch.int16)
    crc = zlib.crc32(table.numpy().astype("<i2").tobytes())
    if crc != NORMAL_TABLE_CRC32:
        raise RuntimeError(f"the normal table has CRC {crc:#x}, not {NORMAL_TABLE_CRC32:#x}: this torch's ndtri is off")
    return (table.to(torch.float32) / 4096).to(device)


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
        """The keys of rows 0 … n − 1, or of the rows given, whose numbers are drawn on that device."""
        index = torch.arange(rows, dtype=torch.int64, device="cpu") if isinstance(rows, int) else rows
        return Keys(self, index.to(device="cpu", dtype=torch.int64), torch.device(device))

    def normal(self, *shape: int) -> Float[Tensor, "*shape"]:
        return self.rows(1).normal(*shape)[0]

    def uniform(self, *shape: int) -> Float[Tensor, "*shape"]:
        return self.rows(1).uniform(*shape)[0]

    def integer(self) -> int:
        """A seed for a generator that is not ours (63 bits)."""
        return self.words[0] | (self.words[1] & 0x7FFFFFFF) << 32


@dataclass(frozen=True, eq=False)
class Keys:
    """One key over a batch: row r draws what it would draw alone. `rows` stay on the CPU until bits are drawn."""

    key: Key
    rows: Int[Tensor, "b"]
    device: torch.device

    def fold(self, *names: str | int) -> "Keys":
        """The keys of a sub-purpose: `key.rows(n).fold(x)` draws what `key.fold(x).rows(n)` does."""
        return replace(self, key=self.key.fold(*names))

    def __getitem__(self, part: slice) -> "Keys":
        return replace(self, rows=self.rows[part])

    def to(self, device: torch.device | str) -> "Keys":
        return replace(self, device=torch.device(device))

    def bits(self, count: int) -> Int[Tensor, "b n"]:
        """At least `count` random 32-bit words a row, a multiple of four."""
        blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=self.device)  # (n/4,)
        rows = moved(self.rows, self.device)[:, None].expand(-1, len(blocks))  # (b, n/4)
        counter = [blocks.expand_as(rows), torch.zeros_like(rows), rows & MASK, (rows >> 32) & MASK]
        return torch.stack(philox(counter, self.key.words), dim=-1).flatten(1)

    def normal(self, *shape: int) -> Float[Tensor, "b *shape"]:
        """Standard normal float32, bit-equal on every device: the sum of two table values over the root of two."""
        count = int(torch.Size(shape).numel())
        with record_function("undiffuse noise"):
            words, table = self.bits(count)[:, :count], normal_table(self.device)
            return ((table[words & 0xFFFF] + table[words >> 16]) * SQRT_HALF).reshape(len(self.rows), *shape)

    def uniform(self, *shape: int) -> Float[Tensor, "b *shape"]:
        """Uniform on [0, 1), float64 with 53 bits, on the CPU: not every device has such numbers."""
        count = int(torch.Size(shape).numel())
        words = self.to("cpu").bits(2 * count)[:, : 2 * count].reshape(len(self.rows), count, 2)
        mantissa = (words[..., 0] >> 5) * 2**26 + (words[..., 1] >> 6)
        return (mantissa.to(torch.float64) / 2**53).reshape(len(self.rows), *shape)

    def integers(self, high: int) -> Int[Tensor, "b"]:
        """Uniform on 0 … high − 1, on the CPU."""
        return (self.uniform() * high).long().clamp_(max=high - 1)
