"""Images to files and back: what is sent against Gaussians, how far off it ends against a formula, and what is read."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from tests.cli import toy
from tests.codec.plans import STD, gaussian, gaussian_images, gaussian_plan, pictures, plan, square
from undiffuse.codec import container, stream, trellis
from undiffuse.codec.chain import Chain, Order
from undiffuse.codec.container import Header, parse
from undiffuse.codec.stream import Codec
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.parameterisation import X0
from undiffuse.diffusion.reverse import FixedSmall, Learned, LearnedRange
from undiffuse.errors import Corrupt, UsageError
from undiffuse.key import Key
from undiffuse.model.load import load
from undiffuse.model.model import Model, to_float
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.unet import UNet

SHAPE = (1, 12, 12)
MODEL = gaussian(SHAPE)
PLAN = gaussian_plan(MODEL)
CODEC = Codec(MODEL, PLAN)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Codec:
    """A U-Net that knows nothing, of 8×8, with tables of few bits."""
    model = load(toy.save(tmp_path_factory.mktemp("model") / "m.safetensors"), "cpu")
    return Codec(
        model, plan(64, (2, 2, 1), (14, 20, 20, 30, 40), weights=model.digest(), times=(1.0, 0.8, 0.6, 0.4, 0.2, 0.1))
    )


@pytest.fixture
def chains(monkeypatch) -> list[Chain]:
    """Those that are walked, in their order."""
    found = list[Chain]()

    def recorded(*args):
        found.append(Chain(*args))
        return found[-1]

    monkeypatch.setattr(stream, "Chain", recorded)
    return found


def test_scales_go_three_bits_at_a_time():
    group = container.Group()
    assert stream.near(group, [9, -9]) == [0, 0]  # none in the first layer
    group.scales.append([0, 0])
    assert stream.near(group, [9, -9]) == [4, -3] and stream.near(group, [2, -1]) == [2, -1]
    group.scales.append([15, -15])
    assert stream.near(group, [40, -40]) == [16, -16]


@pytest.mark.parametrize("group", [1, 3, 16])
def test_a_file_leads_to_where_the_encoder_was(untrained, chains, group):
    for codec, images in ((CODEC, gaussian_images(4)), (untrained, pictures(4, 1, 8, 8))):
        written = codec.write(images, group=group)
        walked = len(chains)
        decoded = codec.decode(written.data)
        assert torch.equal(written.shown, decoded.mean())
        assert decoded.parsed.status == "complete" and walked == 1 == len(chains) - walked  # all groups together
        for there, back in zip(chains[:walked], chains[walked:], strict=True):
            assert torch.equal(there.x, back.x)
        ends = [model_mean(codec, chain) for chain in chains[:walked]]
        assert torch.equal(decoded.mean(), torch.cat(ends))
        chains.clear()


def model_mean(codec: Codec, chain: Chain) -> torch.Tensor:
    """x̂_0 at the end of the tables, by the denoiser alone."""
    t = torch.full((len(chain.x),), codec.plan.times[-1], dtype=F64)
    x_0 = codec.model.denoiser(chain.x, t).x_0
    return ((x_0 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def coded() -> tuple[torch.Tensor, bytes]:
    images = gaussian_images(32, seed=3)
    return images, CODEC.encode(images, group=16)


def test_each_step_leads_as_near_as_the_tables_say(coded):
    """The mean square error of x̂_0 after n steps is 1/(1/std² + SNR_n): coded states are as good as true ones."""
    images, data = coded
    x_0 = to_float(images).double()
    snr = MODEL.process.logsnr(torch.tensor(PLAN.times, dtype=F64)).exp().tolist()
    for steps in range(1, PLAN.steps + 1):
        found = CODEC.decode(CODEC.encode(images, steps)) if steps < PLAN.steps else CODEC.decode(data)
        x = found.estimate().double()
        assert all(step == steps for _, step in found.chains)
        assert float((x - x_0).square().mean()) == pytest.approx(square(snr[steps]), rel=0.08)


def test_bits_are_those_of_the_tables_and_so_little_above_their_divergence(coded):
    images, data = coded
    parsed = parse(data, PLAN, SHAPE)
    bits = [n for group in parsed.groups for n in CODEC.bits(group, 144)]
    assert sum(bits) == sum(len(path) for group in parsed.groups for path in group.paths)
    divergence = 72 * math.log2(square(0) / (2 / 127.5) ** 2)
    assert np.mean(bits) == pytest.approx(1.12 * divergence, rel=0.03)
    assert 8 * len(data) / len(images) < 1.2 * divergence  # with scales, checksums and header


def test_the_realised_log_ratio_of_q_and_p_is_the_divergence():
    """Of the candidates that are taken, as a mean over images: as much as a draw of q has."""
    images = gaussian_images(24, seed=4)
    truth, keys = to_float(images), Key(0).rows(24)
    chain, zeros = Chain(MODEL, PLAN, keys, SHAPE), [0] * 24
    for number in range(4):
        x_0 = chain.estimate(number)
        step, order = chain.step(number, x_0, zeros), Order.of(chain.keys, number, 144)
        linear, squares = (order.along(each) for each in step.weights(truth))
        signed, z, total = linear * order.signs, torch.zeros(24, 144), PLAN.budget(number, 0, 144)
        for i in range(24):
            ends = trellis.edges(144, [total], PLAN.memory)
            path = trellis.search([trellis.Problem(signed[i], squares[i], ends, total)], PLAN.memory)[0]
            z[i] = torch.from_numpy(trellis.read(path, ends, PLAN.memory))
        z = order.back(z * order.signs).view(24, *SHAPE)
        times = [torch.full((24,), PLAN.times[n], dtype=F64) for n in (number, number + 1)]
        q_mean, small = MODEL.process.posterior(chain.x, truth, *times)
        q, p = Normal(q_mean, small.float().sqrt()[:, None, None, None]), Normal(step.mean, step.spread)
        at = step.mean + step.spread * z
        ratio = (q.log_prob(at) - p.log_prob(at)).flatten(1).sum(1).double() / math.log(2)
        assert float(ratio.mean()) == pytest.approx(PLAN.kl[number], rel=0.1)
        assert float(ratio.max()) < 1.5 * PLAN.kl[number] and 0.85 < float(z.square().mean()) < 1.05
        chain.move(step, z.flatten(1))


def test_the_seed_changes_the_bits_and_the_picture_a_little():
    images = gaussian_images(1)
    files = [CODEC.encode(images, seed=seed) for seed in (0, 1, 0)]
    assert files[0] == files[2]
    parsed = [parse(data, PLAN, SHAPE) for data in files[:2]]
    assert [each.header.seed for each in parsed] == [0, 1]
    a, b = (each.groups[0].paths[0] for each in parsed)
    assert 0.2 < (a != b).mean() < 0.8
    first, second = (CODEC.decode(data).mean().double() for data in files[:2])
    assert 0 < (first - second).square().mean() < 4 * 2**2  # each is 2 grey levels off the image


def test_images_of_an_archive_do_not_depend_on_other_groups():
    images = gaussian_images(5, seed=5)
    whole = parse(CODEC.encode(images, group=2), PLAN, SHAPE)
    other = torch.cat([images[:2], 255 - images[2:4], images[4:]])
    changed = parse(CODEC.encode(other, group=2), PLAN, SHAPE)
    for n, (a, b) in enumerate(zip(whole.groups, changed.groups, strict=True)):
        same = all(np.array_equal(p, q) for p, q in zip(a.paths, b.paths, strict=True)) and a.scales == b.scales
        assert same == (n != 1)
    first = parse(CODEC.encode(images[:2], group=2), PLAN, SHAPE)
    assert all(np.array_equal(p, q) for p, q in zip(first.groups[0].paths, whole.groups[0].paths, strict=True))


def test_a_damaged_group_is_in_no_other_ones_way():
    """The last layer of the last group is damaged: all before it is as it was."""
    images = gaussian_images(4, seed=6)
    data = bytearray(CODEC.encode(images, group=2))
    good = CODEC.decode(bytes(data)).mean()
    data[-8] ^= 16
    found = CODEC.decode(bytes(data))
    assert found.parsed.status == "damaged" and found.parsed.layers == [3, 2]
    assert torch.equal(found.mean()[:2], good[:2])
    off = (found.mean()[2:].double() - images[2:].double()).square().mean()
    assert float(off) == pytest.approx(127.5**2 * PLAN.square[7], rel=0.3)


def test_fewer_steps_are_the_first_bits_of_more():
    images = gaussian_images(3, seed=7)
    files = [CODEC.encode(images, steps) for steps in (2, 4, 5, 8)]
    parsed = [parse(data, PLAN, SHAPE) for data in files]
    assert [len(data) for data in files] == sorted(len(data) for data in files)
    for few in parsed:
        assert few.status == "complete" and len(few.groups[0].paths) == few.header.steps
        for path, longer in zip(few.groups[0].paths, parsed[-1].groups[0].paths, strict=False):
            assert np.array_equal(path, longer)
        assert few.groups[0].scales == parsed[-1].groups[0].scales[: len(few.groups[0].scales)]
    # Whole layers are the same bytes but for their checksum, which is of the header too.
    layer, head = sum(len(path) for path in parsed[1].groups[0].paths), len(parsed[1].header.pack())
    a, b = (np.unpackbits(np.frombuffer(files[n][head:], np.uint8))[:layer] for n in (1, 3))
    assert np.array_equal(a, b)


def test_every_first_part_of_a_file_decodes_and_more_of_it_is_nearer():
    images = gaussian_images(2, seed=8)
    data = CODEC.encode(images)
    parsed, found = parse(data, PLAN, SHAPE), dict[int, float]()
    for cut in range(1, len(data) + 1, 3):
        try:
            decoded = CODEC.decode(data[:cut])
        except Corrupt:
            assert cut < len(parsed.header.pack())
            continue
        found[cut] = float((decoded.mean().double() - images.double()).square().mean())
        steps = {step for _, step in decoded.chains}
        assert len(steps) == 1 and steps <= set(range(PLAN.steps + 1))
    assert min(found) - len(parsed.header.pack()) < 3
    errors = list(found.values())
    assert errors[-1] < 0.1 * errors[0] and all(b < 1.35 * a for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("whole", [4, 6])
def test_a_step_that_is_cut_off_in_its_first_state_is_left_out(whole):
    """So few bits say nothing of any value; the picture is that of the step before."""
    images = gaussian_images(1, seed=9)
    data = CODEC.encode(images)
    paths = parse(data, PLAN, SHAPE).groups[0].paths
    before = CODEC.decode(CODEC.encode(images, whole)).mean()
    head = len(Header(PLAN.ident, PLAN.steps).pack()) * 8
    start = head + sum(len(path) for path in paths[:whole]) + 8 + 3
    for cut in range(start // 8 + 1, (start + PLAN.memory) // 8 + 1):
        assert torch.equal(CODEC.decode(data[:cut]).mean(), before)


def test_a_step_of_few_bits_that_is_cut_off_is_left_out(untrained):
    """Its one block has not the row of a smaller number."""
    tables = replace(untrained.plan, layers=(1, 4), bits=((30,) * 33,) + ((4,) * 33,) * 4)
    codec, images = Codec(untrained.model, tables), pictures(1, 1, 8, 8)
    data = codec.encode(images)
    parsed = parse(data, tables, (1, 8, 8))
    assert [len(path) for path in parsed.groups[0].paths] == [33, 7, 7, 7, 7]
    before = codec.decode(codec.encode(images, 1)).mean()
    assert 8 * 14 == 64 + 33 + 8 + 3 + 4  # header, the first layer, its CRC-8, a scale, and 4 of 7 bits
    assert torch.equal(codec.decode(data[:14]).mean(), before)


def test_what_a_cut_path_does_not_say_is_drawn_as_in_sampling(chains):
    """The values that are there are the same as of the whole path."""
    images = gaussian_images(1, seed=10)
    data = CODEC.encode(images)
    paths = parse(data, PLAN, SHAPE).groups[0].paths
    start = 8 * len(Header(PLAN.ident, PLAN.steps).pack()) + sum(len(path) for path in paths[:4]) + 8 + 3
    cut = data[: (start + int(0.8 * len(paths[4]))) // 8]
    chains.clear()
    (chain, step), (full, _) = CODEC.decode(cut).chains[0], CODEC.decode(CODEC.encode(images, 5)).chains[0]
    assert step == 5
    same = (chain.x == full.x).double().mean()
    assert 0.7 < float(same) < 0.85
    t, s = (torch.tensor([PLAN.times[n]], dtype=F64) for n in (4, 5))
    _, c = MODEL.process.posterior_coefficients(t, s)
    spread = float((MODEL.process.small_variance(t, s) + c.square() * PLAN.square[4]).sqrt())
    apart = (chain.x - full.x)[chain.x != full.x]  # two draws of the same law
    assert float(apart.square().mean().sqrt()) == pytest.approx(2**0.5 * spread, rel=0.3)


@pytest.mark.parametrize("size", [(8, 8), (5, 8), (3, 2), (1, 1), (8, 13), (20, 9), (11, 5)])
@pytest.mark.parametrize("n", [1, 2])
def test_images_of_any_size_keep_it(untrained, size, n):
    images = pictures(n, 1, *size)
    data = untrained.encode(images)
    parsed = parse(data, untrained.plan, (1, 8, 8))
    assert parsed.header.size == (None if size == (8, 8) else size)
    values = max(8, size[0]) * max(8, size[1])
    assert len(parsed.groups[0].paths[0]) == 3 + n * int(14 * values / 64 + 0.5)
    found = untrained.decode(data)
    assert found.mean().shape == images.shape and found.drawn(steps=2).shape == images.shape


def test_larger_images_are_as_near_as_those_of_the_model():
    """The exact denoiser knows each value for itself, so that windows change nothing."""
    images = gaussian_images(4, (1, 12, 30), seed=11)
    off = CODEC.decode(CODEC.encode(images)).mean().double() - images.double()
    assert float(off.square().mean()) ** 0.5 == pytest.approx(2.0, rel=0.06)


def test_small_images_are_continued_by_their_last_pixels():
    images = pictures(1, 1, 2, 3)
    found = stream._on_canvas(images, (1, 3, 5))
    assert found[0, 0].tolist() == [
        [*row, row[-1], row[-1]] for row in [*images[0, 0].tolist(), images[0, 0, 1].tolist()]
    ]


class Told(torch.nn.Module):
    """x̂_0 is 0.6 for class 1, −0.6 for class 0, and 0 untold."""

    def forward(self, x, time, cond):
        label = 0.5 if cond.label is None else cond.label[:, None, None, None]
        return torch.zeros_like(x) + 1.2 * (label - 0.5)


def test_a_file_tells_its_class_to_the_model():
    config = replace(MODEL.config, classes=2)
    model = Model(config, Denoiser(Told(), MODEL.process, X0(), FixedSmall(), "logsnr").eval(), {})
    codec, images = Codec(model, PLAN), torch.full((1, *SHAPE), 200, dtype=torch.uint8)
    files = {label: codec.encode(images, label=label) for label in (None, 0, 1)}
    assert len(set(files.values())) == 3
    assert len(files[1]) < len(files[None]) < len(files[0])  # 0.6 is 204: the class tells most of it
    for label, value in ((None, 128), (0, 51), (1, 204)):
        assert codec.decode(files[label]).parsed.header.label == label
        assert codec.decode(files[label]).mean().unique().tolist() == [value]


def test_what_is_drawn_goes_on_from_the_bits(coded):
    """The mean has lost what is not said; a drawn picture has as much of it as the data."""
    images = coded[0][:8]
    found = CODEC.decode(CODEC.encode(images, 4))
    x_0, mean = to_float(images), to_float(found.mean())
    left = square(float(MODEL.process.logsnr(torch.tensor(PLAN.times[4], dtype=F64)).exp()))
    assert float(mean.var()) == pytest.approx(STD**2 - left, rel=0.1)
    flow = 2 * STD**2 * (1 - (1 - left / STD**2) ** 0.5)  # along which Gaussian data are stretched
    for solver, steps, least, most in (
        ("unipc-2", 10, 0.85 * flow, 1.15 * flow),
        ("ancestral", 40, 1.4 * left, 2.2 * left),
    ):
        drawn = to_float(found.drawn(solver, steps))
        assert float(drawn.var()) == pytest.approx(STD**2, rel=0.1)
        assert least < float((drawn - x_0).square().mean()) < most  # ancestral, with β̃, a little less than 2 left


@pytest.mark.parametrize("side", [8, 12])
@pytest.mark.parametrize("learned", [Learned(), LearnedRange()])
def test_a_learned_variance_draws_on_with_a_fixed_one(tmp_path, learned, side):
    """Its steps are no table's, and windows say no variance."""
    model = load(toy.save(tmp_path / "m.safetensors", learned), "cpu")
    own = Codec(model, plan(64, weights=model.digest()))
    found = own.decode(own.encode(pictures(1, 1, side, side), 2))
    assert found.drawn("ancestral", 5).shape == (1, 1, side, side)


