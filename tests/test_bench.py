"""The results of bench/ are of what is there today."""

import json
import re
import subprocess
import sys

import pytest

from tests.test_docs import ROOT, load

BENCH = ROOT / "bench"


@pytest.fixture
def script(monkeypatch):
    """A script of bench/, which imports others there."""
    monkeypatch.syspath_prepend(BENCH)
    return lambda name: load(BENCH / f"{name}.py")


def results() -> dict[str, dict]:
    found = {path.stem: json.loads(path.read_text()) for path in (ROOT / "bench").glob("*.json")}
    return {name: each for name, each in found.items() if "made_of" in each}


def test_figures_are_of_the_weights_of_today():
    """Else `python bench/refresh.py` makes them anew."""
    made_of = load(ROOT / "bench" / "machine.py").made_of
    said = {name: each["made_of"] for name, each in results().items()}
    assert {"shipped-fashion-mnist", "scores-fashion-mnist", "progressive", "ranking", "flow"} <= said.keys()
    assert said == {name: made_of(*weights) for name, weights in said.items()}


def test_no_result_names_a_place_of_the_machine_that_made_it():
    found = {
        path.name: re.findall(r'[" =](?:/|[A-Z]:)[\w.]+/[^" ]*', path.read_text()) for path in ROOT.glob("bench/*.json")
    }
    assert {name: places for name, places in found.items() if places} == {}


def test_scores_are_of_the_solver_that_they_name():
    for name in ("scores-fashion-mnist", "scores-emoji-32"):
        for chain, each in results()[name]["chains"].items():
            said, drawn = each["drawn"]["command"].split(), each["protocol"]["samples"]
            solver = "-".join(str(drawn[part]) for part in ("solver", "order") if part in drawn)
            assert "--solver" not in said or said[said.index("--solver") + 1] == solver
            own = {"fitted": "the default", "log-snr": f"{solver} on log-snr", "even": solver}
            assert chain == f"{own[drawn['grid']]}, {drawn['steps']:,} steps"


def test_what_has_changed_is_made_anew(tmp_path):
    """Of a copy of two results, of which one is of other weights."""
    for name in ("refresh", "machine"):
        (tmp_path / f"{name}.py").write_text((ROOT / "bench" / f"{name}.py").read_text())
    (tmp_path / "made.py").write_text("import sys; print('made', *sys.argv[1:])")
    command = f"python {tmp_path}/made.py --n 2 'a b'"
    for name, weights in (("old", {"fashion-mnist": "0" * 64}), ("new", results()["flow"]["made_of"])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"command": command, "made_of": weights}))
    (tmp_path / "other.json").write_text(json.dumps({"command": command}))

    def run(*words: str) -> tuple[int, list[str], str]:
        ended = subprocess.run([sys.executable, tmp_path / "refresh.py", *words], capture_output=True, text=True)
        return ended.returncode, ended.stdout.splitlines(), ended.stderr.strip()

    done = f"old: other fashion-mnist: {command}"
    assert run() == (0, ["new: of today's weights", done, "made --n 2 a b"], "")
    assert run("--dry-run") == (0, ["new: of today's weights", done], "")
    assert run("new") == (0, [f"new: asked for: {command}", "made --n 2 a b", "old: left out, other fashion-mnist"], "")
    assert run("other")[::2] == (1, "other is no result that is made of weights; give some of new, old")


def test_a_span_is_beside_where_the_busy_process_ran_whatever_it_got(script):
    threads = script("threads")
    others = [0.1, 0.14, 0.15, 0.49, 0.5, 1.4]
    assert [threads.kind({"others": n, "spinner": True}) for n in others] == ["beside"] * 6
    for said in ({"spinner": False}, {}):
        found = [threads.kind({"others": n, **said}) for n in others]
        assert found == ["alone", "alone", None, None, "beside", "beside"]
    spans = [{"seconds": 0.1, "others": 0.0}, {"seconds": 0.25, "others": 0.7}, {"seconds": 9.0, "others": 0.3}]
    row = {"preset": "digits", "threads": 2, "wait": "spins"}
    result = {"date": "2026-11-26", "command": "c", "machine": {"processor": "P", "threads": 2, "torch": "2"}}
    lines = threads.table({**result, "rows": [{**row, "spans": spans}]}).splitlines()
    assert lines[2] == "| `digits` | 2 | spins | 100 (1) | 250 (1) | 2.50 |"
    assert "was not kept yet" in lines[-1] and "are 1 of 3 spans" in lines[-1]
    spans[0]["spinner"] = spans[2]["spinner"] = False
    spans[1] |= {"spinner": True, "others": 0.2}
    lines = threads.table({**result, "rows": [{**row, "spans": spans}]}).splitlines()
    assert lines[2] == "| `digits` | 2 | spins | 100 (1) | 250 (1) | 2.50 |"
    assert "a busy process of our own ran, or" in lines[-1]
