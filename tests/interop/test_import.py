"""`undiffuse import` as it is typed: what is not there, what is assumed, what is refused."""

import json

import diffusers
import pytest
import torch

from tests.interop.theirs import WEIGHTS, variants
from undiffuse.diffusion.process import Cosine
from undiffuse.interop.diffusers_files import absent
from undiffuse.machine.store import Run
from undiffuse.model.load import load

HUB = "undiffuse does not download: `hf download google/ddpm-cifar10-32 --local-dir ddpm-cifar10-32`"


@pytest.mark.parametrize(
    "name", ["google/ddpm-cifar10-32", "https://huggingface.co/google/ddpm-cifar10-32",
             "https://huggingface.co/google/ddpm-cifar10-32/tree/main"]
)  # fmt: skip
@pytest.mark.parametrize("command", ["import", "sample", "init"])
def test_a_name_of_the_hub_is_not_downloaded(call, tmp_path, monkeypatch, name, command):
    monkeypatch.chdir(tmp_path)
    words = {"import": ["import", name, "run"], "sample": ["sample", name, "-n", "1", "--out", "s"],
             "init": ["train", "digits", "--init", name, "--out", "run"]}[command]  # fmt: skip
    code, _, err = call(*words)
    assert code == 2
    assert HUB in err
    assert (
        "`git clone https://huggingface.co/google/ddpm-cifar10-32` does, then `undiffuse import ddpm-cifar10-32 RUN`"
        in err
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["runs", "a/b/c", "a/b.safetensors", "../b", "./b"])
def test_what_is_no_name_of_the_hub(name):
    assert absent(name) is None


def test_a_path_in_a_folder_that_is_there_is_no_name_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absent("runs/photos") is None


def test_a_pickle_is_imported_by_the_command_that_is_named(call, pipe, tmp_path):
    model = diffusers.UNet2DModel.from_pretrained(pipe / "unet")
    (pipe / "unet" / f"{WEIGHTS}.safetensors").unlink()
    model.save_pretrained(pipe / "unet", safe_serialization=False)
    code, _, err = call("sample", pipe, "-n", "1", "--out", tmp_path / "s")
    assert code == 5
    assert "import it with `undiffuse import SRC RUN --allow-pickle`" in err
    code, out, err = call("import", pipe, tmp_path / "run", "--allow-pickle", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["assumed"] == []
    assert load(tmp_path / "run").process == Cosine(1000)


def test_what_is_assumed_is_printed(call, pipe, tmp_path):
    variants(pipe / "unet", "fp16")
    code, out, err = call("import", pipe / "unet", tmp_path / "run", "--json")
    assert code == 0
    assert err == f"warning: {pipe / 'unet'}: " + "; ".join(json.loads(out)["assumed"]) + "\n"
    assert 'the variant "fp16"' in err
    assert "the scheduler beside it" in err
    assert Run(tmp_path / "run").steps() == [0]


def test_a_weight_that_is_not_finite_is_not_imported(call, pipe, tmp_path):
    model = diffusers.UNet2DModel.from_pretrained(pipe / "unet")
    with torch.no_grad():
        model.conv_in.bias[3] = float("nan")
    model.save_pretrained(pipe / "unet")
    code, _, err = call("import", pipe, tmp_path / "run")
    assert code == 5
    assert f"{pipe} cannot be used: conv_in.bias holds NaN or infinity" in err
    assert not (tmp_path / "run").exists()
