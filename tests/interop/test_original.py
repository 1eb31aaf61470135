"""State dicts of pesser/pytorch_diffusion, generated from the authors' list of variables and table of widths."""

import pytest
import torch
from safetensors.torch import save_file

from undiffuse.config import parse
from undiffuse.diffusion.parameterisation import Eps
from undiffuse.diffusion.process import Linear
from undiffuse.diffusion.reverse import FixedLarge, FixedSmall
from undiffuse.errors import Corrupt, UsageError
from undiffuse.interop.original import read_file
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.unet import UNet

# Of each level: input and output widths of its blocks on the way down, then up.
CIFAR10 = (
    [["128 128", "128 128"], ["128 256", "256 256"], ["256 256"] * 2, ["256 256"] * 2],
    [["384 128", "256 128", "256 128"], ["512 256", "512 256", "384 256"], ["512 256"] * 3, ["512 256"] * 3],
    1,
)
LARGE = (
    [["128 128"] * 2] * 2 + [["128 256", "256 256"], ["256 256"] * 2, ["256 512", "512 512"], ["512 512"] * 2],
    [["256 128"] * 3, ["384 128", "256 128", "256 128"], ["512 256", "512 256", "384 256"]]
    + [["768 256", "512 256", "512 256"], ["1024 512", "1024 512", "768 512"], ["1024 512"] * 3],
    4,
)


def shapes(down, up, attention):
    """Name -> shape, with each layer's bias beside its weight."""
    weights = {"temb.dense.0": (512, 128), "temb.dense.1": (512, 512), "conv_in": (128, 3, 3, 3)}
    weights |= {"norm_out": (128,), "conv_out": (3, 128, 3, 3)}

    def block(name, inputs, outputs):
        weights.update({f"{name}.norm1": (inputs,), f"{name}.conv1": (outputs, inputs, 3, 3)})
        weights.update({f"{name}.temb_proj": (outputs, 512), f"{name}.norm2": (outputs,)})
        weights[f"{name}.conv2"] = (outputs, outputs, 3, 3)
        if inputs != outputs:
            weights[f"{name}.nin_shortcut"] = (outputs, inputs, 1, 1)

    def attend(name, width):
        weights[f"{name}.norm"] = (width,)
        weights.update({f"{name}.{layer}": (width, width, 1, 1) for layer in ("q", "k", "v", "proj_out")})

    for way, levels, resample, without in (("down", down, "downsample", len(down) - 1), ("up", up, "upsample", 0)):
        for level, widths in enumerate(levels):
            for j, pair in enumerate(widths):
                inputs, outputs = map(int, pair.split())
                block(f"{way}.{level}.block.{j}", inputs, outputs)
                if level == attention:
                    attend(f"{way}.{level}.attn.{j}", outputs)
            if level != without:
                weights[f"{way}.{level}.{resample}.conv"] = (outputs, outputs, 3, 3)
    middle = int(down[-1][-1].split()[1])
    block("mid.block_1", middle, middle)
    block("mid.block_2", middle, middle)
    attend("mid.attn_1", middle)
    result = {f"{name}.weight": shape for name, shape in weights.items()}
    return result | {f"{name}.bias": shape[:1] for name, shape in weights.items()}


def hollow(names):
    """Tensors of these shapes that take one number each in the file."""
    return {name: torch.full((1,), 0.5).expand(shape) for name, shape in names.items()}


@pytest.mark.parametrize(
    "table, tensors, parameters, config",
    [
        (CIFAR10, 328, 35_746_307, ModelConfig((3, 32, 32), Linear(), Eps(), FixedLarge(), UNet(dropout=0.1))),
        (
            LARGE,
            450,
            113_673_219,
            ModelConfig((3, 256, 256), Linear(), Eps(), FixedSmall(), UNet(128, (1, 1, 2, 2, 4, 4), 2, (4,))),
        ),
    ],
)
def test_the_released_networks(tmp_path, table, tensors, parameters, config):
    names = shapes(*table)
    assert len(names) == tensors
    assert sum(torch.Size(shape).numel() for shape in names.values()) == parameters
    path = tmp_path / "model.ckpt"
    torch.save(hollow(names), path)
    found, meta = read_file(path, allow_pickle=True)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == names
    assert parse(ModelConfig, meta["model"], "test") == config
    assert meta["imported"]["from"] == "pytorch_diffusion"


def test_safetensors_need_no_flag(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.ones(shape, dtype=torch.uint8) for name, shape in shapes(*CIFAR10).items()}, path)
    tensors, meta = read_file(path)
    assert len(tensors) == 328
    assert meta["model"]["image"] == [3, 32, 32]


def test_a_pickle_needs_the_flag(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(hollow(shapes(*CIFAR10)), path)
    with pytest.raises(Corrupt, match=r"model\.ckpt is a pickle.*--allow-pickle"):
        read_file(path)


@pytest.mark.parametrize("change", [{"conv_out.bias": None}, {"conv_out.bias": (6,)}, {"extra": (1,)}])
def test_another_network_is_refused(tmp_path, change):
    names = {name: shape for name, shape in {**shapes(*CIFAR10), **change}.items() if shape is not None}
    torch.save(hollow(names), tmp_path / "model.ckpt")
    message = f"holds {len(names)} tensors that are not those of the paper's networks"
    with pytest.raises(UsageError, match=message):
        read_file(tmp_path / "model.ckpt", allow_pickle=True)


def test_a_damaged_file_is_corrupt(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(Corrupt, match=r"model\.safetensors is damaged"):
        read_file(tmp_path / "model.safetensors")