def test_a_lossless_file_without_its_last_bytes_is_lossless_still():
    """Each lossless end has a CRC of its own; only one that is not there makes the picture another."""
    images = gaussian_images(3, SHAPE)
    data = CODEC.encode(images, group=2, lossless=True)
    spoilt = data[:-1] + bytes([data[-1] ^ 1])
    for part, status in ((data, "complete"), (data[:-1], "partial"), (data[:-4], "partial"), (spoilt, "damaged")):
        found = CODEC.decode(part)
        assert found.parsed.status == status and torch.equal(found.lossless(), images)
    assert CODEC.decode(data[:-5]).lossless() is None


def test_realism_goes_from_the_mean_to_what_is_drawn(coded):
    found = CODEC.decode(CODEC.encode(coded[0][:2], 3))
    mean, drawn = found.mean().double(), found.drawn().double()
    assert torch.equal(found.drawn(realism=0.0).double(), mean)
    assert (found.drawn(realism=0.25).double() - (0.75 * mean + 0.25 * drawn)).abs().max() <= 1.001
    for realism in (-0.1, 1.1):
        with pytest.raises(UsageError, match=rf"^realism = {realism} is not possible; give 0 \(the mean\) to 1$"):
            found.drawn(realism=realism)


def test_progress_is_told_as_often_as_said():
    images, ticks = gaussian_images(5), []
    data = CODEC.encode(images, 3, group=2, tick=ticks.append)
    assert sum(ticks) == CODEC.turns(5, 3, 2) == 9
    CODEC.decode(data, ticks.append)
    assert sum(ticks) == 18 and CODEC.turns(33) == 2 * PLAN.steps


def test_tables_of_few_bits_and_one_step_will_do():
    model = replace(MODEL, config=ModelConfig((2, 4, 4), MODEL.process, X0(), FixedSmall(), UNet(time="logsnr")))
    tables = plan(32, (1,), (1,), times=(0.9, 0.4))
    data = Codec(model, tables).encode(pictures(1, 2, 4, 4))
    assert len(data) == 8 + 2 + 4  # 4 bits and a CRC-8
    assert Codec(model, tables).decode(data).mean().shape == (1, 2, 4, 4)
