"""Which of 2^n candidates a step takes, in n bits: a path through a bit-shift trellis, found by the Viterbi algorithm.

A channel can be simulated by random codes that both sides draw from a shared seed (Mao & Gray 2010 search them along a
trellis; nobody seems to have coded diffusion models so). The state is the last L bits of the message. It picks a row of
one codebook, and the row says the next few values of z, so that a value depends on L bits while each branch costs one:
2^n candidates of which the best is found with n 2^L comparisons. The bits are the path, and need no entropy coder.

Of a step from q = N(mu + ρ, β̃) and p = N(mu, s²), a candidate mu + s z has

    2 log q/p = 2⟨w₁, z⟩ − ⟨w₂, z²⟩ + const,    w₁ = s ρ/β̃,    w₂ = s²/β̃ − 1

and this is what is searched for: what simulates the channel exactly weighs candidates by q/p too.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from undiffuse.key import Key

COLUMNS = 512  # of the codebook; a block of more values takes them in turn
NARROW = 1 << 22  # numbers of branch metrics that are held at a time
KEPT = 1 << 14  # blocks after which it is looked for what all paths that survive share


@cache
def _drawn(memory: int) -> tuple[Float[np.ndarray, "states columns"], Bool[np.ndarray, "states"]]:
    """Rows of the codebook as far as they were drawn, and which these are."""
    return np.empty((1 << memory, COLUMNS), np.float32), np.zeros(1 << memory, bool)


def codebook(memory: int, states: Int[np.ndarray, "_"] | None = None) -> Float[np.ndarray, "states columns"]:
    """Standard normal float32, the same bits on every machine: row r is that of the state whose bits are r.

    With `states`, other rows may be missing: a reader needs few of them.
    """
    book, there = _drawn(memory)
    asked = np.arange(1 << memory) if states is None else states
    missing = np.unique(asked[~there[asked]])
    if len(missing):
        book[missing] = Key(0).fold("codebook", memory).rows(torch.from_numpy(missing)).normal(COLUMNS).numpy()
        there[missing] = True
    return book


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
    return codebook(memory, found)[found[block], column]


class Problem(NamedTuple):
    """A path of `total` bits is to be found over blocks with these `ends`; see `edges`. All of one device."""

    linear: Float[Tensor, "_"]
    square: Float[Tensor, "_"]
    ends: Int[np.ndarray, "_"]
    total: int


def search(problems: Sequence[Problem], memory: int) -> list[UInt8[np.ndarray, "_"]]:
    """Of each the path whose z has the largest 2⟨linear, z⟩ − ⟨square, z²⟩, by the Viterbi algorithm.

    They are searched side by side. One with fewer blocks than another waits at its end: blocks that add nothing lead on
    from where it is best.
    """
    some = [each for each in problems if each.total]
    paths = iter(_searched(some, memory) if some else ())
    return [next(paths) if each.total else np.zeros(0, np.uint8) for each in problems]


def _searched(problems: list[Problem], memory: int) -> list[UInt8[np.ndarray, "_"]]:
    count, half, device = len(problems), (1 << memory) // 2, problems[0].linear.device
    blocks = max(len(each.ends) for each in problems) - 1
    metric = _scores(problems, 0, 1, memory)[0]
    for row, each in zip(metric, problems, strict=True):
        row[1 << min(memory, each.total) :] = -torch.inf  # states of more bits than there are
    # State p·2 + bit follows p, or p with its oldest bit set, whichever has come further.
    without, having, followers = metric[:, :half], metric[:, half:], metric.view(count, half, 2)
    best = torch.empty((count, half), dtype=metric.dtype, device=device)
    some = max(1, NARROW // metric.numel())
    turns = torch.empty((some, count, half), dtype=torch.bool, device=device)
    survivors = [Survivors(memory) for _ in problems]
    for low in range(1, blocks, some):
        gains = _scores(problems, low, min(low + some, blocks), memory).view(-1, count, half, 2)
        for turn, gain in zip(turns[: len(gains)], gains, strict=True):
            torch.gt(having, without, out=turn)
            torch.maximum(without, having, out=best)
            torch.add(gain, best[:, :, None], out=followers)
        packed = np.packbits(turns[: len(gains)].cpu().numpy(), axis=2)
        for i, each in enumerate(survivors):
            each.go_on(packed[:, i])
    every = zip(problems, survivors, metric.argmax(1).tolist(), strict=True)
    return [found.path(state)[max(0, memory - each.total) :][: each.total] for each, found, state in every]


class Survivors:
    """The best path to each state, as the turns that lead back: a bit for each state and block.

    All that survive share their beginning, which is kept as bits, so that memory does not grow with a path.
    """

    def __init__(self, memory: int):
        self.memory, self.half = memory, (1 << memory) // 2
        self.bits = list[UInt8[np.ndarray, "_"]]()  # that all of them begin with
        self.turns = list[UInt8[np.ndarray, "_ bytes"]]()  # of the blocks after those
        self.full = KEPT

    def go_on(self, turns: UInt8[np.ndarray, "blocks bytes"]) -> None:
        """By some blocks."""
        self.turns.append(turns)
        if sum(map(len, self.turns)) >= self.full:
            self._settle()

    def path(self, state: int) -> UInt8[np.ndarray, "n"]:
        """The one that leads to this state."""
        self._keep(np.concatenate(self.turns) if self.turns else np.zeros((0, 1), np.uint8), state)
        return np.concatenate(self.bits)

    def _settle(self) -> None:
        """Looks for the last block at which all are in one state."""
        turns, states = np.concatenate(self.turns), np.arange(2 * self.half)
        for j in reversed(range(len(turns))):
            states = self._before(np.unique(states >> 1), turns[j])
            if len(states) == 1:
                self._keep(turns[:j], int(states[0]))
                turns = turns[j:]
                break
        self.turns, self.full = [turns], KEPT + len(turns)

    def _before(self, younger: Any, turns: UInt8[np.ndarray, "bytes"]) -> Any:
        """The states that lead to those of these younger bits: the turn says their oldest bit. One, or an array."""
        return younger + self.half * (turns[younger >> 3] >> 7 - (younger & 7) & 1).astype(np.int64)

    def _keep(self, turns: UInt8[np.ndarray, "blocks bytes"], state: int) -> None:
        """The bits of the path that comes to this state by these blocks; of the first block those of its state."""
        bits = np.empty(len(turns), np.uint8)
        for j in reversed(range(len(turns))):
            bits[j], state = state & 1, self._before(state >> 1, turns[j])
        if not self.bits:
            self.bits.append((state >> np.arange(self.memory - 1, -1, -1) & 1).astype(np.uint8))
        self.bits.append(bits)


@lru_cache(2)
def _tables(
    memory: int, device: torch.device
) -> tuple[Float[Tensor, "columns states"], Float[Tensor, "columns states"]]:
    """What a row says, twice, and its square with the opposite sign."""
    book = torch.from_numpy(codebook(memory)).to(device).T.contiguous()
    return 2 * book, -book.square()


def _scores(problems: list[Problem], low: int, high: int, memory: int) -> Float[Tensor, "blocks problems states"]:
    """What each row adds to the metric in each of some blocks."""
    double, minus = _tables(memory, problems[0].linear.device)
    ends = [each.ends[low : high + 1] for each in problems]
    wide = min(COLUMNS, max(1, *(int(np.diff(each).max(initial=0)) for each in ends)))

    def side_by_side(values: list[Float[Tensor, "_"]]) -> Float[Tensor, "rows wide"]:
        return pad_sequence([_folded(*each, wide) for each in zip(values, ends, strict=True)]).flatten(0, 1)

    z, z_2 = side_by_side([each.linear for each in problems]), side_by_side([each.square for each in problems])
    return (z @ double[:wide]).addmm_(z_2, minus[:wide]).view(-1, len(problems), double.shape[1])


def _folded(values: Float[Tensor, "_"], ends: Int[np.ndarray, "_"], wide: int) -> Float[Tensor, "blocks wide"]:
    """The values of each block in a row of their own, and those that meet the same column summed up."""
    widths = np.diff(ends)
    turns = max(1, -(-int(widths.max(initial=0)) // wide))
    column = np.arange(turns * wide)
    place = torch.from_numpy(np.where(column < widths[:, None], ends[:-1, None] + column, -1)).to(values.device)
    return values[place.clamp(min=0)].where(place >= 0, 0).view(len(widths), turns, wide).sum(1)
