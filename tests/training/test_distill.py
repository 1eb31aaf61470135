"""Distillation from end to end: a model of N steps knows them, and what it is not made for is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.toy import run_of_digits
from tests.training.test_loop import assert_equal, state
from undiffuse.data.source import ArraySource
from undiffuse.diffusion.grid import LogSnr
from undiffuse.diffusion.objective import spreads
from undiffuse.diffusion.sampler.ddim import DDIM
from undiffuse.diffusion.sampler.dpmpp import Dpmpp
from undiffuse.diffusion.sampler.heun import Heun
from undiffuse.diffusion.trajectory import Taught
from undiffuse.errors import DataError, UsageError
from undiffuse.key import Key
from undiffuse.machine.log import silent
from undiffuse.measure import nll
from undiffuse.measure.flow import nll_ode
from undiffuse.measure.sets import said_of_drawing
from undiffuse.model.fit import fit
from undiffuse.model.load import load, save
from undiffuse.training.distill import distill, recipe_for
from undiffuse.training.start import train
from undiffuse.view import explore, report_run
from undiffuse.view.subject import Drawing, subject

HALVES = "tests.training.test_proxy:Halves"
QUICK = ["train.batch=8", "train.held_out=8", "train.held_out_every=2", "train.sample_every=2", "train.save_every=2"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return run_of_digits(tmp_path_factory.mktemp("teacher") / "run", 3, "parameterisation.name=v")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))


def tuned(teacher: Path, out: Path, length: int, steps: int = 3):
    return distill(teacher, "digits", out, steps, settings=[*QUICK, f"train.steps={length}"], device="cpu", say=silent,
                   show_progress=False)  # fmt: skip


def test_a_distilled_model_draws_in_its_own_steps(teacher, tmp_path):
    model = tuned(teacher, tmp_path / "run", 2)
    assert sorted(path.name for path in (teacher / "fit").iterdir()) == [f"{load(teacher).digest()}.json"]
    first, walk = float(LogSnr().times(model.process, 2)[0]), load(teacher).fit.grid.walks[2]
    # These three training steps make the last one of the walk the lowest t that there is, with nothing left to teach.
    assert walk[2] == model.process.t_min and model.times()[[0, 1, 3]].tolist() == pytest.approx([first, walk[1], 0])
    low, high = spreads(model.process)[0], model.config.bounds[1]
    assert model.config.bounds[0] == pytest.approx((low * high) ** 0.5, rel=1e-4)
    other = tuned(teacher, tmp_path / "two", 1, steps=2)
    assert other.times()[1] == pytest.approx(load(teacher).fit.grid.walks[1][1], abs=1e-6)
    assert model.config.bounds[-1] == pytest.approx(min(80, spreads(model.process)[1]), rel=1e-6)
    alone = tuned(teacher, tmp_path / "one", 1, steps=1)  # begins at noise, not where the mean may stand for it
    assert alone.config.bounds == model.config.bounds[-1:]
    assert model.sampler() == Dpmpp(2) and not model.denoiser.clip
    for again in (model, load(tmp_path / "run")):
        images = again.sample(2)
        asked = (3, again.times(), again.times().tolist(), again.times()[:-1].numpy(), tuple(again.times().tolist()))
        assert all(torch.equal(images, again.sample(2, steps)) for steps in asked)
        assert torch.equal(images, again.sample(2, solver="dpmpp-2"))
    page = report_run.Page(subject(str(tmp_path / "run"), model), None, Drawing(2), "undiffuse report run")
    report_run.write(page, tmp_path / "run.html", lambda done: None)
    html = (tmp_path / "run.html").read_text()
    assert "the 3 steps of this distilled model, seed 0" in html and "A distilled model has no bound" in html
    save(model, tmp_path / "one.safetensors")
    assert torch.equal(load(tmp_path / "one.safetensors").sample(2), images)
    said = said_of_drawing(model, model.times(), model.sampler(), 0, "none")
    assert (said["solver"], said["evaluations"], said["clip"]) == ("dpmpp", 3, False)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2  # previews of both kinds of weights
    assert model.meta["recipe"]["objective"]["name"] == "trajectory"


def test_the_chain_is_of_order_2_between_the_bounds(teacher, tmp_path):
    """z_a = (a/u) z_u + (1 − a/u) D with D on the line through the last two answers, by hand; DDIM first and last."""
    model, before = tuned(teacher, tmp_path / "run", 1, steps=4), None
    seen, keys = [], Key(3).rows(2)
    end = model.chain(keys, model.times(), model.sampler(), callback=lambda r, x, t: seen.append((x.double(), t)))
    bounds = [*model.config.bounds[::-1], 0.0]
    for (x, t), u, a, after in zip(
        seen, bounds[:-1], bounds[1:], [*(x for x, _ in seen[1:]), end.double()], strict=True
    ):
        alpha = float(model.process.alpha(t[:1]))
        answer = now = model.denoiser(x.float(), t).x_0.double()
        if before is not None and a:
            answer = now + np.log(u / a) / np.log(before[0] / u) / 2 * (now - before[1])
        before = u, now
        later = float(model.process.alpha(model.process.time(-2 * torch.tensor([a]).double().log()))) if a else 1.0
        assert torch.allclose(after, later * ((a / u) * x / alpha + (1 - a / u) * answer), atol=1e-4)


def test_what_it_is_not_made_for_is_refused(teacher, tmp_path):
    model = tuned(teacher, tmp_path / "run", 1)
    picture = torch.zeros(model.image_shape, dtype=torch.uint8)
    for call in (
        lambda: model.sample(1, 5),
        lambda: model.times(3, "even"),
        lambda: model.times([1.0, 0.5, 0.2]),
        lambda: model.sample(1, solver="ancestral"),
        lambda: model.sample(1, solver=Heun()),
        lambda: model.sample(1, solver="ddim"),
        lambda: model.sample(1, solver=DDIM(0.5)),
        lambda: model.sampler(eta=0.5),
        lambda: nll.nll(model, "digits", images=2),
        lambda: nll_ode(model, "digits", images=2),
        lambda: explore.interpolate(model, picture, picture),
        lambda: explore.shared(model, 2),
        lambda: fit(model),
        lambda: distill(model, "digits", tmp_path / "again", 2),
    ):
        with pytest.raises(UsageError, match="this model is distilled to 3 steps; take the one that it was made of"):
            call()


def test_a_distillation_goes_on_to_the_bit(teacher, tmp_path):
    tuned(teacher, tmp_path / "whole", 4)
    tuned(teacher, tmp_path / "parts", 2)
    tuned(teacher, tmp_path / "parts", 4)
    assert_equal(state(tmp_path / "whole", 4), state(tmp_path / "parts", 4))


def test_a_run_of_another_model_is_refused(teacher, tmp_path):
    tuned(teacher, tmp_path / "run", 1)
    other = run_of_digits(tmp_path / "other", 2, "parameterisation.name=v", "train.seed=5")
    with pytest.raises(UsageError, match="run holds a distillation of another model"):
        tuned(other, tmp_path / "run", 2)


def test_a_model_that_must_be_told_a_class(tmp_path):
    teacher = run_of_digits(tmp_path / "told", 1, "parameterisation.name=v", "data.labels=true", "train.drop_label=0")
    model = tuned(teacher, tmp_path / "run", 1, steps=2)
    assert model.config.classes == 10 and model.sample(2, label=3).shape == (2, 1, 8, 8)


def test_the_teacher_is_told_its_own_number_of_a_class(tmp_path, monkeypatch):
    """Of data whose classes stand in another order, or are fewer."""
    teacher = run_of_digits(tmp_path / "told", 1, "parameterisation.name=v", "data.labels=true")
    images = torch.arange(16, dtype=torch.uint8)[:, None, None, None].expand(16, 1, 8, 8)
    walked, told = Taught.walked, []

    def watched(self, x, times, cond):
        told.append(cond.label.tolist())
        return walked(self, x, times, cond)

    monkeypatch.setattr(Taught, "walked", watched)

    def labels(names, label, out, *more) -> set[int]:
        told.clear()
        data = ArraySource(images, torch.full((16,), label), classes=names)
        settings = [*QUICK, "train.steps=2", *more]
        distill(teacher, data, tmp_path / out, 2, settings=settings, device="cpu", say=silent, show_progress=False)
        return {each for batch in told for each in batch}

    assert labels(("3", "7"), 1, "a", "train.drop_label=0") == {7}
    assert labels(("3", "7"), 0, "b", "train.drop_label=1") == {3, 10}  # no class, but for held-out images
    assert labels(tuple(map(str, range(10))), 4, "c", "train.drop_label=0") == {4}
    with pytest.raises(DataError, match="^the data has classes that the teacher does not know: x, y. This model knows"):
        labels(("3", "x", "y"), 0, "d")
    assert not (tmp_path / "d").exists()


def test_its_chain_begins_at_the_mean_of_its_own_first_answers(teacher, tmp_path):
    """Where it was trained, not at t = 1: over 64 draws of noise at the first bound."""
    model = tuned(teacher, tmp_path / "run", 1)
    first = model.times()[:1]
    if first < 1:
        x = float(model.process.sigma(first)) * Key(0).fold("mean").rows(64).normal(1, 8, 8)
        expected = model.denoiser(x, first.expand(64)).x_0.mean(0)
        assert torch.equal(model.mean(), expected)
    seen = []
    model.chain(Key(1).rows(1), model.times(), model.sampler(), callback=lambda r, x, t: seen.append(x))
    eps = Key(1).rows(1).fold("x_T").normal(1, 8, 8)
    start = model.process.marginal(model.mean()[None], eps, first) if first < 1 else model.process.prior_std * eps
    assert torch.equal(seen[0], start)


def test_a_learned_variance_is_refused(tmp_path):
    noise = run_of_digits(tmp_path / "learned", 1, "parameterisation.name=v", "variance.name=learned-range",
                          "objective.name=hybrid")  # fmt: skip
    with pytest.raises(UsageError, match="a model with a learned variance cannot be distilled; train one with a fixed"):
        tuned(noise, tmp_path / "out", 1)


def test_another_number_of_steps_or_another_run_is_refused(teacher, tmp_path):
    tuned(teacher, tmp_path / "run", 1)
    with pytest.raises(UsageError, match="run holds a distillation to 3 steps, and one to 2 steps was asked for; give"):
        tuned(teacher, tmp_path / "run", 1, steps=2)
    with pytest.raises(UsageError, match="run holds a training, and one to 2 steps was asked for; give another --out"):
        tuned(teacher, teacher, 1, steps=2)
    with pytest.raises(UsageError, match="steps = 9 is not possible; give 1 to 8, or sample this model in as many"):
        tuned(teacher, tmp_path / "other", 1, steps=9)


def test_a_model_that_predicts_noise_is_refused_before_anything_is_made(tmp_path):
    noise = run_of_digits(tmp_path / "noise", 1, "parameterisation.name=eps")
    with pytest.raises(UsageError, match="a model that predicts eps cannot be distilled: its x̂_0 explodes"):
        tuned(noise, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists() and not (noise / "fit").exists()


def test_data_that_is_not_there_is_refused_before_a_grid_is_fitted(tmp_path):
    other = run_of_digits(tmp_path / "other", 1, "parameterisation.name=v")
    with pytest.raises(DataError, match="nowhere"):
        distill(other, tmp_path / "nowhere", tmp_path / "out", 2, device="cpu", say=silent, show_progress=False)
    assert not (tmp_path / "out").exists() and not (other / "fit").exists()


@pytest.mark.parametrize(
    "setting", ["data.size=16", "objective.name=simple", "objective.bounds=[1,80]", "network.channels=8"]
)
def test_settings_that_make_another_function_of_it_are_refused(teacher, tmp_path, setting):
    said = []
    with pytest.raises(UsageError, match=f"^--set {re.escape(setting)} is not possible in a distillation, whose"):
        distill(teacher, "digits", tmp_path / "out", 2, settings=[setting], device="cpu", say=said.append)
    assert not (tmp_path / "out").exists() and said == []


@pytest.mark.parametrize(
    "given, words",
    [
        ({"minutes": -1}, "a budget of -1 minutes is not possible"),
        ({"images": 0}, "a budget of 0 images"),
        ({"logs": ["x"]}, 'log "x"'),
    ],
)
def test_what_is_refused_is_so_before_a_grid_is_fitted(tmp_path, given, words):
    other, said = run_of_digits(tmp_path / "other", 1, "parameterisation.name=v"), []
    with pytest.raises(UsageError, match=words):
        distill(other, "digits", tmp_path / "out", 2, device="cpu", say=said.append, show_progress=False, **given)
    assert said == [] and not (other / "fit").exists() and not (tmp_path / "out").exists()


def test_a_folder_of_samples_becomes_no_run(teacher, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".undiffuse").write_text("")
    with pytest.raises(UsageError, match="out holds samples; give a new folder for a run"):
        tuned(teacher, tmp_path / "out", 1)


def test_plain_training_does_not_go_on_with_it(teacher, tmp_path):
    tuned(teacher, tmp_path / "run", 2)
    with pytest.raises(UsageError, match="^a distillation goes on with its teacher alone: give `undiffuse distill"):
        train("digits", tmp_path / "run", device="cpu", say=silent, show_progress=False)


def test_training_does_not_go_on_with_it_from_other_weights(teacher, tmp_path):
    tuned(teacher, tmp_path / "run", 1)
    other = run_of_digits(tmp_path / "other", 2, "parameterisation.name=v", "train.seed=5")
    with pytest.raises(UsageError, match="run holds a run that did not begin from .*other; leave --init out"):
        train("digits", tmp_path / "run", device="cpu", init=other, say=silent, show_progress=False)


def test_what_is_said_after_a_nan_is_to_begin_anew(teacher, tmp_path, call, monkeypatch):
    """`undiffuse distill` begins with its teacher, and has no --init."""
    out, words = tmp_path / "run", ["distill", teacher, "digits", "--steps", 2]
    words += [part for each in [*QUICK, "train.steps=4", "train.lr=1e30"] for part in ("--set", each)]
    monkeypatch.setattr("sys.argv", ["undiffuse", *map(str, words), "--out", str(out)])
    code, _, err = call(*words, "--out", out)
    assert code == 3 and "To go on, start a new run with a lower learning rate, --set train.lr=" in err
    command = err.strip().splitlines()[-1]
    assert "--init" not in command and command.endswith(f"--out {out}-2")


def test_its_samples_are_scored_on_the_way_in_its_own_steps(teacher, tmp_path):
    settings = [*QUICK, "train.steps=2", "train.eval_every=2", "train.eval_images=4", f"train.eval_features={HALVES}"]
    how = {"device": "cpu", "say": silent, "show_progress": False}
    with pytest.raises(UsageError, match="train.eval_every = 2 is not possible: another number of steps"):
        distill(teacher, "digits", tmp_path / "run", 3, settings=[*settings, "train.eval_steps=5"], **how)
    distill(teacher, "digits", tmp_path / "run", 3, settings=settings, **how)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    found = next(row for row in rows if "proxy" in row)
    assert (found["proxy"]["steps"], found["proxy"]["solver"]) == (3, "its own") and found["proxy_fd"] > 0


def test_one_step_takes_its_own_solver_by_name(teacher, tmp_path):
    model = tuned(teacher, tmp_path / "run", 1, steps=1)
    assert torch.equal(model.sample(2, solver="dpmpp"), model.sample(2))


def test_the_rate_is_half_of_the_teachers_and_the_optimizer_its_own(tmp_path):
    other = run_of_digits(tmp_path / "other", 1, "parameterisation.name=v", "train.optimizer=muon", "train.lr=0.004")
    recipe = recipe_for(load(other), (1.0, 80.0))
    assert (recipe.train.optimizer, recipe.train.lr, recipe.objective.substeps) == ("muon", 0.002, 8)
    bounds = tuple(0.5 * n for n in range(1, 9))
    assert [recipe_for(load(other), bounds[:n]).objective.substeps for n in (1, 4, 8)] == [16, 4, 3]


def test_the_command(teacher, tmp_path, call):
    out = tmp_path / "run"
    words = ["distill", teacher, "digits", "--steps", 2, "--out", out, "--json"]
    code, text, err = call(*words, *(part for each in [*QUICK, "train.steps=1"] for part in ("--set", each)))
    assert code == 0, err
    found = json.loads(text)
    assert (
        (found["sampling_steps"], found["step"]) == (2, 1)
        and "--set train.steps=2" in found["more"]
        and found["next"].startswith("undiffuse sample")
    )
    code, text, err = call("sample", out, "-n", 2, "--npz", tmp_path / "x.npz", "--json")
    assert code == 0 and json.loads(text)["steps"] == 2, err
    code, _, err = call("export", out, tmp_path / "theirs", "--to", "diffusers")
    assert code == 2 and "an export to diffusers is not possible: this model is distilled to 2 steps" in err
    code, _, err = call("sample", out, "--steps", 5, "--npz", tmp_path / "y.npz")
    assert code == 2 and "another number of steps or grid is not possible: this model is distilled to 2 steps" in err
