"""The codec by command, untrained: tables are made, images go to files and back, and each mistake is one line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.coded import codec, good, pixels, sheet
from tests.codec.plans import untrained
from undiffuse.codec import tables
from undiffuse.codec.container import parse
from undiffuse.figure import enlarged
from undiffuse.model import load


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_tables_are_made_once_and_anew_when_asked(call, folder, tmp_path, cache):
    model = untrained(tmp_path / "M")
    words = ["codec", "fit", model, folder / "SHEET", "--steps", 3, "--memory", 10]
    code, out, err = call(*words, "-n", 5)
    assert code == 0 and "64 evaluations of each of 5 images" in err, err
    made = tables.of(load.load(model, "cpu"))
    assert (made.steps, made.images, made.values, made.memory) == (3, 5, 64, 10)
    assert str(cache / "fit" / f"{made.weights}.codec.json") in out and made.ident.hex() in out
    assert good(call, *words) == {
        "tables": str(cache / "fit" / f"{made.weights}.codec.json"),
        "ident": made.ident.hex(),
        "made": "before",
    }
    for option, value, kept in (("--steps", 4, 3), ("--memory", 12, 10)):
        code, _, err = call(*words, option, value)
        assert code == 2 and f"{option} {value} is not what the tables of this model were made with ({kept});" in err
    other = good(call, *words, "--overwrite")
    assert other["ident"] != made.ident.hex() and other["steps"] == 3 and other["usual"] > 0
    again = tables.of(load.load(model, "cpu"))
    assert again.images == 8 and other["bits_an_image"] == sum(row[16] for row in again.bits)


def test_damaged_tables_are_said_to_be_so_and_made_anew(call, folder, tmp_path, cache):
    model = untrained(tmp_path / "M")
    words = ["codec", "fit", model, folder / "SHEET", "--steps", 3, "--memory", 10, "-n", 5]
    assert call(*words)[0] == 0
    next((cache / "fit").iterdir()).write_text("{")
    code, _, err = call("encode", model, sheet(folder)[0], tmp_path / "x.udf")
    assert code == 5 and err.endswith(".codec.json is damaged; make it anew with `undiffuse codec fit --overwrite`\n")
    assert good(call, *words, "--overwrite")["made"] == "now"


@pytest.mark.parametrize("command", ["fit", "encode", "decode"])
def test_progress_ends_at_a_hundred(call, folder, place, tmp_path, command):
    words = {
        "fit": ["codec", "fit", untrained(tmp_path / "M"), folder / "SHEET", "--steps", 3, "--memory", 10],
        "encode": ["encode", place / "MODEL", folder / "SHEET", tmp_path / "x.udf", "--split", "train", "--no-check"],
        "decode": ["decode", place / "many.udf", tmp_path / "x.npz", "--model", place / "MODEL"],
    }[command]
    code, _, err = call(*words)
    done, total = map(int, re.findall(r" (\d+)/(\d+) \(100 %\)", err)[-1])
    assert code == 0 and done == total > 0, err


def test_a_picture_goes_to_a_file_and_back_as_in_python(call, folder, place, tmp_path):
    file, back = tmp_path / "x.udf", tmp_path / "x.png"
    said = good(call, "encode", place / "MODEL", sheet(folder)[3], file, "--no-check")
    assert file.read_bytes() == (place / "one.udf").read_bytes()
    mean = codec(place).decode(file.read_bytes()).mean()
    off = float(np.square(mean[0, 0].double().numpy() - pixels(sheet(folder)[3])).mean())
    assert said["images"] == 1 and said["bytes"] == file.stat().st_size and said["out"] == str(file)
    assert said["rmse"] == pytest.approx(off**0.5, abs=6e-4)
    assert said["psnr"] == pytest.approx(10 * np.log10(255**2 / off), abs=6e-3)
    assert "bytes_an_image" not in said and said["as_png"] > 50
    told = good(call, "decode", file, back, "--model", place / "MODEL")
    assert told == {"images": 1, "status": "complete", "bytes": said["bytes"], "out": str(back)}
    assert np.array_equal(pixels(back), mean[0, 0].numpy())


def test_a_set_goes_to_one_file_and_back_to_a_folder_or_an_array(call, folder, place, tmp_path):
    file, out, array = tmp_path / "x.udf", tmp_path / "out", tmp_path / "x.npz"
    said = good(call, "encode", place / "MODEL", folder / "SHEET", file, "-n", 5, "--split", "train", "--no-check")
    assert said["images"] == 5 and said["bytes_an_image"] == pytest.approx(said["bytes"] / 5, abs=0.05)
    mean = codec(place).decode(file.read_bytes()).mean()
    assert good(call, "decode", file, out, "--model", place / "MODEL")["images"] == 5
    assert sorted(path.name for path in out.iterdir()) == [f"{i:05d}.png" for i in range(5)]
    assert all(np.array_equal(pixels(out / f"{i:05d}.png"), mean[i, 0].numpy()) for i in range(5))
    assert good(call, "decode", file, array, "--model", place / "MODEL")["out"] == str(array)
    found = np.load(array)["arr_0"]
    assert found.dtype == np.uint8 and np.array_equal(found, mean.permute(0, 2, 3, 1).numpy())


def test_options_of_encode_reach_what_they_name(call, folder, place, tmp_path):
    def data(*words: object) -> bytes:
        good(call, "encode", place / "MODEL", sheet(folder)[3], tmp_path / "x", "--no-check", "--overwrite", *words)
        return (tmp_path / "x").read_bytes()

    own = codec(place)
    image = torch.from_numpy(pixels(sheet(folder)[3]).copy())[None, None]
    assert data() == own.encode(image)
    assert data("--steps", 2) == own.encode(image, 2)
    assert data("--seed", 7) == own.encode(image, seed=7)
    assert len({data(), data("--steps", 2), data("--seed", 7)}) == 3


def test_a_picture_of_another_size_keeps_it_unless_it_is_resized(call, folder, place, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (11, 9), np.uint8)).save(tmp_path / "a.png")
    for words, size in ((), (11, 9)), (("--resize",), (8, 8)):
        good(
            call, "encode", place / "MODEL", tmp_path / "a.png", tmp_path / "x.udf", "--no-check", "--overwrite", *words
        )
        good(call, "decode", tmp_path / "x.udf", tmp_path / "b.png", "--model", place / "MODEL", "--overwrite")
        assert pixels(tmp_path / "b.png").shape == size


def test_a_file_is_checked_in_another_process(call, folder, place, tmp_path):
    said = good(call, "encode", place / "MODEL", sheet(folder)[3], tmp_path / "x.udf")
    assert (tmp_path / "x.udf").stat().st_size == said["bytes"]


@pytest.mark.parametrize(
    "answer, words",
    [
        ((5, "undiffuse: it is damaged\n"), r"could not decode it \(it is damaged\)"),
        ((1, ""), r"could not decode it \(no word\)"),
        ((0, ""), r"decoded it [0-9.]+ grey levels off"),
    ],
)
def test_a_file_that_another_process_reads_otherwise_is_not_kept(
    call, folder, place, tmp_path, monkeypatch, answer, words
):
    def run(command, **_):
        if not answer[0]:
            np.savez(command[5], arr_0=np.full((1, 8, 8, 1), 255, np.uint8))

        class Done:
            returncode, stderr, stdout = *answer, ""

        assert command[2:4] == ["undiffuse", "decode"] and Path(command[4]).name == "file.udf"
        assert Path(command[4]).read_bytes()[:2] == b"\xfdU"
        return Done

    monkeypatch.setattr("subprocess.run", run)
    code, _, err = call("encode", place / "MODEL", sheet(folder)[3], tmp_path / "x.udf")
    assert code == 5 and re.search(r"x\.udf is not kept: another process " + words + "\n$", err), err
    assert not (tmp_path / "x.udf").exists()


@pytest.mark.parametrize("values, words", [(1, ""), (2, r"decoded image 5 0\.18 grey levels off")])
def test_each_picture_of_a_set_has_to_come_back(call, folder, place, tmp_path, monkeypatch, values, words):
    """One value that is rounded the other way is let pass, and a mean over all pictures hides no more."""

    def run(command, **_):
        found = codec(place).decode(Path(command[4]).read_bytes()).mean().permute(0, 2, 3, 1).numpy()
        found[5].flat[:values] ^= 1
        np.savez(command[5], arr_0=found)

        class Done:
            returncode, stderr, stdout = 0, "", ""

        return Done

    monkeypatch.setattr("subprocess.run", run)
    code, _, err = call("encode", place / "MODEL", folder / "SHEET", tmp_path / "x.udf", "--split", "train")
    assert (tmp_path / "x.udf").exists() == (code == 0) == (not words)
    assert not words or (code == 5 and re.search(rf"x\.udf is not kept: another process {words}\n$", err)), err


def test_images_that_the_model_does_not_know_are_warned_of(call, place, tmp_path):
    Image.fromarray(np.random.default_rng(1).integers(0, 2, (8, 8), np.uint8) * 255).save(tmp_path / "a.png")
    path = next((place / "cache" / "fit").glob("*.codec.json"))
    made = json.loads(path.read_text()) | {"usual": 100}
    shutil.copytree(place / "cache", tmp_path / "cache")
    (tmp_path / "cache" / "fit" / path.name).write_text(json.dumps(made))
    code, _, err = call("encode", place / "MODEL", tmp_path / "a.png", tmp_path / "x.udf", "--no-check")
    coder, data = codec(place), (tmp_path / "x.udf").read_bytes()
    (bits,) = coder.bits(parse(data, coder.plan, (1, 8, 8)).groups[0], 64)
    bits -= 3 * 6  # what starts the paths, which an archive has only once for many
    assert code == 0 and "and 99 of 100 images like the model's take at most 100: it does not know such images" in err
    assert f"warning: {bits} bits for each 64 values" in err and f"and this file {len(data):,}\n" in err


def cut(place: Path, tmp_path: Path, name: str = "one.udf", kind: str = "cut") -> Path:
    data = bytearray((place / name).read_bytes())
    if kind == "cut":
        del data[-6:]
    else:
        data[-6] ^= 1
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


@pytest.mark.parametrize("name, out", [("one.udf", "x.png"), ("many.udf", "x"), ("many.udf", "x.npz")])
@pytest.mark.parametrize("kind", ["cut", "damaged"])
def test_a_file_that_is_not_whole_is_read_only_when_asked(call, place, tmp_path, name, out, kind):
    file = cut(place, tmp_path, name, kind)
    words = ["decode", file, tmp_path / out, "--model", place / "MODEL"]
    code, text, err = call(*words)
    assert (code, text) == (5, "") and not (tmp_path / out).exists()
    assert re.fullmatch(rf"undiffuse: {file}: it is .* in .*; give --partial to decode what is good of it\n", err), err
    code, text, err = call(*words, "--partial", "--json")
    status = "partial" if kind == "cut" else "damaged"
    assert code == 0 and json.loads(text)["status"] == status and (tmp_path / out).exists()
    assert re.search(rf"warning: {file}: it is .*; what is before that is decoded\n", err), err
    mean = codec(place).decode(file.read_bytes()).mean()
    assert len(mean) == (8 if name == "many.udf" else 1)
    if out == "x.png":
        assert np.array_equal(pixels(tmp_path / out), mean[0, 0].numpy())


def test_so_many_bytes_of_a_file_are_read_as_of_one_that_is_cut_off(call, place, tmp_path):
    file, data = place / "one.udf", (place / "one.udf").read_bytes()
    words = ["decode", file, tmp_path / "x.png", "--model", place / "MODEL", "--overwrite"]
    said = good(call, *words, "--bytes", len(data) - 3)
    assert said["status"] == "partial" and said["bytes"] == len(data) - 3
    mean = codec(place).decode(data[:-3]).mean()
    assert np.array_equal(pixels(tmp_path / "x.png"), mean[0, 0].numpy())
    assert good(call, *words, "--bytes", 10**6)["status"] == "complete"
    for size, code, message in (
        (0, 2, "--bytes 0 is less than the header of a file; give 8 or more"),
        (7, 2, "--bytes 7 is less than the header of a file; give 8 or more"),
    ):
        found, _, err = call(*words, "--bytes", size)
        assert found == code and message in err and err.count("\n") == 1
    file = cut(place, tmp_path, kind="damaged")  # which is no file that is cut off
    assert call("decode", file, tmp_path / "y.png", "--model", place / "MODEL", "--bytes", len(data))[0] == 5


def test_nothing_good_in_a_file_is_one_line_that_names_it(call, place, tmp_path):
    data = bytearray((place / "one.udf").read_bytes())
    data[9] ^= 1
    (tmp_path / "bad.udf").write_bytes(data)
    for words in (
        ["decode", tmp_path / "bad.udf", tmp_path / "x.png", "--partial"],
        ["codec", "info", tmp_path / "bad.udf"],
    ):
        code, out, err = call(*words, "--model", place / "MODEL")
        assert (code, out) == (5, "") and err.startswith(
            f"undiffuse: {tmp_path}/bad.udf: nothing can be decoded: it is da"
        )


@pytest.mark.parametrize("how, solver, steps", [("flow", "unipc-2", 10), ("ancestral", "ancestral", 50)])
def test_pictures_are_drawn_from_the_bits_in_two_ways(call, place, tmp_path, how, solver, steps):
    words = ["decode", place / "one.udf", tmp_path / "x.png", "--model", place / "MODEL", "--as", how, "--overwrite"]
    found = codec(place).decode((place / "one.udf").read_bytes())
    good(call, *words)
    assert np.array_equal(pixels(tmp_path / "x.png"), found.drawn(solver, steps)[0, 0].numpy())
    good(call, *words, "--realism", 0.5)
    assert np.array_equal(pixels(tmp_path / "x.png"), found.drawn(solver, steps, 0.5)[0, 0].numpy())
    code, _, err = call(*words, "--realism", 2)
    assert (code, err.splitlines()[-1]) == (2, "undiffuse: --realism 2 is not possible; give 0 (the mean) to 1")


def test_what_a_file_holds(call, place, tmp_path):
    said = good(call, "codec", "info", place / "many.udf", "--model", place / "MODEL")
    plan, data = codec(place).plan, (place / "many.udf").read_bytes()
    assert said["images"] == 8 and said["size"] == "8x8" and said["bytes"] == len(data) and said["status"] == "complete"
    assert said["tables"] == plan.ident.hex() and said["seed"] == 0 and said["label"] is None and said["why"] is None
    groups = parse(data, plan, (1, 8, 8)).groups
    assert [each["steps"] for each in said["layers"]] == [1, 2, 2, 1]
    parts = (slice(1), slice(1, 3), slice(3, 5), slice(5, 6))
    for each, steps in zip(said["layers"], parts, strict=True):
        bits = sum(len(path) for group in groups for path in group.paths[steps])
        assert each["groups"] == 3 and each["bytes"] == pytest.approx(bits / 8, abs=0.051)
        square = plan.square[steps.stop]  # of x_0 - x̂_0 in [-1, 1], after the last layer too
        assert each["psnr"] == pytest.approx(10 * np.log10(2**2 / square), abs=6e-3)
        assert each["rmse"] == pytest.approx(255 / 10 ** (each["psnr"] / 20), rel=1e-3)
    assert good(call, "codec", "info", place / "wide.udf", "--model", place / "MODEL")["size"] == "16x8"
    code, out, _ = call("codec", "info", place / "many.udf", "--model", place / "MODEL")
    lines = re.findall(
        r"layer \d  \d steps?, [0-9.]+ bytes, then ([0-9.]+) dB, ([0-9.]+) grey levels off in images", out
    )
    assert code == 0 and lines == [(f"{each['psnr']:.1f}", f"{each['rmse']:.1f}") for each in said["layers"]]
    broken = good(call, "codec", "info", cut(place, tmp_path), "--model", place / "MODEL")
    assert broken["status"] == "partial" and broken["why"].startswith("it is cut off in layer")


def test_a_strip_shows_the_mean_and_a_drawn_picture_at_each_size(call, place, tmp_path):
    file, out = place / "one.udf", tmp_path / "strip.png"
    size = file.stat().st_size
    early = size - 20
    said = good(call, "codec", "strip", file, "--out", out, "--model", place / "MODEL", "--bytes", f"1,{early},99999")
    assert said == {"bytes": f"{early}, {size}", "out": str(out)}
    scale, found = enlarged(8), [codec(place).decode(file.read_bytes()[:n]) for n in (early, size)]
    with Image.open(out) as picture:
        drawn = np.asarray(picture.convert("L"))
    gap = (drawn.shape[1] - 2 * 8 * scale) // 3
    for row, images in enumerate([[each.mean() for each in found], [each.drawn() for each in found]]):
        for column, image in enumerate(images):
            top, left = (gap + n * (8 * scale + gap) for n in (row, column))
            part = drawn[top : top + 8 * scale : scale, left : left + 8 * scale : scale]
            assert np.array_equal(part, image[0, 0].numpy())


def test_a_strip_of_nothing_good_or_of_no_sizes_is_refused(call, place, tmp_path):
    words = ["--out", tmp_path / "x.png", "--model", place / "MODEL"]
    (tmp_path / "short.udf").write_bytes((place / "one.udf").read_bytes()[:7])
    code, _, err = call("codec", "strip", tmp_path / "short.udf", *words)
    assert code == 5 and "cut off in its header" in err
    for sizes, message in (
        ("a,b", '--bytes "a,b" is no list of numbers; give for example 20,50,100'),
        ("-5", "--bytes"),
        ("0", "--bytes"),
    ):
        code, _, err = call("codec", "strip", place / "one.udf", *words, "--bytes", sizes)
        assert code == 2 and message in err
    code, _, err = call("codec", "strip", place / "many.udf", *words, "--image", 8)
    assert (code, err) == (2, "undiffuse: image 8 is not there; the file has 0 to 7\n")
