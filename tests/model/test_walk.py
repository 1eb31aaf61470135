"""The chain that is walked where nobody names a solver, and the one where somebody does."""

import importlib
import subprocess
import sys

import pytest
import torch

from tests.model.test_model import bright
from tests.view.test_explore import gaussian, model
from undiffuse.config import plain
from undiffuse.diffusion.grid import Even, KarrasFew, LogSnr
from undiffuse.diffusion.parameterisation import Mu
from undiffuse.diffusion.process import Cosine, Edm
from undiffuse.diffusion.sampler.ancestral import Ancestral
from undiffuse.diffusion.sampler.ddim import DDIM
from undiffuse.diffusion.sampler.dpmpp import DpmppSde
from undiffuse.diffusion.sampler.unipc import Unipc
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.model.fit import fit
from undiffuse.model.load import load
from undiffuse.model.model import to_uint8
from undiffuse.model.walk import best


def test_few_steps_of_a_fast_solver_unless_one_is_named():
    toy = gaussian(1000)
    times, sampler, said = toy.walk()
    assert torch.equal(times, KarrasFew().times(toy.process, 10)) and sampler == Unipc(order=2)
    what, other = said.split("; ")
    assert what == "10 evaluations of unipc-2 on the karras-few grid (`undiffuse fit` finds a better one)"
    assert other == "--solver ancestral for all 1,000 steps of Algorithm 2"
    assert torch.equal(toy.sample(3, seed=4), to_uint8(toy.chain(Key(4).fold("sample").rows(3), times, sampler)))
    assert len(toy.walk(60).times) == 61 and "on the karras-few grid (`undiffuse fit` finds" in toy.walk(60).said
    assert toy.walk(1).said.startswith("1 evaluation of unipc-2 on")
    assert torch.equal(toy.walk(5, grid="log-snr").times, LogSnr().times(toy.process, 5))
    assert toy.walk((1.0, 0.5)).times.tolist() == [1, 0.5, 0] and toy.walk((1.0, 0.5)).sampler == sampler
    assert best(Cosine(4), None, None)[1] == 4  # a table has no more
    assert toy.walk(noisy=True).sampler == DpmppSde()


def test_a_named_solver_takes_all_steps_on_the_grid_of_the_process():
    toy = gaussian(100)
    for named, expected in (({"solver": "ancestral"}, Ancestral(toy.config.variance)), ({"eta": 0.5}, None)):
        if expected is None:
            named["solver"], expected = "ddim", DDIM(0.5)
        times, sampler, said = toy.walk(**named)
        assert torch.equal(times, Even().times(toy.process, 100)) and (sampler, said) == (expected, "")
    with pytest.raises(UsageError, match="eta = 0.5 belongs to the sampler ddim; name it too, or leave eta out"):
        toy.walk(eta=0.5)
    with pytest.raises(UsageError, match="steps = 101 is not possible; this model takes 1 to 100"):
        toy.walk(101)


def test_a_fitted_grid_is_taken_where_there_is_one_of_that_length(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path))
    known = bright()
    found = fit(known, 4)
    known.meta["fit"] = plain(found)
    times, _, said = known.walk()
    assert torch.equal(times, found.grid.times(known.process, 10)) and "on the fitted grid; " in said
    longer = known.walk(41)  # than any that was fitted
    assert torch.equal(longer.times, found.grid.times(known.process, 41)) and "on the fitted grid; " in longer.said
    assert best(Edm(), None, None)[0] == KarrasFew()


def test_mu_takes_all_steps_of_its_table_and_says_why():
    toy = model(lambda x, t: x, 20)
    object.__setattr__(toy.config, "parameterisation", Mu())
    times, sampler, said = toy.walk()
    assert len(times) == 21 and sampler == Ancestral(toy.config.variance)
    assert said == "this model predicts mu, which holds for steps of 1/T only: all steps of Algorithm 2"
    for steps in (5, [1.0, 0.5]):
        with pytest.raises(UsageError, match="^this model predicts mu, and Algorithm 2 holds for all 20 steps of "):
            toy.walk(steps)
    assert len(toy.walk(5, "ddim").times) == 6
    with pytest.raises(UsageError, match="^solver heun,churn=5 asks at times beside those of its steps, and this mod"):
        toy.walk(5, "heun,churn=5")
    assert len(toy.walk(5, "heun").times) == 6


