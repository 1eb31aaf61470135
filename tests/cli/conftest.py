"""What the tests of commands have in common."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.toy import save
from undiffuse.diffusion.reverse import Learned


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
