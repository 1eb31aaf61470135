"""What ran a benchmark, of which weights its figures are, and where its table goes."""

import argparse
import hashlib
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

import undiffuse
from undiffuse.codec import tables
from undiffuse.codec.stream import Codec
from undiffuse.data.source import open_source
from undiffuse.machine import disk
from undiffuse.machine.device import processor
from undiffuse.quality.feature.base import FEATURES, open_features

TABLES = "tables of "
DOCS = Path(__file__).parent.parent / "docs"


def asking(description: str | None) -> argparse.ArgumentParser:
    """What the benches of the codec are given: a shipped model, and its data."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a shipped model")
    parser.add_argument("--data", required=True)
    return parser


def machine() -> dict[str, object]:
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "undiffuse": undiffuse.__version__,
    }


def made_of(*names: str) -> dict[str, str]:
    """sha256 of the weights of shipped models and extractors: by it `bench/refresh.py` sees that they have changed.

    Of "tables of NAME" it is the identifier of the codec's tables of a shipped model.
    """
    return {name: _identifier(name) for name in names}


def _identifier(name: str) -> str:
    if name.startswith(TABLES):
        return tables.of(undiffuse.load(name.removeprefix(TABLES), "cpu")).ident.hex()
    return open_features(name, "cpu").sha256 if name in FEATURES.classes else undiffuse.load(name, "cpu").digest()


def shipped_codec(name: str, data: str, count: int) -> tuple[Codec, UInt8[Tensor, "n c h w"]]:
    """The codec of a shipped model, and the first test images."""
    model = undiffuse.load(name, "cpu")
    source = open_source(data, channels=model.image_shape[0], split="test")
    return Codec(model, tables.of(model)), source.gather(torch.arange(count, dtype=torch.int64, device="cpu"))[0]


def mark_of(times: Sequence[float]) -> str:
    """By which a row knows the times of its chain, so that it is drawn again on another grid."""
    return hashlib.sha256(repr(times).encode()).hexdigest()[:16]


def kept(path: Path) -> dict[str, Any]:
    """What `keep` wrote, if it did."""
    return json.loads(path.read_text()) if path.exists() else {}


def keep(path: Path, result: dict[str, Any]) -> None:
    """As JSON with a line for each key, and in a list a line for each row, as short as tables of hundreds of rows
    should be, and told apart line by line by `git diff`."""
    lines = []
    for key, value in result.items():
        rows = isinstance(value, list) and all(isinstance(row, dict) for row in value)
        text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if rows and value else json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    disk.write_atomic(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def publish(page: str, mark: str, table: str) -> None:
    """Puts the table between the marks `<!-- mark:begin -->` and `<!-- mark:end -->` of a page of docs/."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    text = (DOCS / page).read_text()
    new, count = re.subn(f"{begin}.*{end}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.S)
    if count != 1:
        raise SystemExit(f"docs/{page} has {count} places between {begin} and {end}; expected one")
    disk.write_atomic(DOCS / page, new.encode())
