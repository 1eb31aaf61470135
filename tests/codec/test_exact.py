"""Algorithms 3 and 4 as they are written: what is received is a draw of q, for what a draw must cost."""

import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats

from tests.codec.plans import gaussian, gaussian_images, gaussian_plan
from undiffuse.codec import exact
from undiffuse.codec.chain import Chain
from undiffuse.codec.coder import Decoder, Encoder
from undiffuse.codec.stream import Codec
from undiffuse.errors import UsageError
from undiffuse.model.model import Model

MODEL = gaussian((1, 8, 8))
CODEC = Codec(MODEL, gaussian_plan(MODEL, 4, 10, (2, 2)))
IMAGES = gaussian_images(12, (1, 8, 8))


class Sent(NamedTuple):
    """Messages; and of each piece what it was said to be worth, and E_p (q/p(z) − q/p)₊ at the z that was taken."""

    messages: list[bytes]
    ledger: exact.Ledger
    worth: list[int]
    above: list[float]


@cache
def sent() -> Sent:
    worth, above, put, picked = list[int](), list[float](), exact._put, exact.picked

    def noted(coder, taken, bits):
        worth.append(bits)
        put(coder, taken, bits)

    def chosen(log_ratio, random):
        taken, ratio = picked(log_ratio, random), np.exp(log_ratio)
        above.append(float(np.clip(ratio[taken] - ratio, 0, None).mean()))
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_put", noted)
        patch.setattr(exact, "picked", chosen)
        return Sent(*exact.send(CODEC, IMAGES), worth, above)


def cost(bits: int) -> np.ndarray:
    """What an index of each octave takes, in bits: the octave by its table, and what is below it as it is."""
    return np.arange(exact.OCTAVES) - np.log2(np.diff(exact.octaves(bits)) / 2**15)


@pytest.mark.parametrize(
    "bits, extra, beyond", [(4, 2.73, (0.23, 0.10, 0.01)), (6, 2.96, (0.27, 0.14, 0.02)), (8, 3.12, (0.29, 0.17, 0.04))]
)
def test_an_index_takes_what_the_poisson_functional_representation_must(bits, extra, beyond, monkeypatch):
    """Bits of octave and mantissa above KL, and P(N > 2^(KL + 2, 4, 8)), by exact integration: of any candidates."""
    assert bits <= exact.PIECE == 8
    monkeypatch.setattr(exact, "OCTAVES", 24)  # more than these indices have
    share = np.diff(exact.octaves.__wrapped__(bits)) / 2**15
    assert share.sum() == 1 and len(share) == 24 and share.min() > 0
    assert (share * (np.arange(24) - np.log2(share))).sum() - bits == pytest.approx(extra, abs=0.02)
    assert [share[bits + more :].sum() for more in (2, 4, 8)] == pytest.approx(beyond, abs=0.006)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_tail_beyond_the_candidates_is_in_the_last_octave(bits, monkeypatch):
    """2^16 − 1 candidates have 16 octaves: the table of a piece has the same odds below."""
    few = np.diff(exact.octaves(bits)) / 2**15
    monkeypatch.setattr(exact, "OCTAVES", 24)
    every = np.diff(exact.octaves.__wrapped__(bits)) / 2**15
    assert len(few) == 16 and few[:15] == pytest.approx(every[:15], abs=16 / 2**15)
    assert few[15] == pytest.approx(every[15:].sum(), abs=16 / 2**15)
    assert bits != 8 or few[15] == pytest.approx(0.06, abs=0.005)  # as the text of the module says


def test_a_poisson_process_picks_a_draw_of_q():
    """Of candidates N(0, 1), with q = N(1, 0.5²): the law of what is taken, and of its index."""
    taken, index = [], []
    for seed in range(2000):
        random = np.random.default_rng(seed)
        z = random.standard_normal(2000)
        number = exact.picked(-((z - 1) ** 2) / 0.5 + z**2 / 2 + math.log(2), random)
        taken.append(z[number])
        index.append(number + 1)
    assert stats.kstest(taken, stats.norm(1, 0.5).cdf).pvalue > 1e-3
    kl = (math.log(4) - 1 + 0.25 + 1) / 2 / math.log(2)
    assert np.log2(index).mean() < kl + 1.53  # Li & El Gamal 2018
    assert np.mean(np.log2(index)) > 0.5


def test_the_ledger_balances():
    """The mean log2 q/p of what is taken is KL(q ‖ p)."""
    ledger = sent().ledger
    kl, ratio = np.array(ledger.kl), np.array(ledger.ratio)
    error = (ratio - kl).std(ddof=1) / len(kl) ** 0.5
    assert len(kl) > 300 and abs((ratio - kl).mean()) < 3 * error < 0.5
    assert 5 < kl.mean() < exact.PIECE


