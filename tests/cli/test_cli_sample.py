"""Drawing and measuring by command, untrained: each option reaches what it names, each mistake is one line."""

import errno
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.cli import main as cli
from undiffuse.cli.options import parse_seeds
from undiffuse.diffusion.sampler.ddim import DDIM
from undiffuse.errors import is_out_of_memory
from undiffuse.machine import disk
from undiffuse.measure.sets import _in_words
from undiffuse.model import load
from undiffuse.view import explore


def samples(call, folder: Path, tmp_path: Path, *words: object) -> torch.Tensor:
    path = tmp_path / "x.npz"
    code, _, err = call("sample", folder / "MODEL", "-n", 3, "--npz", path, "--overwrite", "--json", *words)
    assert code == 0, err
    return torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)


def test_every_way_to_draw_is_the_one_of_python(call, folder, tmp_path):
    loaded = load.load(folder / "MODEL")
    same = {
        ("--solver", "ddim", "--eta", 0.5): loaded.sample(3, solver=DDIM(0.5)),
        ("--no-clip",): loaded.variant(clip=False).sample(3),
        ("--solver", "ancestral"): loaded.sample(3, solver="ancestral"),
        ("--solver", "ancestral", "--variance", "fixed-small"): (
            loaded.variant(variance="fixed-small").sample(3, solver="ancestral")
        ),
        ("--times", "1,0.75,0.25"): loaded.sample(3, steps=(1.0, 0.75, 0.25)),
        (): loaded.sample(3),
    }
    for words, expected in same.items():
        assert torch.equal(samples(call, folder, tmp_path, *words), expected)
    drawn = list(same.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_the_bound_takes_the_same_options(call, folder):
    def bits(*words: object) -> float:
        code, out, err = call("nll", folder / "MODEL", "digits", "-n", 3, "--json", *words)
        assert code == 0, err
        return json.loads(out)["bits_per_dim"]

    assert len({bits(), bits("--no-clip"), bits("--variance", "fixed-small")}) == 3
    assert bits("--variance", "fixed-large", "--clip") == bits()


def test_figures_take_any_subset_of_steps_and_any_lambda(call, folder, tmp_path):
    out, a, b = tmp_path / "x.png", folder / "PICTURES" / "a.png", folder / "PICTURES" / "b.png"
    words = ["--times", "1,0.5,0.25", "--no-clip", "--solver", "ancestral", "--variance", "fixed-small"]
    words += ["--out", out, "--overwrite", "--json"]
    assert json.loads(call("progressive", folder / "MODEL", "-n", 1, *words)[1])["t"] == [1, 0.5, 0.25]
    assert json.loads(call("shared", folder / "MODEL", "-n", 1, "--at", 0.5, *words)[1])["t"] == [0.5]
    code, text, err = call("interpolate", folder / "MODEL", a, b, "--lambda", 0.1, "--lambda", 1.5, *words)
    assert code == 0 and json.loads(text) == {"picture": str(out), "t": [0.5], "lambda": [0.1, 1.5]}, err
    with Image.open(out) as picture:
        assert picture.width == (2 * 9 + 1) * explore.enlarged(8)


def test_neighbours_of_a_crop_and_without_the_bad(call, folder, tmp_path):
    def nearest(*words: object) -> tuple[float, str]:
        code, out, err = call("neighbours", folder / "MODEL", folder / "BAD", "-n", 1, "-k", 1, "--skip-bad",
                              "--out", tmp_path / "x.png", "--overwrite", "--json", *words)  # fmt: skip
        assert code == 0, err
        return json.loads(out)["rmse_of_nearest"][0], err

    image = load.load(folder / "MODEL").sample(1).double()[0, 0]
    for crop, part in (("4x2", image[2:6, 3:5]), ("4", image[2:6, 2:6]), ("0,1,3,2", image[:3, 1:3])):
        distance, err = nearest("--crop", crop)
        assert distance == pytest.approx(float((part - 255).square().mean().sqrt()))  # the picture is white
        assert "warning: 1 left out: b.png (image file is truncated)\n" in err
    whole = torch.full((8, 8), 255.0, dtype=torch.float64)
    whole[7, 7] = 90
    assert nearest()[0] == pytest.approx(float((image - whole).square().mean().sqrt()))


def test_transparency_is_flattened_on_the_background_of_the_training(call, folder, tmp_path):
    for name, value in (("MODEL", 255), ("BLACK", 0)):
        picture = folder / "PICTURES" / "a.png"
        words = [picture, picture, "--t", 0, "--lambda", 0, "--out", tmp_path / f"{name}.png"]
        assert call("interpolate", folder / name, *words)[0] == 0
        with Image.open(tmp_path / f"{name}.png") as mixed:
            assert np.asarray(mixed)[10, 10] == value


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "MODEL", "-n", 5, "--batch", 2, "--solver", "heun", "--steps", 4],
        ["shared", "MODEL", "-n", 2, "--at", 1, "--at", 0.3, "--steps", 4],
        ["interpolate", "MODEL", "PICTURES/a.png", "PICTURES/b.png", "--t", 0.3, "--t", 1, "--steps", 4],
        ["progressive", "MODEL", "-n", 2, "--steps", 4],
        ["neighbours", "MODEL", "PICTURES", "-n", 70, "-k", 1, "--steps", 4],
    ],
    ids=lambda words: words[0],
)
def test_progress_ends_at_a_hundred(call, folder, tmp_path, monkeypatch, words):
    monkeypatch.chdir(folder)
    code, _, err = call(*words, "--out", tmp_path / ("x" if words[0] == "sample" else "x.png"))
    done, total = map(int, re.findall(r" (\d+)/(\d+) \(100 %\)", err)[-1])
    assert code == 0 and done == total > 0, err


