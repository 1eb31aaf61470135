"""`undiffuse report` and `undiffuse compare` from the command line: what is on the pages, and what is refused."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import undiffuse
from tests.cli.toy import SMALL, evaluation, run_of_digits, save
from undiffuse.machine.log import silent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the digits that differ in a learning rate, of which A is measured, and a model without history."""
    root = tmp_path_factory.mktemp("runs")
    for name, lr, steps in (("A", 1e-3, 4), ("B", 2e-3, 6)):
        run_of_digits(root / name, steps, f"train.lr={lr}")
        evaluation(root / name / "eval", undiffuse.load(root / name).digest(), 100 if name == "A" else 200)
    undiffuse.nll(root / "A", "digits", images=4, draws=None, out=root / "A" / "nll")
    save(root / "bare.safetensors")
    pictures = root / "SHEET"
    pictures.mkdir()
    for i in range(6):
        Image.new("RGB", (12, 12), (20 + 20 * i, 0, 0)).save(pictures / f"{i}.png")
    return root


def titles(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


def of(page: str, title: str) -> str:
    """One section of a page."""
    return page.partition(f"<h2>{title}</h2>")[2].partition("</section>")[0]


def test_a_run_is_on_one_page_with_what_was_measured(runs, tmp_path, call):
    out = tmp_path / "page.html"
    code, said, error = call("report", runs / "A", "digits", "-n", 9, "--steps", 3, "--seed", 5, "--out", out, "--json")
    assert (code, error) == (0, "")
    assert json.loads(said) == {"report": str(out)}
    page = out.read_text()
    assert titles(page) == [
        "At a glance", "Samples", "Progressive generation", "Between two pictures", "Scores", "Memorisation",
        "Bits per dimension", "Training", "Time and cost", "Settings", "How this page was made",
    ]  # fmt: skip
    assert {"12.5", "4.5", "FD-EffLite0"} <= set(re.findall(r"<td>(.*?)</td>", of(page, "Scores")))
    assert "5" * 64 in of(page, "Scores") and "other weights" not in page and "Not measured" not in of(page, "Scores")
    summary = json.loads((runs / "A" / "nll" / "summary.json").read_text())
    assert f"{summary['bits_per_dim']:.3f}" in of(page, "Bits per dimension")
    assert of(page, "Bits per dimension").count("<svg ") == 3  # by t, its error, rate-distortion
    assert 'aria-label="Loss"' in of(page, "Training")
    assert "<dt>lr</dt><dd>0.001</dd>" in of(page, "Settings")
    assert "The 9 samples that are nearest to a training image" in of(page, "Memorisation")
    from undiffuse.figure import grid

    drawn = undiffuse.load(runs / "A").sample(9, 3, "ddim", seed=5)
    assert (pictures(of(page, "Samples"))[0] == np.asarray(grid(drawn, None, 7))).all()
    assert "seed 5" in of(page, "Samples")


def test_the_page_says_which_command_makes_what_is_missing(runs, tmp_path, call):
    out, model = tmp_path / "page.html", runs / "bare.safetensors"
    code, _, _ = call("report", model, "-n", 4, "--steps", 3, "--out", out)
    page = out.read_text()
    assert code == 0
    assert f"undiffuse eval {model} DATA" in of(page, "Scores")
    assert f"undiffuse nll {model} DATA" in of(page, "Bits per dimension")
    assert "comes without the log of its training" in of(page, "Training")
    assert "How this model was trained is not known" in of(page, "Settings")
    assert "samples above" in of(page, "Between two pictures")


def test_with_data_the_bound_is_estimated_and_equals_nll(runs, tmp_path, call):
    out = tmp_path / "page.html"
    code, _, _ = call("report", runs / "B", "digits", "-n", 2, "--steps", 2, "--out", out)
    expected = undiffuse.nll(runs / "B", "digits", images=64, draws=8)
    page = of(out.read_text(), "Bits per dimension")
    assert code == 0
    assert f"{expected['bits_per_dim']:.3f} ± {expected['standard_error']:.3f}" in page
    assert "An estimate for this page" in page and f"undiffuse nll {runs / 'B'} digits" in page


@pytest.mark.slow
def test_scores_of_other_weights_are_told_so(runs, tmp_path, call):
    evaluation(tmp_path / "old", "0" * 64)
    out = tmp_path / "page.html"
    call("report", runs / "B", "--eval", tmp_path / "old", "-n", 1, "--steps", 1, "--out", out)
    assert "These scores are of other weights" in of(out.read_text(), "Scores")


def test_models_stand_beside_each_other_with_the_same_seeds(runs, tmp_path, call):
    out = tmp_path / "page.html"
    code, _, _ = call("compare", runs / "A", runs / "B", "-n", 3, "--steps", 2, "--seed", 7, "--out", out)
    page = out.read_text()
    assert code == 0
    (strip,) = pictures(of(page, "Samples"))
    scale = 11  # of 8 pixels to at least 84
    for row, name in enumerate("AB"):
        drawn = undiffuse.load(runs / name).sample(3, 2, "ddim", seed=7)
        for column, image in enumerate(drawn):
            top, left = (scale + i * 9 * scale for i in (row, column))
            cell = strip[top : top + 8 * scale : scale, left : left + 8 * scale : scale]
            assert (cell == image[0].numpy()).all()
    assert "n is 100 for A and 200 for B" in of(page, "Scores")
    assert re.findall(r"<td>([\d.–]+)</td>", of(page, "Scores"))[:2] == ["12.5", "–"]
    assert "<tr><td>train.lr</td><td>0.001</td><td>0.002</td></tr>" in of(page, "Settings that differ")
    assert "train.batch" not in of(page, "Settings that differ")
    assert of(page, "Training").count("<polyline") == 4  # held out and on batches, of two runs
    call("compare", runs / "A", runs / "B", "-n", 12, "--steps", 1, "--out", out, "--overwrite")
    said = re.findall(r'<img [^>]*alt="(.*?)"', of(out.read_text(), "Samples"))
    assert len(said) == 2 and said[0] == "Samples 0 to 7, a row for each of A, B" and all(said)


def test_a_model_beside_pictures_of_another_size(runs, tmp_path, call):
    out = tmp_path / "page.html"
    code, _, _ = call("compare", runs / "A", runs / "SHEET", "-n", 4, "--steps", 2, "--out", out)
    page = out.read_text()
    assert code == 0
    assert "differ in size (8×8 grey and 12×12 RGB)" in of(page, "Samples")
    (strip,) = pictures(of(page, "Samples"))
    reds = strip[-2 * 7 - 20, 20, :3]
    assert strip.ndim == 3 and tuple(reds) == (20, 0, 0)
    assert f"undiffuse eval {runs / 'SHEET'} DATA" in of(page, "Scores")


@pytest.mark.slow
def test_a_class_has_a_row(tmp_path, call):
    run_of_digits(tmp_path / "C", 2, "data.labels=true")
    code, _, error = call("report", tmp_path / "C", "-n", 20, "--steps", 2, "--out", tmp_path / "page.html")
    assert code == 0, error
    page = of((tmp_path / "page.html").read_text(), "Samples")
    assert re.findall(r"<span>(.*?)</span>", page) == [str(i) for i in range(10)]
    words = [
        "report",
        tmp_path / "C",
        "digits",
        "-n",
        120,
        "--steps",
        2,
        "--out",
        tmp_path / "page.html",
        "--overwrite",
    ]
    assert call(*words)[0] == 0
    page = of((tmp_path / "page.html").read_text(), "Samples")
    assert "120 samples, not selected" in page and "As many held-out images of digits, spread evenly over it." in page


def test_images_that_weights_had_seen_before_are_counted(runs, tmp_path, call):
    """8 a step: six of B, and three that began from it."""
    out = tmp_path / "page.html"
    assert call("report", runs / "B", "-n", 1, "--steps", 1, "--out", out)[0] == 0
    assert re.search(r"<dt>images seen in training</dt><dd>48</dd>", of(out.read_text(), "At a glance"))
    how = {"settings": SMALL, "device": "cpu", "say": silent, "show_progress": False}
    undiffuse.train("digits", tmp_path / "C", "digits", init=runs / "B", steps=3, **how)
    assert call("report", tmp_path / "C", "-n", 1, "--steps", 1, "--out", out, "--overwrite")[0] == 0
    seen = "<dt>images seen in training, 24 of them since it began from other weights</dt><dd>72</dd>"
    assert seen in of(out.read_text(), "At a glance")


def test_a_model_that_predicts_mu_has_a_page(tmp_path, call):
    run_of_digits(tmp_path / "M", 2, "parameterisation.name=mu")
    code, _, error = call("report", tmp_path / "M", "-n", 4, "--steps", 3, "--out", tmp_path / "page.html")
    assert code == 0, error
    page = (tmp_path / "page.html").read_text()
    assert "4 samples, not selected: 3 of" in page and "None can be" not in page


BAD = {
    "report NONE": 'model "NONE" is not known',
    "report SHEET": "SHEET holds no checkpoint; give a run folder",
    "report A NONE": "NONE",
    "report A --eval UNFINISHED": "UNFINISHED is not finished, it has no summary.json; give the command that began it",
    "report A --eval NONE": "NONE is no folder; give the --out folder of `undiffuse eval`",
    "report A --nll UNFINISHED": "UNFINISHED is not finished",
    "report A --out page.png": "page.png has not the ending of a page; give the name of a .html",
    "report A --out there.html": "there.html is there already; give another name, or --overwrite to replace it",
    "report A --out SHEET": "SHEET is a folder; give the name of a file",
    "report A -n 0": "-n 0 is not possible; give 1 or more",
    "report A --steps 0": "steps",
    "report A --solver x": 'sampler "x" is not known',
    "compare SHEET SHEET --steps 5": "--steps 5 is for models, and all of these are sets of samples; leave it out",
    "compare SHEET SHEET --seed 5": "--seed 5 is for models, and all of these are sets of samples; leave it out, or",
    "compare A B --size 9": "--size 9 is for sets of samples, and all of these are models; leave it out, or give one",
    "compare A": "A alone cannot be compared; give two or more, or take `undiffuse report`",
    "compare A NONE": "NONE is not there; give a model, or a folder, zip or npz of pictures",
    "compare A B --eval A/eval": "--eval is given 1 times for 2; give it once for each, - for none",
    "compare A SHEET --nll A/nll --nll A/nll": "--nll A/nll is of a model, and SHEET is none; give - in its place",
    "compare A EMPTY": "EMPTY is no model and holds no set of pictures",
    "compare A B -n 0": "-n 0 is not possible; give 1 or more",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_writes_nothing(words, runs, tmp_path, call, monkeypatch):
    for name in ("A", "B", "SHEET"):
        (tmp_path / name).symlink_to(runs / name)
    for name in ("UNFINISHED", "EMPTY"):
        (tmp_path / name).mkdir()
    (tmp_path / "UNFINISHED" / "query.json").write_text("{}")
    (tmp_path / "there.html").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, out, error = call(*words.split())
    assert (code, out) == (2, "")
    line = error.splitlines()[-1]
    assert line.startswith("undiffuse: ") and BAD[words] in line
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "there.html").read_text() == "mine"


@pytest.mark.slow
def test_overwrite_replaces(runs, tmp_path, call):
    out = tmp_path / "page.html"
    out.write_text("mine")
    assert call("report", runs / "bare.safetensors", "-n", 1, "--steps", 1, "--out", out, "--overwrite")[0] == 0
    assert "<h2>Samples</h2>" in out.read_text()


def test_a_measurement_in_the_run_that_is_not_finished_is_told(runs, tmp_path, call):
    import shutil

    shutil.copytree(runs / "B", tmp_path / "B")
    (tmp_path / "B" / "eval" / "summary.json").rename(tmp_path / "B" / "eval" / "query.json")
    (tmp_path / "B" / "evaluation-notes").mkdir()
    (tmp_path / "B" / "nll").mkdir()
    call("report", tmp_path / "B", "-n", 1, "--steps", 1, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    scores, bits = of(page, "Scores"), of(page, "Bits per dimension")
    assert scores.count("is an evaluation that is not finished") == 1 and "a measurement that is not" not in scores
    assert bits.count("is a measurement that is not finished") == 1 and "an evaluation that is not" not in bits


@pytest.mark.slow
def test_torch_is_as_it_was(runs, tmp_path, call):
    before = torch.get_default_dtype(), torch.get_rng_state()
    call("report", runs / "bare.safetensors", "-n", 1, "--steps", 1, "--out", tmp_path / "page.html")
    assert torch.get_default_dtype() == before[0] and bool((torch.get_rng_state() == before[1]).all())


def test_what_is_stale_is_told_and_a_dash_is_none(runs, tmp_path, call):
    out = tmp_path / "page.html"
    words = ["compare", runs / "A", runs / "B", "-n", 2, "--steps", 2, "--out", out, "--overwrite"]
    assert call(*words, "--eval", runs / "B" / "eval", "--eval", runs / "B" / "eval")[0] == 0
    said = f"{runs / 'B' / 'eval'} is of other weights than those of this page"
    assert out.read_text().count(said) == 1 and f"A: A: {said}" in out.read_text()
    assert call(*words, "--nll", "-", "--nll", "-", "--eval", "-", "--eval", "-")[0] == 0
    page = out.read_text()
    assert "Bits per dimension" not in titles(page) and "FD-EffLite0" not in page


def test_one_real_image_is_too_few_to_mix_but_no_reason_to_have_no_page(runs, tmp_path, call):
    (tmp_path / "one").mkdir()
    Image.new("L", (8, 8), 99).save(tmp_path / "one" / "a.png")
    out = tmp_path / "page.html"
    code, _, error = call("report", runs / "B", tmp_path / "one", "-n", 4, "--steps", 2, "--out", out)
    assert code == 0, error
    assert "The first and the last of the samples above" in of(out.read_text(), "Between two pictures")


def test_pictures_alone_are_not_compared_by_none(runs, tmp_path, call):
    for n in (0, -3):
        code, _, error = call("compare", runs / "SHEET", runs / "SHEET", "-n", n, "--out", tmp_path / "x.html")
        assert code == 2 and f"-n {n} is not possible; give 1 or more" in error and not (tmp_path / "x.html").exists()


def test_pictures_of_several_sizes_are_compared_in_the_one_that_is_given(runs, tmp_path, call):
    (tmp_path / "mixed").mkdir()
    for i, side in enumerate((8, 12, 20)):
        Image.new("RGB", (side, side), (90, 40 * i, 0)).save(tmp_path / "mixed" / f"{i}.png")
    words = ["compare", tmp_path / "mixed", runs / "SHEET", "--out", tmp_path / "x.html"]
    code, _, error = call(*words)
    assert code == 2 and "images differ in size" in error and "for example --size 8" in error
    assert call(*words, "--size", "8")[0] == 0 and "Samples" in titles((tmp_path / "x.html").read_text())
