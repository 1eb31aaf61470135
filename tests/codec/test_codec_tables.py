"""Tables of a codec: costs against the divergence of Gaussians, steps against all walks, and where tables are kept."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.cli import toy
from tests.codec.plans import gaussian, gaussian_images, gaussian_plan, plan, square
from undiffuse.codec import tables
from undiffuse.codec.container import Header
from undiffuse.codec.plan import EXTRA, KNOTS, MOST_BITS, SCALES
from undiffuse.codec.stream import Codec
from undiffuse.config import plain
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.parameterisation import X0, Mu
from undiffuse.diffusion.process import Cosine, Edm, Linear, Straight
from undiffuse.diffusion.reverse import FixedSmall
from undiffuse.errors import Corrupt, UsageError
from undiffuse.model import fitted
from undiffuse.model.load import load, save, shipped
from undiffuse.model.model import Model
from undiffuse.network.base import Conditioning

RISING = tuple(0.4 + 0.1 * k for k in range(KNOTS))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Named(torch.nn.Module):
    """x̂_0 is 0.5 for class 1, −0.5 for class 0, and 0 untold."""

    def forward(self, x, time, cond):
        return torch.zeros_like(x) + (0.5 if cond.label is None else cond.label[:, None, None, None]) - 0.5


def test_tables_are_of_images_that_are_told_their_class():
    """Where files say it: half of the images are off by as much as their class says."""
    base = gaussian((1, 4, 4))
    model = Model(replace(base.config, classes=2), Denoiser(Named(), base.process, X0(), FixedSmall(), "logsnr"), {})
    images = torch.cat([torch.full((4, 1, 4, 4), 64, dtype=torch.uint8), torch.full((4, 1, 4, 4), 191)]).byte()
    told = Conditioning(torch.tensor([0] * 4 + [1] * 4))
    off = (0.5 - 63.5 / 127.5) ** 2
    assert [each.square for each in tables.measured(model, images, told, 3)] == pytest.approx([off] * 3, rel=1e-3)
    assert [each.square for each in tables.measured(model, images, count=3)] == pytest.approx([0.5**2] * 3, rel=0.02)
    seen = list[list[torch.Tensor]]()
    Codec(model, gaussian_plan(base)).groups(images, Header(b"1234", 2, 8, 4), seen=seen, cond=told)
    assert [part[0].unique().tolist() for part in seen] == [[-0.5], [0.5]]


def test_a_class_that_the_model_lacks_is_damage():
    """A file that is cut off in its first layer has a header that nothing checks."""
    base = gaussian((1, 4, 4))
    model = Model(replace(base.config, classes=2), Denoiser(Named(), base.process, X0(), FixedSmall(), "logsnr"), {})
    codec = Codec(model, gaussian_plan(base))
    data = bytearray(codec.encode(torch.full((1, 1, 4, 4), 191, dtype=torch.uint8), label=1)[:12])
    assert codec.decode(bytes(data)).parsed.header.label == 1
    data[8] = 65
    with pytest.raises(Corrupt, match="^the file is damaged: it says class 65, and this model has 2 classes$"):
        codec.decode(bytes(data))


def node(t: float, v: float) -> tables.Node:
    mass = np.random.default_rng(int(1e6 * t)).dirichlet(np.ones(KNOTS))
    return tables.Node(t, v, tuple(np.array(RISING) / (mass @ np.array(RISING))), tuple(mass))


@pytest.mark.parametrize("process", [Cosine(), Linear(), Straight(), Edm()], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("scale", [0, 4, -6])
def test_a_step_costs_the_divergence_of_two_gaussians_at_that_residual(process, scale):
    """q = N(b x_t + c x_0, β̃) from p, which has the mean at x̂_0 and the variance β̃ + c² v h, at (x_0 − x̂_0)² = v h."""
    t, s = torch.tensor([0.7], dtype=F64), torch.tensor([0.55], dtype=F64)
    at = node(0.7, 0.03)
    _, c = process.posterior_coefficients(t, s)
    small, expected = process.small_variance(t, s), 0.0
    for h, share in zip(at.shape, at.mass, strict=True):
        v = 0.03 * 2 ** (scale / 4) * h
        p = Normal(0.0, (small + c.square() * v).sqrt())
        q = Normal(c * v**0.5, small.sqrt())
        expected += 256 * share * float(kl_divergence(q, p)) / math.log(2)
    rise = float(process.logsnr(s).exp() - process.logsnr(t).exp())
    assert at.kl(rise, 256, scale) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6])
def test_the_walk_is_the_cheapest_of_all(steps):
    process, times = Cosine(), np.linspace(0.95, 0.05, 7)
    nodes = [node(float(t), float(0.3 * t**3)) for t in times]
    snr = process.logsnr(torch.from_numpy(times)).exp().tolist()

    fine = [node.kl(b - a, 50) for node, (a, b) in zip(nodes, itertools.pairwise(snr), strict=False)]

    def cost(walk, early=None) -> float:
        weights = [1 if early is None else 1 / (early + sum(fine[:i])) for i in range(7)]
        return sum(weights[i] * nodes[i].kl(snr[j] - snr[i], 50) for i, j in itertools.pairwise(walk))

    every = [(0, *inner, 6) for inner in itertools.combinations(range(1, 6), steps - 1)]
    best = min(every, key=cost)
    assert tables.shortest(nodes, process, 50, steps) == [nodes[i] for i in best]
    assert steps in (1, 6) or cost(best) < 0.98 * np.mean([cost(each) for each in every])
    soon = min(every, key=lambda walk: cost(walk, 0.01))
    assert tables.shortest(nodes, process, 50, steps, early=0.01) == [nodes[i] for i in soon]
    assert steps != 3 or soon < best  # shorter steps at first


@pytest.mark.parametrize("steps", range(1, 64))
def test_layers_have_all_steps_and_the_last_step_is_one_of_its_own(steps):
    sizes = tables.layers(steps)
    assert sum(sizes) == steps and min(sizes) > 0
    assert sizes[0] == min(8, max(1, steps // 4)) and max(sizes[1:], default=1) <= 4
    assert steps < 2 or sizes[-1] == 1


def test_layers_by_hand():
    assert tables.layers(32) == (8, 4, 4, 4, 4, 4, 3, 1) and tables.layers(9) == (2, 2, 2, 2, 1)


def test_what_is_measured_is_what_the_denoiser_is_off():
    """Of Gaussian data 1/(1/std² + SNR), the same whatever x̂_0 is, and as often as x̂_0 is there."""
    model, images, ticks = gaussian(), gaussian_images(200), []
    nodes = tables.measured(model, images, count=7, batch=64, tick=ticks.append)
    assert len(nodes) == 7 and sum(ticks) == len(ticks) == 7 * 4
    snr = model.process.logsnr(torch.tensor([each.t for each in nodes], dtype=F64)).exp().tolist()
    assert [each.t for each in nodes] == sorted((each.t for each in nodes), reverse=True)
    for each, rise in zip(nodes, snr, strict=True):
        assert each.square == pytest.approx(square(rise), rel=0.05) or each.square < (1 / 127.5) ** 2
        assert sum(each.mass) == pytest.approx(1) and np.dot(each.mass, each.shape) == pytest.approx(1)
        often = [h for h, mass in zip(each.shape, each.mass, strict=True) if mass > 0.1]
        assert often == pytest.approx([1] * len(often), abs=0.1) or each.square < (1 / 127.5) ** 2
    assert nodes[0].mass[6] == pytest.approx(1, abs=0.01)  # all grey, where nothing is known


def test_tables_have_the_bits_of_their_steps_and_of_the_waste():
    model = gaussian()
    nodes = tables.measured(model, gaussian_images(100), count=30)
    made = tables.plan(nodes, model.process, "a" * 64, 100, 144, steps=8, memory=10)
    assert made.check("x") is made and (made.weights, made.images, made.values, made.steps) == ("a" * 64, 100, 144, 8)
    assert made.layers == tables.layers(8) and made.memory == 10
    by_time = {each.t: each for each in nodes}
    walk = [by_time[t] for t in made.times]
    snr = model.process.logsnr(torch.tensor(made.times, dtype=F64)).exp().tolist()
    for n, (a, b) in enumerate(itertools.pairwise(snr)):
        assert made.square[n] == walk[n].square and made.shape[n] == walk[n].shape
        for k in range(-SCALES, SCALES + 1):
            assert made.bits[n][k + SCALES] == round(1.125 * walk[n].kl(b - a, 144, k))
        assert made.kl[n] == pytest.approx(walk[n].kl(b - a, 144))
    end = next(each for each in nodes if 127.5 * each.square**0.5 <= 0.6)
    assert made.times[0] == nodes[0].t and made.times[-1] == end.t
    # Gaussian data take ½ log2(v_first/v_last) bits a value, whichever steps are taken; coarse ones cost as little.
    assert sum(made.kl) == pytest.approx(72 * math.log2(made.square[0] / end.square), rel=0.05)
    with pytest.raises(UsageError, match=r"^40 steps are more than the \d+ times that were measured; give fewer$"):
        tables.plan(nodes, model.process, "a" * 64, 100, 144, steps=40)


@pytest.mark.parametrize("side", [12, 96, 1024])
def test_tables_of_images_of_any_size_belong_together(side):
    """At the largest scale bits grow with the values: of 1024×1024 RGB to some 10⁷ in a step."""
    model, values = gaussian((1, 12, 12)), 3 * side**2
    nodes = tables.measured(model, gaussian_images(40))
    made = tables.plan(nodes, model.process, "a" * 64, 40, values, steps=8)
    assert max(map(max, made.bits)) > values and made.check("x") is made


def test_bits_go_with_the_values_of_an_image_and_the_first_one_starts_the_path():
    made = plan(values=16, bits=(9, 14, 20, 31))
    assert [made.budget(n, 0, 16) for n in range(4)] == [9, 14, 20, 31]
    assert [made.budget(0, 0, values) for values in (8, 15, 17, 160)] == [5, 8, 10, 90]  # 4.5, 8.4, 9.6 and 90
    assert made.budget(3, 16, 16) == round(31 * 2) and made.budget(3, -16, 16) == round(31 / 2)
    assert made.budgets(1, [0, 16, -16], 16) == [14 + EXTRA, 28, 7] and EXTRA == 3
    assert made.starts() == {0: 0, 2: 1, 3: 2}


ROW = plan().bits[0]
DAMAGES = {
    "a time too few": {"times": plan().times[1:]},
    "times that rise": {"times": (0.9, 0.7, 0.8, 0.3, 0.1)},
    "a time twice": {"times": (0.9, 0.7, 0.7, 0.3, 0.1)},
    "a time above 1": {"times": (1.1, 0.7, 0.6, 0.3, 0.1)},
    "a knot too few": {"shape": (*plan().shape[1:], (1.0,) * (KNOTS - 1))},
    "no knots": {"shape": (*plan().shape[1:], ())},
    "h of 0": {"shape": (*plan().shape[1:], (1.0,) * (KNOTS - 1) + (0.0,))},
    "h of too few steps": {"shape": plan().shape[2:]},
    "a square of 0": {"square": (*plan().square[1:], 0.0)},
    "a square too few": {"square": plan().square[2:]},
    "a scale too few": {"bits": (ROW,) * 3 + (ROW[1:],)},
    "negative bits": {"bits": (ROW,) * 3 + ((-1, *ROW[1:]),)},
    "too many bits": {"bits": (ROW,) * 3 + ((*ROW[:-1], 16 * MOST_BITS + 1),)},
    "bits of too few steps": {"bits": (ROW,) * 3},
    "layers of too few steps": {"layers": (2, 1)},
    "a layer without steps": {"layers": (2, 0, 1, 1)},
    "no values": {"values": 0},
    "no such memory": {"memory": 11},
    "a cost too few": {"kl": (1.0,) * 3},
    "no steps": {"times": (0.9,), "square": (), "shape": (), "bits": (), "layers": (), "kl": ()},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tables_that_do_not_belong_together_are_refused(damage):
    made = plan()
    assert made.check("x") is made
    words = "^FILE is damaged: its tables do not belong together; give `undiffuse codec fit --overwrite`$"
    with pytest.raises(Corrupt, match=words):
        replace(made, **DAMAGES[damage]).check("FILE")


@pytest.fixture
def bare(tmp_path) -> Model:
    return load(toy.save(tmp_path / "bare.safetensors"), "cpu")


def kept(model: Model):
    made = plan(values=64, weights=model.digest())
    return made, tables.keep(made, model)


def test_tables_are_found_by_the_hash_of_the_weights(bare, cache, tmp_path):
    other = load(toy.save(tmp_path / "other.safetensors"), "cpu")
    for weight in other.denoiser.network.parameters():
        weight.add_(1)
    made, path = kept(bare)
    assert path == cache / "fit" / f"{bare.digest()}.codec.json"
    again = tables.of(load(tmp_path / "bare.safetensors", "cpu"))
    assert again == made and again.ident == made.ident
    with pytest.raises(UsageError, match="^no codec is fitted to this model; make its tables with `undiffuse codec fi"):
        tables.of(other)


def test_tables_lie_beside_a_run_and_a_grid_is_not_taken_for_them(tmp_path, cache):
    run = toy.run_of_digits(tmp_path / "run", 1)
    model = load(run, "cpu")
    made, path = kept(model)
    assert path == run / "fit" / f"{model.digest()}.codec.json" and not cache.exists()
    again = load(run, "cpu")
    assert tables.of(again) == made and again.fit is None


def test_a_file_is_read_by_the_model_that_is_given_or_by_a_shipped_one(bare):
    made, _ = kept(bare)
    data = Header(made.ident, 4).pack()
    codec = tables.for_file(data, bare)
    assert codec.model is bare and codec.plan == made
    words = (
        rf"^no shipped model made this file \(tables {made.ident.hex()}; shipped: {', '.join(shipped())}\); give the"
    )
    with pytest.raises(UsageError, match=words):
        tables.for_file(data)
    with pytest.raises(Corrupt, match="^this is no coded image"):
        tables.for_file(b"GIF89a", bare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_exported_file_has_the_tables_along(bare, tmp_path, cache, dtype):
    """By the hash of what is in it, which is another one where the weights were rounded."""
    made, path = kept(bare)
    save(bare, tmp_path / "with.safetensors", dtype)
    path.unlink()
    exported = load(tmp_path / "with.safetensors", "cpu")
    assert tables.of(exported) == replace(made, weights=exported.digest())
    assert (exported.digest() == made.weights) == (dtype == torch.float32)
    save(exported, tmp_path / "again.safetensors")  # from file to file they stay
    assert tables.of(load(tmp_path / "again.safetensors", "cpu")) == tables.of(exported)


def test_tables_in_the_cache_go_before_those_of_the_file(bare, tmp_path):
    kept(bare)
    save(bare, tmp_path / "with.safetensors")
    mine = plan(values=64, weights=bare.digest(), usual=5)
    tables.keep(mine, bare)
    assert tables.of(load(tmp_path / "with.safetensors", "cpu")) == mine


def test_tables_that_are_made_anew_do_not_hide_those_in_the_file(bare, cache):
    """Files that were written with them are still read."""
    old, new = (plan(values=64, weights=bare.digest(), usual=usual) for usual in (5, 6))
    both = replace(bare, meta={**bare.meta, "codec": plain(old)})
    assert tables.of(both) == old
    tables.keep(new, both)
    assert tables.of(both) == new == tables.of(both, new.ident) and tables.of(both, old.ident) == old
    assert tables.of(both, b"none") == new


def test_saving_does_not_make_tables_of_other_weights_those_of_a_model(bare, tmp_path):
    """As of a model that was trained on from a file with tables."""
    stale = replace(bare, meta={**bare.meta, "codec": plain(plan(values=64, weights="1" * 64))})
    with pytest.raises(UsageError, match=r"is of other weights \(111111111111\) than those of this model"):
        tables.of(stale)
    with pytest.raises(UsageError, match="other weights|no codec is fitted"):
        save(stale, tmp_path / "stale.safetensors")
        tables.of(load(tmp_path / "stale.safetensors", "cpu"))


def test_tables_that_are_damaged_or_of_a_later_version_are_refused(bare):
    made, path = kept(bare)
    good = plain(made)
    for change, error, words in (
        (
            {"weights": "1" * 64},
            UsageError,
            rf"of other weights \(1{{12}}\) than those of this model \({made.weights[:12]}",
        ),
        ({"format": 99}, UsageError, "has format 99, and this undiffuse reads up to 1; upgrade undiffuse"),
        ({"format": None}, Corrupt, "is damaged: its format version is None, no integer"),
        ({"memory": 13}, Corrupt, "damaged: its tables do not belong together; give `undiffuse codec fit --overwrite`"),
        ({"times": "no"}, UsageError, "times"),
        ({"surplus": 1}, UsageError, "surplus"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(error, match=words):
            tables.of(bare)
    for text in ("[]", "[1]", "5", '"x"'):
        path.write_text(text)
        with pytest.raises(Corrupt, match="damaged"):
            tables.of(bare)
    path.write_text("{")
    with pytest.raises(Corrupt):
        tables.of(bare)


def test_tables_in_the_file_of_a_model_that_are_no_object_are_refused(bare):
    with pytest.raises(Corrupt, match="is damaged: it is no JSON object; make it anew with `undiffuse codec fit --ov"):
        tables.of(replace(bare, meta={"codec": [1]}))


def test_a_fit_knows_the_bits_that_images_take():
    model, images, ticks = gaussian(), gaussian_images(24, seed=1), []
    made = tables.fit(model, images, steps=4, memory=10, tick=ticks.append)
    assert made.weights == model.digest() and made.images == 24 and made.steps == 4 and made.values == 144
    codec = Codec(model, replace(made, usual=0))
    groups = codec.groups(images, Header(codec.plan.ident, 4, 24, 16))
    bits = [n for group in groups for n in codec.bits(group, 144)]
    assert len(bits) == 24 and made.usual == int(np.percentile(bits, 99))
    first = sum(row[SCALES] for row in made.bits)
    assert min(bits) > 0.6 * first and max(bits) < 1.6 * first
    assert sum(len(path) for group in groups for path in group.paths) == sum(bits)


def test_a_process_of_few_steps_is_measured_between_them(bare):
    """A table of 12 steps has a log-SNR everywhere."""
    made = tables.fit(bare, torch.zeros(2, 1, 8, 8, dtype=torch.uint8), steps=3, memory=10)
    assert bare.process.steps == 12 and made.steps == 3 and made.check("x") is made


def test_what_cannot_be_fitted_is_refused(bare):
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(UsageError, match="^memory = 11 is not possible; give 10, 12, 14, 16$"):
        tables.fit(bare, images, memory=11)
    mu = replace(bare, config=replace(bare.config, parameterisation=Mu()))
    with pytest.raises(
        UsageError, match="^mu prediction holds for steps of 1/T only, and files take few; train eps, x"
    ):
        tables.fit(mu, images)
    few = replace(bare, config=replace(bare.config, bounds=(0.1, 1.0)))
    with pytest.raises(UsageError, match="a codec"):
        tables.fit(few, images)


def test_tables_by_formula_are_good_tables():
    """Those that other tests take."""
    made = gaussian_plan(gaussian())
    assert made.check("x") is made and sum(made.kl) == pytest.approx(
        72 * math.log2(0.2**2 / (2 / 127.5) ** 2), rel=0.01
    )
    assert fitted.CODEC == ".codec"
