"""Each option of diffusers' `UNet2DModel` that our U-Net can be, number by number, and seen to be missed.

All parameters are redrawn, because at initialisation both networks return almost nothing and any two would agree.
"""

import re
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import pytest
import torch

from undiffuse.config import parse, plain
from undiffuse.interop.diffusers import read_folder, write_folder
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.base import Conditioning
from undiffuse.network.unet import UNet

SIDE = 8
SMALL = {
    "sample_size": SIDE,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 16,
}
ALL = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
NONE = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
LEVELS = {"block_out_channels": (32, 64, 48), "sample_size": 16}
MIXED = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D", "UpBlock2D"),
}
RESNET = {"downsample_type": "resnet", "upsample_type": "resnet"}
SCALED = {"resnet_time_scale_shift": "scale_shift"}
# Fields beside SMALL, else diffusers' defaults; and one of our options with which the same weights are another network.
CASES = {
    "the default head": ({}, {"head": 16}),
    "the default order of sines": ({}, {"cosine_first": False}),
    "the default frequencies": ({}, {"frequency_shift": 1}),
    "the default padding": ({}, {"centred": False}),
    "the default eps": ({}, {"eps": 1e-6}),
    "another eps": ({"norm_eps": 1e-3}, {"eps": 1e-5}),
    "no head": ({"attention_head_dim": None}, {"head": 8}),
    "a head as wide as everything": ({"attention_head_dim": 64}, {"head": 32}),
    "a head that does not divide": ({"attention_head_dim": 48}, None),
    "frequencies of DDPM": ({"freq_shift": 1}, {"frequency_shift": 0}),
    "frequencies of another": ({"freq_shift": 2}, {"frequency_shift": 1}),
    "sines first": ({"flip_sin_to_cos": False}, {"cosine_first": True}),
    "padding of DDPM": ({"downsample_padding": 0}, {"centred": True}),
    "groups of the middle": ({"attn_norm_num_groups": 4}, {"middle_groups": None}),
    "scale and shift": (SCALED, {"activation": "gelu"}),
    "scale and shift with a norm": ({**SCALED, "attn_norm_num_groups": 16}, {"head": None}),
    "residual resampling": ({**ALL, **RESNET}, {"activation": "relu"}),
    "residual down alone": ({**ALL, "downsample_type": "resnet"}, {"eps": 1e-6}),
    "residual up alone": ({**ALL, "upsample_type": "resnet"}, {"eps": 1e-6}),
    "a type that nothing reads": ({**NONE, **RESNET}, {"centred": False}),
    "blocks of three kinds": ({**LEVELS, **MIXED}, {"head": None}),
    "blocks of three kinds with both": ({**LEVELS, **MIXED, **RESNET}, None),
    "the first releases": ({"down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D")}, {"head": 4}),
    "a middle without attention": ({"add_attention": False}, {"eps": 1e-3}),
    "no middle": ({"mid_block_type": None}, {"eps": 1e-3}),
    "a scaled middle": ({"mid_block_scale_factor": 2**0.5}, {"middle_scale": 1.0}),
    "a scaled middle without attention": ({"mid_block_scale_factor": 2, "add_attention": False}, {"middle_scale": 1.0}),
    "relu": ({"act_fn": "relu"}, {"activation": "silu"}),
    "gelu": ({"act_fn": "gelu"}, {"activation": "silu"}),
    "mish": ({"act_fn": "mish"}, {"activation": "silu"}),
    "swish": ({"act_fn": "swish"}, {"activation": "gelu"}),
    "a wide time embedding": ({"time_embedding_dim": 96}, {"head": None}),
    "widths that are no multiples": ({"block_out_channels": (48, 80)}, {"head": None}),
    "widths that fall": ({"block_out_channels": (64, 32)}, {"head": None}),
    "attention down only": ({**ALL, "up_block_types": ("UpBlock2D",) * 2}, {"head": None}),
    "attention up only": ({**NONE, "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}, {"head": None}),
    "three layers": ({"layers_per_block": 3}, {"head": None}),
    "a centred input": ({"center_input_sample": True}, {"centre_input": False}),
    "one channel in, two out": ({"in_channels": 1, "out_channels": 2}, {"head": None}),
    "not square": ({"sample_size": (8, 12)}, {"head": None}),
    "five classes": ({"num_class_embeds": 5}, {"head": None}),
    "five numbers": ({"num_class_embeds": 5, "class_embed_type": "timestep"}, {"frequency_shift": 1}),
}  # fmt: skip
EXAMPLE = {  # as diffusers' example of unconditional training has it
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}


@torch.no_grad()
def redraw(network, run):
    """Every parameter from a normal, so that each layer matters, the norms' eps included, and the output has std 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            small = any(part in name for part in ("conv1", "time_emb_proj", "conv_in"))
            noise *= (0.2 if small else 1.0) / parameter[0].numel() ** 0.5
        else:
            noise = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        parameter.copy_(noise)
    std = run().std()
    for name, parameter in network.named_parameters():
        if name.startswith("conv_out"):
            parameter /= std


def build(config: ModelConfig, tensors):
    with torch.device("meta"):
        network = config.build(clip=True).network
    network.load_state_dict(tensors, assign=True)
    return network.eval()


@torch.no_grad()
def compare(fields, folder):
    """Our answer and diffusers', what was read, and what runs another of our networks, or an exported one."""
    theirs = diffusers.UNet2DModel(**fields).eval()
    side = fields["sample_size"]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(
        2, theirs.config.in_channels, *(side if isinstance(side, tuple) else (side, side)), generator=generator
    )
    index, label = torch.tensor([37.0, 999.0]), torch.tensor([1, 4]) if theirs.config.num_class_embeds else None
    redraw(theirs, lambda: theirs(x, index, label).sample)
    theirs.save_pretrained(folder)
    tensors, meta = read_folder(folder)
    config = parse(ModelConfig, meta["model"], "test")

    def ours(config, tensors=tensors):
        return build(config, tensors)(x, index, Conditioning(label=label))

    def exported(path):
        return diffusers.UNet2DModel.from_pretrained(path / "unet").eval()(x, index, label).sample

    return ours(config), theirs(x, index, label).sample, config, tensors, ours, exported


def distance(one, two):
    """The largest difference, relative to the largest value."""
    return float((one - two).abs().max() / two.abs().max())


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_an_imported_network_says_what_theirs_says_and_so_does_what_is_exported(tmp_path, case):
    fields, wrong = CASES[case]
    mine, theirs, config, tensors, ours, exported = compare({**SMALL, **fields}, tmp_path / "in")
    assert 0.5 < theirs.std() < 2
    assert distance(mine, theirs) <= 1e-5
    if wrong is not None:
        other = replace(config, network=replace(config.network, **wrong))
        assert other.network.meaning() != config.network.meaning()
        assert distance(ours(other), theirs) > (1e-4 if "eps" not in wrong else 2e-5)
    write_folder(tmp_path / "out", tensors, {"model": plain(config)})  # and back
    assert distance(exported(tmp_path / "out"), theirs) <= 1e-5
    again, meta = read_folder(tmp_path / "out")
    assert parse(ModelConfig, meta["model"], "test") == config
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "widths, side",
    [
        ((32, 32, 64, 64, 128, 128), 32),
        pytest.param((128, 128, 256, 256, 512, 512), 64, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
    ids=["narrow", "as it is"],
)
@torch.no_grad()
def test_the_network_of_the_unconditional_example(tmp_path, widths, side):
    fields = {**EXAMPLE, "block_out_channels": widths, "sample_size": side}
    mine, theirs, config, *_ = compare(fields, tmp_path)
    assert 0.5 < theirs.std() < 2
    assert distance(mine, theirs) <= 1e-5
    assert config.network == UNet(
        widths[0],
        (1, 1, 2, 2, 4, 4),
        attention=(4,),
        groups=32,
        head=8,
        eps=1e-5,
        centred=True,
        frequency_shift=0,
        cosine_first=True,
    )


@torch.no_grad()
def test_the_network_that_diffusers_makes_unasked(tmp_path):
    """224 to 896 channels; narrow here by a seventh, with as many groups less."""
    fields = {"block_out_channels": (32, 64, 96, 128), "sample_size": 16}
    mine, theirs, config, *_ = compare(fields, tmp_path)
    assert distance(mine, theirs) <= 1e-5
    assert config.network.attention == (1, 2, 3)


def test_the_defaults_of_the_options_are_the_papers_network():
    """None of them adds a parameter or a number to it."""
    fields = asdict(UNet())
    options = {
        name: value for name, value in fields.items() if name not in ("channels", "multipliers", "dropout", "label")
    }
    assert options == {
        "blocks": 2,
        "attention": (1,),
        "patch": 1,
        "groups": None,
        "time": "index",
        "attention_up": None,
        "middle": "attention",
        "middle_groups": None,
        "middle_scale": 1.0,
        "head": None,
        "eps": 1e-6,
        "activation": "silu",
        "modulation": "shift",
        "residual_down": (),
        "residual_up": (),
        "centred": False,
        "embedding": None,
        "frequency_shift": 1,
        "cosine_first": False,
        "centre_input": False,
        "fourier": (),
    }


def test_every_option_is_explained():
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text("utf-8")
    table = text[text.index("### Options of the U-Net") :]
    named = {
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert named == asdict(UNet()).keys()