def test_a_full_disk_says_how_many_pictures_are_written(call, folder, tmp_path, monkeypatch):
    def full(change: str, path: Path, detail=None) -> None:
        if change == "write" and "0002.png" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "hook", full)
    code, _, err = call("sample", folder / "MODEL", "-n", 4, "--out", tmp_path / "out", "--json")
    assert code == 4
    assert "0002.png cannot be written: No space left on device" in err and "2 of 4 pictures are written" in err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [".undiffuse", "0000.png", "0001.png"]  # whole; none beside
    for name in names[1:]:
        with Image.open(tmp_path / "out" / name) as picture:
            picture.load()


def test_samples_beside_others_are_refused_before_any_is_drawn(call, folder, tmp_path):
    command = ("sample", folder / "MODEL", "-n", 2, "--out", tmp_path / "out")
    assert call(*command)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    code, _, err = call(*command, "--seed", 1)
    assert code == 2 and "out holds samples of another command (other seed); give the same settings or another" in err
    assert "sampling" not in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    code, out, _ = call(*command, "--json")  # the same once more has nothing to do
    assert code == 0 and json.loads(out)["images"] == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_very_many_seeds_are_read_at_once():
    seeds = parse_seeds("200000-399999,7")
    assert len(seeds) == 200_001 and len(str(_in_words(seeds))) < 20
    scattered = list(range(0, 200_000, 2))
    assert len(_in_words(scattered)) == 64 != _in_words(scattered[::-1])