def test_mu_is_asked_at_the_times_of_its_table_alone():
    """Between them its coefficients are those of no step that it has learned."""
    toy = model(lambda x, t: x, 20)
    free = toy.times(4, "log-snr") * 20
    object.__setattr__(toy.config, "parameterisation", Mu())
    found = toy.walk(4, "unipc-2", grid="log-snr").times * 20
    assert not torch.equal(free, free.round()) and torch.equal(found, free.round())
    assert torch.equal(toy.times([0.97, 0.33]), torch.tensor([0.95, 0.35, 0.0], dtype=torch.float64))
    with pytest.raises(
        UsageError, match="alone, and of these 18 steps some lie at the same; give fewer, or --grid even$"
    ):
        toy.times(18, "log-snr")
    with pytest.raises(
        UsageError, match="^this model predicts mu, .* so that no grid is fitted to it; sample it in all"
    ):
        fit(toy, 4)


def test_a_solver_by_name_has_the_steps_that_its_order_needs():
    toy = model(lambda x, t: x, 20)
    for name, order in (("unipc-3", 3), ("deis-4", 4), ("dpmpp-sde", 2), ("heun", 2), ("ddim", 1)):
        assert len(toy.walk(order, name).times) == order + 1
        if order > 1:
            with pytest.raises(
                UsageError, match=f"^solver {name} has order {order}, for which .* too few; give {order} or"
            ):
                toy.walk(order - 1, name)
    assert len(toy.walk(1).times) == 2  # what nobody named has a lower order there


def test_arguments_of_another_kind_are_refused():
    """Where no type checker stands before them, as it does in tests."""
    code = """
import undiffuse
model = undiffuse.load("fashion-mnist", "cpu")
for call in (
    lambda: model.walk("5"),
    lambda: model.walk(solver=3),
    lambda: model.walk(solver=""),
    lambda: model.variant(precision=3),
):
    try:
        call()
    except undiffuse.Error as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    steps, number, empty, precision = done.stdout.splitlines()
    assert steps == "steps = '5' is not possible; give a whole number"
    assert number == "solver = 3 is not possible; give its name, such as unipc-2, or a sampler"
    assert empty.startswith('sampler "" is not known') and precision.startswith('precision "3" is not known')


def test_the_shipped_model_has_a_grid_of_its_own():
    shipped = load("fashion-mnist")
    assert shipped.fit is not None and torch.equal(shipped.walk().times, shipped.times(10, "fitted"))


def test_commands_say_what_nobody_named(call, tmp_path):
    toys = importlib.import_module("tests.cli.toy")
    made, line = toys.save(tmp_path / "toy.safetensors"), "evaluations of unipc-2 on the karras-few grid"
    code, out, err = call("sample", made, "-n", 2, "--npz", tmp_path / "a.npz")
    assert "solver  unipc-2\n" in out  # a name that draws the same when it is given
    hint = "(`undiffuse fit` finds a better one)"
    assert code == 0 and err.splitlines()[0] == f"10 {line} {hint}; --solver ancestral for all 12 steps of Algorithm 2"
    code, _, err = call("sample", made, "-n", 2, "--npz", tmp_path / "b.npz", "--solver", "ancestral")
    assert code == 0 and line not in err
    code, _, err = call("progressive", made, "-n", 1, "--steps", 4, "--out", tmp_path / "x.png")
    assert code == 0 and f"4 {line}" in err
    code, _, err = call("shared", made, "-n", 2, "--out", tmp_path / "y.png")
    assert code == 0 and "10 evaluations of dpmpp-sde on the karras-few grid" in err
