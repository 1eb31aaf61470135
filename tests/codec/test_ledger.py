"""What files cost beside the bound, for Gaussian data whose bound is known in closed form."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.codec.plans import STD, gaussian, gaussian_images, gaussian_plan, square
from undiffuse.codec import ledger
from undiffuse.codec.plan import KNOTS
from undiffuse.codec.stream import Codec
from undiffuse.codec.tables import Node
from undiffuse.diffusion.grid import LogSnr
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import Cosine

MODEL = gaussian()
CODEC = Codec(MODEL, gaussian_plan(MODEL))
D = 144


def nodes(process, count: int = 100, shape: tuple[float, ...] = (1.0,) * KNOTS) -> list[Node]:
    """As they would be measured, without noise."""
    times = LogSnr().spread(process, count)
    snr = process.logsnr(times).exp().tolist()
    return [Node(t, square(s), shape, (1 / KNOTS,) * KNOTS) for t, s in zip(times.tolist(), snr, strict=True)]


@pytest.mark.parametrize("rmse", [20.0, 5.0, 1.0])
def test_the_bound_of_continuous_time_is_that_of_gaussian_data(rmse):
    """The rate-distortion function of a Gaussian: D/2 log2 of the variance over the distortion."""
    bound = ledger.Curve.of(nodes(MODEL.process, 400), MODEL.process, D).continuous()
    assert bound.at(rmse) == pytest.approx(D / 2 * math.log2((127.5 * STD / rmse) ** 2), rel=2e-3)
    assert bound.bits[0] == 0 and (np.diff(bound.bits) > 0).all() and (np.diff(bound.rmse) < 0).all()


def test_the_bound_of_a_chain_is_its_sum():
    """Σ D (SNR_s − SNR_t) mse_t / (2 ln 2), over the steps of the table up to where the last one begins."""
    process = Cosine(steps=50)
    curve = ledger.Curve.of(nodes(process, 400), process, D)
    bound, fitted = (curve.stepped(process, 50, fitted) for fitted in (False, True))
    t = torch.arange(50, 0, -1, dtype=F64) / 50
    snr = process.logsnr(t).exp().numpy()
    rates = D * np.diff(snr) * np.array([square(s) for s in snr[:-1]]) / (2 * math.log(2))
    assert len(bound.bits) == 50 and bound.bits[0] == 0
    assert bound.bits[1:] == pytest.approx(np.cumsum(rates), rel=2e-3)
    assert bound.rmse == pytest.approx([127.5 * square(s) ** 0.5 for s in snr], rel=2e-3)
    exact = [D / 2 * math.log2(square(0) / square(s)) for s in snr]  # what the right variances cost a Gaussian
    assert fitted.bits == pytest.approx(np.array(exact) - exact[0], rel=2e-3, abs=0.01)
    assert (fitted.rmse == bound.rmse).all() and (fitted.bits[1:] < bound.bits[1:]).all()


def test_fewer_steps_cost_more_but_with_the_right_variance():
    """Where v is right, log2(1 + (SNR_s − SNR_t) v) adds up to the same for every list of steps of Gaussian data."""
    every = nodes(MODEL.process)
    end = every[next(i for i, node in enumerate(every) if 127.5 * node.square**0.5 <= 0.6)]
    rows = ledger.totals(every, MODEL.process, D, (5, 10, 20, 40))
    exact = D / 2 * math.log2(every[0].square / end.square)
    for row in rows:
        assert row["fitted"] == pytest.approx(exact, rel=1e-9) and row["by_value"] == pytest.approx(exact, rel=1e-9)
    equal = [row["equal"] for row in rows]
    assert equal == sorted(equal, reverse=True) and equal[-1] > 1.03 * exact and equal[0] > 2 * exact


def test_a_table_over_values_costs_the_mean_of_the_logarithm():
    """At every node where the list has all of them."""
    shape = np.linspace(0.2, 1.8, KNOTS)
    every = nodes(MODEL.process, 30, tuple(shape.tolist()))
    (row,) = ledger.totals(every, MODEL.process, D, (29,))
    walk = [node for node in every if 127.5 * node.square**0.5 > 0.6]
    snr = MODEL.process.logsnr(torch.tensor([node.t for node in every], dtype=F64)).exp().tolist()
    rises = [b - a for a, b in itertools.pairwise(snr)]
    terms = [np.log2(1 + rise * node.square * shape).mean() for rise, node in zip(rises, walk, strict=False)]
    assert row["by_value"] == pytest.approx(D / 2 * sum(terms), rel=1e-9) and row["by_value"] < row["fitted"]


def test_images_of_no_bits_have_no_ratio():
    """x̂_0 before the first bit is as near as the file comes."""
    found = ledger.compared(CODEC, torch.full((1, 1, 12, 12), 128, dtype=torch.uint8))
    assert found["bound_continuous_bytes"] == 0 and found["archive_over_continuous"] is None


@pytest.mark.parametrize("group", [1, 4])
def test_files_are_those_that_encode_writes(group):
    images = gaussian_images(4, seed=1)
    found = ledger.files(CODEC, images, group)
    assert found["bytes"] == len(CODEC.encode(images, group=group)) / 4
    assert found["lossless"] == len(CODEC.encode(images, group=group, lossless=True)) / 4
    mean = CODEC.decode(CODEC.encode(images, group=group)).mean()
    assert found["rmse"] == pytest.approx(float((mean.double() - images.double()).square().mean().sqrt()), rel=1e-9)
    assert abs(found["rmse_of_mean"] - found["rmse"]) < 0.1 and found["rmse_of_mean"] != found["rmse"]


def test_what_codec_bench_says():
    images, ticks = gaussian_images(8, seed=2), list[int]()
    found = ledger.compared(CODEC, images, ticks.append)
    assert sum(ticks) == ledger.turns(CODEC, 8)
    assert found["archive_bytes"] == len(CODEC.encode(images)) / 8
    assert found["single_bytes"] == np.mean([len(CODEC.encode(image[None])) for image in images])
    ideal = D / 16 * math.log2((127.5 * STD / 2) ** 2)  # of the 2 grey levels at which these tables end
    assert found["bound_continuous_bytes"] == pytest.approx(ideal, rel=0.03)
    assert found["archive_over_continuous"] == found["archive_bytes"] / found["bound_continuous_bytes"]
    assert found["bound_1000_steps_bytes"] > found["bound_continuous_bytes"]
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(buffer, "PNG", optimize=True)
        sizes.append(len(buffer.getvalue()))
    assert found["png_lossless_bits"] == 8 * sum(sizes) / images.numel()
    assert 0 < found["decode_seconds"] < 60 and 0 < found["encode_seconds"] < 60
