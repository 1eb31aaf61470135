"""What holds for every extractor, the choice among them, and one's own."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from tests.quality.fidelity import pictures, random_inception
from tests.quality.test_dinov2 import write as write_dinov2
from undiffuse.errors import UsageError
from undiffuse.quality.feature import efflite0, inception
from undiffuse.quality.feature.base import FEATURES, auto_features, open_features, several_features
from undiffuse.quality.feature.inception import FILES

TITLES = {
    "inception": "FID",
    "dinov2": "FD-DINOv2-32x2",
    "efflite0": "FD-EffLite0",
    "classifier-28": "FD-classifier",
    "classifier-emoji": "FD-classifier",
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Each of them, with random weights where nothing else is at hand."""
    folder = tmp_path_factory.mktemp("weights")
    write_dinov2(folder / "dinov2", 224)
    torch.save(random_inception().state_dict(), folder / FILES[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "SHA256", hashlib.sha256((folder / FILES[0]).read_bytes()).hexdigest())
        files = {"dinov2": folder / "dinov2", "inception": folder / FILES[0]}
        yield {name: open_features(name, weights=files.get(name)) for name in FEATURES.classes}


def images_for(extractor):
    """Four that it takes, in colour if it sees colours."""
    size = 32 if extractor.size is None or extractor.resize != "none" else extractor.size[0]
    return pictures(4, size)[:, : extractor.channels]


def test_these_are_the_extractors(opened):
    assert {name: extractor.title for name, extractor in opened.items()} == TITLES
    assert all(extractor.name == name for name, extractor in opened.items())


@pytest.mark.parametrize("name", TITLES)
def test_what_every_extractor_keeps_to(opened, name):
    extractor = opened[name]
    images = images_for(extractor)[:2]
    whole, again, apart = extractor(images), extractor(images), [extractor(images[:1]), extractor(images[1:])]
    assert set(whole.parts()) == extractor.dimensions.keys()
    for part, width in extractor.dimensions.items():
        assert whole[part].shape == (2, width) and whole[part].dtype == torch.float32
        assert torch.equal(again[part], whole[part])
        split = torch.cat([each[part] for each in apart])
        assert (split - whole[part]).abs().max() < 1e-5 * max(1, float(whole[part].abs().max()))
        assert whole[part].std(0).max() > 1e-3  # they tell images apart
    assert len(extractor.identity["sha256"]) == 64


@pytest.mark.parametrize("name", TITLES)
def test_grey_is_repeated_and_other_channels_are_refused(opened, name):
    extractor = opened[name]
    images = images_for(extractor)
    grey = images[:2, :1]
    assert torch.equal(extractor(grey).pool, extractor(grey.repeat(1, extractor.channels, 1, 1)).pool)
    colours = "grey" if extractor.channels == 1 else "grey and RGB"
    with pytest.raises(UsageError) as error:
        extractor(images[:, :1].repeat(1, 4, 1, 1))
    assert str(error.value) == (
        f"images of 4 channels cannot be seen by {name}, which takes {colours} images; "
        f"give --set data.channels={extractor.channels}, or other --features"
    )


@pytest.mark.parametrize("name", ["classifier-28", "classifier-emoji", "efflite0"])
def test_an_option_that_it_has_not(name):
    with pytest.raises(UsageError, match=f"^features {name} have no option weights; leave it out$"):
        open_features(name, weights=Path("file.pth"))


def test_fields_and_options_are_for_those_that_have_them():
    both = several_features(["efflite0,size=64", "classifier-28"], resize=None)
    assert [each.name for each in both] == ["efflite0", "classifier-28"] and both[0].size == (64, 64)
    assert several_features(["efflite0", "classifier-28"], resize="torch")[0].resize == "torch 112x112"
    with pytest.raises(UsageError, match='features efflite0: "resize" input should be'):
        several_features(["efflite0", "classifier-28"], resize="cubic")
    with pytest.raises(UsageError, match="^features efflite0, classifier-28 have no option weights; leave it out$"):
        several_features(["efflite0", "classifier-28"], weights=Path("x"))


def test_auto_takes_the_best_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path))
    assert [auto_features(shape) for shape in ((1, 28, 28), (3, 32, 32), (3, 64, 48))] == ["efflite0"] * 3
    assert open_features("auto", shape=(3, 64, 48)).name == "efflite0"
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / FILES[1]).touch()
    assert [auto_features(shape) for shape in ((1, 28, 28), (3, 64, 48))] == ["inception"] * 2


def test_auto_without_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert efflite0._file() is None
    assert [auto_features(shape) for shape in ((1, 28, 28), (3, 32, 32))] == ["classifier-28", "classifier-emoji"]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: features {name} were learnt on one set of images and say little of others; for any images: "
        'pip install "undiffuse[eval]"'
        for name in ("classifier-28", "classifier-emoji")
    ]
    with pytest.raises(
        UsageError, match=r'^no features are at hand for these images; .*pip install "undiffuse\[eval\]"'
    ):
        auto_features((3, 64, 48))
    with pytest.raises(
        UsageError, match=r"^no features are at hand for images of 4 channels; .* my_module:MyExtractor$"
    ):
        auto_features((4, 32, 32))


def test_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine_too.py").write_text(
        dedent("""
        from dataclasses import dataclass
        from typing import ClassVar
        from undiffuse.quality.feature.base import Extractor, FeatureExtractor
        from undiffuse.quality.metric.base import Features

        @dataclass(frozen=True)
        class Corner(FeatureExtractor):
            resize: str = "none"
            title: ClassVar[str] = "FD-corner"

            def open(self, device):
                see = lambda images: Features(images[:, :, 0, 0].float())
                return Extractor("corner", self.title, "", self.resize, None, 3, {"pool": 3}, see, device)
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    extractor = open_features("mine_too:Corner", resize="twice")
    assert torch.equal(extractor(pictures()).pool, pictures()[:, :, 0, 0].float())
    assert (
        extractor.identity["resize"] == "twice"
        and extractor.named("{fd} {kd} {is}") == "FD-corner KD-corner corner score"
    )
    with pytest.raises(UsageError, match="have no option weights"):
        open_features("mine_too:Corner", weights=Path("file"))
    with pytest.raises(UsageError, match='features "mine_too:Centre" cannot be imported'):
        open_features("mine_too:Centre")
    sys.modules.pop("mine_too")


def test_a_name_that_is_none():
    with pytest.raises(UsageError, match='^features "incepton" is not known. Did you mean "inception"?'):
        open_features("incepton")
