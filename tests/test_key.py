"""Random123's known answers, then what all else rests on: the numbers depend on the names and on nothing else."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from undiffuse import key
from undiffuse.key import Key, normal_table, philox

WORD = st.integers(0, 2**32 - 1)
FULL = 0xFFFFFFFF
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def reference_philox(counter, words):
    """Philox4x32-10 as in the paper's listing, in Python's unbounded integers."""
    (a, b, c, d), (k0, k1) = counter, words
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ k0, right & FULL, (left >> 32) ^ d ^ k1, left & FULL
        k0, k1 = (k0 + 0x9E3779B9) & FULL, (k1 + 0xBB67AE85) & FULL
    return [a, b, c, d]


def draw(counter, words):
    return [int(word) for word in philox([torch.tensor([value]) for value in counter], words)]


@pytest.mark.parametrize(
    "counter, words, answer",
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([FULL] * 4, (FULL, FULL), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter, words, answer):
    assert " ".join(f"{word:08x}" for word in draw(counter, words)) == answer


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_int64_wraps_as_unsigned_words_do(counter, words):
    assert draw(counter, words) == reference_philox(counter, words)


@given(st.integers(0, 2**63 - 1), st.integers(1, 40))
def test_bits_are_philox_of_block_and_row(row, count):
    root = Key(3).fold("bits")
    bits = root.rows(torch.tensor([row])).bits(count)[0].tolist()
    blocks = [reference_philox((block, 0, row & FULL, row >> 32), root.words) for block in range(math.ceil(count / 4))]
    assert bits == list(itertools.chain(*blocks))


@pytest.mark.parametrize("device", DEVICES)
def test_the_stream_never_changes(device):
    """Golden numbers: files and checkpoints name their noise by key, so these are part of the format."""
    keys = Key(7).fold("golden", 3).rows(torch.tensor([0, 12345678901]), device)
    assert keys.key.words == (3141370881, 3763185291)
    assert [[value.hex() for value in row] for row in keys.normal(3).tolist()] == [
        ["0x1.02fa540000000p-1", "-0x1.82093e0000000p+0", "0x1.7dd6700000000p-6"],
        ["0x1.9b5c000000000p-2", "0x1.05fbaa0000000p-1", "0x1.2326b60000000p+0"],
    ]
    assert [value.hex() for value in keys.uniform().tolist()] == ["0x1.6607750680a7ap-2", "0x1.658d09e96268bp-1"]


def test_table_is_the_one_of_the_format():
    table = normal_table(torch.device("cpu"))
    assert torch.equal(table, -table.flip(0)) and table[-1] == 17715 / 4096
    assert torch.equal(table.sort().values, table)


def test_another_table_is_refused(monkeypatch):
    monkeypatch.setattr(key, "NORMAL_TABLE_CRC32", 1)
    with pytest.raises(RuntimeError, match="the normal table has CRC 0x546c8cb1, not 0x1: this torch's ndtri is off"):
        normal_table.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_a_row_draws_what_it_would_draw_alone(kind):
    root = Key(1).fold("rows")
    whole = getattr(root.rows(9), kind)(3, 5)
    for row in range(9):
        assert torch.equal(getattr(root.rows(torch.tensor([row])), kind)(3, 5)[0], whole[row])
    assert torch.equal(getattr(root.rows(9)[2:5], kind)(3, 5), whole[2:5])
    assert torch.equal(getattr(root.rows(torch.tensor([8, 0, 8])), kind)(3, 5), whole[[8, 0, 8]])
    assert torch.equal(getattr(root, kind)(3, 5), whole[0])


def test_keys_move_to_a_device_with_their_rows():
    keys = Key(1).fold("a").rows(torch.tensor([3, 9]))
    for moved in (keys.to("meta"), Key(1).fold("a").rows(torch.tensor([3, 9]), "meta")):
        assert moved.device.type == moved.bits(4).device.type == moved.normal(2).device.type == "meta"
        assert moved.rows.tolist() == [3, 9]  # which stay where they can be read without waiting
    assert torch.equal(keys.to("cpu").normal(2), keys.normal(2))


def test_shape_changes_no_number():
    keys = Key(2).fold("shape").rows(4)
    assert torch.equal(keys.normal(2, 3, 5), keys.normal(30).reshape(4, 2, 3, 5))
    assert torch.equal(keys.normal(7), keys.normal(30)[:, :7])
    assert torch.equal(keys.uniform(7), keys.uniform(30)[:, :7])
    assert keys.normal().shape == keys.uniform().shape == (4,)
    assert Key(2).rows(0).normal(3).shape == (0, 3)


def test_the_same_key_gives_the_same_numbers():
    keys = Key(5).rows(3)
    assert torch.equal(keys.normal(8), keys.normal(8))


def test_folding_is_one_path_of_names():
    root = Key(4)
    assert root.fold("a", 1).words == root.fold("a").fold(1).words
    assert torch.equal(root.fold("a").rows(5).normal(2), root.rows(5).fold("a").normal(2))
    assert torch.equal(root.rows(5).fold("a", "b").normal(2), root.rows(5).fold("a").fold("b").normal(2))


def test_different_names_are_different_keys():
    names = [(), (1,), ("1",), (-1,), (0,), ("",), ("a", "b"), ("ab",), ("b", "a"), ("a,b",), ('a", "b',), ("a\x1fb",)]
    keys = [Key(seed).fold(*path) for seed in (0, 1) for path in names]
    assert len({key.words for key in keys}) == len(keys)


@given(st.lists(st.integers() | st.text(), max_size=3), st.lists(st.integers() | st.text(), max_size=3))
def test_keys_are_equal_only_if_the_names_are(left, right):
    assert (Key().fold(*left).words == Key().fold(*right).words) == (left == right)


def exact_normal_pmf():
    """The distribution of the sum of two table values, in units of 1/4096, over −35430 … 35430."""
    table = (normal_table(torch.device("cpu")).double() * 4096).round().long().numpy()
    single = np.bincount(table - table.min(), minlength=table.max() - table.min() + 1) / 65536
    size = 2 * len(single) - 1
    pmf = np.fft.irfft(np.fft.rfft(single, 2**17) ** 2, 2**17)[:size]
    return np.arange(size) + 2 * table.min(), pmf


def test_the_normal_is_normal_by_its_exact_distribution():
    """No sampling: variance, kurtosis, and the distance to the normal distribution function."""
    values, pmf = exact_normal_pmf()
    x = values / 4096 / math.sqrt(2)
    assert pmf.sum() == pytest.approx(1, abs=1e-9)
    assert (pmf * x**2).sum() == pytest.approx(0.99998, abs=5e-6)
    assert (pmf * x**4).sum() / (pmf * x**2).sum() ** 2 == pytest.approx(2.9996, abs=5e-5)
    middle = np.cumsum(pmf) - pmf / 2
    assert pmf.max() / 2 < 3.5e-5
    assert np.abs(middle - torch.special.ndtr(torch.from_numpy(x)).numpy()).max() < 1e-6


def farthest(sample, cdf):
    """Kolmogorov's distance between a sample and a distribution function."""
    ordered = sample.double().flatten().sort().values
    ranks = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    truth = cdf(ordered)
    return max((ranks[1:] - truth).abs().max(), (truth - ranks[:-1]).abs().max())


