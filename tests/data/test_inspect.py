"""What `data inspect` and `data check` report, on folders that could not be trained on."""

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.data.inspect import Bad, check, contact_sheet, inspect
from undiffuse.data.source import ArraySource, open_raw
from undiffuse.errors import DataError


@pytest.fixture
def mixed(tmp_path):
    for name, mode, size, level in [
        ("a/1.png", "L", (4, 2), 0),
        ("a/2.png", "L", (4, 2), 255),
        ("b/3.png", "RGB", (200, 100), (255, 0, 0)),
        ("b/4.png", "RGB", (2, 2), (0, 0, 0)),
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new(mode, size, level).save(tmp_path / name)
    (tmp_path / "b/4.png").write_bytes((tmp_path / "b/4.png").read_bytes()[:40])
    return tmp_path


def test_a_folder_of_mixed_pictures(mixed):
    summary = inspect(open_raw(mixed))
    assert summary.count == 3
    assert summary.sizes == {(2, 4): 2, (100, 200): 1}
    assert list(summary.sizes) == [(2, 4), (100, 200)]  # the most frequent first
    assert summary.channels == {1: 2, 3: 1}
    assert summary.labels == {"a": 2, "b": 1}
    values = np.concatenate([np.zeros(8), np.ones(8), np.tile([1, 0, 0], 20000)])
    assert summary.mean == pytest.approx(values.mean(), rel=1e-12)
    assert summary.std == pytest.approx(values.std(), rel=1e-12)
    assert [bad.path for bad in summary.bad] == ["b/4.png"]


def test_check_lists_what_cannot_be_decoded(mixed):
    (mixed / "b/5.jpg").write_bytes(b"text")
    first, second = check(mixed).bad
    assert first.path == "b/4.png" and first.reason and "b/4.png" not in first.reason
    assert second == Bad("b/5.jpg", "not a picture in a known format")
    for name in ("4.png", "5.jpg"):
        (mixed / "b" / name).unlink()
    assert (check(mixed).count, check(mixed).bad) == (3, ())


def test_nothing_readable(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match=r"none of 1 images can be read; the first is a.png \(not a picture in a known"):
        inspect(open_raw(tmp_path))


def test_the_sheet_shows_each_picture_whole():
    wide = torch.zeros(3, 100, 200, dtype=torch.uint8)
    small = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    sheet = np.asarray(contact_sheet([wide, small]))
    assert sheet.shape == (64, 512, 3)
    rows, columns = np.nonzero((sheet[:, :64] == 0).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 47, 0, 63)
    rows, columns = np.nonzero((sheet[:, 64:128] == 0).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 47, 0, 31)  # pixels stay square


def test_the_sheet_of_a_large_set_is_spread_over_it():
    images = torch.arange(256, dtype=torch.uint8).repeat_interleave(4).reshape(-1, 1, 1, 1)
    sheet = np.asarray(inspect(ArraySource(images)).sheet)
    assert sheet.shape == (512, 512, 3)
    shown = sheet[32::64, 32::64, 0].flatten().astype(int)
    assert (shown[0], shown[-1]) == (0, 255)
    assert set(np.diff(shown)) <= {3, 4, 5}