def test_messages_are_as_long_as_the_ledger_says():
    """The cost of each index by its table, three bits for each scale, and the end of each message."""
    found, scales = sent(), exact.DELTA_BITS * len(IMAGES) * (len(CODEC.plan.layers) - 1)
    octave = np.log2(found.ledger.index).astype(int)
    ideal = scales + sum(cost(bits)[at] for bits, at in zip(found.worth, octave, strict=True))
    assert len(octave) > 400 and set(found.worth) == {8}
    assert 0 < 8 * sum(map(len, found.messages)) - ideal < 12 * len(IMAGES)  # less than a byte and a half each


def test_indices_cost_what_theory_gives():
    """Given z, N − 1 is geometric of mean E_p (q/p(z) − q/p)₊, here over the candidates themselves.

    With it the cost of each index, as of any variances, is known: 3.12 bits above KL where that is 8 and the
    variances are equal, less where candidates end.
    """
    found, kl = sent(), np.array(sent().ledger.kl)
    above = np.array(found.above)[:, None]
    beyond = (above / (1 + above)) ** (2.0 ** np.arange(exact.OCTAVES + 1) - 1)  # P(N ≥ 2^octave)
    beyond[:, -1] = 0
    theory = (beyond[:, :-1] - beyond[:, 1:]) @ cost(8)
    paid = cost(8)[np.log2(found.ledger.index).astype(int)]
    error = (paid - theory).std(ddof=1) / len(paid) ** 0.5
    assert error < 0.1 and abs((paid - theory).mean()) < 3 * error
    assert (paid - kl).mean() < 3.12 and np.log2(found.ledger.index).mean() < kl.mean() + 1.53


def test_a_message_leads_to_where_the_sender_was(monkeypatch):
    walked = list[Chain]()
    built = Chain.__init__

    def noted(self, *given, **more):
        built(self, *given, **more)
        walked.append(self)

    monkeypatch.setattr(Chain, "__init__", noted)
    messages, _ = exact.send(CODEC, IMAGES[:3])
    found = exact.receive(CODEC, messages)
    there, back = walked
    assert torch.equal(there.x, back.x)
    off = float((found.double() - IMAGES[:3].double()).square().mean().sqrt())
    assert off == pytest.approx(2, rel=0.2)  # grey levels, where these tables end


def test_what_is_received_is_distributed_as_q():
    """Each step: (x_s − μ_q)/√β̃ is standard normal, which the best of many candidates is not."""
    seen = list[torch.Tensor]()
    moved = Chain.move

    def noted(self, step, z):
        before = self.x.clone()
        moved(self, step, z)
        truth = IMAGES.float() / 127.5 - 1
        t, s = (self.times[n].expand(len(truth)) for n in (len(seen), len(seen) + 1))
        mean, small = self.process.posterior(before, truth, t, s)
        seen.append((self.x - mean) / small.float().sqrt()[:, None, None, None])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chain, "move", noted)
        exact.send(CODEC, IMAGES, seed=1)
    assert len(seen) == 4
    for z in seen:
        assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3


def test_pieces_cover_all_values_once():
    for bits, count, each in ((0, 1, 0), (8, 1, 8), (9, 2, 5), (80, 10, 8), (10**6, 64, 15625)):
        found, worth = exact.pieces(bits, 64)
        assert (len(found), worth) == (count, each) and [i for part in found for i in range(64)[part]] == [*range(64)]


def test_every_index_is_sent_and_received():
    coder, every = Encoder(), (0, 1, 2, 1000, exact.CANDIDATES - 2, exact.CANDIDATES - 1)
    for taken in every:
        for bits in (1, 8):
            exact._put(coder, taken, bits)
    found = Decoder(coder.end())
    assert [exact._take(found, bits) for _ in every for bits in (1, 8)] == [each for each in every for _ in range(2)]


def test_what_messages_cannot_say_is_refused():
    told = {"recipe": {"train": {"drop_label": 0.0}}}
    classes = Model(replace(MODEL.config, classes=2), MODEL.denoiser, told)
    with pytest.raises(UsageError, match="^this model was never trained without a class, and messages say none; use"):
        exact.send(Codec(classes, CODEC.plan), IMAGES[:1])
    with pytest.raises(UsageError, match="cannot be encoded by this model; give uint8"):
        exact.send(CODEC, IMAGES[:0])


def test_other_sizes_are_refused():
    with pytest.raises(UsageError, match=r"^images of \[1, 9, 9\] were given; give \[1, 8, 8\]$"):
        exact.send(CODEC, gaussian_images(1, (1, 9, 9)))
