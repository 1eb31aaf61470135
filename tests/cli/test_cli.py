"""The commands as a user meets them: what they print, what they write, and one line for each mistake."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.config import to_toml
from undiffuse.machine import store, tensorfile
from undiffuse.model.load import load
from undiffuse.training.loop import train

SETTINGS = [
    "process.steps=12", "process.beta_end=0.5", "network.channels=8", "network.multipliers=[1, 1]", "network.blocks=1",
    "network.attention=[]", "train.steps=3", "train.batch=4", "train.warmup=1", "train.save_every=2",
    "train.sample_every=0", "train.log_every=1", "train.held_out=4", "train.lr=1e-2", "train.ema=0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run on the digits, three steps old."""
    from undiffuse.data.source import open_source
    from undiffuse.model.recipe import load_recipe

    out = tmp_path_factory.mktemp("runs") / "digits"
    recipe = load_recipe("cifar10", [*SETTINGS, "data.size=8", "data.channels=1"])
    train(recipe, open_source("digits"), out, say=lambda text: None, show_progress=False)
    return out


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("undiffuse: ")]
    assert len(lines) == 1 and "Traceback" not in err
    return lines[0]


def test_train_then_resume_then_sample(call, tmp_path):
    command = ["train", "digits", "-p", "cifar10", "-o", tmp_path / "run", "--json"]
    command += [word for setting in [*SETTINGS, "data.size=8", "data.channels=1"] for word in ("--set", setting)]
    code, out, err = call(*command, "--steps", "2")
    assert code == 0, err
    assert json.loads(out)["step"] == 2
    code, out, err = call(*command)
    assert code == 0 and json.loads(out) | {"run": "", "next": "", "more": ""} == {
        "run": "", "next": "", "more": "", "step": 3, "images_seen": 12,
        "parameters": load(tmp_path / "run").parameters(),
        "log": str(tmp_path / "run" / "log.jsonl"),
    }  # fmt: skip
    code, out, _ = call(
        "sample", tmp_path / "run", "-n", 3, "--out", tmp_path / "s", "--npz", tmp_path / "s.npz", "--json"
    )
    assert code == 0
    pictures = sorted((tmp_path / "s").glob("*.png"))
    assert len(pictures) == 4  # three and the grid
    array = np.load(tmp_path / "s.npz")["arr_0"]
    assert array.shape == (3, 8, 8, 1) and array.dtype == np.uint8
    single = next(path for path in pictures if path.name != "grid.png")
    assert np.array_equal(np.asarray(Image.open(single)), array[0, :, :, 0])


def test_a_sample_depends_on_its_seed_and_number_alone(run_folder):
    model = load(run_folder)
    whole = model.sample(5, seed=3)
    assert torch.equal(whole, model.sample(5, seed=3))
    assert not torch.equal(whole, model.sample(5, seed=4))
    parts = model.sample(5, seed=3, batch=2)  # convolutions may differ in the last bit from batch to batch
    assert (whole.int() - parts.int()).abs().max() <= 1
    assert model.sample(2, steps=4, solver="ddim").shape == (2, 1, 8, 8)


@pytest.mark.parametrize("command", ["progressive", "shared", "interpolate", "neighbours"])
def test_pictures_of_the_paper(call, run_folder, tmp_path, command):
    picture = tmp_path / "out.png"
    words: list[object] = [command, run_folder]
    if command == "interpolate":
        for name, value in (("a.png", 30), ("b.jpg", 200)):
            Image.new("RGB", (20, 31), (value, value, 90)).save(tmp_path / name)
        words += [tmp_path / "a.png", tmp_path / "b.jpg", "--t", "0.5", "--t", "1", "--count", 3]
    if command == "neighbours":
        words += ["digits", "-n", 2, "-k", 3]
    if command in ("progressive", "shared"):
        words += ["-n", 2]
    code, out, err = call(*words, "--out", picture, "--json")
    assert code == 0, err
    assert json.loads(out)["picture"] == str(picture)
    assert np.asarray(Image.open(picture)).std() > 5


