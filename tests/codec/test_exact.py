"""Algorithms 3 and 4 as they are written: what is received is a draw of q, for what a draw must cost."""

import math
from dataclasses import replace
from functools import cache

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


@cache
def sent() -> tuple[list[bytes], exact.Ledger]:
    return exact.send(CODEC, IMAGES)


@pytest.mark.parametrize("bits, extra", [(4, 2.73), (6, 2.96)])
def test_an_index_takes_what_the_poisson_functional_representation_must(bits, extra):
    """Bits of octave and mantissa above KL, by exact integration with any number of candidates."""
    share = np.diff(exact.octaves(bits)) / 2**15
    assert share.sum() == 1 and len(share) == exact.OCTAVES and share.min() > 0
    cost = -(share * np.log2(share)).sum() + (share * np.arange(exact.OCTAVES)).sum()
    assert cost - bits == pytest.approx(extra, abs=0.06)


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
    _, ledger = sent()
    kl, ratio = np.array(ledger.kl), np.array(ledger.ratio)
    error = (ratio - kl).std(ddof=1) / len(kl) ** 0.5
    assert len(kl) > 300 and abs((ratio - kl).mean()) < 3 * error < 0.5
    assert 5 < kl.mean() < exact.PIECE


def test_messages_are_as_long_as_the_ledger_says():
    messages, ledger = sent()
    bits = 8 * sum(map(len, messages))
    kl = np.array(ledger.kl)
    assert 2 < (bits - kl.sum()) / len(kl) < 6.5  # an octave table for 8 bits where there are fewer costs more
    assert np.log2(ledger.index).mean() < kl.mean() + 1.53


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
