"""CIFAR-10 in its two versions, and pickles that want more than arrays."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch

from undiffuse.data.format.cifar import CLASSES
from undiffuse.data.source import open_source
from undiffuse.errors import Corrupt, DataError

NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
RANDOM = np.random.default_rng(0)
PIXELS = {name: RANDOM.integers(0, 256, (3, 3072), np.uint8) for name in NAMES}
LABELS = {name: RANDOM.integers(0, 10, 3) for name in NAMES}


def binary(name):
    return np.concatenate([LABELS[name][:, None].astype(np.uint8), PIXELS[name]], axis=1).tobytes()


def legacy_pickle(pixels, labels):
    """The opcodes that Python 2 and NumPy 1 wrote: protocol 2, byte strings, `numpy.core`."""

    def string(data):
        return b"T" + len(data).to_bytes(4, "little") + data

    def integer(value):
        return b"J" + int(value).to_bytes(4, "little", signed=True)

    shape = integer(pixels.shape[0]) + integer(pixels.shape[1]) + b"\x86"
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + integer(0) + b"\x85" + string(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + integer(0) + integer(1) + b"tR("
    dtype += integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    array = start + b"(" + integer(1) + shape + dtype + integer(0) + string(pixels.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + listed + b"u."


def modern_pickle(pixels, labels):
    return pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol=3)


WRITERS = {
    "binary": (".bin", binary),
    "python, as published": ("", lambda name: legacy_pickle(PIXELS[name], LABELS[name])),
    "python, saved anew": ("", lambda name: modern_pickle(PIXELS[name], LABELS[name])),
    "python, column order": ("", lambda name: modern_pickle(np.asfortranarray(PIXELS[name]), LABELS[name])),
}


def unpacked(folder, ending, write):
    folder.mkdir()
    for name in NAMES:
        (folder / (name + ending)).write_bytes(write(name))
    return folder


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("packed", [False, True])
def test_both_versions_packed_or_not(tmp_path, version, packed):
    path = unpacked(tmp_path / "cifar", *WRITERS[version])
    if packed:
        with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
            archive.add(path, "cifar-10-batches")
        path = tmp_path / "cifar.tar.gz"
    train, test = open_source(path), open_source(path, split="test")
    expected = np.concatenate([PIXELS[name] for name in NAMES[:5]]).reshape(15, 3, 32, 32)
    assert torch.equal(train.images, torch.from_numpy(expected))
    assert train.labels.tolist() == np.concatenate([LABELS[name] for name in NAMES[:5]]).tolist()
    assert torch.equal(test.images, torch.from_numpy(PIXELS["test_batch"].reshape(3, 3, 32, 32)))
    assert train.classes == test.classes == CLASSES


class Evil:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


HOSTILE = {
    "call": (lambda path: pickle.dumps({b"data": Evil(path), b"labels": [0]}, protocol=3), "names .*open, .* refused"),
    "name": (lambda path: b"\x80\x03cos\nsystem\n.", "names os.system, which is refused; expected only NumPy arrays$"),
    "other numpy": (lambda path: b"\x80\x03cnumpy\nload\n.", "names numpy.load, which is refused"),
    "dotted": (
        lambda path: b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.sum\x93.",
        "names numpy.ndarray.sum, which is refused",
    ),
    "persistent": (lambda path: b"\x80\x03Pabc\n.", "not CIFAR-10's Python version, or damaged"),
    "extension": (lambda path: b"\x80\x03\x82\x01.", "not CIFAR-10's Python version, or damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_is_executed(tmp_path, case):
    write, message = HOSTILE[case]
    path = unpacked(tmp_path / "cifar", *WRITERS["python, saved anew"])
    (path / "data_batch_3").write_bytes(write(tmp_path / "harm"))
    with pytest.raises(Corrupt, match=f"cifar: data_batch_3: .*{message}"):
        open_source(path)
    assert not (tmp_path / "harm").exists()


def test_every_truncation_of_the_pickle_is_an_error(tmp_path):
    path = unpacked(tmp_path / "cifar", *WRITERS["python, as published"])
    data = (path / "test_batch").read_bytes()
    for length in [*range(0, 200), *range(200, len(data), 997)]:
        (path / "test_batch").write_bytes(data[:length])
        with pytest.raises(Corrupt, match="test_batch: not CIFAR-10's Python version, or damaged"):
            open_source(path, split="test")


BAD = {
    "type": (PIXELS["test_batch"].astype(np.int16), [1, 2, 3], "pixels of type i2; expected u1, unsigned bytes"),
    "count": (PIXELS["test_batch"], [1, 2], r"pixels \(3, 3072\) and labels \(2,\); expected \[n, 3072\] and \[n\]"),
    "width": (PIXELS["test_batch"][:, 1:], [1, 2, 3], r"pixels \(3, 3071\)"),
    "label": (PIXELS["test_batch"], [1, 2, 10], "labels from 1 to 10; expected 0 to 9, so it is damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_contents(tmp_path, case):
    pixels, labels, message = BAD[case]
    path = unpacked(tmp_path / "cifar", *WRITERS["python, saved anew"])
    (path / "test_batch").write_bytes(modern_pickle(pixels, np.array(labels)))
    with pytest.raises(DataError, match=f"test_batch.*{message}"):
        open_source(path, split="test")


def test_damaged_binary(tmp_path):
    path = unpacked(tmp_path / "cifar", *WRITERS["binary"])
    (path / "test_batch.bin").write_bytes(binary("test_batch")[:-1])
    with pytest.raises(DataError, match="test_batch.bin: 9218 bytes; expected records of 3073, so it is damaged"):
        open_source(path, split="test")


def test_missing_batches(tmp_path):
    path = unpacked(tmp_path / "cifar", *WRITERS["binary"])
    (path / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match="has no data_batch_4.bin or data_batch_4; expected CIFAR-10's five data"):
        open_source(path)


def test_archives_of_other_things(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    with pytest.raises(DataError, match="a.tar.gz has no pictures in its tar files; expected members like 1.jpg:"):
        open_source(tmp_path / "a.tar.gz")
    (tmp_path / "b.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="b.tar.gz cannot be read as a tar archive"):
        open_source(tmp_path / "b.tar.gz")