def test_seeds_name_images(call, folder, tmp_path):
    code, out, err = call("sample", folder / "MODEL", "--seeds", "7,3-5", "--out", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["seed"] == [7, 3, 4, 5], err
    loaded = load.load(folder / "MODEL")
    for seed in (3, 4, 5, 7):
        with Image.open(tmp_path / "out" / f"{seed:04}.png") as picture:
            assert torch.equal(torch.from_numpy(np.array(picture)), loaded.sample(1, seed=seed)[0, 0])


BAD = [
    ("sample MODEL -n 2 --batch 0 --out x", 2, "batch = 0 is not possible; give 1 or more"),
    ("sample MODEL -n 2 --batch -1 --out x", 2, "batch = -1 is not possible; give 1 or more"),
    ("sample MODEL --seeds 1,2 -n 3 --out x", 2, "--seeds 1,2 says how many images, and -n 3 too; give one of them"),
    ("sample MODEL --seeds 1,2 --seed 3 --out x", 2, "--seeds 1,2 and --seed 3 say the same twice; give one of them"),
    ("sample MODEL --seeds 9-5 --out x", 2, '--seeds "9-5" is not a list of seeds; give numbers and ranges, such as'),
    ("sample MODEL --seeds 1,,2 --out x", 2, '--seeds "1,,2" is not a list of seeds; give numbers and ranges, such as'),
    ("sample MODEL --seeds 4,1-5 --out x", 2, "--seeds 4,1-5 has 4 twice, which is the same image; give it once"),
    ("sample MODEL --seeds 0,0 --out x", 2, "--seeds 0,0 has 0 twice, which is the same image; give it once"),
    ("sample MODEL --seeds 0-99999999 --out x", 2, "--seeds 0-99999999 are more than 1,000,000; give fewer at a time"),
    ("sample MODEL --out FILE", 2, "FILE is a file; give the name of a folder"),
    ("sample MODEL --out FILE/x", 2, "FILE is a file, so FILE/x cannot be in it; give another place"),
    (
        "sample MODEL --out x --variance fixed-large --solver ancestral,variance=fixed-small",
        2,
        "--variance fixed-large and --solver ancestral,variance=fixed-small say two variances; give one of them",
    ),
    ("sample MODEL --out x --variance fixed-large", 2, "--variance fixed-large belongs to Algorithm 2; give --solver"),
    ("sample MODEL --out x --solver unipc-2,order=3", 2, "solver unipc-2,order=3 says its order twice; say it once"),
    (
        "sample MODEL --out x --solver heun,churn=4,churn_min=3,churn_max=1",
        2,
        "sampler heun: churn_min 3 is not below churn_max 1, so nothing is churned",
    ),
    ("sample MODEL --out x --solver dpmpp-sde-2", 2, 'sampler dpmpp-sde has no field "order". It has none'),
    (
        "sample MODEL --out x --solver unipc-3 --steps 1",
        2,
        "order 3, for which 1 step of a chain is too few; give 3 or",
    ),
    (
        "sample MODEL --out x --solver dpmpp-2 --times 0.5",
        2,
        "solver dpmpp-2 has order 2, for which 1 step of a chain is",
    ),
    (
        "sample MODEL --out x --grid fitted,rho=2",
        2,
        "grid fitted,rho=2: the fitted grid has no fields; give fitted alone",
    ),
    ("sample MODEL --out x --grid karras,rho=0.001", 2, '"rho" input should be greater than or equal to 0.1, given'),
    ("sample MODEL --out x --grid fited,rho=2", 2, 'grid "fited" is not known. Did you mean "fitted"'),
    ("sample MODEL --out x --guide MODEL", 2, "MODEL says what to lead away from, and not how much; give --guidance 2"),
    ("sample MODEL --out x --guidance 2", 2, "guidance needs something to lead away from, and this model was trained"),
    (
        "progressive MODEL --out x.png --steps 4 --slots 9",
        2,
        "9 slots along a chain of 4 steps are not possible; give 1 to 4",
    ),
    (
        "nll MODEL digits -n 1 --grid fitted --steps 2",
        2,
        'grid "fitted" is not known. Known: even, karras, karras-few, log-snr, quad',
    ),
    ("sample MODEL --npz BAD", 2, "BAD is a folder; give the name of a file"),
    ("sample MODEL --out x --times 1,0.5,0.5", 2, "times 1, 0.5, 0.5 do not fall strictly"),
    ("sample MODEL --out x --times 1;2", 2, '--times "1;2" is not a list of numbers; give for example 1,0.75'),
    ("sample MODEL --out x --times 1,0.5 --steps 2", 2, "--steps 2 and --times 1,0.5 say the same twice"),
    ("sample MODEL --out x --eta 0.5", 2, "eta = 0.5 belongs to the sampler ddim; name it too, or leave eta out"),
    ("sample MODEL --out x --solver ddim --eta -1", 2, '"eta" input should be greater than or equal to 0, given -1.0'),
    ("sample MODEL --out x --variance fixed-smal", 2, 'Did you mean "fixed-small"?'),
    ("sample LEARNED --out x --variance fixed-small", 2, "this model says its own (learned); leave it out"),
    ("nll LEARNED digits -n 1 --variance fixed-large", 2, "this model says its own (learned); leave it out"),
    ("nll MODEL digits -n 2 --batch 0", 2, "batch = 0 is not possible; give 1 or more"),
    ("nll MODEL digits -n 2 --steps 0", 2, "steps = 0 is not possible; this model takes 1 to 12"),
    ("nll MODEL digits -n 2 --steps 9999", 2, "steps = 9999 is not possible; this model takes 1 to 12"),
    ("nll MODEL digits -n 2 --out FILE", 2, "FILE is a file; give the name of a folder"),
    (
        "nll MODEL digits --draws 3 --rate-distortion --out x",
        2,
        "--rate-distortion needs every term of the chain; leave",
    ),
    (
        "nll MODEL digits --ode --draws 3",
        2,
        "--draws 3 belongs to the bound, which --ode is not; leave out one of",
    ),
    ("nll MODEL digits --ode --steps 3", 2, "--steps 3 belongs to the bound, which --ode is not; leave out one of"),
    ("nll MODEL digits --ode --grid even", 2, "--grid even belongs to the bound, which --ode is not; leave out one"),
    ("nll MODEL digits --ode --variance fixed-small", 2, "--variance fixed-small belongs to the bound, which --ode is"),
    ("nll MODEL digits --ode --clip", 2, "--clip belongs to the bound, which --ode is not; leave out one of them"),
    ("nll MODEL digits --ode --rate-distortion", 2, "--rate-distortion belongs to the bound, which --ode is not"),
    ("nll MODEL digits --ode --tolerance 0", 2, "tolerance = 0 is not possible; give 1e-07 to 0.1"),
    ("nll MODEL digits --ode --probes 0", 2, "probes = 0 is not possible; give 1 or more"),
    ("nll MODEL digits --probes 2", 2, "--probes 2 belongs to --ode; give that too, or leave it out"),
    ("nll MODEL digits --tolerance 1e-3", 2, "--tolerance 0.001 belongs to --ode; give that too, or leave it out"),
    ("nll MODEL BAD --split train", 2, "or leave them out with --skip-bad"),
    ("progressive MODEL --slots 0 --out x.png", 2, "0 slots along a chain of 10 steps are not possible; give 1 to 10"),
    ("neighbours MODEL PICTURES -k 1 -n -1 --out x.png", 2, "n = -1 is not possible; give 1 or more"),
    ("neighbours MODEL PICTURES -k 0 --out x.png", 2, "0 neighbours are not possible in 2 images; give 1 to 2"),
    ("neighbours MODEL PICTURES -k 1 --crop 9x8 --out x.png", 2, "crop (9, 8) (height, width) does not lie within"),
    ("neighbours MODEL PICTURES -k 1 --crop 1,2,3 --out x.png", 2, '--crop "1,2,3" is not TOP,LEFT,HEIGHT,WIDTH'),
    (
        "neighbours MODEL PICTURES -k 1 --crop 4 --features rows --out x.png",
        2,
        "--crop 4 is for pixels, and --features",
    ),
    ("neighbours MODEL PICTURES -k 1 --feature-weights x --out x.png", 2, "--feature-weights is for --features, which"),
    ("neighbours MODEL PICTURES -k 1 --features clasifier-28 --out x.png", 2, 'Did you mean "classifier-28"'),
    ("neighbours MODEL PICTURES -k 1 --features classifier-28 --out x.png", 2, "images of 8×8 cannot be seen by"),
    ("neighbours MODEL PICTURES -k 1 --crop big --out x.png", 2, '--crop "big" is no size; give a side such as 32'),
    ("interpolate MODEL PICTURES/a.png PICTURES/b.png --lambda nan --out x.png", 2, "λ = nan is not possible"),
    ("interpolate MODEL PICTURES/a.png PICTURES/b.png --lambda 1 --count 3 --out x.png", 2, "both say which mixtures"),
    (
        "train PICTURES -p cifar10 --size 0 --out x",
        2,
        '"data.size" input should be greater than or equal to 1, given 0',
    ),
    (
        "train PICTURES -p cifar10 --size 8x --out x",
        2,
        '--size "8x" is no size; give a side such as 32, or HEIGHTxWIDTH',
    ),
    ("train PICTURES -p cifar10 --size 30x17 --out x", 2, "use --size 32x16 (height 32, width 16) or fewer"),
    ("sample MODEL -n 100000000000 --out x", 6, "out of memory (tried to allocate 800000000000 bytes); give a smaller"),
]


@pytest.mark.parametrize("words", ["-n 0", "--label cat", "--seeds 9-7", "--seeds 1,2 -n 3", "--batch 0"])
def test_what_is_refused_is_the_only_line(call, folder, tmp_path, words):
    code, _, err = call("sample", folder / "MODEL", "--out", tmp_path / "x", *words.split())
    assert code == 2 and err.startswith("undiffuse: ") and err.count("\n") == 1, err


@pytest.mark.parametrize("words, code, message", BAD, ids=[words for words, *_ in BAD])
def test_bad_input_gets_one_line_and_leaves_nothing(call, folder, monkeypatch, words, code, message):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    got, out, err = call(*words.split())
    lines = [line for line in err.splitlines() if line.startswith("undiffuse: ")]
    assert (got, out, len(lines)) == (code, "", 1)
    assert message in lines[0] and "Traceback" not in err
    assert "evaluations of" not in err  # which is what it would have done
    assert "%" not in err  # nothing had been drawn or measured: no progress was shown
    assert sorted(folder.rglob("*")) == before


def test_out_of_memory_is_told_from_other_failures(call, folder, monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0"), MemoryError()):
        monkeypatch.setattr(load, "load", lambda *a, error=error, **k: (_ for _ in ()).throw(error))
        code, _, err = call("sample", folder / "MODEL", "--out", "x")
        assert code == 6 and err.startswith("undiffuse: out of memory")
        assert ("(tried to allocate 2.00 gib)" in err) == bool(str(error))
    for text in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "GET was unable to find an engine to execute this computation",
    ):
        assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))
    monkeypatch.setattr(load, "load", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("a bug")))
    monkeypatch.setattr(sys, "argv", ["undiffuse", "sample", "m", "--out", "x"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def test_a_size_of_two_sides_trains_and_is_kept(call, folder, tmp_path):
    settings = ["process.steps=4", "process.beta_end=0.5", "network.channels=8", "network.multipliers=[1, 1]",
                "network.blocks=1", "network.attention=[]", "train.batch=2", "train.sample_every=0"]  # fmt: skip
    words = ["train", folder / "PICTURES", "-p", "cifar10", "--size", "8x16", "--steps", 1, "--out", tmp_path / "run"]
    code, _, err = call(*words, *(word for setting in settings for word in ("--set", setting)), "--json")
    assert code == 0, err
    loaded = load.load(tmp_path / "run")
    assert loaded.image_shape == (3, 8, 16) and loaded.data.size == (8, 16)


def test_presets_shows_what_is_published(call):
    code, out, _ = call("presets")
    assert code == 0
    assert "inception score 9.46 ± 0.11, fid train 3.17, fid test 5.24, bits per dim test 3.75" in out
    assert "fid 7.89, samples 50,000, released step 4,432,000 (Ho, Jain & Abbeel 2020, Table 3)" in out
    assert "unstable True (Ho, Jain & Abbeel 2020, Table 2)" in out
    assert "\nfashion-mnist-likelihood  Fashion-MNIST for the fewest bits" in out
    assert re.search(r"bits per dim test 2\.\d+ ± 0\.\d+, .*samples 1,000, fd efflite0 in 20 steps \d", out)
