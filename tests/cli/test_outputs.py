"""What a command writes: in the format of its name, never over what is there, and never numbers that are none."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.measure import nll
from undiffuse.model import load
from undiffuse.model.model import Model
from undiffuse.view import explore

FIGURES = {
    "progressive": ["MODEL", "-n", "1", "--steps", "2"],
    "shared": ["MODEL", "-n", "1", "--steps", "2"],
    "interpolate": ["MODEL", "PICTURES/a.png", "PICTURES/b.png", "--steps", "2"],
    "neighbours": ["MODEL", "PICTURES", "-n", "1", "-k", "1", "--steps", "2"],
}


def words(folder, name: str) -> list[str]:
    return [name, *(str(folder / w) if (folder / w).exists() else w for w in FIGURES[name])]


@pytest.mark.parametrize("ending, kind", [("png", "PNG"), ("jpg", "JPEG"), ("JPEG", "JPEG"), ("webp", "WEBP"),
                                          ("gif", "GIF"), ("tiff", "TIFF"), ("bmp", "BMP")])  # fmt: skip
def test_a_picture_has_the_format_of_its_name(call, folder, tmp_path, ending, kind):
    path = tmp_path / f"i.{ending}"
    code, _, err = call(*words(folder, "progressive"), "-o", path)
    assert code == 0, err
    with Image.open(path) as picture:
        assert picture.format == kind and picture.size == ((8 * 2 + 3) * 7, (8 + 2) * 7)


@pytest.mark.parametrize("name", FIGURES)
def test_what_cannot_be_written_is_refused_before_the_work(call, folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(load, "load", lambda *_: pytest.fail("the work has begun"))
    (tmp_path / "there.png").write_text("mine")
    for out, message in (
        ("", f"{tmp_path} is a folder; give the name of a file"),
        ("i", f'{tmp_path}/i has no ending of a picture that can be written; give one such as "i.png"'),
        ("i.ico", f'{tmp_path}/i.ico has no ending of a picture that can be written; give one such as "i.png"'),
        (".png", f'{tmp_path}/.png has no ending of a picture that can be written; give one such as "png.png"'),
        (
            "there.png/i.png",
            f"{tmp_path}/there.png is a file, so {tmp_path}/there.png/i.png cannot be in it; give another place",
        ),
        ("i.txt", f'{tmp_path}/i.txt has no ending of a picture that can be written; give one such as "i.png"'),
        ("there.png", f"{tmp_path}/there.png is there already; give another name, or --overwrite to replace it"),
    ):
        code, _, err = call(*words(folder, name), "-o", tmp_path / out)
        assert (code, err) == (2, f"undiffuse: {message}\n")
    assert (tmp_path / "there.png").read_text() == "mine"


def test_a_file_is_replaced_when_asked(call, folder, tmp_path):
    for path in (tmp_path / "i.png", tmp_path / "i.npz"):
        path.write_text("old")
    assert call(*words(folder, "shared"), "-o", tmp_path / "i.png", "--overwrite")[0] == 0
    Image.open(tmp_path / "i.png").close()
    asked = ["sample", folder / "MODEL", "-n", 1, "--steps", 2, "--npz", tmp_path / "i.npz"]
    code, _, err = call(*asked)
    assert code == 2 and err.endswith("i.npz is there already; give another name, or --overwrite to replace it\n")
    assert call(*asked, "--overwrite")[0] == 0 and np.load(tmp_path / "i.npz")["arr_0"].shape == (1, 8, 8, 1)


def endless(folder) -> Model:
    """A model whose answer is NaN, though each of its weights is finite."""
    model = load.load(folder / "MODEL").variant(clip=False)
    for weight in model.denoiser.network.parameters():
        weight.copy_(weight.sign() * 1e30)
    return model


def test_values_that_are_not_finite_are_no_picture_and_no_number(call, folder, tmp_path, monkeypatch):
    broken = endless(folder)
    monkeypatch.setattr(load, "load", lambda *_, **__: broken)
    monkeypatch.setattr(Model, "variant", lambda self, *_: self)
    for asked in (
        ["sample", "M", "-n", "1", "-o", tmp_path / "s"],
        *([*words(folder, name), "-o", tmp_path / "i.png"] for name in FIGURES),
    ):
        code, _, err = call(*asked)
        assert code == 3 and "the chain ended in values that are not finite, so nothing is drawn" in err, asked
        assert err.rstrip().endswith("are others to try")  # and no command, which would fail in the same way
    code, out, err = call("nll", "M", "digits", "-n", "2", "-o", tmp_path / "n", "--json")
    assert code == 3 and out == "" and "the bound of image 0 is not finite, so there is no number to give" in err
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.npz"))


def test_one_image_has_no_standard_error(call, folder):
    code, out, _ = call("nll", folder / "MODEL", "digits", "-n", "1", "--json")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert code == 0 and found["standard_error"] is None
    assert nll.nll(load.load(folder / "MODEL"), "digits", images=1)["standard_error"] is None
    assert "standard" not in call("nll", folder / "MODEL", "digits", "-n", "1")[1]


def test_a_grid_in_python_follows_its_name(tmp_path):
    explore.write_grid(torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8), tmp_path / "g.jpeg")
    with Image.open(tmp_path / "g.jpeg") as picture:
        assert picture.format == "JPEG"


def test_a_contact_sheet_is_written_like_any_picture(call, folder, tmp_path):
    asked = ["data", "inspect", folder / "SHEET", "--sheet"]
    code, _, err = call(*asked, tmp_path / "s.jpg")
    assert code == 0, err
    with Image.open(tmp_path / "s.jpg") as picture:
        assert picture.format == "JPEG" and picture.size == (512, 64)
    code, _, err = call(*asked, tmp_path / "s.jpg")
    assert code == 2 and err.endswith("s.jpg is there already; give another name, or --overwrite to replace it\n")
    assert call(*asked, tmp_path / "s.jpg", "--overwrite")[0] == 0
    code, _, err = call(*asked, tmp_path)
    assert (code, err) == (2, f"undiffuse: {tmp_path} is a folder; give the name of a file\n")


def test_a_name_says_whether_it_is_a_file_or_a_folder(call, folder, tmp_path):
    assert call("export", folder / "MODEL", tmp_path / "m.safetensors", "--half")[0] == 0
    assert (tmp_path / "m.safetensors").is_file()
    for asked, message in (
        (
            ["export", folder / "MODEL", tmp_path / "n.safetensors", "--to", "diffusers"],
            "is the name of a file, and",
        ),
        (
            ["sample", folder / "MODEL", "-n", 1, "-o", tmp_path / "grid.png"],
            "is the name of a picture, and samp",
        ),
        (
            ["sample", folder / "MODEL", "-n", 1, "--npz", tmp_path / "a.txt"],
            "has not the ending of an array; gi",
        ),
        (
            ["train", folder / "PICTURES", "-o", tmp_path / "m.safetensors"],
            "m.safetensors is a file; give the ",
        ),
    ):
        code, _, err = call(*asked)
        assert code == 2 and message in err, asked
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("name", ["i.png", "i.jpg"])
def test_a_figure_is_no_picture_to_train_on(call, folder, tmp_path, name):
    shutil.copytree(folder / "SHEET", tmp_path / "data")
    assert call(*words(folder, "progressive"), "-o", tmp_path / "data" / name)[0] == 0
    code, _, err = call("train", tmp_path / "data", "-p", "digits", "-o", tmp_path / "run", "--size", 8)
    assert code == 2
    assert f"1 of 9 images cannot be read: {name} (a figure that undiffuse drew, and no picture). Remove" in err
    assert not (tmp_path / "run").exists()
