"""Grids fitted to a model: better than others where the truth is known, kept by the hash of the weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cli import toy
from tests.cli.toy import run_of_digits
from tests.model.test_model import bright
from undiffuse.config import plain
from undiffuse.diffusion.fit import LEVEL
from undiffuse.diffusion.grid import Even, Karras, LogSnr
from undiffuse.diffusion.process import Cosine
from undiffuse.errors import Corrupt, UsageError
from undiffuse.key import Key
from undiffuse.measure.sets import said_of_drawing
from undiffuse.model import fitted
from undiffuse.model.classes import drawn
from undiffuse.model.fit import cost, fit, steps_of
from undiffuse.model.fitted import Fitted
from undiffuse.model.load import load, save


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def off(model, times) -> float:
    """How far chains of the default solver end from where the flow does, which here is known: root mean square."""
    keys = Key(7).rows(200)
    start = model.process.marginal(torch.full((200, 1, 4, 6), 0.25), keys.normal(1, 4, 6), times[:1].expand(200))
    u = float(torch.exp(-model.process.logsnr(times[:1]) / 2))
    z = start / float(model.process.alpha(times[:1]))
    truth = 0.25 + (z - 0.25) * 0.2 / (0.04 + u**2) ** 0.5
    return float((model.chain(keys, times, model.sampler("unipc-2"), start=start) - truth).square().mean().sqrt())


@pytest.mark.parametrize("other", [LogSnr(), Karras(), Even()], ids=["log-snr", "karras", "even"])
def test_a_fitted_grid_is_nearer_to_the_flow_than_any_other(other):
    """And for many steps off by no level of grey, which is all that counts there."""
    known = bright()
    ticks = []
    found = fit(known, 20, progress=ticks.append)
    assert sum(ticks) == steps_of(known, 20) == 61 and found.trajectories == 20
    assert cost(known) == "128 chains of 61 evaluations"
    for n in (3, 4, 5, 8, 10):
        own = off(known, found.grid.times(known.process, n))
        assert own < 0.8 * off(known, other.times(known.process, n)), n
    assert all(off(known, found.grid.times(known.process, n)) < LEVEL for n in (16, 20))


def test_a_grid_is_kept_beside_a_run_by_the_hash_of_its_weights(tmp_path, cache):
    run = run_of_digits(tmp_path / "run", 2)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    model = load(run)
    assert model.fit is None and model.run == run
    found = fit(model, 4)
    path = fitted.keep(found, model.run)
    assert path == run / "fit" / f"{model.digest()}.json" and not cache.exists()
    assert all(path.read_bytes() == data for path, data in before.items())  # nothing that is sealed has changed
    checkpoint = next(run.glob("step-*"))
    for again in (load(run), load(checkpoint)):
        assert again.fit == found
        assert again.times(3, "fitted").tolist() == [*found.grid.walks[2], 0]
    assert load(run, weights="raw").fit is None  # other weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_exported_file_has_it_along_and_a_file_alone_has_it_in_the_cache(tmp_path, cache, dtype):
    model = load(toy.save(tmp_path / "bare.safetensors"))
    found = fit(model, 4)
    assert fitted.keep(found, model.run).parent == cache / "fit" and model.run is None
    save(load(tmp_path / "bare.safetensors"), tmp_path / "with.safetensors", dtype)
    for path in (cache / "fit").iterdir():
        path.unlink()
    assert load(tmp_path / "bare.safetensors").fit is None
    exported = load(tmp_path / "with.safetensors")
    assert exported.fit == replace(found, weights=exported.digest())
    assert (exported.digest() == found.weights) == (dtype == torch.float32)


def test_what_is_said_of_samples_names_the_grid(tmp_path, cache):
    model = load(toy.save(tmp_path / "bare.safetensors"))
    fitted.keep(fit(model, 4), model.run)
    model = load(tmp_path / "bare.safetensors")
    said = said_of_drawing(model, model.times(3, "fitted"), model.sampler("unipc"), 0, "none")
    assert said["grid"] == "fitted" and said["evaluations"] == 3


def test_more_steps_than_the_longest_walk_divide_it_evenly():
    grid, process = Fitted(((0.5,), (0.8, 0.2), (0.9, 0.6, 0.1))), Cosine(1000)
    for steps, times in ((2, [0.8, 0.2]), (3, [0.9, 0.6, 0.1]), (5, [0.9, 0.75, 0.6, 0.35, 0.1])):
        assert grid.spread(process, steps).tolist() == pytest.approx(times, abs=1e-12)
    for steps in (4, 50, 1000):
        times = grid.times(process, steps)
        assert len(times) == steps + 1 and (times[:-1] > times[1:]).all()
        assert times[[0, -2, -1]].tolist() == [0.9, 0.1, 0]


def test_what_does_not_belong_is_refused(tmp_path, cache):
    model = load(toy.save(tmp_path / "bare.safetensors"))
    with pytest.raises(UsageError, match="no grid is fitted to this model; make one with `undiffuse fit`, or choose"):
        model.times(3, "fitted")
    with pytest.raises(UsageError, match='grid "fited" is not known. Did you mean "fitted"'):
        model.times(3, "fited")
    found = fit(model, 4)
    path = fitted.keep(found, model.run)
    with pytest.raises(UsageError, match="was fitted to this model has one step, and 2 is more; give 1, or --grid k"):
        Fitted(((0.5,),)).spread(model.process, 2)
    good = plain(found)
    for change, error, words in (
        ({"weights": "0" * 64}, UsageError, r"is fitted to other weights \(000000000000\) than those of this model"),
        ({"grid": {"walks": [[0.5], [0.5, 0.9]]}}, Corrupt, "is damaged: its grid of 2 steps does not fall; give"),
        ({"grid": {"walks": [[0.5], [0.5]]}}, Corrupt, "is damaged: its grid of 2 steps does not fall; give `und"),
        ({"format": 99}, UsageError, "has format 99, and this undiffuse reads up to 1; upgrade undiffuse"),
        ({"grid": {"walks": "no"}}, UsageError, "grid.walks"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(error, match=words):
            load(tmp_path / "bare.safetensors").times(3, "fitted")
    path.write_text("{")
    with pytest.raises(Corrupt, match=r"json is damaged; make it anew with `undiffuse fit --overwrite`$"):
        load(tmp_path / "bare.safetensors").times(3, "fitted")
    path.write_text(json.dumps(good | {"grid": {"walks": []}}))
    with pytest.raises(Corrupt, match="is damaged: it has no grid; give `undiffuse fit --overwrite`$"):
        load(tmp_path / "bare.safetensors").times(3, "fitted")
    path.write_text("[]")
    with pytest.raises(Corrupt, match="is damaged: it is not a JSON object; make it anew with `undiffuse fit --ov"):
        load(tmp_path / "bare.safetensors").times(3, "fitted")


def test_a_fit_of_ones_own_goes_before_that_of_the_file_and_before_an_older_one(tmp_path, cache):
    model = load(toy.save(tmp_path / "bare.safetensors"))
    fitted.keep(fit(model, 4), None)
    save(load(tmp_path / "bare.safetensors"), tmp_path / "with.safetensors")
    mine = fit(model, 6)
    fitted.keep(mine, None)
    assert load(tmp_path / "with.safetensors").fit == mine
    run = run_of_digits(tmp_path / "run", 1)
    old, new = fit(load(run), 4), fit(load(run), 6)
    fitted.keep(old, None)
    assert load(run).fit == old
    fitted.keep(new, run)
    assert load(run).fit == new


def test_a_damaged_fit_is_mended_and_is_in_nobodys_way(tmp_path, cache, call):
    path = toy.save(tmp_path / "bare.safetensors")
    place = fitted.keep(fit(load(path), 4), None)
    place.write_text("[]")
    code, _, err = call("sample", path, "--times", "1,0.5", "-n", 1, "--npz", tmp_path / "x.npz")
    assert code == 0, err
    code, _, err = call("fit", path)
    assert code == 5 and "make it anew with `undiffuse fit --overwrite`" in err
    code, out, err = call("fit", path, "--trajectories", 4, "--overwrite", "--json")
    assert code == 0 and json.loads(out)["steps"] == 11 and load(path).fit.trajectories == 4, err
    code, out, _ = call("fit", path, "--json")
    assert code == 0 and json.loads(out) == {"grid": str(place), "steps": 11, "made": "before"}


def test_each_class_is_looked_at_as_often_as_in_training():
    told = bright(classes=3)
    fit(told, 6)
    assert sorted(set(told.denoiser.network.asked)) == [6, 8]  # the chains, and the means that they begin at
    assert len(told._means) == len(set(drawn(told.classes, 6).label.tolist()))
