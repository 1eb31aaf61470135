"""`undiffuse codec bench` on an untrained model, whose figures are those of files; and files of models with classes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.codec.plans import untrained
from undiffuse.codec import tables
from undiffuse.codec.stream import Codec
from undiffuse.data.source import open_source
from undiffuse.model import load
from undiffuse.model.model import Model
from undiffuse.network.base import Conditioning


@pytest.fixture
def model(folder, tmp_path, monkeypatch) -> load.Model:
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    return load.load(untrained(tmp_path / "MODEL"), "cpu")


def test_files_beside_the_bound(call, folder, tmp_path, model):
    words = ["codec", "bench", tmp_path / "MODEL", folder / "SHEET", "--split", "train", "-n", 4]
    code, _, err = call(*words)
    assert code == 2 and err.count("\n") == 1 and "`undiffuse codec fit MODEL DATA`" in err
    source = open_source(str(folder / "SHEET"), channels=1, size=8)
    images = source.gather(torch.arange(4) * len(source) // 4)[0]
    plan = tables.fit(model, images, steps=6, memory=10)
    tables.keep(plan, model)
    code, out, err = call(*words, "--json")
    assert code == 0, err
    found, codec = json.loads(out), Codec(model, plan)
    assert found["images"] == 4 and found["archive_bytes"] == len(codec.encode(images)) / 4
    assert found["single_bytes"] == sum(len(codec.encode(image[None])) for image in images) / 4
    assert found["archive_over_100_steps"] == pytest.approx(found["archive_bytes"] / found["bound_100_steps_bytes"])
    assert found["bound_100_steps_bytes"] > found["bound_continuous_bytes"] > 0
    shown = call(*words)[1]
    assert re.search(r"^ +archive bytes +[\d.]+$", shown, re.M) and "webp lossless bits" in shown


@pytest.mark.parametrize("count", [0, -1])
def test_no_images_are_refused(call, folder, tmp_path, model, count):
    tables.keep(tables.fit(model, open_source(str(folder / "SHEET"), channels=1, size=8).images, 4, 10), model)
    code, _, err = call("codec", "bench", tmp_path / "MODEL", folder / "SHEET", "--split", "train", "-n", count)
    assert code == 2 and f"--images {count} is not possible; give 1 or more" in err


@pytest.fixture
def named(folder, tmp_path, model) -> Path:
    """A model of two classes that was never trained without, with tables."""
    config = replace(model.config, classes=2)
    recipe = {**model.meta.get("recipe", {}), "train": {"drop_label": 0.0}}
    with_classes = Model(config, config.build(clip=True), {**model.meta, "recipe": recipe})
    load.save(with_classes, tmp_path / "NAMED")
    found = load.load(tmp_path / "NAMED", "cpu")
    images = open_source(str(folder / "SHEET"), channels=1, size=8).images
    tables.keep(tables.fit(found, images, 4, 10, cond=Conditioning(torch.ones(len(images), dtype=torch.int64))), found)
    return tmp_path / "NAMED"


@pytest.mark.parametrize("words", [(), ("--label", "all"), ("--label", "random"), ("--label", "none")])
def test_a_file_needs_its_class_where_the_model_does(call, folder, tmp_path, named, words):
    sheet, out = str(next((folder / "SHEET").iterdir())), tmp_path / "x.udf"
    for command in (["encode", named, sheet, out], ["codec", "bench", named, folder / "SHEET", "--split", "train"]):
        code, _, err = call(*command, *words)
        assert code == 2 and err.count("\n") == 1
        assert "a file says one class for all of its images; give --label with one. This model knows 0, 1" in err
    assert not out.exists()


def test_a_class_is_kept_in_the_file(call, folder, tmp_path, named):
    sheet, out = str(next((folder / "SHEET").iterdir())), tmp_path / "x.udf"
    code, _, err = call("encode", named, sheet, out, "--label", 1, "--no-check")
    assert code == 0, err
    code, shown, _ = call("codec", "info", out, "--model", named, "--json")
    assert code == 0 and json.loads(shown)["label"] == 1


def test_tables_need_classes_where_the_model_does(call, folder, tmp_path, named):
    code, _, err = call("codec", "fit", named, folder / "SHEET", "--overwrite", "-n", 2)
    assert code == 2 and err.count("\n") == 1
    assert f"{folder / 'SHEET'} has no classes, and this model was never trained without; give other data" in err