def test_nll_writes_its_terms_and_goes_on(call, run_folder, tmp_path):
    out = tmp_path / "nll"
    words = ["nll", run_folder, "digits", "-n", 6, "--batch", 3, "--rate-distortion", "--out", out, "--json"]
    code, text, err = call(*words)
    assert code == 0, err
    first = json.loads(text)
    assert first["images"] == 6 and len(first["rate_distortion"]) == 10
    assert first["prior"] + first["rate"] + first["decoder"] == pytest.approx(first["bits_per_dim"])
    table = (out / "rate-distortion.tsv").read_text().splitlines()
    assert table[0] == "step\trate\trmse" and len(table) == 13
    assert len((out / "terms.tsv").read_text().splitlines()) == 13
    assert "<svg" in (out / "rate-distortion.svg").read_text()
    part = out / "part-00000003.npz"
    stamp, part_0 = part.stat().st_mtime_ns, out / "part-00000000.npz"
    part_0.unlink()  # as if the run had been killed: only that batch is measured again
    code, text, _ = call(*words)
    assert code == 0 and json.loads(text) == first and part.stat().st_mtime_ns == stamp and part_0.exists()
    code, _, err = call(*[3 if word == 6 else word for word in words], "--seed", 1)
    assert code == 2 and "holds another measurement (other seed)" in one_line(err)
    code, text, _ = call("nll", run_folder, "digits", "--draws", 3, "-n", 20, "--json")
    assert code == 0 and json.loads(text)["standard_error"] > 0


def test_nll_by_the_ode_goes_on_too_and_says_how_it_was_found(call, run_folder, tmp_path):
    out = tmp_path / "ode"
    words = ["nll", run_folder, "digits", "-n", 4, "--batch", 2, "--ode", "--tolerance", 1e-2, "--out", out, "--json"]
    code, text, err = call(*words)
    assert code == 0, err
    first = json.loads(text)
    assert first["images"] == 4 and first["tolerance"] == 0.01 and first["probes"] == 1 and first["evaluations"] > 10
    (out / "part-00000000.npz").unlink()
    assert call(*words)[:2] == (0, text)
    code, _, err = call(*words, "--probes", 2)
    assert code == 2 and "holds another measurement (other ode)" in one_line(err)
    code, _, err = call(*words[:-3], "--no-clip")
    assert code == 0 and "images 4/4 (100 %)" in err


def test_export_and_import_keep_the_model(call, run_folder, tmp_path):
    assert call("export", run_folder, tmp_path / "one.safetensors", "--to", "file")[0] == 0
    assert torch.equal(load(tmp_path / "one.safetensors").sample(2), load(run_folder).sample(2))
    code, _, err = call("export", run_folder, tmp_path / "one.safetensors", "--to", "file")
    assert code == 2 and "exists; give the name of a new file" in one_line(err)
    assert call("export", run_folder, tmp_path / "folder", "--to", "diffusers")[0] == 0
    code, _, err = call("import", tmp_path / "folder", tmp_path / "imported")
    assert code == 0, err
    assert torch.equal(load(tmp_path / "imported").sample(2), load(run_folder).sample(2))


def test_inspect_verify_presets_doctor(call, run_folder):
    assert 'name = "eps"' in call("inspect", run_folder)[1]
    assert "channels = 128" in call("inspect", "cifar10")[1]
    assert json.loads(call("verify", run_folder, "--json")[1]) == {"good": 2, "damaged": "none"}
    presets = json.loads(call("presets", "--json")[1])
    assert presets["cifar10"]["expected"]["fid_train"] == 3.17
    found = json.loads(call("doctor", "--json")[1])
    assert found["torch"] == torch.__version__ and found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["noise"].startswith("Tri" if torch.cuda.is_available() else "torch")


