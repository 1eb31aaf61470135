"""Files of models: clean names whatever the network is wrapped in, and no number that is not finite."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from undiffuse.config import plain
from undiffuse.diffusion.parameterisation import Eps
from undiffuse.diffusion.process import Linear
from undiffuse.diffusion.reverse import FixedLarge
from undiffuse.errors import Corrupt, UsageError
from undiffuse.interop.diffusers import write_folder
from undiffuse.machine.tensorfile import read_weights, write_weights
from undiffuse.model.load import as_written, from_weights, load, parse_model, save
from undiffuse.model.recipe import ModelConfig
from undiffuse.model.weights import clean
from undiffuse.network.unet import UNet

CONFIG = ModelConfig((1, 8, 8), Linear(20), Eps(), FixedLarge(), UNet(8, (1,), 1, (0,), groups=4))


def model():
    torch.manual_seed(0)
    return from_weights(CONFIG, CONFIG.build(clip=True).network.state_dict(), {})


class Wrapper(nn.Module):
    """As DistributedDataParallel keeps what it wraps."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def inside(network):
    """A part that is compiled, as one does with the blocks alone."""
    network.mid["block_1"] = torch.compile(network.mid["block_1"])
    return network


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method`:DeprecationWarning"
)  # of torch's compiler, when it is loaded
@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        DataParallel,
        Wrapper,
        lambda network: Wrapper(torch.compile(network)),
        lambda network: torch.compile(Wrapper(network)),
        lambda network: DataParallel(Wrapper(network)),
        inside,
    ],
    ids=["compiled", "parallel", "distributed", "distributed compiled", "compiled distributed", "twice", "inside"],
)
def test_a_wrapped_network_is_saved_under_its_own_names(tmp_path, wrap):
    plain_one, wrapped = model(), model()
    save(plain_one, tmp_path / "plain.safetensors")
    wrapped.denoiser.network = wrap(wrapped.denoiser.network)
    save(wrapped, tmp_path / "wrapped.safetensors")
    assert (tmp_path / "wrapped.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    assert load(tmp_path / "wrapped.safetensors").parameters() == plain_one.parameters()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_a_file_with_the_names_of_a_wrapper_is_read(tmp_path, prefix):
    """As earlier versions wrote it."""
    tensors, meta = as_written(model()), {"model": plain(CONFIG)}
    write_weights(tmp_path / "a.safetensors", {f"{prefix}{name}": t for name, t in tensors.items()}, meta)
    found = load(tmp_path / "a.safetensors").denoiser.network.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_names_of_ours_are_clean_already():
    names = CONFIG.build(clip=True).network.state_dict()
    assert [clean(name) for name in names] == list(names)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_neither_read_nor_written(tmp_path, value):
    spoilt = model()
    tensors = {name: tensor.clone() for name, tensor in as_written(spoilt).items()}
    tensors["conv_in.bias"][2:4] = value
    tensors["conv_out.bias"][0] = value
    write_weights(tmp_path / "a.safetensors", tensors, {"model": plain(CONFIG)})
    message = r"a.safetensors cannot be used: conv_in.bias and 1 more tensors hold NaN or infinity"
    with pytest.raises(Corrupt, match=message):
        load(tmp_path / "a.safetensors")
    with torch.no_grad():
        spoilt.denoiser.network.conv_in.bias[0] = value
    with pytest.raises(Corrupt, match="this model cannot be written: conv_in.bias holds NaN or infinity"):
        save(spoilt, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("value, kept", [(1e5, False), (65504.0, True), (65520.0, False), (-7e4, False), (1e-9, True)])
@pytest.mark.parametrize("to", ["file", "diffusers"])
def test_half_a_weight_that_is_too_large_for_it_is_not_written(call, tmp_path, value, kept, to):
    large = model()
    with torch.no_grad():
        large.denoiser.network.conv_in.bias[1] = value
    save(large, tmp_path / "a.safetensors")
    code, _, err = call("export", tmp_path / "a.safetensors", tmp_path / "out", "--to", to, "--half")
    if kept:
        assert (code, err) == (0, "")
        return
    assert code == 5
    assert f"cannot be written in float16, which ends at 65504: conv_in.bias has {abs(value):g}; write it in" in err
    assert not (tmp_path / "out").exists()


def test_half_is_half_in_either_form(call, tmp_path):
    save(model(), tmp_path / "a.safetensors")
    for to in ("file", "diffusers"):
        assert call("export", tmp_path / "a.safetensors", tmp_path / to, "--to", to, "--half")[0] == 0
    tensors, _ = read_weights(tmp_path / "file")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    whole = tmp_path / "whole"
    write_folder(whole, as_written(model()), {"model": plain(CONFIG)})
    sizes = [
        (path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
        for path in (whole, tmp_path / "diffusers")
    ]
    assert 0.4 < sizes[1] / sizes[0] < 0.7


def test_a_weight_of_64_bits_that_is_too_large_is_refused(tmp_path):
    tensors = {name: tensor.double() for name, tensor in as_written(model()).items()}
    tensors["conv_in.bias"][0] = 1e300
    with pytest.raises(Corrupt, match="conv_in.bias holds NaN or infinity"):
        parse_model(tensors, {"model": plain(CONFIG)}, "test")


class Inside(torch.nn.Module):
    """A user's own wrapper."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments):
        return self.inner(*arguments)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    wrapped = model()
    wrapped.denoiser.network = Inside(wrapped.denoiser.network)
    with pytest.raises(UsageError, match="these weights are of another architecture: conv_in.bias is missing"):
        save(wrapped, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_a_data_set_does_not_hide_the_shipped_model_of_its_name(tmp_path, monkeypatch):
    """As `undiffuse data build emoji --out emoji-32` may have made it; a run of that name is meant first."""
    expected = load("emoji-32", "cpu").digest()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji-32").mkdir()
    (tmp_path / "emoji-32" / "train.npz").write_bytes(b"pictures")
    assert load("emoji-32", "cpu").digest() == expected
    (tmp_path / "fashion-mnist").mkdir()
    save(load("emoji-32", "cpu"), tmp_path / "fashion-mnist" / "best.safetensors")
    assert load("fashion-mnist", "cpu").digest() == expected
