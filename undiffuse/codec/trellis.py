"""Which of 2^n candidates a step takes, in n bits: a path through a bit-shift trellis, found by the Viterbi algorithm.

A channel can be simulated by random codes that both sides draw from a shared seed (Mao & Gray 2010 search them along a
trellis; nobody seems to have coded diffusion models so). The state is the last L bits of the message. It picks a row of
one codebook, and the row says the next few values of z, so that a value depends on L bits while each branch costs one:
2^n candidates of which the best is found with n 2^L comparisons. The bits are the path, and need no entropy coder.

Of a step from q = N(mu + ρ, β̃) and p = N(mu, s²), a candidate mu + s z has

    2 log q/p = 2⟨w₁, z⟩ − ⟨w₂, z²⟩ + const,    w₁ = s ρ/β̃,    w₂ = s²/β̃ − 1

and this is what is searched for: what simulates the channel exactly weighs candidates by q/p too.
"""

from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from undiffuse.key import Key

COLUMNS = 512  # of the codebook; a block of more values takes them in turn
NARROW = 1 << 22  # numbers of branch metrics that are held at a time


@cache
def codebook(memory: int) -> Float[np.ndarray, "states columns"]:
    """Standard normal float32, the same bits on every machine: row r is that of the state whose bits are r."""
    return Key(0).fold("codebook", memory).rows(1 << memory).normal(COLUMNS).numpy()


def edges(values: int, bits: list[int], memory: int) -> Int[np.ndarray, "ends"]:
    """Where the blocks of a path over some images end, each of so many values and of its own number of bits.

    The first block has `memory` bits, or all if they are fewer, and each one after it one more.
    """
    total = sum(bits)
    if not total:
        return np.zeros(1, np.int64)
    ends, first = [np.zeros(1, np.int64)], 0
    for number, n in enumerate(bits):
        if n:
            ends.append(first + values * np.arange(1, n + 1) // n)
        first = values * (number + 1)
    found = np.concatenate(ends)  # after how many values each bit has been used
    found[-1] = values * len(bits)
    return np.concatenate([[0], found[min(memory, total) :]])


def states(path: UInt8[np.ndarray, "n"], memory: int) -> Int[np.ndarray, "blocks"]:
    """The state at each block whose bits are there; of a path of fewer bits than a state has, their number."""
    memory = min(memory, len(path))
    if not memory:
        return np.zeros(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(path.astype(np.int64), memory)
    return windows @ (1 << np.arange(memory - 1, -1, -1))


def read(path: UInt8[np.ndarray, "n"], ends: Int[np.ndarray, "ends"], memory: int) -> Float[np.ndarray, "values"]:
    """The z of a path, of which the end may be missing: as many values as its blocks have."""
    if len(ends) > 2 and len(path) < memory:
        return np.zeros(0, np.float32)
    found = states(path, memory)[: len(ends) - 1]
    block = np.repeat(np.arange(len(found)), np.diff(ends)[: len(found)])
    column = (np.arange(len(block)) - ends[block]) % COLUMNS
    return codebook(memory)[found[block], column]


def search(
    linear: Float[np.ndarray, "values"],
    square: Float[np.ndarray, "values"],
    ends: Int[np.ndarray, "ends"],
    total: int,
    memory: int,
) -> UInt8[np.ndarray, "n"]:
    """The path of `total` bits whose z has the largest 2⟨linear, z⟩ − ⟨square, z²⟩."""
    if not total:
        return np.zeros(0, np.uint8)
    first = min(memory, total)
    book, half = codebook(memory)[: 1 << first], (1 << first) // 2
    metric = _scores(book, linear, square, ends[:2])[:, 0]
    turns = np.zeros((len(ends) - 2, half), bool)
    some = max(1, NARROW // len(book))
    for low in range(1, len(ends) - 1, some):
        scores = _scores(book, linear, square, ends[low : low + some + 1]).T.reshape(-1, half, 2)
        for j, gain in enumerate(np.ascontiguousarray(scores), low - 1):
            # State p·2 + bit follows p, or p with its oldest bit set, whichever has come further.
            turns[j] = metric[half:] > metric[:half]
            metric = (np.maximum(metric[:half], metric[half:])[:, None] + gain).reshape(-1)
    return _walked_back(int(metric.argmax()), turns, first, half)


def _scores(
    book: Float[np.ndarray, "states columns"],
    linear: Float[np.ndarray, "values"],
    square: Float[np.ndarray, "values"],
    ends: Int[np.ndarray, "ends"],
) -> Float[np.ndarray, "states blocks"]:
    """What each row adds to the metric in each block."""
    widths = np.diff(ends)
    wide = min(int(widths.max()), COLUMNS)
    block = np.repeat(np.arange(len(widths)), widths)
    place = block * wide + (np.arange(len(block)) - (ends[block] - ends[0])) % COLUMNS
    there = slice(int(ends[0]), int(ends[-1]))

    def folded(values: Float[np.ndarray, "values"]) -> Float[np.ndarray, "wide blocks"]:
        sums = np.bincount(place, values[there], len(widths) * wide)
        return sums.reshape(len(widths), wide).T.astype(np.float32)

    rows = book[:, :wide]
    return 2 * (rows @ folded(linear)) - np.square(rows) @ folded(square)


def _walked_back(
    state: int, turns: Bool[np.ndarray, "branches half"], memory: int, half: int
) -> UInt8[np.ndarray, "n"]:
    path = np.zeros(memory + len(turns), np.uint8)
    for j in reversed(range(len(turns))):
        path[memory + j], state = state & 1, state >> 1
        state += half * int(turns[j, state])
    path[:memory] = state >> np.arange(memory - 1, -1, -1) & 1
    return path