def test_average_rebuilds_a_model_from_a_run(call, tmp_path):
    run, out = tmp_path / "run", tmp_path / "wide.safetensors"
    settings = [*SETTINGS, "data.size=8", "data.channels=1", "train.ema_profiles=[0.05,0.1]"]
    settings += ["train.ema_snapshot_every=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    code, text, err = call("train", "digits", "-p", "cifar10", "-o", run, "--json", *words)
    assert code == 0 and json.loads(text)["averages"] == str(run / "ema"), err
    code, text, err = call("average", run, "--sigma-rel", 0.2, "--out", out, "--json")
    assert code == 0, err
    made = json.loads(text)
    assert (made["step"], made["snapshots"]) == (3, 6) and 0 < made["profile_error"] < 0.6
    assert load(out).sample(2).shape == (2, 1, 8, 8)
    assert load(out).meta["average"]["sigma_rel"] == 0.2 and load(out).meta["images"] == 12
    code, _, err = call("average", run, "--sigma-rel", 0.2, "--out", out)
    assert code == 2 and "exists; give the name of a new file" in one_line(err)
    assert json.loads(call("verify", run, "--json")[1]) == {"good": 2, "ema_snapshots": 6, "damaged": "none"}
    broken = run / "ema" / "step-000000002-0.1.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    code, text, _ = call("verify", run, "--json")
    assert code == 5 and json.loads(text)["ema_snapshots"] == 5 and list(json.loads(text)["damaged"]) == [broken.name]
    code, _, err = call("average", run, "--sigma-rel", 0.2, "--out", tmp_path / "other.safetensors")
    assert code == 5 and broken.name in one_line(err)


def spoil(folder: Path, run_folder: Path) -> None:
    """Everything bad that the words in capitals below stand for."""
    (folder / "EMPTY").mkdir()
    for name, shapes in {
        "MIXED": [(8, 8, 3), (12, 12, 3)], "TRUNCATED": [(8, 8, 3)] * 2, "GREY_AND_RGB": [(8, 8), (8, 8, 3)]
    }.items():  # fmt: skip
        (folder / name).mkdir()
        for i, shape in enumerate(shapes):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, shape, np.uint8)).save(folder / name / f"{i}.png")
    last = folder / "TRUNCATED" / "1.png"
    last.write_bytes(last.read_bytes()[:100])
    (folder / "plain.toml").write_text('about = "no size, no channels"\n')
    torch.save({"weights": torch.zeros(3)}, folder / "PICKLE")
    tensorfile.write_weights(folder / "DAMAGED", {"w": torch.zeros(64)}, {})
    shutil.copytree(run_folder, folder / "BROKEN")
    for path in (folder / "DAMAGED", *(folder / "BROKEN").glob("step-*/ema.safetensors")):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)


NO_IMAGES = "EMPTY has no images: 0 files, none with the ending of a picture"


