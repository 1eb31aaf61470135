"""From what a user names to one tensor: shapes unified, bad input refused in one line."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.data.picture import Reading
from undiffuse.data.source import FORMATS, ArraySource, Item, Source, Wanted, open_raw, open_source, refuse_bad, unify
from undiffuse.errors import DataError, MemoryExhausted, UsageError

NAMES = {"cifar10", "digits", "fashion-mnist", "fashion-mnist-sample", "folder", "idx", "numpy", "rule", "zip"}
NAMES |= {"lmdb", "packed", "parquet", "saved-dataset", "several", "tar-shards"}


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def save(path, height=8, width=8, channels=3, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = noise(height, width, channels, seed)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_the_formats_are_found():
    assert set(FORMATS.classes) == NAMES


def test_images_of_one_shape_come_back_exactly(tmp_path):
    expected = [save(tmp_path / f"{i}.png", seed=i) for i in range(3)]
    source = open_source(tmp_path)
    assert torch.equal(source.images, torch.stack(expected))
    assert source.image_shape == (3, 8, 8)
    assert (source.labels, source.classes, source.skipped) == (None, None, ())
    assert torch.equal(source[1].image, expected[1])


def test_sizes_and_channels_are_unified(tmp_path):
    save(tmp_path / "a.png", 8, 12)
    save(tmp_path / "b.png", 20, 16, channels=1)
    assert open_source(tmp_path, size=8, channels=3).image_shape == (3, 8, 8)
    assert open_source(tmp_path, size=(4, 6), channels=1).image_shape == (1, 4, 6)


def test_mixed_sizes_name_two_files_and_what_to_do(tmp_path):
    save(tmp_path / "a.png", 8, 12)
    save(tmp_path / "b.png", 20, 16)
    message = "images differ in size: a.png is 12x8, b.png is 16x20 (width x height). Give one, for example --size 8"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        open_source(tmp_path)


@pytest.mark.parametrize("sides, stride, side", [
    ((75, 48, 33), 8, 32), ((75, 100), 4, 72), ((75, 100), 32, 64), ((5, 6), 8, 8), ((20, 24), 32, 32),
])  # fmt: skip
def test_the_size_that_is_proposed_suits_the_network(tmp_path, sides, stride, side):
    """The largest multiple of the stride that no picture of the two has to be enlarged for, if there is one."""
    for i, given in enumerate(sorted(sides)[:2]):
        save(tmp_path / f"{i}.png", given, given + 3)
    with pytest.raises(DataError, match=rf"^images differ in size: .* for example --size {side}$"):
        unify(open_raw(tmp_path), stride=stride)


def test_mixed_channels_name_two_files_and_what_to_do(tmp_path):
    save(tmp_path / "a.png", channels=3)
    save(tmp_path / "b.png", channels=1)
    message = (
        "images differ in channels: a.png has 3, b.png has 1. "
        "Give --set data.channels=1 for grey or --set data.channels=3 for RGB"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        open_source(tmp_path)


def test_bad_files_are_listed_or_left_out(tmp_path):
    good = save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:100])
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DataError, match=r"^2 of 3 images cannot be read: cut.png \(.+\), empty.jpg \(not a picture"):
        open_source(tmp_path)
    source = open_source(tmp_path, skip_bad=True)
    assert source.skipped == ("cut.png", "empty.jpg")
    assert torch.equal(source.images, good[None])


def test_twenty_bad_files_are_listed_and_the_rest_counted(tmp_path):
    for i in range(23):
        (tmp_path / f"{i:02}.png").touch()
    with pytest.raises(DataError, match=r"^23 of 23 .*, 19.png \([^)]*\) and 3 more\. Remove or repair") as caught:
        open_source(tmp_path)
    assert "20.png" not in str(caught.value)
    with pytest.raises(DataError, match="^23 of 23 images cannot be read"):
        open_source(tmp_path, skip_bad=True)


def test_more_bad_files_than_can_be_listed(tmp_path, monkeypatch):
    save(tmp_path / "good.png")
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").touch()
    monkeypatch.setattr("undiffuse.data.source.SKIPPED", 40)
    with pytest.raises(DataError, match=r"^2 of 3 .*: a.png \(.* --skip-bad can list no more than 40 bytes of them$"):
        open_source(tmp_path, skip_bad=True)


def test_a_source_of_which_more_is_bad_is_refused(tmp_path):
    """20, or 1 in 1,000: more is no accident of a few files."""
    save(tmp_path / "good.png")
    for i in range(20):
        (tmp_path / f"{i}.png").touch()
    assert len(open_source(tmp_path, skip_bad=True).skipped) == 20
    (tmp_path / "20.png").touch()
    with pytest.raises(
        DataError, match=r"^21 of 22 .*: 0.png \(.* and 1 more. .* leaves out 20 at most. `undif.* lists them all$"
    ):
        open_source(tmp_path, skip_bad=True)
    refuse_bad([("a", "b")] * 40, 40_000, skip_bad=True)
    with pytest.raises(DataError, match="^41 of 40000 images cannot be read: .*; --skip-bad leaves out 40 at most"):
        refuse_bad([("a", "b")] * 41, 40_000, skip_bad=True)


def test_labels_of_skipped_files_are_left_out_too(tmp_path):
    for i, name in enumerate(["a/1", "b/2", "b/3"]):
        save(tmp_path / f"{name}.png", seed=i)
    (tmp_path / "b/2.png").write_bytes(b"")
    source = open_source(tmp_path, skip_bad=True)
    assert source.labels.tolist() == [0, 1]
    assert source.skipped == ("b/2.png",)


@pytest.mark.parametrize("spec", ["fashion-mnits", "/no/such/folder", "gone.npz", "gone.zip", "gone-idx3-ubyte"])
def test_what_is_not_there(spec):
    with pytest.raises(DataError, match=f'^data "{spec}" is neither a path nor a named set'):
        open_source(spec)


def test_a_near_name_is_proposed():
    with pytest.raises(DataError, match=r'Did you mean "fashion-mnist"\? Known: digits, fashion-mnist, '):
        open_source("fashion-mnits")


def test_an_unknown_kind_of_file(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"notes.txt is not in a known format; give a folder or .zip of pictures"):
        open_source(tmp_path / "notes.txt")


def test_bad_options(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="size 0x0 is not possible; give 1 to 67108864 pixels"):
        open_source(tmp_path, size=0)
    with pytest.raises(UsageError, match="size 9000x9000 is not possible"):
        open_source(tmp_path, size=9000)
    with pytest.raises(UsageError, match=r"channels 0 is not possible; give 1 \(grey\), 3 \(RGB\) or another count"):
        open_source(tmp_path, channels=0)
    with pytest.raises(UsageError, match='split "tests" is not known; expected train or test'):
        open_source(tmp_path, split="tests")
    with pytest.raises(UsageError, match='background "wite" is not a colour'):
        open_source(tmp_path, reading=Reading("wite"))


def test_what_the_system_refuses():
    with pytest.raises(DataError, match="^x+ cannot be read: File name too long$"):
        open_source("x" * 5000)


class Endless(Source):
    """More images than any memory holds."""

    classes = None

    def __len__(self):
        return 10**15

    def __getitem__(self, index):
        return Item(torch.zeros(3, 64, 64, dtype=torch.uint8))

    def fingerprint(self):
        return ""


def test_more_than_the_memory_holds():
    message = "^1000000000000000 images of 64x64 need 12288000000.0 GB of memory; give a smaller --size$"
    with pytest.raises(MemoryExhausted, match=message):
        unify(Endless())


def test_an_empty_split(tmp_path):
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 4), np.uint8))
    with pytest.raises(DataError, match="none.npy has no images in its train split; expected at least one"):
        open_source(tmp_path / "none.npy")


def test_fingerprints_see_pixels_labels_order_and_shape():
    images = torch.arange(96, dtype=torch.uint8).reshape(2, 3, 4, 4)
    labels = torch.tensor([0, 1])
    sources = [
        ArraySource(images, labels),
        ArraySource(images, None),
        ArraySource(images, labels.flip(0)),
        ArraySource(images.flip(0), labels),
        ArraySource(images.reshape(2, 3, 2, 8), labels),
        ArraySource(images + 1, labels),
    ]
    assert len({source.fingerprint() for source in sources}) == len(sources)
    assert sources[0].fingerprint() == ArraySource(images.clone(), labels.int()).fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", sources[0].fingerprint())


def test_a_folder_s_fingerprint_sees_names_and_bytes(tmp_path):
    save(tmp_path / "a.png", seed=0)
    save(tmp_path / "b.png", seed=1)
    before = open_raw(tmp_path).fingerprint()
    (tmp_path / "a.png").touch()
    assert open_raw(tmp_path).fingerprint() == before
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    renamed = open_raw(tmp_path).fingerprint()
    save(tmp_path / "b.png", seed=2)
    assert len({before, renamed, open_raw(tmp_path).fingerprint()}) == 3


def test_an_array_that_fits_is_not_copied():
    source = ArraySource(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    assert unify(source, 4, 1) is source
    assert unify(source, 2, 3).image_shape == (3, 2, 2)


@pytest.mark.parametrize(
    "size, channels, accepted",
    [(None, None, True), (4, None, False), ((4, 6), None, True), ((6, 4), None, False), (None, 3, True),
     (None, 1, False), ((4, 6), 3, True), ((4, 6), 1, False), (4, 3, False)],
)  # fmt: skip
def test_a_shape_is_accepted_where_both_its_sides_and_its_channels_are_those_asked_for(size, channels, accepted):
    assert Wanted.of(size, channels).accepts((3, 4, 6)) is accepted


@pytest.mark.parametrize("size", [None, 2])
def test_some_of_a_source_are_spread_over_it_with_their_labels(size):
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(-1, 1, 4, 4)
    some = unify(ArraySource(images, torch.arange(10), tuple("abcdefghij"), ("bad",)), size, count=4)
    assert some.images[:, 0, 0, 0].tolist() == some.labels.tolist() == [0, 2, 5, 7]
    assert (some.classes, some.skipped) == (tuple("abcdefghij"), ("bad",))


def test_subset():
    source = ArraySource(torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1), torch.arange(5), tuple("abcde"))
    part = source.subset(torch.tensor([4, 0]))
    assert part.images.flatten().tolist() == part.labels.tolist() == [4, 0]
    assert len(source.subset(slice(3))) == 3
