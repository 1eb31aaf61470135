"""Our network and chain against diffusers', number by number.

All parameters are redrawn, because at initialisation both networks return almost nothing and any two would agree.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.schedulers import scheduling_ddpm

from undiffuse.config import parse, plain
from undiffuse.diffusion.grid import Even
from undiffuse.diffusion.parameterisation import Eps
from undiffuse.diffusion.process import Linear
from undiffuse.diffusion.reverse import FixedLarge, FixedSmall
from undiffuse.diffusion.sampler.ancestral import Ancestral
from undiffuse.diffusion.sampler.base import sample
from undiffuse.interop.diffusers import read_folder, write_folder
from undiffuse.key import Key, Keys
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.attention import Attention
from undiffuse.network.unet import UNet

CIFAR10 = {"down": "Down AttnDown Down Down", "up": "Up Up AttnUp Up", "widths": [128, 256, 256, 256]}
LARGE = {
    "down": "Down Down Down Down AttnDown Down",
    "up": "Up AttnUp Up Up Up Up",
    "widths": [128, 128, 256, 256, 512, 512],
}
TABLES = {"cifar10": CIFAR10, "256": LARGE}
# The 256² network on smaller images, but for one test: its attention then has 4×4 positions, and 2×2 in the middle.
SIDES = {"cifar10": 32, "256": 64}


def their_network(down: str, up: str, widths: list[int], side: int) -> diffusers.UNet2DModel:
    """As the config files of the published models have it."""
    return diffusers.UNet2DModel(
        sample_size=side,
        freq_shift=1,
        flip_sin_to_cos=False,
        down_block_types=[f"{name}Block2D" for name in down.split()],
        up_block_types=[f"{name}Block2D" for name in up.split()],
        block_out_channels=widths,
        downsample_padding=0,
        attention_head_dim=None,
        norm_eps=1e-6,
    ).eval()


@torch.no_grad()
def redraw(network, run):
    """Every parameter from a normal, so that each layer matters, the norms' eps included, and the output has std 1.

    The first layer of a block is small: what the second norm sees then has a variance of about 0.1, beside which
    an eps of 1e-5 is not nothing.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            small = any(part in name for part in ("conv1", "time_emb_proj", "temb_proj", "conv_in"))
            noise *= (0.2 if small else 1.0) / parameter[0].numel() ** 0.5
        else:
            noise = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        parameter.copy_(noise)
    std = run().std()
    last = {name: parameter for name, parameter in network.named_parameters() if name.startswith("conv_out")}
    for parameter in last.values():
        parameter /= std


@dataclass
class Pair:
    """The same weights in both, and the same input for both."""

    theirs: diffusers.UNet2DModel
    ours: torch.nn.Module
    config: ModelConfig
    x: torch.Tensor
    index: torch.Tensor

    @torch.no_grad()
    def run(self, network) -> torch.Tensor:
        output = network(self.x, self.index)
        return output if isinstance(output, torch.Tensor) else output.sample

    def difference(self, first, second) -> float:
        """The largest, relative to the largest value."""
        first, second = self.run(first), self.run(second)
        assert 0.5 < first.std() < 2
        return float((first - second).abs().max() / first.abs().max())


def read(path: Path) -> tuple[torch.nn.Module, ModelConfig]:
    tensors, meta = read_folder(path)
    config = parse(ModelConfig, meta["model"], str(path))
    network = config.build(clip=True, device="meta").network
    network.load_state_dict(tensors, assign=True)
    return network.eval(), config


@pytest.fixture(scope="module", params=["cifar10", pytest.param("256", marks=[pytest.mark.slow, pytest.mark.long])])
def pair(request, tmp_path_factory) -> Pair:
    """diffusers' network with redrawn weights, saved by diffusers and imported by us."""
    name, table = request.param, TABLES[request.param]
    side = SIDES[name]
    theirs = their_network(**table, side=side)
    x = Key(0).fold("x").rows(2).normal(3, side, side)
    index = torch.tensor([37.0, 999.0])
    redraw(theirs, lambda: theirs(x, index).sample)
    path = tmp_path_factory.mktemp(name)
    theirs.save_pretrained(path)
    return Pair(theirs, *read(path), x, index)