BAD = [
    (["sample", "RUN", "-n", "0", "--out", "x"], 2, "n = 0 is not possible; give 1 or more"),
    (["sample", "RUN", "-n", "3", "--steps", "13", "--out", "x"], 2, "steps = 13 is not possible; this model takes 1"),
    (["sample", "RUN"], 2, "nowhere to write; give --out FOLDER for PNGs, or --npz FILE"),
    (["sample", "RUN", "--solver", "dimm", "--out", "x"], 2, 'sampler "dimm" is not known. Did you mean "ddim"?'),
    (["sample", "RUN", "--out", "x", "--device", "cuda:77"], 2, 'device "cuda:77" cannot be used here'),
    (["sample", "RUN", "--out", "x", "--stepz", "3"], 2, "--stepz (Possible options: --npz, --seed, --steps)"),
    (["sample", "RUN", "-n", "many", "--out", "x"], 2, "Invalid value for '-n'"),
    (["sample", "no-such-model", "--out", "x"], 2, 'model "no-such-model" is not known'),
    (["sampel"], 2, "Did you mean 'sample'?"),
    (["train", "digits", "-p", "cifar11", "--out", "x"], 2, 'preset "cifar11" is not known. Did you mean "cifar10"?'),
    (["train", "no-such-folder", "-p", "cifar10", "--out", "x"], 2, "neither a path nor a named set"),
    (["train", "digits", "-p", "cifar10", "--out", "x", "--set", "process.name=cosin"], 2, 'Did you mean "cosine"?'),
    (["train", "digits", "-p", "cifar10", "--out", "x", "--set", "train.btach=3"], 2, 'Did you mean "batch"?'),
    (["train", "digits", "-p", "cifar10", "--out", "x", "--set", "train.batch=0"], 2, '"train.batch" input should be'),
    (["train", "digits", "-p", "cifar10", "--out", "x", "--set", "train.batch"], 2, "is not of the form a.b=c"),
    (["train", "EMPTY", "-p", "cifar10", "--out", "x"], 2, NO_IMAGES),
    (["train", "MIXED", "-p", "fashion-mnist", "--out", "x"], 2, "images differ in size"),
    (["train", "GREY_AND_RGB", "-p", "plain.toml", "--out", "x"], 2, "in channels: 0.png has 1, 1.png has 3. Give "),
    (["train", "TRUNCATED", "-p", "cifar10", "--out", "x"], 2, "1 of 2 images cannot be read: "),
    (["train", "digits", "-p", "fashion-mnist", "--size", "6", "--out", "x"], 2, "strides divide by 4; use --size 8"),
    (["nll", "RUN", "digits", "-n", "0"], 2, "images = 0 is not possible; give 1 or more"),
    (["nll", "RUN", "digits", "--draws", "99"], 2, "99 draws an image are not possible; give 1 to 12"),
    (["interpolate", "RUN", "none.png", "none.png", "--out", "x.png"], 2, "none.png cannot be read: No such file"),
    (["sample", "PICKLE", "--out", "x"], 5, "PICKLE is a pickle, as torch.save writes"),
    (["sample", "DAMAGED", "--out", "x"], 5, "DAMAGED is damaged: its sha256 is not the one that it carries"),
    (["sample", "BROKEN", "--out", "x"], 5, "no checkpoint in BROKEN is good. BROKEN/step-000000003/ema.s"),
    (["sample", "BROKEN/step-000000002", "--out", "x"], 5, "its size or sha256 is not what the manifest says"),
    (["verify", "EMPTY"], 2, "has no checkpoints; give the --out folder of a training run"),
    (["average", "RUN", "--sigma-rel", "0.1", "--out", "x"], 2, "no EMA snapshots; train with --set 'train.ema"),
    (["train", "digits", "-p", "cifar10", "--out", "x", "--set", "train.ema_profiles=[0.3]"], 2, "ema_profiles.0"),
    (["train", "digits", "-p", "digits", "--out", "x", "--log", "wandbb"], 2, 'log "wandbb" is not known. Did you'),
    (["train", "digits", "-p", "digits", "--out", "n" * 300], 4, "cannot be read: File name too long"),
    (["sample", "n" * 300, "--out", "x"], 2, "cannot be used: File name too long; give another name or place"),
    (["codec", "info", "n" * 300], 2, "cannot be used: File name too long; give another name or place"),
    (["export", "fashion-mnist", "n" * 300], 2, "cannot be used: File name too long; give another name or place"),
    (["nll", "fashion-mnist", "digits", "--out", "n" * 300], 2, "cannot be used: File name too long; give another na"),
    (["sample", "fashion-mnist", "--out", "n" * 300], 2, "cannot be used: File name too long; give"),
    (["progressive", "fashion-mnist", "--out", "n" * 252 + ".png"], 2, "cannot be used: File name too long; give"),
    (["data", "inspect", "EMPTY"], 2, NO_IMAGES),
    (["data", "check", "EMPTY"], 2, NO_IMAGES),
    (["data", "pack", "EMPTY", "--out", "x"], 2, "EMPTY has no images: 0 files"),
    (["data", "pack", "digits", "--out", "MIXED"], 2, "MIXED is not empty and holds no packed data; give a new folder"),
    (["data", "pack", "digits", "--out", "x", "--size", "0"], 2, "size 0x0 is not possible"),
    (["data", "pack", "digits", "--out", "x", "--workers", "0"], 2, "0 workers are not possible; give at least 1"),
    (["data", "build", "emojis", "x.tgz", "--out", "x"], 2, 'Did you mean "emoji"?'),
]  # fmt: skip


