"""What commands of the codec refuse, in one line each: places, options, files and pictures."""

import numpy as np
import pytest
from PIL import Image

from tests.cli.coded import codec, good, pixels, sheet
from undiffuse.codec.stream import Codec


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_places_that_cannot_be_written_are_refused_before_the_work(call, folder, place, tmp_path, monkeypatch):
    (tmp_path / "there.udf").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "there.png").write_text("mine")
    monkeypatch.setattr(Codec, "encode", lambda *_: pytest.fail("the work has begun"))
    monkeypatch.setattr(Codec, "decode", lambda *_: pytest.fail("the work has begun"))
    model, one, many = place / "MODEL", place / "one.udf", place / "many.udf"
    at, there = tmp_path, "is there already; give another name, or --overwrite to replace it"
    for words, message in (
        (["encode", model, folder / "SHEET", at / "there.udf"], f"{at}/there.udf {there}"),
        (["encode", model, folder / "SHEET", at], f"{at} is a folder; give the name of a file"),
        (["encode", model, folder / "SHEET", at / "there.udf" / "x"],
         f"{at}/there.udf is a file, so {at}/there.udf/x cannot be in it; give another place"),
        (["decode", one, at / "there.png"], f"{at}/there.png {there}"),
        (["decode", one, at / "x.jpg"], f"{at}/x.jpg would not keep the image as it is; give the name of a .png or a"),
        (["decode", one, at / "x"], f"{at}/x would not keep the image as it is; give the name of a .png or a"),
        (["decode", many, at / "full"], f"{at}/full holds other files (mine.txt); give a new folder or a .npz"),
        (["decode", many, at / "there.png"], f"{at}/there.png is the name of a picture, and the file holds 8 images;"),
        (["decode", many, at / "there.udf"], f"{at}/there.udf is a file, and the file holds 8 images; give a"),
        (["decode", many, at / "there.png" / "x"], f"{at}/there.png is a file, so {at}/there.png/x cannot be in it;"),
        (["decode", at, at / "x.png"], f"{at} is a folder; give the name of a file"),
        (["decode", one, at / "x.png", "--as", "best"], "--as best is not known; give mean, flow or ancestral"),
        (["codec", "strip", one, "--out", at / "there.png"], f"{at}/there.png {there}"),
        (["codec", "strip", one, "--out", at / "x.txt"], f"{at}/x.txt has no ending of a picture that can be written"),
    ):  # fmt: skip
        code, out, err = call(*words, *(["--model", model] if words[0] != "encode" else []))
        assert (code, out) == (2, "") and err.startswith(f"undiffuse: {message}") and err.count("\n") == 1, err
    assert (at / "there.png").read_text() == (at / "there.udf").read_text() == (at / "full" / "mine.txt").read_text()


def test_what_is_there_is_replaced_when_asked(call, folder, place, tmp_path):
    (tmp_path / "x.udf").write_text("mine")
    good(call, "encode", place / "MODEL", sheet(folder)[3], tmp_path / "x.udf", "--no-check", "--overwrite")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.png").write_text("mine")
    good(call, "decode", place / "many.udf", tmp_path / "out", "--model", place / "MODEL", "--overwrite")
    assert pixels(tmp_path / "out" / "00000.png").shape == (8, 8)


def test_a_model_without_tables_says_how_to_make_them(call, folder, place, tmp_path):
    words = "undiffuse: no codec is fitted to this model; make its tables with `undiffuse codec fit MODEL DATA`\n"
    assert call("encode", place / "BARE", sheet(folder)[0], tmp_path / "x.udf")[::2] == (2, words)
    code, _, err = call("decode", place / "one.udf", tmp_path / "x.png", "--model", place / "BARE")
    assert code == 2 and "this model has not the tables" in err and "give the run or file that has them" in err


