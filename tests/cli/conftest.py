"""What the tests of commands have in common."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.coded import sheet
from tests.cli.toy import save
from tests.codec.plans import untrained
from undiffuse.codec import tables
from undiffuse.codec.stream import Codec
from undiffuse.diffusion.reverse import Learned
from undiffuse.model import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models and pictures; nothing in it is changed."""
    root = tmp_path_factory.mktemp("folder")
    save(root / "MODEL")
    save(root / "LEARNED", Learned())
    save(root / "BLACK", meta={"recipe": {"data": {"background": "black"}}})
    for i, name in enumerate(("PICTURES/a.png", "PICTURES/b.png", "BAD/a.png", "BAD/b.png")):
        (root / name).parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 255, (8, 8, 4), np.uint8)
        noise[..., 3] = 0  # all of it transparent, but for a corner
        noise[7, 7] = 90, 90, 90, 255
        Image.fromarray(noise).save(root / name)
    (root / "BAD" / "b.png").write_bytes((root / "BAD" / "b.png").read_bytes()[:60])
    (root / "FILE").write_text("mine")
    (root / "SHEET").mkdir()
    for i in range(8):
        Image.new("L", (8, 8), 20 + 20 * i).save(root / "SHEET" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory) -> Path:
    """A model with tables in its file, and coded files; nothing in it is changed."""
    root = tmp_path_factory.mktemp("codec")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNDIFFUSE_CACHE", str(root / "cache"))
        model = load.load(untrained(root / "BARE"), "cpu")
        images = torch.from_numpy(np.stack([np.asarray(Image.open(each)) for each in sheet(folder)]))[:, None]
        tables.keep(tables.fit(model, images, steps=6, memory=10), model)
        load.save(model, root / "MODEL")
    codec = Codec(model, tables.of(load.load(root / "MODEL", "cpu")))
    (root / "one.udf").write_bytes(codec.encode(images[3:4]))
    (root / "many.udf").write_bytes(codec.encode(images, group=3))
    (root / "wide.udf").write_bytes(codec.encode(torch.cat([images[2:3], images[5:6]], 3)))
    return root
