"""The emoji set from small packages of the same make as the real ones."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from undiffuse.data.format import emoji
from undiffuse.data.format.emoji import CATEGORIES, STYLES, attribution, build, code_points, held_out
from undiffuse.data.source import open_source
from undiffuse.errors import DataError, StorageError, UsageError

POINTS = [f"{0x1F600 + i:x}" for i in range(40)]
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><rect width="36" height="72" fill="{}"/></svg>'


def image(seed, kind):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:2] = 0  # transparent
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def google():
    entries = [{"unified": point.upper(), "category": "Smileys & Emotion"} for point in POINTS]
    files = {f"img/google/64/{point}.png": image(i, "PNG") for i, point in enumerate(POINTS)}
    files["img/google/64/1f600-1f3fb.png"] = image(1000, "PNG")  # a skin tone
    files[f"img/google/64/{POINTS[1]}.png"] = files[f"img/google/64/{POINTS[0]}.png"]  # the same picture again
    files["img/google/sheets-64/64.png"] = image(1001, "PNG")
    return files | {"emoji.json": json.dumps(entries).encode()}


def fluent():
    return {f"assets/{point}-fe0f.webp": image(100 + i, "WEBP") for i, point in enumerate(POINTS)}


def openmoji():
    entries = [{"hexcode": point.upper(), "group": "food-drink"} for point in POINTS]
    files = {f"color/svg/{point.upper()}.svg": SVG.format(f"#0000{i:02x}").encode() for i, point in enumerate(POINTS)}
    files["color/svg/E000.svg"] = SVG.format("#ff0000").encode()
    entries.append({"hexcode": "E000", "group": "extras-openmoji"})
    return files | {"data/openmoji.json": json.dumps(entries).encode()}


def unpacked(root, files):
    for name, data in files.items():
        path = root / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def packed(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def arrays(out):
    return {split: dict(np.load(out / f"{split}.npz")) for split in ("train", "test")}


def test_build(tmp_path):
    packages = [unpacked(tmp_path / "g", google()), packed(tmp_path / "f.tgz", fluent())]
    built = build(packages, tmp_path / "out", size=8)
    assert built.found == {"noto": 40, "twemoji": 0, "fluent": 40, "openmoji": 0}
    assert (built.distinct, built.train + built.test) == (79, 79)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ATTRIBUTION.txt", "test.npz", "train.npz"]
    found = arrays(tmp_path / "out")
    assert (len(found["train"]["images"]), len(found["test"]["images"])) == (built.train, built.test)
    for split, is_test in (("train", False), ("test", True)):
        assert {held_out(key) for key in found[split]["key"].tolist()} == {is_test}
        assert (found[split]["category"] == CATEGORIES.index("smileys-emotion")).all()
    images, keys, style = (np.concatenate([found[s][name] for s in found]) for name in ("images", "key", "style"))
    expected = np.asarray(Image.open(io.BytesIO(image(105, "PNG"))).convert("RGB")).copy()
    expected[:2] = 255  # on white
    (row,) = np.nonzero((keys == POINTS[5]) & (style == 2))[0]
    assert np.array_equal(images[row], expected)


@pytest.mark.parametrize(
    ("labels", "count", "seen"),
    [
        ("style", len(STYLES), "fluent"),
        ("category", len(CATEGORIES), "smileys-emotion"),
        ("both", len(STYLES) * len(CATEGORIES), "fluent smileys-emotion"),
    ],
)
def test_what_is_built_opens_as_a_source(tmp_path, labels, count, seen):
    packages = [unpacked(tmp_path / "g", google()), packed(tmp_path / "f.tgz", fluent())]
    build(packages, tmp_path / "out", size=16, labels=labels)
    train, test = open_source(tmp_path / "out"), open_source(tmp_path / "out", split="test")
    assert train.image_shape == test.image_shape == (3, 16, 16)
    assert len(train.classes) == count
    style = arrays(tmp_path / "out")["train"]["style"]
    assert {train.classes[label] for label in train.labels[style == 2].tolist()} == {seen}


def test_labels_of_another_kind(tmp_path):
    with pytest.raises(UsageError, match='kind of labels "styles" is not known. Did you mean "style"'):
        build([unpacked(tmp_path / "g", google())], tmp_path / "out", labels="styles")


def test_an_svg_is_drawn(tmp_path):
    build([packed(tmp_path / "o.tgz", openmoji())], tmp_path / "out", size=8)
    found = arrays(tmp_path / "out")
    keys, images, category = (np.concatenate([found[s][n] for s in found]) for n in ("key", "images", "category"))
    red = images[keys == "e000"][0]
    assert np.abs(red[:, :3].astype(int) - (255, 0, 0)).max() < 40
    assert np.abs(red[:, 5:].astype(int) - 255).max() < 40
    assert category[keys == "e000"] == CATEGORIES.index("extras-openmoji")


def test_the_same_input_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        build([unpacked(tmp_path / f"g-{name}", google())], tmp_path / name)
    for file in ("train.npz", "test.npz", "ATTRIBUTION.txt"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_attribution_names_what_was_used(tmp_path):
    build([unpacked(tmp_path / "g", google())], tmp_path / "out")
    text = (tmp_path / "out" / "ATTRIBUTION.txt").read_text()
    assert "Noto Emoji, Copyright Google Inc., Apache License 2.0" in text
    assert "OpenMoji" not in text and "BY-SA" not in text
    everything = attribution(STYLES)
    assert "the set as a whole is under CC BY-SA 4.0" in everything
    assert all(style.terms in everything for style in STYLES)


def test_code_points_have_one_spelling():
    assert code_points("0039-FE0F-20E3") == code_points("39-20e3") == "0039-20e3"
    assert code_points("1f3f4-e0067_e007f") == code_points("1F3F4-E0067")


def test_one_code_point_in_ten_is_held_out():
    share = sum(held_out(f"{i:x}") for i in range(10_000)) / 10_000
    assert abs(share - 0.1) < 5 * 0.003
    assert [key for key in POINTS if held_out(key)] == ["1f60c", "1f60d", "1f617", "1f61a", "1f61c", "1f623"]


def test_a_package_of_something_else(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="other holds no emoji that are known here; expected emoji-datasource-google"):
        build([tmp_path / "other"], tmp_path / "out")
    (tmp_path / "a.tgz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="a.tgz cannot be read as an npm package: "):
        build([tmp_path / "a.tgz"], tmp_path / "out")
    with pytest.raises(DataError, match="gone.tgz cannot be read as an npm package: .*No such file"):
        build([tmp_path / "gone.tgz"], tmp_path / "out")


def test_categories_are_needed(tmp_path):
    with pytest.raises(DataError, match="no package says which category .* add emoji-datasource-google or openmoji"):
        build([packed(tmp_path / "f.tgz", fluent())], tmp_path / "out")


def test_lists_of_another_make(tmp_path):
    files = google() | {"emoji.json": b'[{"unified": "1F600", "category": "Weather"}]'}
    with pytest.raises(DataError, match="^emoji.json is not the list of emoji that was expected: "):
        build([unpacked(tmp_path / "g", files)], tmp_path / "out")


def test_too_few_to_split(tmp_path):
    files = {name: data for name, data in google().items() if name.endswith(("json", "/1f600.png"))}
    with pytest.raises(DataError, match="^1 emoji are too few to hold one in 10 out; give whole packages$"):
        build([unpacked(tmp_path / "g", files)], tmp_path / "out")


def test_a_place_that_cannot_be_written(tmp_path):
    package = unpacked(tmp_path / "g", google())
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/out cannot be written: (Not a directory|File exists)$"):
        build([package], tmp_path / "file" / "out")


def test_nothing_half_written(tmp_path):
    files = google() | {f"img/google/64/{POINTS[7]}.png": b"damaged"}
    with pytest.raises(DataError, match=f"^img/google/64/{POINTS[7]}.png cannot be drawn: not a picture"):
        build([unpacked(tmp_path / "g", files)], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


def test_an_existing_folder_is_not_written_to(tmp_path):
    with pytest.raises(UsageError, match=f"^{tmp_path} exists; give the name of a new folder$"):
        build([], tmp_path)


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'drawing openmoji needs resvg-py; .* pip install "undiffuse\[emoji\]"$'):
        build([packed(tmp_path / "o.tgz", openmoji())], tmp_path / "out")
