"""`undiffuse codec bench` on an untrained model: its figures are those of files that encode writes."""

import json
import re

import pytest
import torch

from tests.codec.plans import untrained
from undiffuse.codec import tables
from undiffuse.codec.stream import Codec
from undiffuse.data.source import open_source
from undiffuse.model import load


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
