"""What the levels of images say near the data: against sums over all 256 of them, and in a denoiser."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from undiffuse.config import plain
from undiffuse.data.source import ArraySource
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.lattice import FINE, LEVELS, level_nll, level_noise
from undiffuse.diffusion.numbers import per_image
from undiffuse.diffusion.parameterisation import PARAMETERISATIONS, Lattice, Mu, V
from undiffuse.diffusion.process import Edm, Straight, Vdm
from undiffuse.diffusion.reverse import FixedSmall, LearnedRange
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.model.load import load, save
from undiffuse.model.recipe import ModelConfig, load_recipe
from undiffuse.network.base import Network
from undiffuse.training.trainer import Trainer

F64 = torch.float64
GRID = torch.arange(LEVELS, dtype=F64) / 127.5 - 1


def drawn(count: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels, black and white among them, and the same with noise."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randint(0, LEVELS, (count,), generator=generator)
    k[::4], k[1::4] = 0, 255
    return GRID[k], GRID[k] + spread * torch.randn(count, dtype=F64, generator=generator)


def log_posterior(z: torch.Tensor, spread: float) -> torch.Tensor:
    """log p(k | z) for all 256 levels, equally likely before."""
    return (-0.5 * ((z[..., None] - GRID) / spread).square()).log_softmax(-1)


@pytest.mark.parametrize("gaps", [0.165, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5])
def test_the_noise_that_levels_tell_is_the_mean_over_all_of_them(gaps):
    spread = gaps / 127.5
    _, z = drawn(4000, spread)
    exact = (log_posterior(z, spread).exp() * ((z[:, None] - GRID) / spread)).sum(1)
    wide = torch.tensor([spread], dtype=F64)
    torch.testing.assert_close(level_noise(z, wide), exact, rtol=0, atol=1e-6)
    # float32 holds z to 6e-8, of which the smallest spread makes 5e-5, and the posterior between two levels more.
    assert (level_noise(z.float(), wide.float()).double() - exact).abs().max() < 1e-3


def test_beyond_fine_grey_levels_tell_nothing_any_more():
    z = torch.linspace(-0.8, 0.8, 4001, dtype=F64)
    exact = (log_posterior(z, FINE).exp() * ((z[:, None] - GRID) / FINE)).sum(1)
    assert exact.abs().max() < 1e-12


@pytest.mark.parametrize("spread", [math.exp(-13.3 / 2), 0.5 / 127.5, 2 / 127.5, 1.0])
def test_the_cost_of_a_level_is_by_its_likelihood_among_all(spread):
    x_0, z = drawn(4000, spread)
    exact = -log_posterior(z, spread).gather(1, ((x_0 + 1) * 127.5).round().long()[:, None])[:, 0]
    wide = torch.tensor([spread], dtype=F64)
    torch.testing.assert_close(level_nll(x_0, z, wide), exact, rtol=1e-12, atol=1e-12)
    single = level_nll(x_0.float(), z.float(), wide.float()).double()
    torch.testing.assert_close(single, exact, rtol=1e-5, atol=1e-3)


class Clean(nn.Module):
    """Its own x̂_0 is x_t/alpha, as if there were no noise; what it was told stays in `seen`."""

    def __init__(self, process, parameterisation):
        super().__init__()
        self.process, self.parameterisation = process, parameterisation

    def forward(self, x, time, cond):
        self.seen = x
        t = self.process.time(time.double())
        alpha = self.process.alpha(t)
        skip, out, scale, *_ = self.parameterisation.coefficients(self.process, t)
        x_t = x[:, : x.shape[1] // 2] / per_image(scale, x)
        return per_image((1 / alpha - skip) / out, x) * x_t


@pytest.mark.parametrize("process", [Vdm(), Straight(), Edm()], ids=["vdm", "straight", "edm"])
@pytest.mark.parametrize("name", ["eps", "x0", "v", "edm"])
def test_a_network_that_knows_no_levels_has_their_mean_all_the_same(name, process):
    """Each row at a t of its own: below FINE x̂_0 = E[x_0 | x_t] of uniform levels, above it is the network's alone."""
    spreads = torch.tensor([0.002, 0.003, 0.007, 0.0117, 0.0118, 0.05], dtype=F64)
    t, of = process.time(-2 * spreads.log()), PARAMETERISATIONS.build(name)
    network = Clean(process, of)
    denoiser = Denoiser(network, process, Lattice(of), FixedSmall(), "logsnr", clip=False)
    generator = torch.Generator().manual_seed(1)
    x_0 = GRID[torch.randint(0, LEVELS, (6, 2, 5, 5), generator=generator)]
    x_t = process.marginal(x_0, torch.randn(6, 2, 5, 5, dtype=F64, generator=generator), t)
    z = x_t / per_image(process.alpha(t), x_t)
    found = denoiser(x_t, t).x_0
    for i, spread in enumerate(spreads.tolist()):
        mean = log_posterior(z[i], spread).exp() @ GRID if spread <= FINE else z[i]
        torch.testing.assert_close(found[i], mean, rtol=0, atol=2e-7)  # time is told in float32
        told = (z[i] - mean) / spread
        torch.testing.assert_close(network.seen[i, 2:], told, rtol=0, atol=2e-6)
        assert (told.abs().max() > 0.01) == (spread <= FINE)