def test_files_of_other_tables_or_of_none_are_refused(call, place, tmp_path):
    code, _, err = call("decode", place / "one.udf", tmp_path / "x.png")
    assert code == 2 and err.startswith("undiffuse: no shipped model made this file (tables ")
    assert "give the one that did with --model. One with other tables than the shipped ones comes from" in err
    data = bytearray((place / "one.udf").read_bytes())
    data[4] ^= 1
    (tmp_path / "other.udf").write_bytes(data)
    code, _, err = call("decode", tmp_path / "other.udf", tmp_path / "x.png", "--model", place / "MODEL")
    assert code == 5 and "the file was made with other tables or another model" in err
    for text in (b"", b"GIF89a"):
        (tmp_path / "none.udf").write_bytes(text)
        for words in (["decode", tmp_path / "none.udf", tmp_path / "x.png"], ["codec", "info", tmp_path / "none.udf"]):
            code, _, err = call(*words)
            assert code == 5 and err.startswith(f"undiffuse: {tmp_path}/none.udf: this is no coded image")
    code, _, err = call("decode", tmp_path / "absent.udf", tmp_path / "x.png")
    assert code != 0 and f"{tmp_path}/absent.udf" in err and err.count("\n") == 1


def test_options_out_of_range_are_refused(call, folder, place, tmp_path):
    model, one, sheets, out = place / "MODEL", sheet(folder)[0], folder / "SHEET", tmp_path / "x.udf"
    train = ["--split", "train"]
    for words, message in (
        (["encode", model, one, out, "--steps", 0], "0 steps are not possible; the tables of this model have 1 to 6"),
        (["encode", model, one, out, "--steps", 7], "7 steps are not possible; the tables of this model have 1 to 6"),
        (["encode", model, sheets, out, "-n", 9, *train], f"9 images are not possible; {sheets} has 1 to 8"),
        (["encode", model, sheets, out, "-n", 0, *train], "--images 0 is not possible; give 1 or more"),
        (["encode", model, one, out, "--label", "cat"], "label"),
        (["codec", "fit", place / "BARE", folder / "SHEET", "-n", 0], "--images 0 is not possible; give 1 or more"),
        (["codec", "fit", place / "BARE", folder / "SHEET", "-n", 2, "--memory", 11],
         "memory = 11 is not possible; give 10, 12, 14, 16"),
        (["codec", "fit", place / "BARE", folder / "SHEET", "-n", 2, "--steps", 0], "0 steps are not possible; give 1"),
        (["codec", "fit", place / "BARE", folder / "SHEET", "-n", 2, "--steps", 99],
         "99 steps are not possible; give 1 to 63"),
    ):  # fmt: skip
        code, _, err = call(*words)
        assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err, (words, err)
    assert not out.exists()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_file_has_is_refused(call, folder, place, tmp_path, seed):
    code, _, err = call("encode", place / "MODEL", sheet(folder)[0], tmp_path / "x.udf", "--seed", seed, "--no-check")
    assert code == 2 and "seed" in err.splitlines()[-1] and not (tmp_path / "x.udf").exists()


