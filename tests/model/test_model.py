"""The object users hold: which times it walks, what a variant of it changes, and how it reads pictures."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from undiffuse.data.format.packed import PackedSource
from undiffuse.data.pack import pack
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.grid import LogSnr
from undiffuse.diffusion.likelihood import bound
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.parameterisation import X0, Eps
from undiffuse.diffusion.process import ContinuousCosine, Cosine, Linear, Process
from undiffuse.diffusion.reverse import FixedLarge, FixedSmall
from undiffuse.diffusion.sampler.ancestral import Ancestral
from undiffuse.diffusion.sampler.ddim import DDIM
from undiffuse.diffusion.sampler.dpmpp import DpmppSde
from undiffuse.diffusion.sampler.heun import Heun
from undiffuse.diffusion.sampler.unipc import Unipc
from undiffuse.errors import DataError, UsageError
from undiffuse.key import Key
from undiffuse.model.load import from_weights, load, save
from undiffuse.model.model import Model, to_float, to_uint8
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.base import Conditioning
from undiffuse.network.unet import UNet
from undiffuse.strict import flag


class Fixed(nn.Module):
    """x̂_0 = answer(x_t), and the times that it was asked at."""

    def __init__(self, steps: int, answer):
        super().__init__()
        self.steps, self.answer, self.seen = steps, answer, []

    def forward(self, x, time, cond):
        self.seen.append(round(float(time[0] + 1) / self.steps, 6))
        return self.answer(x)


def model(answer, process: Process | None = None, meta=None) -> Model:
    process = process or Linear(100, 1e-3, 0.2)
    config = ModelConfig((1, 4, 6), process, X0(), FixedSmall(), UNet(time="logsnr" if not process.steps else "index"))
    network = Fixed(process.steps or 1, answer)
    return Model(config, Denoiser(network, process, X0(), FixedSmall(), config.network.time), meta or {})


def half(x):
    return x / 2


def test_times_are_the_ones_given_and_0():
    toy = model(half)
    assert toy.times((1, 0.5, 0.1)).tolist() == [1, 0.5, 0.1, 0]
    assert toy.times([0.95, 0.0]).tolist() == [0.95, 0]
    assert toy.times((0.504, 0.494, 0.01)).tolist() == [0.504, 0.494, 0.01, 0]  # not points of the table
    assert torch.equal(toy.times(3), toy.times((1, 0.67, 0.33)))
    assert model(half, ContinuousCosine()).times((0.7123, 0.5)).tolist() == [0.7123, 0.5, 0]
    toy.sample(2, steps=(1, 0.3, 0.05), solver=DDIM(eta=0.5))
    assert toy.denoiser.network.seen == [1, 0.3, 0.05]
    toy.sample(1, steps=(1, 0.123), solver="ddim")
    assert toy.denoiser.network.seen[3:] == [1, 0.123]


@pytest.mark.parametrize(
    "times, message",
    [
        ((0.5, 0.5), r"times 0\.5, 0\.5 do not fall strictly; sort or thin them"),
        ((0.1, 0.5), r"times 0\.1, 0\.5 do not fall strictly"),
        ((1.5, 0.5), r"times 1\.5, 0\.5 are not possible; give one or more from 1, which is noise, down to 0\.01"),
        ((0.5, 0.001), r"times 0\.5, 0\.001 are not possible"),
        ((0.5, float("nan")), r"times 0\.5, nan are not possible"),
        ((), "times none are not possible"),
        ((0.0,), "times 0 are not possible"),
    ],
)
def test_times_that_are_no_chain_are_refused(times, message):
    with pytest.raises(UsageError, match=message):
        model(half).times(times)


def test_seeds_of_any_library_make_the_images_that_they_make_alone():
    toy, seeds = model(half), [5, 17, 2**40]
    alone = torch.cat([toy.sample(1, 7, "ancestral", seed) for seed in seeds])
    assert len(alone.flatten(1).unique(dim=0)) == 3
    for given in (seeds, tuple(seeds), np.array(seeds), torch.tensor(seeds), list(np.array(seeds))):
        assert torch.equal(toy.sample(3, 7, "ancestral", given), alone)
    assert torch.equal(toy.sample(1, 7, "ancestral", torch.tensor(5)), alone[:1])
    with pytest.raises(UsageError, match="3 seeds were given for 2 images; give one for each, or a single one"):
        toy.sample(2, 7, seed=np.array(seeds))
    with pytest.raises(UsageError, match=r"^seed = 5\.0 is not possible; give a whole number such as 5$"):
        toy.sample(1, 7, seed=np.array([5.0]))


@pytest.mark.parametrize("steps", [0, -1, 101])
def test_steps_that_the_table_lacks_are_refused(steps):
    with pytest.raises(UsageError, match=f"steps = {steps} is not possible; this model takes 1 to 100"):
        model(half).sample(1, steps)
    if steps < 1:
        with pytest.raises(UsageError, match=f"steps = {steps} is not possible; this model takes 1 or more"):
            model(half, ContinuousCosine()).times(steps)


@pytest.mark.parametrize("batch", [0, -1])
def test_no_images_at_a_time_is_refused(batch):
    with pytest.raises(UsageError, match=f"batch = {batch} is not possible; give 1 or more"):
        model(half).sample(2, batch=batch)


@pytest.mark.parametrize("solver", ["ancestral", "ddim", "heun", "unipc", "ipndm"])
@pytest.mark.parametrize("n, batch", [(2, 64), (5, 2)])
def test_progress_counts_to_its_total_whatever_the_solver_evaluates(solver, n, batch):
    toy, counted = model(half), []
    toy.sample(n, 7, solver, batch=batch, progress=counted.append)
    assert sum(counted) == toy.sampling_steps(n, 7, batch) == 7 * -(-n // batch)


def test_without_clipping_the_chain_is_the_bare_algorithm_2():
    """x̂_0 = 3 everywhere: the last step of Algorithm 2 returns it, the clipped chain returns 1."""
    toy = model(lambda x: torch.full_like(x, 3.0))
    keys, times = Key(0).rows(2), toy.times(5)
    bare = toy.variant(clip=False)
    assert (toy.chain(keys, times, toy.sampler()) == 1).all()
    assert (bare.chain(keys, times, bare.sampler()) == 3).all()
    assert toy.denoiser.clip and not bare.denoiser.clip  # a copy, with the same weights
    assert bare.denoiser.network is toy.denoiser.network and not bare.denoiser.training


def test_the_variance_is_that_of_the_step_and_of_the_bound():
    """One step to s > 0 leaves the mean and the noise, so its spread is β̃ or β of that step."""
    toy = model(lambda x: torch.zeros_like(x))
    times = torch.tensor([1.0, 0.5], dtype=F64)
    x_0, found = torch.zeros(3, 1, 4, 6), {}
    for name in ("fixed-small", "fixed-large"):
        other = toy.variant(variance=name)
        start = torch.zeros(400, 1, 4, 6)
        x = other.chain(Key(1).rows(400), times, other.sampler(), start=start)
        expected = {"fixed-small": toy.process.small_variance, "fixed-large": toy.process.large_variance}[name]
        assert float(x.var()) == pytest.approx(float(expected(*times)), rel=0.05)
        found[name] = bound(other.denoiser, x_0, Key(0).rows(3)).totals()
    assert (found["fixed-large"] > found["fixed-small"]).all()  # x̂_0 = x_0: what is left is the mismatch of β
    assert toy.sampler() == Ancestral(FixedSmall()) and toy.variant(variance=FixedLarge()).sampler() == Ancestral()


def test_a_variance_that_the_network_does_not_say_is_refused():
    with pytest.raises(
        UsageError, match="variance learned-range needs a network that was trained to say it, and this "
    ):
        model(half).variant(variance="learned-range")
    with pytest.raises(UsageError, match='variance "fixed-smal" is not known. Did you mean "fixed-small"'):
        model(half).variant(variance="fixed-smal")


def test_a_solver_may_be_named_with_its_order():
    assert model(half).sampler("unipc-2") == Unipc(2) and model(half).sampler("dpmpp-sde") == DpmppSde()
    assert model(half).sampler("heun,churn=40,churn_noise=1.003") == Heun(40.0, 1.003)
    assert model(half).sampler("heun,churn=1,churn_min=1e-3") == Heun(1.0, churn_min=1e-3)
    assert model(half).sampler("unipc-2,variant=bh1") == Unipc(2, "bh1")
    for name, message in {
        "unipc-4": 'sampler unipc: "order" input should be 1, 2 or 3, given 4',
        "ddim-2": 'sampler ddim has no field "order". Known: eta',
        "unipcc-2": 'sampler "unipcc" is not known. Did you mean "unipc"',
        "heun,churn": 'sampler "heun,churn": "churn" is not of the form field=value, as in heun,a=1',
        "heun,=3": 'sampler "heun,=3": "" is no name of a field, as in heun,a=1',
        "heun,churn=1,churn.a=2": '"churn.a" is no name of a field',
        "heun,churn=40,churn=3": 'sampler "heun,churn=40,churn=3" says churn twice; say it once',
        "heun,churns=4": 'sampler heun has no field "churns". Did you mean "churn"',
        "heun,churn_noise=1.1": "sampler heun: churn_noise belongs to the churn; give churn too, such as 40",
        "heun,steps=9": "sampler heun: steps belongs to the churn; give churn too, such as 40",
        "heun,churn=-1": 'sampler heun: "churn" input should be greater than or equal to 0',
        "unipc,name=ddim": 'sampler "unipc,name=ddim": the name comes first, and once',
        "-2": 'sampler "-2" is not known',
        "dpmp": 'sampler "dpmp" is not known. Did you mean "dpmpp"',
    }.items():
        with pytest.raises(UsageError, match=message):
            model(half).sampler(name)


def test_eta_is_ddims():
    assert model(half).sampler("ddim", eta=0.25) == DDIM(0.25)
    for solver in ("ancestral", "heun"):
        with pytest.raises(UsageError, match=f"eta = 0.5 belongs to the sampler ddim, not to {solver}"):
            model(half).sampler(solver, eta=0.5)
    with pytest.raises(UsageError, match="eta = 0.2 is given beside the fields of ddim,eta=0.5; say it there"):
        model(half).sampler("ddim,eta=0.5", eta=0.2)
    with pytest.raises(UsageError, match='sampler ddim: "eta" input should be less than or equal to 1, given 2'):
        model(half).sampler("ddim", eta=2)
    assert model(half).sampler("ddim", eta=np.float32(0.5)) == DDIM(eta=0.5)
    with pytest.raises(UsageError, match="^eta = nan is not possible; give a number$"):
        model(half).sampler("ddim", eta=float("nan"))


def test_pictures_are_read_as_those_of_the_training_were(tmp_path):
    path = tmp_path / "pictures" / "glass.png"
    path.parent.mkdir()
    Image.new("RGBA", (12, 8), (9, 9, 9, 0)).save(path)
    for meta, value in (({"recipe": {"data": {"background": "#404040"}}}, 64), ({}, 255), ({"recipe": 3}, 255)):
        toy = model(half, meta=meta)
        assert torch.equal(toy.picture(path), torch.full((1, 4, 6), value, dtype=torch.uint8))
        assert torch.equal(toy.source(path.parent).images[0], toy.picture(path))
    with pytest.raises(DataError, match="none.png cannot be read: No such file"):
        toy.picture(tmp_path / "none.png")


def test_packed_data_is_not_copied_into_memory(tmp_path):
    Image.new("L", (6, 4), 7).save(tmp_path / "a.png")
    toy = model(half)
    packed = pack(tmp_path / "a.png", tmp_path / "packed", channels=1)
    same = toy.source(packed.path)
    assert isinstance(same, PackedSource) and same.fingerprint() == toy.source(tmp_path / "a.png").fingerprint()
    other = pack(tmp_path / "a.png", tmp_path / "other", size=2, channels=1)
    assert toy.source(other.path).images.shape == (1, 1, 4, 6)


def test_bad_pictures_are_left_out_when_asked(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (12, 8), (9, 9, 9)).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:45])
    with pytest.raises(DataError, match="1 of 2 images cannot be read: .* or leave them out with --skip-bad"):
        model(half).source(tmp_path)
    kept = model(half).source(tmp_path, skip_bad=True)
    assert len(kept) == 1 and kept.skipped == ("b.png",)


def test_a_notebook_shows_what_a_model_is():
    html = load("fashion-mnist")._repr_html_()
    cells = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", html))
    assert cells["images"] == "28×28, grey" and cells["network"] == "UNet, 1,198,148 weights"
    assert cells["process"] == "cosine, 1,000 steps" and (
        cells["trained on"] == "1,715,200 images in 6,700 steps after the 2,227,200 of the weights that it began from"
    )


def test_what_is_loaded_neither_drops_out_nor_wants_gradients(tmp_path):
    config = ModelConfig((1, 8, 8), Linear(10), Eps(), FixedSmall(), UNet(8, (1,), 1, (), dropout=0.5))
    network = config.build(clip=True).network
    save(from_weights(config, dict(network.named_parameters()), {}), tmp_path / "model.safetensors")
    for made in (from_weights(config, dict(network.named_parameters()), {}), load(tmp_path / "model.safetensors")):
        assert not any(module.training for module in made.denoiser.modules()) and made.denoiser.clip
        assert not any(weight.requires_grad for weight in made.denoiser.parameters())


def test_bytes_become_numbers_and_come_back():
    """0 is −1 and 255 is 1; each value is rounded to the nearest, and what lies outside is clipped."""
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = to_float(every)
    assert (x.dtype, float(x.min()), float(x.max())) == (torch.float32, -1.0, 1.0)
    assert (x.double() - (2 * every.double() / 255 - 1)).abs().max() < 1e-7
    for nudge in (-0.49, 0.0, 0.49):
        assert torch.equal(to_uint8(x + nudge / 127.5), every)
    outside = torch.tensor([-1e9, -1.01, 1.01, 300.0]).reshape(1, 1, 2, 2)
    assert to_uint8(outside).flatten().tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("batch", [1, 2, 64])
@pytest.mark.parametrize("seed", [0, 5])
def test_a_sample_is_what_its_own_noise_becomes(seed, batch):
    """One step of DDIM from t = 1 to 0 ends at x̂_0, here half of the noise that is keyed by the seed and the number."""
    noise = Key(seed).fold("sample").rows(5).fold("x_T").normal(1, 4, 6)
    found = model(half).sample(5, steps=1, solver=DDIM(), seed=seed, batch=batch)
    assert torch.equal(found, to_uint8((noise / 2).clamp(-1, 1)))
    assert torch.equal(model(half).sample(5, steps=1, solver=Heun(), seed=seed, batch=batch), found)


def test_a_chain_in_float64_rounds_its_state_less():
    """With x̂_0 = x/2 each step of DDIM multiplies x by alpha_s/2 + (sigma_s/sigma_t)(1 − alpha_t/2)."""
    toy, keys = model(half), Key(0).rows(2)
    toy, times, seen = toy.variant(clip=False), toy.times(40), []
    alpha, sigma = toy.process.alpha_sigma(times)
    gain = float((alpha[1:] / 2 + sigma[1:] / sigma[:-1] * (1 - alpha[:-1] / 2)).prod())
    expected = gain * keys.fold("x_T").normal(1, 4, 6).double()
    toy.denoiser.network.weight = nn.Parameter(torch.ones(1))  # so it is asked, and answers, in float32
    for dtype, error in ((torch.float32, 1e-6), (torch.float64, 1e-7)):
        found = toy.chain(keys, times, DDIM(), callback=lambda r, x, t: seen.append(x.dtype), dtype=dtype)
        assert found.dtype == seen[-1] == dtype and (found - expected).abs().max() < error * expected.abs().max()
    assert error * expected.abs().max() < (toy.chain(keys, times, DDIM()) - expected).abs().max()


class Bright(nn.Module):
    """E[x_0 | x_t] of data N(label + 1, 0.2²), with the label 0 for none; it counts the images that it is asked for."""

    def __init__(self, process: Process):
        super().__init__()
        self.process, self.asked = process, []

    def forward(self, x, time, cond):
        self.asked.append(len(x))
        t = time.double() if self.process.steps is None else (time.double() + 1) / self.process.steps
        alpha, sigma = (each.reshape(-1, 1, 1, 1) for each in self.process.alpha_sigma(t))
        mean = (1 if cond.label is None else cond.label.reshape(-1, 1, 1, 1) + 1) / 4
        gain = 0.04 * alpha / (0.04 * alpha**2 + sigma**2)
        return (mean + gain * (x - alpha * mean)).to(x.dtype)


def bright(classes: int | None = None) -> Model:
    process = Cosine()
    config = ModelConfig((1, 4, 6), process, X0(), FixedSmall(), UNet(), classes)
    return Model(config, Denoiser(Bright(process), process, X0(), FixedSmall()), {})


def test_a_chain_that_begins_below_1_begins_at_the_mean_of_the_data():
    """Noise alone would leave what an exact solver carries to the end: −mean · 0.2/√(0.2² + u²) for u = σ/α."""
    toy, n = bright(), 2000
    times = LogSnr(sigma_max=5.0).times(toy.process, 60)
    keys = Key(0).fold("sample").rows(n)
    ends = toy.chain(keys, times, toy.sampler("dpmpp-3"))
    sure = 4 * 0.2 / (n * 24) ** 0.5
    assert float(ends.mean()) == pytest.approx(0.25, abs=sure) and float(ends.std()) == pytest.approx(0.2, rel=0.03)
    alone = toy.process.sigma(times[:1]).float() * keys.fold("x_T").normal(1, 4, 6)
    dark = toy.chain(keys, times, toy.sampler("dpmpp-3"), start=alone)
    assert float(ends.mean() - dark.mean()) == pytest.approx(0.25 * 0.2 / (0.04 + 25) ** 0.5, rel=0.02)


@pytest.mark.parametrize("process", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_no_mean_is_read_off_a_network_that_predicts_the_noise(process):
    """Its small errors there are large in x̂_0: an error of 0.003 is one of 0.5 or of 61."""
    config = ModelConfig((1, 4, 6), process, Eps(), FixedSmall(), UNet())
    network = Fixed(1000, lambda x: x + 0.003)
    toy = Model(config, Denoiser(network, process, Eps(), FixedSmall()), {})
    assert float(process.sigma(torch.ones(1)) / process.alpha(torch.ones(1))) * 0.003 > 0.4
    assert torch.equal(toy.mean(), torch.zeros(1, 4, 6)) and not network.seen


def test_the_mean_is_of_each_class_and_asked_for_once():
    toy = bright(classes=3)
    cond = Conditioning(torch.tensor([2, 0, 2]))
    seen = []
    times = torch.tensor([0.9, 0.0], dtype=F64)
    for _ in range(2):
        toy.chain(Key(1).rows(3), times, toy.sampler("ddim"), cond, callback=lambda r, x, t: seen.append(x))
    alpha, sigma = (float(each) for each in toy.process.alpha_sigma(times[:1]))
    eps = Key(1).rows(3).fold("x_T").normal(1, 4, 6)
    means = torch.tensor([0.75, 0.25, 0.75]).reshape(-1, 1, 1, 1)
    assert torch.equal(seen[0], seen[1]) and torch.allclose(seen[0], alpha * means + sigma * eps, atol=1e-4)
    assert sorted(toy.denoiser.network.asked) == [3, 3, 8, 8]
    assert toy.mean(1).shape == (1, 4, 6) and float(toy.mean(1).mean()) == pytest.approx(0.5, abs=1e-4)


def test_progress_counts_each_step_of_each_batch_once():
    toy, counted = model(half), []
    toy.sample(5, steps=7, batch=2, progress=counted.append)
    assert [k for k in counted if k] == [1] * 21 and toy.sampling_steps(5, 7, 2) == 21


@pytest.mark.parametrize("given", ["no", 0, None])
def test_what_is_neither_true_nor_false_is_refused(given):
    assert flag("clip", True) is True and flag("clip", False) is False
    with pytest.raises(UsageError, match=f"^clip = {given!r} is not possible; give True or False$"):
        flag("clip", given)


def test_a_variant_changes_what_it_is_told_to_and_nothing_else():
    bare = model(half).variant(clip=False)
    assert not bare.denoiser.clip and model(half).denoiser.clip and bare.variant().denoiser.clip is False
    large = bare.variant(variance="fixed-large")
    assert not large.denoiser.clip and large.config.variance == large.denoiser.variance == FixedLarge()
    assert large.variant(clip=True).denoiser.clip and large.variant(clip=True).config.variance == FixedLarge()