@pytest.mark.parametrize("words, code, message", BAD, ids=[" ".join(words) for words, *_ in BAD])
def test_bad_input_gets_one_line(call, run_folder, tmp_path, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path, run_folder)
    before = sorted(tmp_path.rglob("*"))
    got, out, err = call(*[run_folder if word == "RUN" else word for word in words])
    assert (got, out) == (code, "")
    assert message in one_line(err)
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def apart(words: list[object], largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own, whose files may be no larger than so many bytes."""
    lines = [
        "import sys",
        "from undiffuse.cli import main as cli",
        f"sys.argv = {['undiffuse', *map(str, words)]!r}",
        "cli.main()",
    ]
    if largest_file is not None:
        lines.insert(0, f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({largest_file}, {largest_file}))")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=environment)


def training(out: Path, *settings: str) -> list[object]:
    """The run of `run_folder`, as a command."""
    every = [*SETTINGS, "data.size=8", "data.channels=1", *settings]
    return ["train", "digits", "-p", "cifar10", "--out", out, *(w for setting in every for w in ("--set", setting))]


@pytest.mark.slow
def test_a_run_in_use_is_refused(tmp_path):
    with store.Run(tmp_path / "run").lock():
        done = apart(training(tmp_path / "run"))
    assert done.returncode == 7
    in_use = f"is in use by process {os.getpid()} on {socket.gethostname()}; wait for its end, or give another folder"
    assert one_line(done.stderr).endswith(in_use)


def test_a_run_in_use_is_refused_before_any_data_is_read(call, tmp_path):
    with store.Run(tmp_path / "run").lock():
        code, _, err = call("train", "no-such-data", "-p", "cifar10", "--out", tmp_path / "run")
    assert code == 7 and "is in use by process" in one_line(err)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(call, tmp_path):
    """The limit on the size of a file stands for the disk; the second checkpoint is the one that meets it."""
    assert call(*training(tmp_path / "run"), "--steps", 2)[0] == 0
    done = apart(training(tmp_path / "run"), largest_file=2**13)
    assert done.returncode == 4
    line = one_line(done.stderr)
    assert "step-000000003 cannot be written: File too large; 0." in line and line.endswith("nothing older was touched")
    assert store.Run(tmp_path / "run").latest() == 2
    assert [path.name for path in tmp_path.rglob("*") if store.LEFTOVER.fullmatch(path.name)] == []
    code, _, err = call(*training(tmp_path / "run"))
    assert code == 0 and "resuming" in err and store.Run(tmp_path / "run").latest() == 3


@pytest.mark.slow
@pytest.mark.parametrize("words", [["sample", "--npz", "OUT"], ["export", "OUT", "--to", "file"]], ids=lambda w: w[0])
def test_a_full_disk_leaves_no_part_of_a_file(run_folder, tmp_path, words):
    command, *rest = [tmp_path / "out.npz" if word == "OUT" else word for word in words]
    done = apart([command, run_folder, *rest], largest_file=2**11)
    assert done.returncode == 4
    growing = ".partial" if command == "sample" else ""  # in which the same command goes on
    assert f"{tmp_path / 'out.npz'}{growing} cannot be written: File too large" in one_line(done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ([f"out.npz{growing}"] if growing else [])
    if growing:
        assert apart([command, run_folder, *rest]).returncode == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


def test_weights_of_another_architecture_are_no_beginning(call, run_folder, tmp_path):
    code, _, err = call(*training(tmp_path / "run", "network.channels=16"), "--init", run_folder)
    assert code == 2
    assert (
        "is another function: network.channels is 8 there and 16 here; give --set network.channels=8, or"
        in one_line(err)
    )
    assert store.Run(tmp_path / "run").steps() == []


def test_verify_names_the_file_that_is_damaged(call, run_folder, tmp_path):
    spoil(tmp_path, run_folder)
    code, out, _ = call("verify", tmp_path / "BROKEN", "--json")
    assert code == 5 and json.loads(out)["good"] == 0
    damaged = json.loads(out)["damaged"]
    assert list(damaged) == ["2", "3"] and "step-000000002/ema.safetensors is damaged" in damaged["2"]


@pytest.mark.slow
def test_the_demo_says_in_json_where_its_report_is(call, tmp_path):
    code, out, err = call("demo", "--quick", "--out", tmp_path / "demo", "--json")
    assert code == 0 and json.loads(out) == {"report": str(tmp_path / "demo" / "report.html")}
    assert "training a model on 1,500 digits" in err and (tmp_path / "demo" / "report.html").exists()


def test_a_recipe_file_is_a_preset(call, tmp_path):
    from undiffuse.model.recipe import load_recipe

    (tmp_path / "mine.toml").write_text(to_toml(load_recipe("cifar10", [*SETTINGS, "data.size=8", "data.channels=1"])))
    code, out, err = call(
        "train", "digits", "-p", tmp_path / "mine.toml", "-o", tmp_path / "run", "--steps", 1, "--json"
    )
    assert code == 0 and json.loads(out)["step"] == 1, err
