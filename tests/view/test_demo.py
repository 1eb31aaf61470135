"""The demo in its quick form, what its judge says of images whose nature is known, and, slowly, what it promises."""

import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.codec.plans import gaussian, gaussian_images, gaussian_plan
from undiffuse.codec.stream import Codec, Decoded
from undiffuse.data.source import ArraySource, open_source
from undiffuse.diffusion.parameterisation import V
from undiffuse.diffusion.process import Cosine
from undiffuse.diffusion.reverse import FixedSmall
from undiffuse.errors import Corrupt
from undiffuse.figure import enlarged, grid
from undiffuse.model import load as loading
from undiffuse.model.model import Model
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.unet import UNet
from undiffuse.view import demo

PICTURES = {"digits.png", "nearest.png", "samples.png", "progressive.png", "interpolation.png", "emoji.png"}
PLOTS = {"loss.svg", "rate-distortion.svg"}


def tiny() -> Model:
    network = UNet(channels=8, multipliers=(1,), blocks=1, attention=(), patch=4)
    config = ModelConfig((1, 28, 28), Cosine(20), V(), FixedSmall(), network)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(config, config.build(clip=True).eval().requires_grad_(False), {})


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out, said = tmp_path_factory.mktemp("demo"), []
    report = demo.run_demo(out, quick=True, model=tiny(), say=said.append)
    return out, report, said


def test_the_demo_ends_with_a_report_and_the_pictures_in_it(quick):
    out, report, said = quick
    assert report == out / "report.html"
    assert said[-1].endswith(f"the report is {report}")
    assert {path.name for path in out.iterdir()} == PICTURES | PLOTS | {"report.html", "digits", ".undiffuse"}
    for name in PICTURES:
        with Image.open(out / name) as picture:
            assert picture.width >= 56
    html = report.read_text()
    assert html.count("<img ") == len(PICTURES) and html.count("<svg ") == len(PLOTS)
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_the_report_says_what_is_abbreviated_and_that_a_quick_run_means_nothing(quick):
    html = quick[1].read_text()
    assert "only to see that it works" in html
    cells = re.findall(r"<td>(.*?)</td>", html)
    assert {"4 of 20 steps", "4 images, 2 of 20 terms each", "2 images"} <= set(cells)
    assert html.count("<h2>") == 8
    assert "None can be made: no codec is fitted to this model" in html
    assert "trained on 768,000 images after the 1,280,000 of the weights that it began from: four sets" in html


def test_the_same_command_again_goes_on_with_the_training_that_is_there(quick):
    out, _, first = quick
    said = []
    demo.run_demo(out, quick=True, model=tiny(), say=said.append)
    assert f"resuming {out / 'digits'} at step 3" in said
    verdict = [line for line in first if line.startswith("the classifier")]
    assert verdict and verdict == [line for line in said if line.startswith("the classifier")]


def test_without_the_file_of_the_emoji_one_line_stands_for_them(tmp_path, monkeypatch):
    """As NOTICE allows; a file that is there and is damaged is no such case."""
    (tmp_path / "assets").mkdir()
    monkeypatch.setattr(loading, "resources", SimpleNamespace(files=lambda _: tmp_path))
    html = demo.run_demo(tmp_path / "without", quick=True, model=tiny(), say=lambda _: None).read_text()
    assert "<h2>Emoji, told their style</h2>" in html and not (tmp_path / "without" / "emoji.png").exists()
    assert "Left out, because the file of the model <code>emoji-32</code> is not in this installation." in html
    assert html.count("<h2>") == 8 and html.count("<img ") == len(PICTURES) - 1
    (tmp_path / "assets" / "emoji-32.safetensors").write_bytes(b"damaged")
    with pytest.raises(Corrupt, match="emoji-32.safetensors"):
        demo.run_demo(tmp_path / "damaged", quick=True, model=tiny(), say=lambda _: None)


def test_copies_are_found_out_and_new_digits_are_not():
    train, test = open_source("digits"), open_source("digits", split="test")
    copied = demo.judge(train.images[:50], train, test, steps=1)
    assert (copied.copies, copied.nearest) == (50, 0.0)
    fresh = demo.judge(test.images, train, test, steps=1)
    assert fresh.copies == 3  # the closest 1 % of 297
    assert fresh.threshold == pytest.approx(19.673, abs=1e-3)
    assert int(fresh.classes.sum()) == 297


def test_each_claim_can_fail():
    good = demo.Verdict(0.97, 0.8, torch.full((10,), 20), threshold=20.0, nearest=21.0, copies=0)
    assert list(good.checks().values()) == [True] * 4
    missing = torch.tensor([0, *[20] * 9])
    bad = demo.Verdict(0.969, 0.799, missing, threshold=20.0, nearest=19.0, copies=1)
    assert list(bad.checks().values()) == [False] * 4


def test_coded_files_are_seen_at_every_size(tmp_path, monkeypatch):
    model = gaussian((1, 8, 8))
    monkeypatch.setattr(demo.tables, "of", lambda _: gaussian_plan(model))
    images = gaussian_images(3, (1, 8, 8))
    section = demo._coded(tmp_path, model, ArraySource(images), demo.Scale(coded=2, bytes=(9, 30)))
    file = (tmp_path / "image.udf").read_bytes()
    codec = Codec(model, gaussian_plan(model))
    assert file == codec.encode(images[:1])
    (frames,) = section.frames
    assert [label for label, *_ in frames.pictures] == ["9", "30", "all"]
    second = codec.encode(images[1:2])
    for size, (_, sheet, names) in zip((9, 30, None), frames.pictures, strict=True):
        found = [codec.decode(each[:size]) for each in (file, second)]
        rows = [images[:2], *(torch.cat([make(each) for each in found]) for make in (Decoded.mean, Decoded.drawn))]
        assert (
            names == ("image", "mean", "drawn on")
            and sheet.tobytes() == grid(torch.cat(rows), 2, 3 * enlarged(8)).tobytes()
        )
    assert section.facts[0][1] == f"{(len(file) + len(second)) / 2:.0f}"


@pytest.mark.slow
@pytest.mark.long
def test_the_digits_of_the_demo_are_digits(tmp_path):
    section = demo._digits(tmp_path, demo.FULL, print)
    (table,) = section.tables
    assert [row[2] for row in table.rows] == ["yes"] * 4, table
