"""Several data sets as one."""

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.data.format.several import join
from undiffuse.data.passed import counts
from undiffuse.data.source import ArraySource, open_raw, open_source
from undiffuse.data.subset import Subset, divide
from undiffuse.errors import DataError


def save(path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)


def values(source) -> list[int]:
    return [int(source[i].image[0, 0, 0]) for i in range(len(source))]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        save(tmp_path / "cats" / f"{i}.png", 10 + i)
        save(tmp_path / "dogs" / f"{i}.png", 20 + i)
    return tmp_path


def test_two_folders(here):
    source = open_raw(join(["cats", "dogs"]))
    assert values(source) == [10, 11, 12, 20, 21, 22] and source.classes is None
    assert source.name(4) == "1.png" and len(source.stamp()) == 6
    assert source.fingerprint() != open_raw(join(["dogs", "cats"])).fingerprint()
    assert open_source(join(["cats", "dogs"])).images[:, 0, 0, 0].tolist() == [10, 11, 12, 20, 21, 22]


def test_a_pattern_and_files_by_name(here):
    assert values(open_raw("cats/*.png")) == [10, 11, 12]
    found = open_raw("*/[01].png")  # the folders that files lie in are their classes
    assert values(found) == [10, 11, 20, 21] and found.classes == ("cats", "dogs")
    assert [found[i].label for i in range(4)] == [0, 0, 1, 1]
    assert values(open_raw(join(["cats/1.png", "cats/2.png", "dogs"]))) == [11, 12, 20, 21, 22]
    assert values(open_raw(join(["cats/1.png", "cats/*.png"]))) == [10, 11, 12]  # each once


def test_a_folder_whose_name_looks_like_a_pattern(here):
    save(here / "cats [1]" / "a.png", 99)
    assert values(open_raw("cats [1]")) == [99]
    assert values(open_raw(join(["cats [1]", "dogs"]))) == [99, 20, 21, 22]


def test_classes_are_joined_by_name(here):
    for name, labels in (("a", [0, 1]), ("b", [1, 0])):
        np.savez(here / f"{name}.npz", images=np.full((2, 4, 4), 7, np.uint8), labels=np.array(labels))
    both = open_raw(join(["a.npz", "b.npz"]))
    assert both.classes is not None and [both[i].label for i in range(4)] == [0, 1, 1, 0]
    mixed = open_raw(join(["a.npz", "dogs"]))
    assert mixed.classes is None and mixed[0].label is None and mixed.every_label() is None
    assert both.every_label().tolist() == [0, 1, 1, 0] and both.passed == ()
    assert counts(mixed.passed) == {"classes because another part of the data has none": 2}


def test_a_test_split_of_one_part_is_enough(here):
    for split in ("train", "test"):
        save(here / "split" / split / "a.png", 50 if split == "train" else 60)
    spec = join(["split", "cats"])
    assert values(open_raw(spec)) == [50, 10, 11, 12] and values(open_raw(spec, "test")) == [60]
    with pytest.raises(DataError, match="no test split"):
        open_raw(join(["cats", "dogs"]), "test")


def test_a_test_split_that_is_there_and_damaged_is_no_part_without_one(here):
    for name in "ab":
        for split in ("train", "test"):
            (here / name).mkdir(exist_ok=True)
            np.savez(here / name / f"{split}.npz", images=np.full((2, 4, 4, 3), 7, np.uint8))
    assert len(open_raw(join(["a", "b"]), "test")) == 4
    (here / "b" / "test.npz").write_bytes(b"no arrays")
    with pytest.raises(DataError, match="b/test.npz"):
        open_raw(join(["a", "b"]), "test")


def test_what_matches_nothing_is_refused(here):
    with pytest.raises(DataError, match=r"^no file matches cats/\*.jpg; check the path, or give the folder itself$"):
        open_raw("cats/*.jpg")
    with pytest.raises(DataError, match='data "birds" is neither a path nor a named set'):
        open_raw(join(["cats", "birds"]))
    with pytest.raises(DataError, match="has a line break in its name"):
        join(["a\nb"])


def test_a_source_is_divided_and_no_image_is_in_both_parts():
    every = torch.stack([torch.arange(400) % 256, torch.arange(400) // 256], 1).to(torch.uint8).reshape(400, 1, 1, 2)
    whole = ArraySource(every[:40], torch.arange(40), tuple(map(str, range(40))))
    rest, held = divide(whole, 0.1)
    assert sorted(values(rest) + values(held)) == list(range(40)) and 1 <= len(held) <= 8
    more = ArraySource(every)
    assert len(divide(more, 0.1)[1]) == pytest.approx(40, abs=20)  # three standard deviations
    assert divide(more, 0.1)[1].index[: len(held)].tolist() == held.index.tolist()  # more images move none of these
    gathered, labels = rest.gather(torch.tensor([3, 0]))
    assert gathered[:, 0, 0, 0].tolist() == labels.tolist() == [values(rest)[3], values(rest)[0]]
    assert rest.fingerprint() != held.fingerprint() != whole.fingerprint()
    assert (
        rest.classes == whole.classes and rest.image_shape == (1, 1, 2) and rest.name(0) == f"image {values(rest)[0]}"
    )
    assert [len(part) for part in divide(Subset(whole, torch.arange(2)), 0.01)] == [1, 1]
    with pytest.raises(DataError, match="1 image cannot be divided"):
        divide(Subset(whole, torch.arange(1)), 0.5)


def test_as_many_names_as_a_shell_makes_of_a_pattern(here):
    names = [f"cats/{'long' * 10}-{i}.png" for i in range(300)]
    for i, name in enumerate(names):
        save(here / name, i % 250)
    assert len("\n".join(names)) > 4096 and len(open_raw(join(names))) == 300


def test_a_test_split_beside_single_files_is_seen(here):
    for split in ("train", "test"):
        save(here / "split" / split / "a.png", 50 if split == "train" else 60)
    assert values(open_raw(join(["cats/0.png", "split"]), "test")) == [60]


@pytest.mark.parametrize("count, what", [(1, "the set of 1 file"), (2, "the set of 2 files")])
def test_named_files_have_no_test_split(tmp_path, count, what):
    for i in range(2):
        (tmp_path / f"{i}.png").touch()
    with pytest.raises(DataError, match=f"^{what} has no test split; give the path of the test images"):
        open_raw(f"{tmp_path}/*.png" if count == 2 else f"{tmp_path}/[0].png", "test")