def test_what_a_picture_would_lose_is_said(call, place, tmp_path):
    """Also of a lossless file, which keeps what the model sees."""
    noise = np.random.default_rng(3)
    Image.fromarray(noise.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / "rgb.png")
    Image.fromarray(noise.integers(0, 65535, (8, 8), np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(noise.integers(0, 1023, (8, 8), np.uint16)).save(tmp_path / "ten.png")
    words = ["encode", place / "MODEL"]
    for name, told in (
        ("rgb.png", "1 image becomes 8×8 grey: 1 made grey"),
        ("deep.png", "1 read from more than 8 bits"),
    ):
        code, _, err = call(*words, tmp_path / name, tmp_path / f"{name}.udf", "--lossless", "--no-check")
        assert code == 0 and told in err, err
    code, _, err = call(*words, tmp_path / "ten.png", tmp_path / "ten.udf", "--no-check")
    assert (
        code == 2 and "all images are nearly black: uint16 values from" in err and not (tmp_path / "ten.udf").exists()
    )
    code, _, err = call(
        *words, tmp_path / "ten.png", tmp_path / "ten.udf", "--no-check", "--set", "data.range=[0,1023]"
    )
    assert code == 0, err


def test_a_folder_becomes_a_file_of_all_its_pictures_at_their_size(call, place, tmp_path):
    """It has no splits, and needs none; --resize crops, and nothing else does."""
    (tmp_path / "d").mkdir()
    for i in range(3):
        values = np.random.default_rng(i).integers(0, 255, (9, 11), np.uint8)
        Image.fromarray(values).save(tmp_path / "d" / f"{i}.png")
    words = ["encode", place / "MODEL", tmp_path / "d"]
    for more, size, count in (([], (3, 1, 9, 11), 3), (["-n", 2], (2, 1, 9, 11), 2), (["--resize"], (3, 1, 8, 8), 3)):
        said = good(call, *words, tmp_path / "x.udf", "--steps", 2, "--no-check", "--overwrite", *more)
        assert said["images"] == count
        assert codec(place).decode((tmp_path / "x.udf").read_bytes()).mean().shape == size
    Image.new("L", (8, 8), 90).save(tmp_path / "d" / "3.png")
    code, _, err = call(*words, tmp_path / "y.udf")
    assert code == 2 and f"the images of {tmp_path}/d differ in size; give one at a time, or --resize" in err


def test_a_picture_is_not_replaced_by_its_own_file(call, folder, place, tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(before := sheet(folder)[0].read_bytes())
    code, _, err = call("encode", place / "MODEL", picture, picture, "--overwrite")
    assert code == 2 and f"{picture} is the picture itself, which the file would replace; give another name" in err
    assert picture.read_bytes() == before


def test_options_without_effect_are_refused(call, place, tmp_path):
    one, out = place / "one.udf", tmp_path / "x.png"
    for words, message in (
        (
            ["--realism", 0.5, "--model", place / "MODEL"],
            "--realism 0.5 belongs to what is drawn; give --as flow or",
        ),
        (["--weights", "raw"], "--weights raw is of a run; give --model too"),
    ):
        code, _, err = call("decode", one, out, *words)
        assert (code, out.exists()) == (2, False) and err.startswith(f"undiffuse: {message}")


def test_a_file_with_bytes_behind_its_end_is_damaged_and_its_layers_are_good(call, place, tmp_path):
    file, model = tmp_path / "more.udf", ["--model", place / "MODEL"]
    file.write_bytes((place / "one.udf").read_bytes() + b"abc")
    code, _, err = call("decode", file, tmp_path / "x.png", *model)
    assert code == 5 and f"{file}: 3 bytes follow where it should end; give --partial to decode what is good" in err
    said = good(call, "decode", file, tmp_path / "x.png", *model, "--partial")
    assert said["status"] == "damaged"
    whole = codec(place).decode((place / "one.udf").read_bytes()).mean()
    assert np.array_equal(pixels(tmp_path / "x.png"), whole[0, 0].numpy())
    code, out, err = call("codec", "strip", file, "--out", tmp_path / "s.png", *model)
    assert code == 0 and f"{file}: 3 bytes follow where it should end; what is before that is drawn" in err


def test_a_layer_that_is_not_whole_is_said_to_be_so(call, place, tmp_path):
    file, data = tmp_path / "cut.udf", (place / "many.udf").read_bytes()
    file.write_bytes(data[:-6])
    found = good(call, "codec", "info", file, "--model", place / "MODEL")
    assert (found["groups"], found["lossless"], found["layers"][-1]["groups"]) == (3, False, 2)
    _, out, _ = call("codec", "info", file, "--model", place / "MODEL")
    last = next(line for line in out.splitlines() if line.strip().startswith(f"layer {len(found['layers'])} "))
    assert last.endswith("; whole in 2 of 3 groups")


def test_a_lossless_file_of_known_images_is_not_warned_of(call, folder, place, tmp_path):
    """By the bits of its chain: its end is more, and no surprise."""
    code, _, err = call("encode", place / "MODEL", sheet(folder)[3], tmp_path / "x.udf", "--lossless", "--no-check")
    assert code == 0 and "does not know such images" not in err


def test_an_array_is_read_as_it_is_said(call, place, tmp_path):
    values = np.random.default_rng(5).integers(0, 255, (3, 8, 8), np.uint8)
    np.save(tmp_path / "a.npy", values)
    words = ["encode", place / "MODEL", tmp_path / "a.npy", tmp_path / "x.udf", "--no-check"]
    code, _, err = call(*words)
    assert code == 2 and "data.axes" in err, err
    assert good(call, *words, "--set", "data.axes=nhw")["images"] == 3