def test_the_published_networks_hold_as_many_weights(pair):
    counts = {328: 35_746_307, 450: 113_673_219}
    tensors = list(pair.ours.parameters())
    assert sum(tensor.numel() for tensor in tensors) == counts[len(tensors)]


def test_an_imported_network_says_what_theirs_says(pair):
    assert pair.difference(pair.theirs, pair.ours) <= 1e-5


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("pair", ["256"], indirect=True)
def test_at_256_pixels_too(pair):
    """Attention over 16×16 positions, and 8×8 in the middle, as in the published models."""
    whole = replace(pair, x=Key(0).fold("x").rows(1).normal(3, 256, 256), index=torch.tensor([500.0]))
    assert whole.difference(whole.theirs, whole.ours) <= 1e-5


def test_an_exported_network_says_what_ours_says(pair, tmp_path):
    write_folder(tmp_path / "out", pair.ours.state_dict(), {"model": plain(pair.config)})
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    assert pair.difference(pair.ours, pipeline.unet) <= 1e-5


def test_a_swapped_q_and_k_would_be_seen(pair):
    attentions = [module for module in pair.ours.modules() if isinstance(module, Attention)]
    for module in attentions:
        module.q, module.k = module.k, module.q
    difference = pair.difference(pair.theirs, pair.ours)
    for module in attentions:
        module.q, module.k = module.k, module.q
    assert len(attentions) == 6
    assert difference > 1e-3


def test_an_eps_of_1e_5_would_be_seen(pair):
    norms = [module for module in pair.ours.modules() if isinstance(module, torch.nn.GroupNorm)]
    for module in norms:
        module.eps = 1e-5
    difference = pair.difference(pair.theirs, pair.ours)
    for module in norms:
        module.eps = 1e-6
    assert difference > 2e-5


def their_chain(path: Path, keys: Keys, shape: tuple[int, ...], process: Linear, monkeypatch) -> torch.Tensor:
    """The whole pipeline on our noise, with the tables of its scheduler in float64."""
    pipeline = diffusers.DDPMPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    scheduler = pipeline.scheduler
    scheduler.betas = process.betas()
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    names = [("x_T",), *(("step", n) for n in range(process.steps, 1, -1))]
    noise = (keys.fold(*name).normal(*shape) for name in names)
    for module in (scheduling_ddpm, pipeline_ddpm):
        monkeypatch.setattr(module, "randn_tensor", lambda *arguments, **options: next(noise))
    images = pipeline(len(keys.rows), num_inference_steps=process.steps, output_type="pt").images
    assert next(noise, None) is None
    return images * 2 - 1


@pytest.mark.parametrize(
    "process",
    [Linear(100, 1e-3, 0.2), pytest.param(Linear(), marks=[pytest.mark.slow, pytest.mark.long])],
    ids=["hundred", "thousand"],
)
def test_a_thousand_steps_with_either_variance(tmp_path, monkeypatch, process):
    """diffusers' β and ᾱ are overwritten in float64: its float32 ones are wrong by 5e-4 where t is small."""
    keys, ours, theirs = Key(1).rows(1), [], []
    for variance in (FixedSmall(), FixedLarge()):
        config = ModelConfig((3, 8, 8), process, Eps(), variance, UNet(32, (1,), 1, ()))
        denoiser = config.build(clip=True).eval()
        x, index = Key(0).normal(1, *config.image), torch.tensor([process.steps / 2])
        redraw(denoiser.network, lambda network=denoiser.network, x=x, index=index: network(x, index))
        folder = tmp_path / type(variance).__name__
        write_folder(folder, denoiser.network.state_dict(), {"model": plain(config)})
        theirs.append(their_chain(folder, keys, config.image, process, monkeypatch))
        ours.append(
            sample(Ancestral(variance), denoiser, config.process, keys, config.image, Even().times(config.process))
        )
    assert (ours[0].abs() < 1).float().mean() > 0.5  # not all at the ends, where clipping hides differences
    for i in (0, 1):
        assert (ours[i] - theirs[i]).abs().max() <= 1e-5
        assert (ours[i] - theirs[1 - i]).abs().max() > 1e-2