@pytest.mark.parametrize("kind, cdf, step", [("uniform", lambda u: u, 0), ("normal", torch.special.ndtr, 4e-5)])
@pytest.mark.parametrize("rows, count", [(1, 200_000), (200_000, 1), (400, 500)])
def test_draws_follow_their_distribution(kind, cdf, step, rows, count):
    """Dvoretzky, Kiefer, Wolfowitz and Massart: P(D > d) ≤ 2 exp(−2 n d²), here 1e-6; down a row and across rows.

    To this comes half the largest probability of one value of the normal, and its distance to the continuous one.
    """
    sample = getattr(Key(11).fold("ks").rows(rows), kind)(count)
    assert farthest(sample, cdf) < math.sqrt(math.log(2e6) / (2 * rows * count)) + step


def test_moments():
    """The first eight, within 5 standard errors of those of the exact distribution."""
    values, pmf = exact_normal_pmf()
    x = values / 4096 / math.sqrt(2)
    z = Key(12).fold("moments").rows(1000).normal(1000).double()
    for power in range(1, 9):
        moment = (pmf * x**power).sum()
        spread = math.sqrt((pmf * x ** (2 * power)).sum() - moment**2)
        assert abs(float((z**power).mean()) - moment) < 5 * spread / 1000


def test_neighbours_do_not_correlate():
    """Between rows, between numbers of a row, between sub-keys and between seeds: 5 standard errors."""
    keys = Key(13).rows(1000)
    z = keys.normal(1000)
    others = [z.roll(1, 0), z.roll(1, 1), z.roll(4, 1), keys.fold("a").normal(1000), Key(14).rows(1000).normal(1000)]
    assert max(abs(float((z * other).mean())) for other in others) < 5 / 1000
    assert max(abs(float((z**2 * other**2).mean()) - 1) for other in others) < 5 * math.sqrt(8) / 1000


def test_uniform_has_53_bits_and_stays_below_one(monkeypatch):
    u = Key(15).rows(1000).uniform(100)
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    low_bits = (u * 2**53).long() & 0xFFFF
    assert len(low_bits.unique()) > 50_000
    monkeypatch.setattr(key, "philox", lambda counter, words: [torch.full_like(counter[0], FULL)] * 4)
    assert Key(0).uniform() == 1 - 2**-53
    assert Key(0).rows(2).integers(10).tolist() == [9, 9]


def test_integers_are_uniform():
    """A chi-square with 9 degrees of freedom exceeds 45 with probability 1e-6."""
    counts = torch.bincount(Key(16).rows(100_000).integers(10), minlength=10)
    assert len(counts) == 10
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 45


def test_integer_seeds_fit_other_generators():
    seeds = [Key(seed).integer() for seed in range(100)]
    assert len(set(seeds)) == 100 and all(0 <= seed < 2**63 for seed in seeds)


def test_annotations_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        Key(0).rows(torch.zeros(3))
