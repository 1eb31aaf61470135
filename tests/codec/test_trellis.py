"""The search of a path: against all paths there are, against published waste, and read back value by value."""

import itertools
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from undiffuse.codec import trellis
from undiffuse.codec.trellis import COLUMNS, codebook, edges, read, states

BITS = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any)


def drawn(path, ends, memory: int) -> np.ndarray:
    """z of a path, block by block: the last bits pick a row, which says the values of the block."""
    first, z = min(memory, len(path)), list[float]()
    for block, (a, b) in enumerate(itertools.pairwise(ends)):
        state = int("".join(map(str, path[block : block + first])), 2)
        z += [float(codebook(memory)[state, k % COLUMNS]) for k in range(b - a)]
    return np.array(z)


def search(linear, square, ends, total, memory) -> np.ndarray:
    """Of one problem."""
    return trellis.search([as_problem(linear, square, ends, total)], memory)[0]


def as_problem(linear, square, ends, total) -> trellis.Problem:
    return trellis.Problem(torch.from_numpy(linear).float(), torch.from_numpy(square).float(), ends, total)


def score(z: np.ndarray, linear: np.ndarray, square: np.ndarray) -> float:
    return float(2 * linear @ z - square @ z**2)


def problem(values: int, images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights that differ a lot from value to value."""
    random = np.random.default_rng(seed)
    return random.standard_normal(values * images) * random.exponential(2, values * images), random.exponential(
        0.5, values * images
    )


@pytest.mark.parametrize(
    "values, bits, memory",
    [
        (20, [9], 4),
        (20, [10], 6),
        (33, [8], 5),
        (7, [10], 4),  # fewer values than bits
        (3, [10], 5),  # far fewer: blocks that are empty
        (12, [3], 6),  # one block: fewer bits than a state has
        (12, [6], 6),
        (1, [1], 4),
        (2, [11], 2),
        (700, [7], 4),  # blocks wider than the codebook
        (9, [5, 2, 3], 4),  # a group
        (5, [2, 0, 7], 4),
        (4, [1, 1, 1], 6),
    ],
)
@pytest.mark.parametrize("kept", [1, trellis.KEPT])
def test_the_path_is_the_best_of_all(monkeypatch, values, bits, memory, kept):
    monkeypatch.setattr(trellis, "KEPT", kept)
    monkeypatch.setattr(trellis, "NARROW", 1 << memory)  # a block at a time
    for seed in range(5):
        linear, square = problem(values, len(bits), seed)
        ends = edges(values, bits, memory)
        every = [np.array(path, np.uint8) for path in itertools.product((0, 1), repeat=sum(bits))]
        scores = [score(drawn(path.tolist(), ends, memory), linear, square) for path in every]
        found = search(linear, square, ends, sum(bits), memory)
        best = every[int(np.argmax(scores))]
        assert found.dtype == np.uint8 and found.tolist() == best.tolist()
        assert read(found, ends, memory) == pytest.approx(drawn(best.tolist(), ends, memory), abs=0)


def test_problems_side_by_side_are_those_of_each_alone():
    """Of more and of fewer bits and values, down to none; pieces of the longest are not of the same length either."""
    every = [(9, [5, 2, 3]), (30, [40]), (20, [0]), (12, [3]), (1500, [4, 3]), (7, [6])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trellis, "NARROW", 7 * len(every) * 2**6)
        problems = [problem(values, len(bits), seed) for seed, (values, bits) in enumerate(every)]
        ends, totals = [edges(values, bits, 6) for values, bits in every], [sum(bits) for _, bits in every]
        found = trellis.search(
            [as_problem(*each) for each in zip(*zip(*problems, strict=True), ends, totals, strict=True)], 6
        )
    assert [len(path) for path in found] == totals
    for path, weights, end, total in zip(found, problems, ends, totals, strict=True):
        assert path.tolist() == search(*weights, end, total, 6).tolist()


def test_of_a_long_path_only_the_end_is_kept_as_turns(monkeypatch):
    """All paths that survive share their beginning: what is let go of is not looked for again, and is the same."""
    monkeypatch.setattr(trellis, "KEPT", 100)
    monkeypatch.setattr(trellis, "NARROW", 64 * 10)
    most, go_on = [], trellis.Survivors.go_on

    def watched(self, turns):
        go_on(self, turns)
        most.append(sum(map(len, self.turns)))

    monkeypatch.setattr(trellis.Survivors, "go_on", watched)
    linear, square = problem(4000, 1, 0)
    ends = edges(4000, [3000], 6)
    found = search(linear, square, ends, 3000, 6)
    assert len(found) == 3000 and max(most) < 150 < sum(most)
    monkeypatch.setattr(trellis, "KEPT", 1 << 20)
    assert found.tolist() == search(linear, square, ends, 3000, 6).tolist() and max(most) == 3000 - 6


def test_candidates_that_are_all_alike_have_some_path():
    ends = edges(6, [8], 4)
    assert len(search(np.zeros(6), np.zeros(6), ends, 8, 4)) == 8


def test_no_bits_are_no_path_and_no_values():
    none = np.zeros(0, np.uint8)
    assert edges(20, [0], 4).tolist() == [0] and edges(20, [0, 0], 4).tolist() == [0]
    assert len(search(np.ones(20), np.ones(20), edges(20, [0], 4), 0, 4)) == 0
    assert len(read(none, edges(20, [0], 4), 4)) == 0 and len(states(none, 4)) == 0


@given(st.integers(1, 50), BITS, st.sampled_from([4, 6, 10]))
def test_blocks_cover_all_values_in_their_order(values, bits, memory):
    """The bits of an image are spread evenly over its values, and the first `memory` bits are one block."""
    ends, total = edges(values, bits, memory).tolist(), sum(bits)
    assert ends[0] == 0 and ends[-1] == values * len(bits) and all(a <= b for a, b in itertools.pairwise(ends))
    assert len(ends) == 1 + total - min(memory, total) + 1
    reached = [values * i + values * k // n for i, n in enumerate(bits) for k in range(1, n + 1)]
    assert ends[1:-1] == reached[min(memory, total) - 1 : -1]


def test_blocks_by_hand():
    assert edges(10, [5], 2).tolist() == [0, 4, 6, 8, 10]
    assert edges(10, [3], 4).tolist() == [0, 10]
    assert edges(2, [5], 2).tolist() == [0, 0, 1, 1, 2]
    assert edges(10, [2, 0, 2], 2).tolist() == [0, 10, 25, 30]  # the image without bits belongs to the next bit


@given(st.integers(1, 60), BITS, st.sampled_from([4, 6]), st.integers(0, 99))
def test_the_values_of_a_path_that_goes_on_stay_as_they_are(values, bits, memory, seed):
    path = np.random.default_rng(seed).integers(0, 2, sum(bits), np.uint8)
    ends = edges(values, bits, memory)
    whole = read(path, ends, memory)
    assert whole.tolist() == drawn(path.tolist(), ends, memory).tolist() and len(whole) == values * len(bits)
    for cut in range(min(memory, len(path)), len(path)):
        part = read(path[:cut], ends, memory)
        assert part.tolist() == whole[: len(part)].tolist() and len(part) == ends[cut - memory + 1]


def test_a_path_that_ends_within_its_first_state_says_nothing():
    """Fewer bits than the first block has are not the row of a smaller number."""
    path = np.random.default_rng(0).integers(0, 2, 20, np.uint8)
    ends = edges(40, [20], 6)
    assert [len(read(path[:cut], ends, 6)) for cut in range(6)] == [0] * 6


@pytest.mark.parametrize(
    "memory, bits, published",
    [
        (10, 64, 0.165),
        (10, 128, 0.163),
        (12, 64, 0.158),
        (12, 128, 0.119),
        (14, 64, 0.14),
        (14, 128, 0.11),
        (16, 64, 0.11),
        (16, 128, 0.094),
    ],
)
def test_the_waste_on_gaussian_residuals_is_what_simulations_say(memory, bits, published):
    """Bits over −D/2 log2(1 − ρ²), where ρ is the correlation of z with a residual of 784 values."""
    random, values = np.random.default_rng(1), 784
    y, sums = 2 ** (2 * bits / values) - 1, np.zeros(3)
    ends = edges(values, [bits], memory)
    for _ in range(40):
        q = random.standard_normal(values)
        z = read(search(q * math.sqrt(y * (1 + y)), np.full(values, y), ends, bits, memory), ends, memory)
        sums += z @ q, z @ z, q @ q
    rho_2 = sums[0] ** 2 / (sums[1] * sums[2])
    assert bits / (-values / 2 * math.log2(1 - rho_2)) - 1 == pytest.approx(published, abs=0.03)


def test_more_memory_finds_better_paths():
    random, found = np.random.default_rng(2), dict[int, float]()
    residuals = random.standard_normal((20, 784))
    for memory in (4, 8, 12):
        ends = edges(784, [96], memory)
        paths = [search(q, np.full(784, 0.2), ends, 96, memory) for q in residuals]
        found[memory] = sum(q @ read(path, ends, memory) for q, path in zip(residuals, paths, strict=True))
    assert found[4] < 0.95 * found[8] and found[8] < 0.98 * found[12]


KNOWN = {
    10: (0x9B61AAAA, [0.5249784588813782, -0.04229520633816719, -0.6007645130157471]),
    12: (0x82DF28C4, [0.3204077482223511, 0.7283406853675842, 0.7720169425010681]),
    14: (0x936E5F38, [-0.39412224292755127, -0.4797484576702118, -1.6938798427581787]),
    16: (0x971AEAF1, [0.6427145004272461, 0.030038226395845413, -2.8639895915985107]),
}


@pytest.mark.parametrize("memory", KNOWN)
def test_the_codebook_is_the_one_that_files_were_made_with(memory):
    crc, first = KNOWN[memory]
    book = codebook(memory)
    assert book.shape == (1 << memory, COLUMNS) and book.dtype == np.float32
    assert book[[0, 1, -1], [0, 1, -1]].tolist() == first
    assert zlib.crc32(book.astype("<f4").tobytes()) == crc


def test_a_reader_draws_the_rows_that_it_needs_alone():
    """The same numbers as those of the whole book, which a search draws."""
    path = np.random.default_rng(0).integers(0, 2, 60, np.uint8)
    ends, asked = edges(784, [60], 12), states(path, 12)
    expected = drawn(path.tolist(), ends, 12)
    trellis._drawn.cache_clear()
    assert read(path, ends, 12).tolist() == expected.tolist()
    assert set(np.flatnonzero(trellis._drawn(12)[1])) == set(asked) and len(asked) == 49
    assert zlib.crc32(codebook(12).astype("<f4").tobytes()) == KNOWN[12][0]


def test_the_codebook_is_standard_normal_and_its_rows_know_nothing_of_each_other():
    book = codebook(10).astype(float)
    n = book.size
    assert abs(book.mean()) < 4 / n**0.5 and abs((book**2).mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((book**4).mean() - 3) < 0.05
    together = book @ book.T / COLUMNS
    assert abs(together[~np.eye(1024, dtype=bool)]).max() < 6 / COLUMNS**0.5
