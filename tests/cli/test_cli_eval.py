"""`undiffuse eval`: what it prints, what it takes, and one line for each thing that it cannot do."""

import json

import numpy as np
import pytest

from tests import waves

WAVES = ("--features", "tests.waves:Waves", "--device", "cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(waves, "seen", [])


def score(call, *words):
    code, out, err = call("eval", *words, *WAVES, "--json")
    assert code == 0, err
    return json.loads(out, parse_constant=pytest.fail)


def test_what_sample_writes_scores_as_the_model_does(folder, call, tmp_path):
    drawn = ("-n", 60, "--steps", 4, "--seed", 3)
    assert call("sample", folder / "MODEL", *drawn, "--out", tmp_path / "S", "--device", "cpu")[0] == 0
    model = score(call, folder / "MODEL", "digits", *drawn, "--batch", 64)
    pictures = score(call, tmp_path / "S", "digits")
    assert [row["score"] for row in model["scores"]][:2] == ["FD-waves", "FD-waves∞"]
    for one, other in zip(model["scores"], pictures["scores"], strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-9), one["score"]
    said = model["protocol"]
    assert said["samples"]["seed"] == 3 and said["samples"]["evaluations"] == 4
    assert said["model"]["source"] == str(folder / "MODEL") and said["reference"]["split"] == "train"
    assert set(pictures["protocol"]["samples"]) == {"source", "fingerprint"}


def test_people_get_a_table_the_protocol_and_the_cost(folder, call, tmp_path):
    out = tmp_path / "out"
    words = ("-n", 20, "--solver", "heun", "--steps", 3, "--seeds", 2, "--metric", "frechet", "--out", out)
    code, text, err = call("eval", folder / "MODEL", "digits", *words, *WAVES)
    lines = text.splitlines()
    assert code == 0 and lines[0].split() == ["score", "samples", "±", "(2", "seeds)", "20", "real"]
    assert lines[1].startswith("FD-waves ") and lines[7] == "protocol:"
    assert lines[2].endswith("than the closest 1 % of 20 images of the test split")
    assert [line.split()[0] for line in lines[3:6]] == ["in", "pixels", "tests.waves:Waves"] and lines[6][-1] == "."
    said = {line[:20].strip(): line[22:] for line in lines[8:]}
    assert said["samples"] == "solver heun, steps 3, evaluations 5, grid even, clip True, seed 0 1"
    assert said["reference"].startswith("data digits, split train, images 1500, fingerprint 0493")
    assert said["floor"] == "20 images of the test split" and said["out"] == str(out)
    assert said["features"].endswith("note grey repeated to 3 channels, metrics frechet")
    assert "20 samples, 100 evaluations of the network: about" in err and "for each of 2 seeds" in err
    assert "20 samples are fewer than the 10,000 that a Fréchet distance is given with; compare it only" in err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["protocol"]["samples"]["seed"] == [0, 1] and len(summary["scores"][0]["each"]) == 2
    before = len(waves.seen)
    assert call("eval", folder / "MODEL", "digits", *words, *WAVES)[1] == text and len(waves.seen) == before
    assert call("eval", folder / "MODEL", "digits", *words[2:], *WAVES)[0] == 2


def test_statistics_that_are_saved_are_data(folder, call, tmp_path):
    words = (folder / "MODEL", "digits", "-n", 20, "--steps", 3)
    first = score(call, *words, "--save-statistics", tmp_path / "a.npz")
    second = score(call, folder / "MODEL", tmp_path / "a.npz", *words[2:])
    assert second["scores"][0]["value"] == pytest.approx(first["scores"][0]["value"], rel=1e-9)
    code, _, err = call("eval", *words, *WAVES, "--save-statistics", tmp_path / "a.npz")
    assert code == 2 and "is there already; give another name, or --overwrite to replace it" in err
    assert call("eval", *words, *WAVES, "--save-statistics", tmp_path / "a.npz", "--overwrite")[0] == 0


def test_size_and_channels_are_for_both(folder, call):
    found = score(call, folder / "SHEET", "digits", "--metric", "frechet", "--size", "4x6", "--set", "data.channels=3")
    assert found["protocol"]["images"] == "6×4 RGB, uint8"
    assert "1,500 made RGB" in found["protocol"]["reference"]["made"]
    assert "8 made RGB" in found["protocol"]["samples"]["made"]


BAD = {
    "SHEET digits -n 9": "SHEET has 8 images, and -n 9 is more; give fewer, or leave -n out",
    "SHEET digits -n 1": "n = 1 is not possible; give 2 or more",
    "SHEET digits --batch 0": "batch = 0 is not possible; give 1 or more",
    "MODEL digits --seeds 0": "seeds = 0 is not possible; give 1 or more",
    "SHEET digits --seeds 2": "seeds is for a model that draws",
    "SHEET digits --seed 1": "seed is for a model that draws",
    "SHEET digits --steps 5": "--steps is for a model that draws, and SHEET is none; leave it out, or give a model",
    "SHEET digits --no-clip": "--no-clip is for a model that draws",
    "SHEET digits --solver ddim": "solver is for a model that draws",
    "SHEET digits --label 3": "label is for a model that draws",
    "MODEL digits --label 3": "label 3 is not possible: this model was trained without labels",
    "MODEL digits --solver ddmi": 'sampler "ddmi" is not known. Did you mean "ddim"',
    "MODEL digits --size 8": "size is for samples that are there already; a model draws in its own",
    "MODEL digits --set data.channels=3": "--set data.channels=3 is not possible here",
    "SHEET digits --size 8by8": '--size "8by8" is no size; give a side such as 32, or HEIGHTxWIDTH',
    "SHEET digits --metric kernl": 'metric "kernl" is not known. Did you mean "kernel"?',
    "SHEET digits --metric frechet-infinity": "8 samples are too few for frechet-infinity, which needs 50",
    "SHEET digits --split val": 'split "val" is not known; expected train or test',
    "SHEET SHEET --split test": "SHEET has no test split",
    "NOPE digits": "samples NOPE are neither a model nor pictures",
    "fashon-mnist digits --steps 5": 'Did you mean "fashion-mnist"?',
    "fashon-mnist digits --solver ddim": 'Did you mean "fashion-mnist"?',
    "EMPTY digits": "samples: EMPTY has no images",
    "SHEET NOPE": 'data "NOPE" is neither a path nor a named set',
    "SHEET COLOUR": "the samples are grey and COLOUR is RGB, so a distance would mostly say that; give --set data.ch",
    "COLOUR digits": "the samples are RGB and digits is grey, so a distance would mostly say that; give --set data.ch",
    "MIXED digits": "samples: images differ in size: a.png is 8x8, b.png is 9x8 (width x height). Give one",
    "BAD digits": "samples: 1 of 2 images cannot be read: b.png",
    "SHEET digits --features x:Y": 'features "x:Y" cannot be imported',
    "SHEET digits --features classifer-28": 'features "classifer-28" is not known. Did you mean "classifier-28"?',
    "SHEET digits --features classifier-28": "give --size 28 for pictures, or other --features",
    "SHEET digits --resize pil": "features tests.waves:Waves have no option resize; leave it out",
    "SHEET digits --keep-images": "the images that are kept have no place; give --out FOLDER too",
    "SHEET digits --out FILE": "FILE is a file; give the name of a folder",
    "SHEET digits --save-statistics x.txt": "x.txt has not the ending of an array; give the name of a .npz",
    "SHEET theirs.npz": "theirs.npz does not say whose features its statistics are of",
    "SHEET theirs.npz --metric kernel --features tests.waves:Fid": "kernel looks at each reference image",
    "theirs.npz digits": "theirs.npz holds statistics and no images, which are for DATA; give the samples themselves",
    "SHEET cut.npz": "cut.npz is damaged: File is not a zip file",
}


@pytest.fixture(scope="module")
def bad_folder(folder):
    from PIL import Image

    for name, size in (
        ("COLOUR/a.png", (8, 8)),
        ("COLOUR/b.png", (8, 8)),
        ("MIXED/a.png", (8, 8)),
        ("MIXED/b.png", (9, 8)),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (200, 30, 90)).save(folder / name)
    (folder / "EMPTY").mkdir()
    np.savez(folder / "theirs.npz", mu=np.zeros(6), sigma=np.eye(6))
    (folder / "cut.npz").write_bytes((folder / "theirs.npz").read_bytes()[:300])
    return folder


@pytest.mark.parametrize("line", BAD)
def test_what_it_cannot_do_is_one_line(bad_folder, call, monkeypatch, line):
    monkeypatch.chdir(bad_folder)
    before = sorted(bad_folder.rglob("*"))
    words = line.split()
    code, out, err = call("eval", *words, *(WAVES[2:] if "--features" in words else WAVES), "--json")
    assert (code, out) == (2, ""), (out, err)
    assert BAD[line] in err and err.count("undiffuse: ") == 1 and "Traceback" not in err
    assert len(err.strip().splitlines()[-1]) == len(err[err.index("undiffuse: ") :].strip())  # the last line, and one
    assert sorted(bad_folder.rglob("*")) == before and waves.seen == []


def test_features_that_are_not_finite_end_with_3(folder, call, monkeypatch, tmp_path):
    monkeypatch.setitem(waves.trouble, "nan after", 0)
    code, out, err = call("eval", folder / "SHEET", "digits", *WAVES, "--save-statistics", tmp_path / "x.npz")
    assert (code, out) == (3, "") and "the pool features of image 1 are not finite" in err
    assert not (tmp_path / "x.npz").exists()


def test_damaged_statistics_end_with_5(folder, call, tmp_path):
    np.savez(tmp_path / "nan.npz", mu=np.full(6, np.nan), sigma=np.eye(6))
    code, out, err = call("eval", folder / "SHEET", tmp_path / "nan.npz", *WAVES)
    assert (code, out) == (5, "") and "nan.npz: mu or sigma holds NaN or infinity; make it anew" in err