def test_a_learned_variance_is_as_the_network_says_it():
    """What levels tell is added to F, and not to the other half of the channels."""

    class Silent(nn.Module):
        def forward(self, x, time, cond):
            assert x.shape[1] == 2
            return torch.zeros_like(x)

    process, t = Vdm(), torch.tensor([1e-5], dtype=F64)
    x_t = torch.full((1, 1, 2, 2), 0.4)
    prediction = Denoiser(Silent(), process, Lattice(), LearnedRange(), "logsnr", clip=False)(x_t, t)
    assert prediction.raw_variance.eq(0).all() and prediction.output.ne(0).all()


@pytest.mark.parametrize("of, name", [(Mu(), "mu"), (Lattice(V()), "lattice")])
def test_what_it_cannot_be_of(of, name):
    with pytest.raises(UsageError, match=f"parameterisation lattice cannot be of {name}; choose eps, x0, v or edm"):
        Lattice(of)


SET = [
    "process.name=vdm",
    "parameterisation.name=lattice",
    "parameterisation.of.name=x0",
    "objective.name=continuous-vlb",
    "network.time=logsnr",
    "network.channels=8",
    "network.fourier=[127.5, 255]",
    "train.batch=4",
    "train.channels_last=false",  # whose bits are others
    "data.labels=true",
]


def test_settings_train_are_saved_and_come_back(tmp_path):
    """With classes too: two steps, a model on disk, and the same samples and x̂_0 from it."""
    recipe = load_recipe("fashion-mnist", SET)
    assert recipe.parameterisation == Lattice(PARAMETERISATIONS.build("x0"))
    assert plain(recipe)["parameterisation"] == {"name": "lattice", "of": {"name": "x0"}}
    pixels = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    source = ArraySource(pixels, torch.arange(8) % 2)
    trainer = Trainer(recipe, recipe.model((1, 8, 8), 2), source)
    assert trainer.denoiser.network.conv_in.weight.shape[1] == (1 * (1 + 4) + 1) * 4
    losses = [trainer.update(2)["loss"] for _ in range(2)]
    assert all(math.isfinite(loss) for loss in losses)
    model = trainer.model()
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert again.config == model.config
    x_t, t = Key(0).rows(2).normal(1, 8, 8), torch.tensor([1e-4, 0.9], dtype=F64)
    assert torch.equal(again.denoiser(x_t, t).x_0, model.denoiser(x_t, t).x_0)
    assert torch.equal(again.sample(2, steps=3, label=1), model.sample(2, steps=3, label=1))


@dataclass(frozen=True)
class Old(Network):
    """A network of one's own that knows of no hints."""

    time = "logsnr"

    def build(self, image_channels, output_channels, classes=None):
        return nn.Conv2d(image_channels, output_channels, 1)

    def stride(self):
        return 1


def test_a_network_without_hints_is_refused_by_name():
    for parameterisation in (V(), Lattice()):
        config = ModelConfig((1, 4, 4), Vdm(), parameterisation, FixedSmall(), Old())
        if parameterisation.lattice:
            with pytest.raises(UsageError, match="network .*:Old takes no hints, which parameterisation lattice"):
                config.build(clip=True)
        else:
            assert config.build(clip=True).network.in_channels == 1
