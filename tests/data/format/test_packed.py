"""Packed folders: what is read is what was packed, and what is damaged is named."""

import json
import re

import numpy as np
import pytest
import torch

from undiffuse.data import pack as packing
from undiffuse.data.format.packed import open_packed
from undiffuse.data.inspect import check
from undiffuse.data.loader import Loader
from undiffuse.data.pack import pack
from undiffuse.data.source import ArraySource, open_raw, open_source, unify
from undiffuse.errors import Corrupt, DataError, UsageError

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 3, 5, 6), np.uint8)
LABELS = np.arange(10) % 3


@pytest.fixture(params=["labelled", "unlabelled"])
def both(request, tmp_path, monkeypatch):
    """The same ten images in memory, and packed in four shards."""
    monkeypatch.setattr(packing, "SHARD", 3 * 90)
    labels = {"labels": LABELS} if request.param == "labelled" else {}
    np.savez(tmp_path / "set.npz", images=IMAGES, **labels)
    return open_source(tmp_path / "set.npz"), pack(tmp_path / "set.npz", tmp_path / "packed")


@pytest.fixture
def folder(both, tmp_path):
    return tmp_path / "packed"


def test_a_folder_is_what_was_packed(both, folder):
    memory, packed = both
    assert sorted(path.name for path in folder.iterdir()) == [
        "00000.bin", "00001.bin", "00002.bin", "00003.bin", "lock", "packed.json"
    ]  # fmt: skip
    assert [len(part) for part in packed.images] == [3, 3, 3, 1]
    assert (len(packed), packed.image_shape, packed.classes) == (10, (3, 5, 6), memory.classes)
    assert packed.fingerprint() == memory.fingerprint()
    for i in (0, 2, 3, 9):
        assert torch.equal(packed[i].image, memory[i].image) and packed[i].label == memory[i].label
    again = open_source(folder)
    assert isinstance(again, ArraySource) and again.fingerprint() == memory.fingerprint()


@pytest.mark.parametrize("flip", [False, True])
def test_batches_are_those_of_memory(both, flip):
    memory, packed = (Loader(source, 8, seed=5, flip=flip) for source in both)
    for step in range(6):
        expected, found = memory.batch(step), packed.batch(step)
        assert torch.equal(found.image, expected.image) and torch.equal(found.index, expected.index)
        assert found.label is None if expected.label is None else torch.equal(found.label, expected.label)


def test_a_batch_reads_no_file_anew(both, folder, monkeypatch):
    _, packed = both
    for path in folder.iterdir():
        path.unlink()
    assert torch.equal(packed.gather(torch.arange(10))[0], torch.from_numpy(IMAGES))


def test_another_shape_is_made_as_of_any_source(both, folder):
    memory, packed = both
    assert torch.equal(unify(packed, 2, 1).images, unify(memory, 2, 1).images)


def test_train_and_test_beside_each_other(tmp_path, monkeypatch):
    np.savez(tmp_path / "set.npz", images=IMAGES)
    pack(tmp_path / "set.npz", tmp_path / "both/train")
    assert len(open_raw(tmp_path / "both")) == 10
    with pytest.raises(DataError, match=r"both/test is missing; .*both has no test split$"):
        open_raw(tmp_path / "both", "test")
    pack("digits", tmp_path / "both/test", split="test")
    assert len(open_raw(tmp_path / "both", "test")) == 297
    with pytest.raises(DataError, match="train has no test split; give the path of the test images"):
        open_raw(tmp_path / "both/train", "test")


def test_what_was_not_finished(both, folder):
    (folder / "packed.json").rename(folder / "packing.json")
    with pytest.raises(DataError, match="packed is not packed to its end; run the same `undiffuse data pack` again$"):
        open_raw(folder)


def test_every_bit_flip_of_a_shard_is_found(both, folder):
    assert check(folder).bad == ()
    path = folder / "00003.bin"
    good = path.read_bytes()
    for bit in range(0, 8 * len(good), 7):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(Corrupt, match="00003.bin is damaged: its sha256 is not what packed.json says; remove the"):
            open_packed(folder).verify()
    with pytest.raises(Corrupt, match="00003.bin is damaged"):
        check(folder)


def test_the_bytes_of_the_manifest_are_guarded(both, folder):
    path = folder / "packed.json"
    good = path.read_bytes()
    for place in range(0, len(good), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            same = json.loads(path.read_bytes()) == json.loads(good)
        except ValueError:
            same = False
        if not same:
            with pytest.raises(Corrupt, match="packed.json is damaged"):
                open_packed(folder)


def test_a_shard_that_is_cut_or_gone(both, folder):
    path = folder / "00001.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(
        Corrupt, match=rf"00001.bin is damaged: {len(data) - 1} bytes, not {len(data)}; remove the folder"
    ):
        open_raw(folder)
    path.unlink()
    with pytest.raises(Corrupt, match=rf"00001.bin is damaged: missing, not {len(data)}"):
        open_raw(folder)


def test_a_newer_format(both, folder, monkeypatch):
    monkeypatch.setattr("undiffuse.data.format.packed.FORMAT", 0)
    with pytest.raises(UsageError, match=r"packed.json has format 1, and this undiffuse reads 0; remove the folder"):
        open_raw(folder)


def test_the_manifest_says_where_it_is_from(both, folder):
    memory, packed = both
    fields = json.loads((folder / "packed.json").read_bytes())
    assert fields["source"] == memory.fingerprint() and fields["format"] == 1
    assert [shard["images"] for shard in fields["shards"]] == [3, 3, 3, 1]
    assert all(re.fullmatch("[0-9a-f]{64}", shard["sha256"]) for shard in fields["shards"])
