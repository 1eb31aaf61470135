"""npy, npz and IDX: layouts, labels, splits, and every way in which they can be wrong."""

import gzip
import io
import re
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from undiffuse.data.format.arrays import read_idx
from undiffuse.data.levels import own
from undiffuse.data.made import done
from undiffuse.data.picture import Reading
from undiffuse.data.source import open_source
from undiffuse.errors import Corrupt, DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 5), np.uint8)  # NCHW
LABELS = np.array([2, 0, 1, 1, 0])


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def put_mnist(folder, ending="", infix="-"):
    folder.mkdir(exist_ok=True)
    for prefix, count in (("train", 4), ("t10k", 1)):
        files = {"images": ("idx3", IMAGES[:count, 0]), "labels": ("idx1", LABELS[:count].astype(np.uint8))}
        for kind, (code, array) in files.items():
            data = idx(array)
            path = folder / f"{prefix}-{kind}{infix}{code}-ubyte{ending}"
            path.write_bytes(gzip.compress(data) if ending else data)
    return folder


@pytest.mark.parametrize("key", ["images", "x", "arr_0"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_npz(tmp_path, key, layout):
    np.savez(tmp_path / "a.npz", **{key: IMAGES if layout == "nchw" else IMAGES.transpose(0, 2, 3, 1)})
    source = open_source(tmp_path / "a.npz")
    assert torch.equal(source.images, torch.from_numpy(IMAGES))
    assert source.labels is None


@pytest.mark.parametrize("key", ["labels", "y", "arr_1"])
def test_npz_labels_and_classes(tmp_path, key):
    np.savez(tmp_path / "a.npz", images=IMAGES, **{key: LABELS.astype(np.uint8)})
    source = open_source(tmp_path / "a.npz")
    assert source.labels.tolist() == LABELS.tolist()
    assert source.classes == ("0", "1", "2")
    np.savez(tmp_path / "b.npz", images=IMAGES, classes=np.array(["a", "b", "c", "d"]), **{key: LABELS})
    assert open_source(tmp_path / "b.npz").classes == ("a", "b", "c", "d")


def test_npy_of_grey_images(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES[:, 0])
    assert torch.equal(open_source(tmp_path / "a.npy").images, torch.from_numpy(IMAGES[:, :1]))


def test_a_folder_of_npz_is_split(tmp_path):
    np.savez(tmp_path / "train.npz", images=IMAGES)
    np.savez(tmp_path / "test.npz", images=IMAGES[:2])
    assert (len(open_source(tmp_path)), len(open_source(tmp_path, split="test"))) == (5, 2)
    with pytest.raises(DataError, match="train.npz has no test split; give the path of the test images, or a folder"):
        open_source(tmp_path / "train.npz", split="test")


BAD = {
    "float": (
        {"x": IMAGES / 255},
        r": float64 values from 0 to 1; say what is black and what is white, for example --set 'data.range=\[0,1\]'",
    ),
    "signed": (
        {"x": IMAGES.astype(np.int16) - 9},
        r": int16 values from -9 to 246; say what is black .* 'data.range=\[-9,246\]'$",
    ),
    "sixteen": ({"x": IMAGES.astype(np.uint16) * 16}, r": uint16 values from 0 to 4080; .*data.range=\[0,4095\]'$"),
    "whole": ({"x": IMAGES.astype(np.int64)}, r": int64 values from 0 to 255; say .* 'data.range=\[0,255\]'$"),
    "both signs": ({"x": np.float32(IMAGES / 127.5 - 1)}, r": float32 values from -1 to 1; .*range=\[-1,1\]'$"),
    "not a number": (
        {"x": np.where(IMAGES > 250, np.nan, IMAGES)},
        r": [0-9]+ of 450 values are not finite \(NaN or infinite\); replace them",
    ),
    "complex": ({"x": IMAGES * 1j}, ": complex128 values; expected integers or real numbers"),
    "text": ({"x": IMAGES.astype(str)}, ": <U3 values; expected integers or real numbers"),
    "flat": ({"x": IMAGES.reshape(5, -1)}, r"has shape \(5, 90\); expected images as \[n, h, w\]"),
    "channels": ({"x": np.zeros((2, 5, 6, 7), np.uint8)}, r"has shape \(2, 5, 6, 7\), which can be read in two ways"),
    "no pixels": (
        {"x": np.zeros((2, 0, 4), np.uint8)},
        r"has images of shape \(1, 0, 4\); expected at least one pixel",
    ),
    "name": ({"pictures": IMAGES}, "has the arrays pictures; expected one named images or x or arr_0"),
    "label count": ({"x": IMAGES, "y": LABELS[:2]}, r"has labels int64 \[2\] for 5 images; expected an integer each"),
    "label type": ({"x": IMAGES, "y": LABELS / 2}, r"has labels float64 \[5\] for 5 images"),
    "label range": ({"x": IMAGES, "y": LABELS, "classes": np.array(["a"])}, "has labels from 0 to 2; expected 0 to 0"),
    "negative label": ({"x": IMAGES, "y": LABELS - 1}, "has labels from -1 to 1; expected 0 to 99999"),
    "huge label": ({"x": IMAGES, "y": LABELS * 10**12}, "has labels from 0 to 2000000000000; expected 0 to 99999"),
}


@pytest.mark.parametrize("case", BAD)
def test_arrays_that_are_no_images(tmp_path, case):
    arrays, message = BAD[case]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=f"a.npz ?{message}"):
        open_source(tmp_path / "a.npz")


ONE_WAY = {  # shape of the array: (channels, height, width)
    (8, 16, 16, 2): (2, 16, 16), (3, 32, 32, 3): (3, 32, 32), (3, 3, 32, 32): (3, 32, 32), (5, 28, 28, 1): (1, 28, 28),
    (5, 1, 28, 28): (1, 28, 28), (4, 8, 8, 6): (6, 8, 8), (4, 6, 8, 8): (6, 8, 8), (4, 2, 8, 8): (2, 8, 8),
    (4, 4, 48, 64): (4, 48, 64), (2, 48, 64, 10): (10, 48, 64), (2, 4, 4, 3): (3, 4, 4), (2, 1, 1, 1): (1, 1, 1),
    (7, 8, 9): (1, 8, 9), (1, 64, 64): (1, 64, 64), (9, 28, 1): (1, 28, 1), (3, 3, 9): (1, 3, 9),
}  # fmt: skip
TWO_WAYS = [(8, 3, 8, 3), (3, 3, 3, 3), (5, 8, 8, 8), (2, 4, 5, 4), (2, 5, 6, 7), (4, 16, 16, 16), (4, 3, 2, 2)]


@pytest.mark.parametrize("shape", ONE_WAY)
def test_axes_that_can_be_told(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    assert open_source(tmp_path / "a.npy").image_shape == ONE_WAY[shape]


@pytest.mark.parametrize("shape", TWO_WAYS)
def test_axes_that_cannot_be_told_are_asked_for(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.save(tmp_path / "a.npy", array)
    message = "which can be read in two ways; say which, --set data.axes=nhwc or --set data.axes=nchw"
    with pytest.raises(DataError, match=f"a.npy has shape {re.escape(str(shape))}, {message}$"):
        open_source(tmp_path / "a.npy")
    first = open_source(tmp_path / "a.npy", reading=Reading(axes="nchw"))
    last = open_source(tmp_path / "a.npy", reading=Reading(axes="nhwc"))
    assert np.array_equal(first.images, array) and np.array_equal(last.images, array.transpose(0, 3, 1, 2))


ONE_OR_MANY = [((16, 20, 3), "hwc"), ((5, 5, 4), "hwc"), ((3, 16, 20), "chw"), ((4, 16, 16), "chw"), ((2, 3, 3), "chw"),
               ((3, 4, 4), "chw")]  # fmt: skip


@pytest.mark.parametrize("shape, one", ONE_OR_MANY)
def test_one_image_or_many(tmp_path, shape, one):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.save(tmp_path / "a.npy", array)
    said = re.escape(str(shape))
    message = f"{said}, which can be read in two ways; say which, --set data.axes={one} or --set data.axes=nhw$"
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "a.npy")
    for axes, expected in (("hwc", array.transpose(2, 0, 1)[None]), ("chw", array[None]), ("nhw", array[:, None])):
        assert np.array_equal(open_source(tmp_path / "a.npy", reading=Reading(axes=axes)).images, expected)
    with pytest.raises(DataError, match=rf"has shape {said}, of 3 axes; data.axes=nhwc names 4$"):
        open_source(tmp_path / "a.npy", reading=Reading(axes="nhwc"))
    np.savez(tmp_path / "a.npz", images=array, labels=np.zeros(len(array), int))  # of which there is one an image
    assert np.array_equal(open_source(tmp_path / "a.npz").images, array[:, None])
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(array))
    assert np.array_equal(open_source(tmp_path / "train-images-idx3-ubyte").images, array[:, None])


@pytest.mark.parametrize("dtype, span", [
    (np.float16, (0, 1)), (np.float32, (-1, 1)), (np.float64, (0.0, 1.0)), (np.uint16, (0, 4095)), (np.int32, (-5, 90)),
    (np.int64, (0, 255)), (np.uint8, (0, 1)), (np.float32, (0, 1e6)),
])  # fmt: skip
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_values_of_a_range(tmp_path, dtype, span, ending):
    """255 (v - low) / (high - low), rounded."""
    low, high = span
    values = np.linspace(low, high, 120).reshape(5, 4, 6)
    values = (values.round() if np.dtype(dtype).kind in "iu" else values).astype(dtype)
    path = tmp_path / f"a.{ending}"
    np.save(path, values) if ending == "npy" else np.savez(path, images=values)
    source = open_source(path, reading=Reading(range=span))
    expected = 255 * (values.astype(float) - low) / (high - low)
    assert np.abs(source.images[:, 0].numpy() - expected).max() <= 0.5 + 1e-9
    assert source.own[:2] == (low, high) and source.own.kind == np.dtype(dtype).name and done(source.made) == ()


def test_values_beyond_the_range_are_clipped_and_counted(tmp_path):
    values = np.array([0.0, 0.5, 1.0, 2.0, -1.0, 0.25]).reshape(6, 1, 1)
    np.save(tmp_path / "a.npy", values)
    source = open_source(tmp_path / "a.npy", reading=Reading(range=(0, 1)))
    assert source.images.flatten().tolist() == [0, 128, 255, 255, 0, 64]
    assert done(source.made) == (("clipped to data.range=[0,1]", 2, "-1 to 2"),)


def test_bits_need_no_range(tmp_path):
    np.save(tmp_path / "a.npy", np.array([True, False]).reshape(2, 1, 1))
    assert open_source(tmp_path / "a.npy").images.flatten().tolist() == [255, 0]


@pytest.mark.parametrize("array, said", [
    (np.zeros((5, 4, 4), bool), "bool values from 0 to 0"), (np.zeros((5, 4, 4), ">u2"), "uint16 values from 0 to 0"),
    (np.ones((5, 4, 4), ">i4"), "int32 values from 1 to 1"), (np.ones((5, 4, 4), bool), "bool values from 1 to 1"),
])  # fmt: skip
def test_values_are_named_as_people_do(array, said):
    """Whatever the order of their bytes; bits are 0 and 1."""
    assert own(array).span == said


class Evil:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_objects_are_never_loaded(tmp_path):
    objects = np.array([Evil(tmp_path / "harm")], object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "a.npz", images=objects, allow_pickle=True)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(Corrupt, match=f"{name} holds Python objects, which are never loaded"):
            open_source(tmp_path / name)
    objects.dump(tmp_path / "b.npy")
    with pytest.raises(Corrupt, match="b.npy is a pickle, which is never executed"):
        open_source(tmp_path / "b.npy")
    assert not (tmp_path / "harm").exists()


def test_damaged_numpy_files(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, IMAGES)
    (tmp_path / "a.npy").write_bytes(buffer.getvalue()[:-1])
    with pytest.raises(DataError, match="a.npy is damaged: "):
        open_source(tmp_path / "a.npy")
    (tmp_path / "b.npy").write_bytes(b"not numpy")
    with pytest.raises(DataError, match="b.npy begins with 6e6f74206e75; expected NumPy's npy or npz"):
        open_source(tmp_path / "b.npy")
    np.savez_compressed(tmp_path / "c.npz", images=IMAGES)
    (tmp_path / "c.npz").write_bytes((tmp_path / "c.npz").read_bytes()[:-30])
    with pytest.raises(DataError, match="c.npz is damaged: File is not a zip file"):
        open_source(tmp_path / "c.npz")


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_flipped_bytes_give_an_error_or_an_array(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    np.save(path, IMAGES) if ending == "npy" else np.savez(path, images=IMAGES)
    good, refused = path.read_bytes(), 0
    for position in range(0, 260):
        data = bytearray(good)
        data[position] ^= 1 + position % 255
        path.write_bytes(data)
        try:
            assert open_source(path).images.dtype == torch.uint8
        except (DataError, Corrupt) as error:
            assert str(path) in str(error) and "allow_pickle" not in str(error)
            refused += 1
    assert refused > 50


def test_an_npz_of_other_things(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images", b"no array")
    with pytest.raises(DataError, match="a.npz has the arrays ; expected one named images"):
        open_source(tmp_path / "a.npz")


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("infix", ["-", "."])
def test_a_folder_with_the_names_of_mnist(tmp_path, ending, infix):
    folder = put_mnist(tmp_path / "mnist", ending, infix)
    train, test = open_source(folder), open_source(folder, split="test")
    assert torch.equal(train.images, torch.from_numpy(IMAGES[:4, :1]))
    assert train.labels.tolist() == LABELS[:4].tolist()
    assert (len(test), test.labels.tolist()) == (1, [2])


def test_room_is_not_taken_for_what_an_idx_file_only_claims(tmp_path):
    path = tmp_path / "a-images-idx3-ubyte"
    path.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 1000, 1000, 1000) + bytes(100))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"does not hold the 1000000000 bytes of its shape \[1000, 1000, 1000\]"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_a_single_idx_file_takes_the_labels_beside_it(tmp_path):
    folder = put_mnist(tmp_path / "mnist")
    images = folder / "train-images-idx3-ubyte"
    assert open_source(images).labels.tolist() == LABELS[:4].tolist()
    (folder / "train-labels-idx1-ubyte").unlink()
    assert open_source(images).labels is None
    with pytest.raises(DataError, match="train-images-idx3-ubyte has no test split"):
        open_source(images, split="test")


def test_names_in_capital_letters(tmp_path):
    folder = put_mnist(tmp_path / "mnist")
    for file in list(folder.iterdir()):
        file.rename(folder / file.name.upper())
    (folder / "preview.png").write_bytes(b"")
    for split, count in (("train", 4), ("test", 1)):
        assert open_source(folder, split=split).labels.tolist() == LABELS[:count].tolist()
    single = open_source(folder / "TRAIN-IMAGES-IDX3-UBYTE")
    assert single.labels.tolist() == LABELS[:4].tolist()


def test_a_missing_part(tmp_path):
    folder = put_mnist(tmp_path / "mnist")
    (folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataError, match="has no file t10k-images-idx3-ubyte or .gz; expected the four names of MNIST"):
        open_source(folder, split="test")


def test_damaged_idx_files(tmp_path):
    path, good = tmp_path / "a-idx3-ubyte", idx(IMAGES[:, 0])
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(DataError, match="a-idx3-ubyte (begins with|ends within its header|does not hold)"):
            read_idx(path)
    path.write_bytes(good + b"x")
    with pytest.raises(DataError, match=r"does not hold the 150 bytes of its shape \[5, 6, 5\]; it is damaged"):
        read_idx(path)
    path.write_bytes(good[:4] + b"\xff" * 12)
    with pytest.raises(DataError, match="does not hold the 79228162458924105385300197375 bytes of its shape"):
        read_idx(path)
    path.write_bytes(b"\0\0\x0d\x03" + good[4:])
    with pytest.raises(DataError, match="begins with 00000d03; expected 0000080n"):
        read_idx(path)


def test_a_damaged_gzip(tmp_path):
    path = tmp_path / "a-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(IMAGES[:, 0]))[:-12])
    with pytest.raises(DataError, match="a-idx3-ubyte.gz cannot be read: Compressed file ended"):
        open_source(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="a-idx3-ubyte.gz cannot be read: Not a gzipped file"):
        open_source(path)
