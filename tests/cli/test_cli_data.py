"""`undiffuse data …` on small folders: looking, checking, packing, and training on what was packed."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.cli.test_cli import SETTINGS, one_line


def test_data_inspect_and_check(call, tmp_path):
    for i in range(3):
        (tmp_path / "cats").mkdir(exist_ok=True)
        Image.new("RGB", (10 + i, 9), (i * 80, 10, 10)).save(tmp_path / "cats" / f"{i}.png")
    code, out, err = call("data", "inspect", tmp_path, "--sheet", tmp_path.parent / "sheet.png", "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == 3 and json.loads(out)["sizes"] == {"10x9": 1, "11x9": 1, "12x9": 1}
    assert (tmp_path.parent / "sheet.png").exists()
    assert call("data", "check", tmp_path)[:2] == (0, "all good\n")
    (tmp_path / "cats" / "broken.png").write_bytes((tmp_path / "cats" / "0.png").read_bytes()[:-30])
    code, out, _ = call("data", "check", tmp_path)
    assert code == 2 and "broken.png" in out and out.endswith("1 bad\n")


@pytest.mark.slow
def test_data_pack_check_and_train(call, tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    for i in range(6):
        (tmp_path / "cats").mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (9, 9, 3), np.uint8)).save(tmp_path / f"cats/{i}.png")
    (tmp_path / "cats/3.png").write_bytes(b"")
    pack = ["data", "pack", tmp_path / "cats", "--size", 8, "--out", tmp_path / "packed"]
    code, _, err = call(*pack)
    assert code == 2 and "1 of 6 images cannot be read: 3.png (not a picture in a known format)" in one_line(err)
    code, out, err = call(*pack, "--skip-bad", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["images"], result["size"], result["channels"], result["shards"]) == (5, "8x8", 3, 1)
    assert result["skipped"] == {"3.png": "not a picture in a known format"}
    assert call("data", "check", tmp_path / "packed")[:2] == (0, "all good\n")

    train = [
        "-p",
        "cifar10",
        "--size",
        8,
        "-o",
        tmp_path / "run",
        "--json",
        *(w for s in SETTINGS for w in ("--set", s)),
    ]
    code, _, err = call("train", tmp_path / "packed", *train, "--steps", 1)
    assert code == 0, err
    data = json.loads((tmp_path / "run/data.json").read_bytes())
    assert data["skipped"] == ["3.png"] and data["fingerprint"] == result["fingerprint"]
    code, out, err = call("train", tmp_path / "cats", "--skip-bad", "--no-pack", *train, "--steps", 2)
    assert code == 0 and json.loads(out)["step"] == 2, err  # packed or not, it is the same data
    assert not (tmp_path / "cache").exists()
    code, out, err = call("train", tmp_path / "cats", "--skip-bad", "--pack", *train)
    assert code == 0 and json.loads(out)["step"] == 3, err
    assert len(list((tmp_path / "cache/packed").iterdir())) == 1

    shard = tmp_path / "packed/00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    code, _, err = call("data", "check", tmp_path / "packed")
    assert code == 5 and "00000.bin is damaged: its sha256 is not what packed.json says" in one_line(err)
