"""A stateless shuffle: which example stands at a position of an endless walk through the data.

Position p is in epoch p // length. Each epoch has its own permutation, a generalised Feistel network over a grid of
a × b ≥ length cells (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002), whose round functions are tables
drawn from the key; a result beyond the length is enciphered again. No list of the data set's length is ever made, and
there is nothing to save or to restore.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from undiffuse.errors import UsageError
from undiffuse.key import Key

ROUNDS = 12


def order(seed: int, length: int, positions: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """The example in 0 … length − 1 at each position; length successive positions from a multiple of it see each once.

    Raises UsageError if the length is below 1 or a position is negative.
    """
    if length < 1 or bool((positions < 0).any()):
        raise UsageError(f"the order of {length} examples has no such position; give length >= 1 and positions >= 0")
    epochs = positions // length
    result = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        result[here] = _permute(positions[here] % length, length, _tables(seed, length, epoch))
    return result


def _sides(length: int) -> tuple[int, int]:
    """The grid closest to square: at most sqrt(length) of its cells are beyond the length."""
    a = math.isqrt(length - 1) + 1
    return a, -(-length // a)


@lru_cache(maxsize=4)
def _tables(seed: int, length: int, epoch: int) -> Int[Tensor, "rounds a"]:
    side = _sides(length)[0]  # the longer one
    return Key(seed).fold("order", epoch).rows(ROUNDS).bits(side)[:, :side]


def _permute(index: Int[Tensor, "n"], length: int, tables: Int[Tensor, "rounds a"]) -> Int[Tensor, "n"]:
    a, b = _sides(length)
    beyond = torch.ones_like(index, dtype=torch.bool)
    while bool(beyond.any()):
        x, y = index[beyond] // b, index[beyond] % b
        for even, odd in zip(tables[0::2], tables[1::2], strict=True):
            x = (x + even[y]) % a
            y = (y + odd[x]) % b
        index = index.masked_scatter(beyond, x * b + y)
        beyond = index >= length
    return index
