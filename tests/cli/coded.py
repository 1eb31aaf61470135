"""What tests of the commands of the codec have in common; `place` is a fixture of conftest.py."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from undiffuse.codec import tables
from undiffuse.codec.stream import Codec
from undiffuse.model import load


def sheet(folder: Path) -> list[Path]:
    return sorted((folder / "SHEET").iterdir())


def codec(place: Path) -> Codec:
    model = load.load(place / "MODEL", "cpu")
    return Codec(model, tables.of(model))


def good(call, *words: object) -> dict:
    code, out, err = call(*words, "--json")
    assert code == 0, err
    return json.loads(out)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.mode == "L"
        return np.asarray(picture)
