"""DINOv2 through transformers, with a small network of random weights in a folder."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.quality.fidelity import pictures
from undiffuse.errors import Corrupt, UsageError
from undiffuse.quality.feature import dinov2
from undiffuse.quality.feature.base import hash_of_file, open_features

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}


def write(folder, size, kind="Dinov2", **more):
    """A folder as the hub has them, for images of that size, and its network."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(image_size=size, **SMALL, **more)
    network = getattr(transformers, f"{kind}Model")(config)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(folder)
    return network.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    return folder, write(folder, 224)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "weights")


@torch.no_grad()
def test_the_class_token_of_pillows_pictures(made, capfd):
    folder, network = made
    extractor = open_features("dinov2", weights=folder)
    assert capfd.readouterr() == ("", "")
    images = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pictures()]
    values = np.array([np.asarray(each.resize((224, 224), Image.Resampling.BICUBIC)) / 255 for each in images])
    values = (values - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    wanted = network(pixel_values=torch.tensor(values).permute(0, 3, 1, 2).float()).last_hidden_state[:, 0]
    found = extractor(pictures())
    assert found.parts() == ("pool",) and (found.pool - wanted).abs().max() < 1e-5 and wanted.std(0).mean() > 0.01
    # Behind the norm, whose weights are 1 here.
    assert found.pool.mean(1).abs().max() < 1e-5 and (found.pool.var(1, correction=0) - 1).abs().max() < 1e-3
    other = open_features("dinov2", weights=folder, resize="tf1")
    assert (other(pictures()).pool - found.pool).abs().max() > 1e-3 and other.resize == "tf1 224x224"


def test_what_it_says_of_itself(made, monkeypatch):
    small = open_features("dinov2", weights=made[0])
    assert small.title == "FD-DINOv2-32x2" and small.dimensions == {"pool": 32}
    sha256 = hash_of_file(made[0] / "model.safetensors")
    assert small.identity == {"extractor": "dinov2", "sha256": sha256, "resize": "pil-uint8 224x224"}
    monkeypatch.setattr(dinov2, "LARGE", (32, 2, 14))
    assert open_features("dinov2", weights=made[0]).title == "FD-DINOv2"


def cubic(lines, places):
    """Keys' convolution with a = −3/4 along the first axis, the ends repeated."""
    near, made = np.floor(places).astype(int), 0
    for step in range(-1, 3):
        x = np.abs(places - near - step)
        weight = np.where(x <= 1, 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4))
        made = made + weight[:, None, None] * lines[np.clip(near + step, 0, len(lines) - 1)]
    return made


def test_position_embeddings_are_stretched_with_the_offset_of_dinov2s_code(tmp_path):
    """Of 20 places a side, number i of the 16 is read at (i + ½) · 20 / 16.1 − ½."""
    given = write(tmp_path, 280).embeddings.position_embeddings.detach()
    network, shape = dinov2._network(tmp_path)
    found, grid = network.embeddings.position_embeddings, given[0, 1:].view(20, 20, 32).double().numpy()
    assert shape == (32, 2, 14) and found.shape == (1, 257, 32) and torch.equal(found[:, 0], given[:, 0])
    apart = []
    for offset in (0.1, 0):
        places = (np.arange(16) + 0.5) * 20 / (16 + offset) - 0.5
        wanted = cubic(cubic(grid, places).swapaxes(0, 1), places).swapaxes(0, 1)
        apart.append(np.abs(found[0, 1:].view(16, 16, 32).numpy() - wanted).max())
    assert apart[0] < 1e-5 and apart[1] > 0.01
    assert open_features("dinov2", weights=tmp_path)(pictures()).pool.isfinite().all()


ASK = r"give --feature-weights, a folder with config.json and model.safetensors of DINOv2 ViT-L/14"


def test_no_folder_or_not_all_of_it(folder, tmp_path):
    with pytest.raises(UsageError, match=f"^features dinov2 need weights, which are not downloaded; {ASK}"):
        open_features("dinov2")
    with pytest.raises(UsageError, match=f"nowhere is no folder; {ASK}"):
        open_features("dinov2", weights=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=f"model.safetensors is no folder; {ASK}"):
        open_features("dinov2", weights=folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=f"weights has no config.json; {ASK}"):
        open_features("dinov2", weights=folder)


def test_a_pickle_is_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(Corrupt, match=f"has its weights in a pickle, which can run code when it is read; {ASK}"):
        open_features("dinov2", weights=folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_half_a_file(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(Corrupt, match=r"^\S+ cannot be read as DINOv2: [^\n]+$"):
        open_features("dinov2", weights=folder)


def test_a_folder_that_lacks_a_tensor_is_not_filled_up_with_noise(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Corrupt, match="lacks layernorm.weight, so it is no DINOv2"):
        open_features("dinov2", weights=folder)


def test_another_network(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 48, "num_attention_heads": 3}))
    with pytest.raises(Corrupt, match=r"^\S+ (cannot be read as DINOv2|lacks \S+, so it is no DINOv2)[^\n]*$"):
        open_features("dinov2", weights=folder)


def test_another_kind_of_network(tmp_path):
    write(tmp_path, 224, "ViT", intermediate_size=64)
    with pytest.raises(Corrupt, match=r"^\S+ (cannot be read as DINOv2|is a vit|lacks)[^\n]*$"):
        open_features("dinov2", weights=tmp_path)


def test_without_transformers(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r'^DINOv2 needs transformers; .* pip install "undiffuse\[dinov2\]"$'):
        open_features("dinov2", weights=folder)
