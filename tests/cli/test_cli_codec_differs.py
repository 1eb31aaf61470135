"""A machine that does not come to the numbers of a lossless file writes what it can, says so, and exits with code 5."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.cli.coded import codec, good, pixels, sheet
from undiffuse.codec import tail
from undiffuse.network.unet import UNetModule


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))


def other_machine(monkeypatch, size: float) -> None:
    """Its network's answers are that much larger, relatively."""
    own = UNetModule.forward
    monkeypatch.setattr(UNetModule, "forward", lambda *given: own(*given) * (1 + size))


def test_last_bits_that_differ_are_no_matter(call, folder, place, tmp_path, monkeypatch):
    file, model = tmp_path / "x.udf", place / "MODEL"
    good(call, "encode", model, sheet(folder)[3], file, "--lossless", "--no-check")
    other_machine(monkeypatch, 1e-7)
    good(call, "decode", file, tmp_path / "x.png", "--model", model)
    assert np.array_equal(pixels(tmp_path / "x.png"), pixels(sheet(folder)[3]))


@pytest.mark.parametrize("count, out", [(1, "x.png"), (1, "x.npz"), (5, "x")])
@pytest.mark.parametrize("checked", [True, False])
def test_the_lossy_pictures_are_written_and_said_to_be_so(
    call, folder, place, tmp_path, monkeypatch, count, out, checked
):
    """Whichever check finds it: that of the numbers, or, one time in 256, that of the values behind them."""
    if not checked:
        monkeypatch.setattr(tail, "_check", lambda _: 0)
    file, model = tmp_path / "x.udf", place / "MODEL"
    given = [sheet(folder)[3]] if count == 1 else [folder / "SHEET", "--split", "train", "-n", count]
    good(call, "encode", model, given[0], file, "--lossless", "--no-check", *given[1:])
    other_machine(monkeypatch, 0.05)
    code, text, err = call("decode", file, tmp_path / out, "--model", model, "--json")
    why = "this machine (does not come to the numbers|comes to other values than those) that the file was .*"
    said = f"undiffuse: {file}: {why}; {tmp_path / out} is what can be decoded, and is not lossless\n$"
    found = re.search(said, err)
    assert (code, text) == (5, "") and found and checked == found[1].endswith("numbers"), err
    mean = codec(place).decode(file.read_bytes()).mean().permute(0, 2, 3, 1).numpy()
    there = written(tmp_path / out)
    assert np.array_equal(there, mean)
    known = np.stack([pixels(each) for each in ([sheet(folder)[3]] if count == 1 else sheet(folder)[:count])])[
        ..., None
    ]
    assert 0 < np.abs(there.astype(int) - known).mean() < 60  # an estimate of them, and not they


def written(out: Path) -> np.ndarray:
    """The pictures of a .png, a .npz or a folder."""
    if out.suffix == ".npz":
        return np.load(out)["arr_0"]
    paths = sorted(out.iterdir()) if out.is_dir() else [out]
    return np.stack([pixels(path) for path in paths])[..., None]
