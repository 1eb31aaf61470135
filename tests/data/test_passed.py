"""What is not read of a data set, for each way of keeping one: every kind with its count, and in one line."""

import io
import os
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from undiffuse.data import listing, picture
from undiffuse.data.inspect import check, inspect
from undiffuse.data.pack import open_data, pack
from undiffuse.data.passed import Passed, counts, kinds, line, merged
from undiffuse.data.source import open_raw, open_source
from undiffuse.errors import DataError, UsageError


def encoded(kind="PNG", level=90, mode="L", **options):
    data = io.BytesIO()
    Image.new(mode, (4, 4), level).save(data, kind, **options)
    return data.getvalue()


def animation(kind, count):
    frames = [Image.fromarray(np.full((4, 4), 60 + 9 * i, np.uint8)) for i in range(count)]
    data = io.BytesIO()
    frames[0].save(data, kind, save_all=True, append_images=frames[1:])
    return data.getvalue()


def fill(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def as_folder(root, files):
    return fill(root / "set", files)


def as_zip(root, files):
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return root / "set.zip"


def as_tar(root, files, name="set.tar", mode="w"):
    with tarfile.open(root / name, mode) as archive:
        for member, data in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return root / name


def as_tgz(root, files):
    return as_tar(root, files, "set.tgz", "w:gz")


KEPT = {"folder": as_folder, "zip": as_zip, "tar": as_tar, "tar.gz": as_tgz}
PNG = encoded()
HEIC = b"\0\0\0\x18ftypheic" + bytes(20)

# The files, and what is told of those that are not read.
BESIDE = {
    "endings": ({"a.JPG": encoded("JPEG"), "b.CR2": b"x", "c.CR2": b"y", "d.txt": b"", "LICENSE": b""},
                {".CR2 (raw: develop them to PNG)": 2, ".txt": 1, "without an ending": 1}),
    "mixed case": ({"a.png": PNG, "b.MP4": b"", "c.mp4": b""}, {".mp4 (films: save their frames as pictures)": 2}),
    "pictures without an ending": ({"a.png": PNG, "b": PNG, "c": encoded("PNG", 3)},
                                   {"without an ending (they are pictures; rename them to end in .png)": 2}),
    "an address": ({"a.png": PNG, "pic.jpg?w=200": encoded("JPEG"), "b.jpg?w=1": encoded("JPEG")},
                   {".jpg… (they are pictures; rename them to end in .jpg)": 2}),
    "another ending": ({"a.png": PNG, "b.dat": encoded("JPEG"), "c.jpg.1": encoded("JPEG")},
                       {".dat (they are pictures; rename them to end in .jpg)": 1,
                        ".1 (they are pictures; rename them to end in .jpg)": 1}),
    "heic by another name": ({"a.png": PNG, "b": HEIC},
                             {"without an ending (they are .heic pictures; install pillow-heif)": 1}),
    "beside the splits": ({"train/1.png": PNG, "test/1.png": PNG, "extra/1.png": PNG, "extra/2.png": PNG, "a.png": PNG},
                          {"in extra/ (train/ is trained on, test/ is held out)": 2,
                           "beside the splits (train/ is trained on, test/ is held out)": 1}),
    "two held out": ({"train/1.png": PNG, "test/1.png": PNG, "val/1.png": PNG},
                     {"in val/ (train/ is trained on, test/ is held out)": 1}),
    "stray": ({"a/1.png": PNG, "a/2.png": PNG, "b/1.png": PNG, "c.png": PNG}, {"in no folder of a class": 1}),
    "samples": ({"a.png": PNG, "s/.undiffuse": b"", "s/0000.png": PNG, "s/grid.png": PNG},
                {"in s/ (written by undiffuse)": 2}),
    "a run": ({"a.png": PNG, "runs/x/config.toml": b"", "runs/x/data.json": b"", "runs/x/samples/1.png": PNG},
              {"in runs/x/ (written by undiffuse)": 3}),
    "a run of a checkpoint": ({"a.png": PNG, "x/config.toml": b"", "x/step-000000005/meta.json": b"", "x/b.png": PNG},
                              {"in x/ (written by undiffuse)": 3}),
    "hidden": ({"a.png": PNG, ".b.png": PNG, "__MACOSX/._a.png": PNG, "Thumbs.db": b"", "sub/Desktop.ini": b"",
                "@eaDir/a.png": PNG, "$RECYCLE.BIN/a.png": PNG, ".DS_Store": b"", "lost+found/a.png": PNG,
                "PaxHeader/a.png": PNG, "x/PaxHeaders.123/a.png": PNG, "GNUSparseFile.0/a.png": PNG,
                "pax_global_header": b"", "@LongLink": b"", "PaxHeaders.0/cat/._1.png": PNG,
                "._a.png": PNG, "~$a.png": b"", "System Volume Information/a.png": PNG}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("case", BESIDE)
def test_each_kind_is_counted(tmp_path, kept, case):
    files, expected = BESIDE[case]
    path = KEPT[kept](tmp_path, files)
    assert counts(open_raw(path).passed) == expected
    assert counts(open_source(path, 4, 1).passed) == expected
    assert counts(inspect(open_raw(path)).passed) == expected
    assert counts(check(path).passed) == expected


def test_the_line(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "suffixes", lambda: frozenset({".jpg"}))  # whatever is installed
    found = open_raw(as_folder(tmp_path, {f"{i}.HEIC": HEIC for i in range(20)} | {"a.JPG": encoded("JPEG")}))
    assert len(found) == 1 and line(found.passed) == "20 files passed over: 20 .HEIC (install pillow-heif)"
    many = [Passed(k, f".{k}") for k in range(1, 12)] + [Passed(18, "after the first of their file", "frame")]
    assert line(many) == (
        "66 files passed over: 11 .11, 10 .10, 9 .9, 8 .8, 7 .7, 6 .6, 5 .5, 4 .4, 6 of 3 other kinds; "
        "18 frames passed over: 18 after the first of their file"
    )
    assert line([Passed(1200, ".x")]) == "1,200 files passed over: 1,200 .x"
    assert line([Passed(1, ".x"), Passed(2, "because", "class")]) == (
        "1 file passed over: 1 .x; 2 classes passed over: 2 because"
    )
    assert line([]) == ""
    assert merged([Passed(1, ".x")], [Passed(2, ".x"), Passed(1, ".y")]) == (Passed(3, ".x"), Passed(1, ".y"))


def test_many_endings_are_one_number():
    found = kinds([f"a.e{i}" for i in range(40)])
    assert len(found) == 33 and found[-1] == Passed(8, "of other endings")


ANIMATED = {"TIFF": 10, "GIF": 7, "PNG": 3, "WEBP": 4}


@pytest.mark.parametrize("kind", ANIMATED)
def test_pages_and_frames_after_the_first(tmp_path, kind):
    count = ANIMATED[kind]
    root = as_folder(tmp_path, {f"a.{kind.lower()}": animation(kind, count), "b.png": PNG})
    expected = {"frames after the first of their file": count - 1}
    assert open_raw(root)[0].frames == count
    assert counts(open_raw(root).passed) == {}  # they are known when the pictures are decoded
    assert counts(open_source(root, 4, 1).passed) == counts(inspect(open_raw(root)).passed) == expected
    assert counts(check(root).passed) == expected
    packed = pack(root, tmp_path / "packed", 4, 1)
    assert counts(packed.passed) == counts(open_raw(tmp_path / "packed").passed) == expected


def test_layers_and_sizes_are_one_picture(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.ico", sizes=[(16, 16), (32, 32)])
    assert open_raw(tmp_path / "a.ico")[0].frames == 1
    assert picture.frames(animation("GIF", 3)[:-30]) in (1, 2)  # cut after the first


def test_what_is_new_beside_packed_data_is_told_too(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    root = as_folder(tmp_path, {"a.png": PNG, "b.png": PNG})
    assert counts(open_data(root, use_cache=True).passed) == {}
    (root / "c.svg").touch()
    assert counts(open_data(root, use_cache=True).passed) == {".svg (drawings: turn them into PNG)": 1}


def test_other_arrays_and_other_formats(tmp_path):
    images = np.zeros((2, 1, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, masks=images, note=np.array(3))
    assert counts(open_raw(tmp_path / "a.npz").passed) == {'arrays "masks" of a.npz': 1, 'arrays "note" of a.npz': 1}
    folder = tmp_path / "split"
    fill(folder, {"preview.png": PNG, "readme.md": b""})
    for name in ("Train.NPZ", "Val.npz"):
        with open(folder / name, "wb") as file:
            np.savez(file, images=images)
    assert counts(open_raw(folder).passed) == {".png (beside the data)": 1, ".md": 1}
    assert len(open_raw(folder, "test")) == 2 and open_raw(folder, "test").passed == ()
    packed = pack(tmp_path / "a.npz", tmp_path / "packed")
    (packed.path / "x.jpg").touch()
    assert counts(open_raw(packed.path).passed) == counts(packed.passed) | {".jpg (beside the data)": 1}


def test_where_no_picture_is_left_it_is_said_what_there_was(tmp_path):
    root = as_folder(tmp_path, {"a.mov": b"", "b.txt": b"", "c.gz": b""})
    message = (
        rf"^{root} has no images: 3 files, none with the ending of a picture \(.png, .jpg, .webp …\): 3 files passed "
        r"over: 1 .gz \(unpack it\), 1 .mov \(films: save their frames as pictures\), 1 .txt. Give the folder"
    )
    with pytest.raises(DataError, match=message):
        open_raw(root)
    with pytest.raises(DataError, match=r"1 .mov \(films: save their frames as pictures\)\)$"):
        open_raw(root / "a.mov")


def test_a_pattern_passes_over_what_nothing_reads(tmp_path):
    root = as_folder(tmp_path, {"a.png": PNG, "b.png": PNG, "c.txt": b"", "Thumbs.db": b""})
    source = open_raw(f"{root}/*")
    assert len(source) == 2 and counts(source.passed) == {".txt": 1}
    with pytest.raises(DataError, match=r"^.*\*.txt has no images: 1 file passed over: 1 .txt$"):
        open_raw(f"{root}/*.txt")
    with pytest.raises(DataError, match="c.txt is not in a known format"):  # who names a file means it
        open_raw(f"{root}/a.png\n{root}/c.txt")


def test_named_files_are_never_hidden(tmp_path):
    root = fill(tmp_path / ".cache", {".a.png": PNG, "b.png": PNG})
    assert len(open_raw(f"{root}/.a.png\n{root}/b.png")) == 2


def test_a_plugin_is_registered_where_it_is_there(tmp_path, monkeypatch):
    """A stand-in that reads one more ending, as pillow-heif does."""
    (tmp_path / "stand_in.py").write_text(
        "from PIL import Image, PpmImagePlugin\n"
        "def register():\n"
        "    Image.register_extension(PpmImagePlugin.PpmImageFile.format, '.standin')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(picture, "PLUGINS", {"stand_in": "register", "not_there_at_all": "register"})
    files = {"a.standin": b"P5 1 1 255 \x07"}
    root = as_folder(tmp_path, files)
    picture.add_plugins.cache_clear(), picture.suffixes.cache_clear()
    try:
        assert int(open_raw(root)[0].image) == 7
    finally:
        Image.EXTENSION.pop(".standin")
        picture.add_plugins.cache_clear(), picture.suffixes.cache_clear()


INSIDE = {
    "the folder": ("set", "set"),
    "below": ("set", "set/runs/a"),
    "by a link": ("link", "set/run"),
    "by another link": ("set", "link/run"),
    "through a link inside": ("linked", "set/run"),
    "one of several": ("other\nset", "set/run"),
    "with dots": ("set", "other/../set/run"),
    "a pattern": ("se*", "set/run"),
    "a pattern of files": ("set/*.png", "set/sheet.png"),
    "a pattern that would find it": ("set/*", "set/run"),
    "the file": ("set/a.png", "set/a.png"),
}
OUTSIDE = {
    "beside": ("set", "runs/a"),
    "a longer name": ("set", "set-2"),
    "above": ("set", "."),
    "a name": ("digits", "runs/digits"),
    "not found by the pattern": ("set/*.png", "set/run"),
    "beside a file": ("set/a.png", "set/run"),
}


@pytest.fixture
def places(tmp_path, monkeypatch):
    fill(tmp_path, {"set/a.png": PNG, "other/b.png": PNG, "linked/c.png": PNG})
    (tmp_path / "link").symlink_to(tmp_path / "set")
    (tmp_path / "linked/there").symlink_to(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", INSIDE)
def test_output_inside_the_data_is_refused(places, case):
    data, out = INSIDE[case]
    which = data.split("\n")[-1]
    with pytest.raises(UsageError) as refused:
        listing.refuse_inside(places / out if case == "with dots" else type(places)(out), data, "--out")
    shown = places / out if case == "with dots" else type(places)(out)
    assert str(refused.value) == (
        f"--out {shown} lies in the data, {which}, and would be read as data the next time; give a place outside of it"
    )


@pytest.mark.parametrize("case", OUTSIDE)
def test_output_outside_is_not(places, case):
    data, out = OUTSIDE[case]
    listing.refuse_inside(type(places)(out), data, "--out")


def test_everything_that_lies_in_data_is_either_read_or_told(tmp_path):
    """Whatever names there are, pictures and what is passed over make up all but what is hidden."""
    names = np.random.default_rng(0)
    parts = ["train", "test", "val", "cat", "dog", "a.png", "b.jpg", "c.txt", "d", "e.JPG", ".f.png", "Thumbs.db"]
    for trial in range(60):
        chosen = {"/".join(names.choice(parts[:5], names.integers(0, 3))) for _ in range(6)}
        files = {f"{folder}/{name}".strip("/"): PNG for folder in chosen for name in names.choice(parts[5:], 4)}
        root = fill(tmp_path / str(trial), files)
        visible = [name for name in files if not os.path.basename(name).startswith((".f", "Thumbs"))]
        total = Counter[str]()
        for split in ("train", "test"):
            try:
                source = open_raw(root, split)
            except DataError as error:
                assert "split" in str(error) or "no images" in str(error)
                continue
            total["read"] += len(source)
            total["told"] += sum(each.count for each in source.passed if each.noun == "file")
        # Files that are no pictures are told with each split.
        assert not total or total["read"] + total["told"] >= len(visible)
