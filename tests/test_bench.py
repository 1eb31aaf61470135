"""The results of bench/ are of what is there today."""

import json
import re
import subprocess
import sys

from tests.test_docs import ROOT, load


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
