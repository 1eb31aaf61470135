"""The results of bench/ are of what is there today."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.test_docs import ROOT, load
from undiffuse.model.recipe import load_recipe

BENCH = ROOT / "bench"


@pytest.fixture
def script(monkeypatch):
    """A script of bench/, or of a copy of it, which imports others there."""

    def opened(name: str, folder: Path = BENCH):
        monkeypatch.syspath_prepend(folder)
        for path in BENCH.glob("*.py"):
            monkeypatch.delitem(sys.modules, path.stem, raising=False)
        return load(folder / f"{name}.py")

    return opened


def results() -> dict[str, dict]:
    found = {path.stem: json.loads(path.read_text()) for path in (ROOT / "bench").glob("*.json")}
    return {name: each for name, each in found.items() if "made_of" in each}


def test_figures_are_of_the_weights_of_today():
    """Else `python bench/refresh.py` makes them anew."""
    made_of = load(ROOT / "bench" / "machine.py").made_of
    said = {name: each["made_of"] for name, each in results().items()}
    assert {"shipped-fashion-mnist", "scores-fashion-mnist", "progressive", "ranking", "flow"} <= said.keys()
    assert said == {name: made_of(*weights) for name, weights in said.items()}


def test_results_are_as_scripts_write_them_and_small(script, tmp_path):
    """A row a line; none is of the size that the package of sources keeps for pictures and weights."""
    keep, path = script("machine").keep, tmp_path / "result.json"
    keep(path, {"rows": [{"a": 1, "b": [0.5]}, {"a": 2}], "none": [], "names": ["é"], "machine": {"threads": 1}})
    assert path.read_text() == (
        '{\n "rows": [\n  {"a": 1, "b": [0.5]},\n  {"a": 2}\n ],\n "none": [],\n "names": ["\\u00e9"],\n'
        ' "machine": {"threads": 1}\n}\n'
    )
    for stored in BENCH.glob("*.json"):
        keep(path, json.loads(stored.read_text()))
        assert stored.read_text() == path.read_text()
        assert stored.stat().st_size <= 100_000


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


def bits(parts: dict[str, dict]) -> dict[str, float]:
    """As the presets have it, of the splits."""
    found = {f"bits_per_dim_{split}": round(part["bits_per_dim"], 3) for split, part in parts.items()}
    return found | {f"bits_per_dim_{split}_error": round(part["standard_error"], 3) for split, part in parts.items()}


def distances(chains: dict[str, dict]) -> dict[str, float]:
    found = dict[str, float]()
    for steps, chain in chains.items():
        own = {each["score"]: float(f"{each['value']:.4g}") for each in chain["scores"] if each["key"] == "fd"}
        found[f"fd_efflite0_in_{steps}_steps"] = own["FD-EffLite0"]
        found[f"fd_classifier_in_{steps}_steps"] = own["FD-classifier"]
    return found


@pytest.mark.parametrize("name", ["fashion-mnist", "emoji-32", "fashion-mnist-likelihood"])
def test_presets_expect_what_was_measured_on_the_files_in_the_package(name):
    expected = {key: value for key, value in load_recipe(name).expected.items() if key not in ("curve", "measured_in")}
    del expected["parameters"]  # which tests/model/test_recipe.py counts
    every = results()
    if name == "fashion-mnist-likelihood":
        found = every[f"bits-{name}"]
        wanted = bits({split: found[split] for split in ("test", "train")}) | {"samples": 1000}
        wanted["fd_efflite0_in_20_steps"] = float(f"{found['samples']['efflite0']:.4g}")
        wanted["fd_classifier_in_20_steps"] = float(f"{found['samples']['classifier-28']:.4g}")
    else:
        found, scores = every[f"shipped-{name}"]["bits_per_dim"], every[f"scores-{name}"]
        chains = {"10": scores["chains"]["the default, 10 steps"]}
        if whole := scores["chains"].get("ancestral, 1,000 steps"):
            chains["1000"] = whole
        wanted = bits({split: found[f"{split}_stratified"] for split in ("test", "train")})
        wanted |= distances(chains) | {"samples": scores["n"]}
    assert expected == wanted


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

    fails = f"python {tmp_path}/none.py"
    for name, its in (("bad", fails), ("distilled", "python bench/distilled.py RUN …"), ("solvers", fails)):
        found = {"command": its, "made_of": {"fashion-mnist": "0" * 64}}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    code, lines, said = run()
    assert code == 1 and said.splitlines()[-1] == "failed: bad"
    assert lines[0] == f"bad: other fashion-mnist: {fails}"
    assert lines[1].startswith("distilled: other fashion-mnist; by hand: `undiffuse distill fashion-mnist")
    assert lines[2:5] == ["new: of today's weights", done, "made --n 2 a b"]
    assert lines[5].startswith("solvers: other fashion-mnist; by hand: `python bench/solvers.py`")
    assert len(lines) == 6


def names(result: dict) -> list[str]:
    return [row["name"] for row in result["rows"]]


@pytest.fixture
def tried(script, monkeypatch, tmp_path):
    """Calls `trial.run` in a copy of bench/ where nothing is trained: what was, and the rows of result and table."""
    (tmp_path / "docs").mkdir()
    page, bench = tmp_path / "docs" / "benchmarks.md", tmp_path / "bench"
    page.write_text("<!-- toy:begin -->\n<!-- toy:end -->\n")
    bench.mkdir()
    for name in ("trial", "machine"):
        (bench / f"{name}.py").write_text((BENCH / f"{name}.py").read_text())
    trial = script("trial", bench)

    def call(
        judges: dict[str, str], *words: str, candidates: str = "a b", on: str = "X", unit: str = "seconds"
    ) -> tuple[list[str], dict, list[str]]:
        done, argv = [], [bench / "toy.py", "--work", tmp_path, *words]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        monkeypatch.setattr(trial, "made_of", lambda *names: {name: judges[name] for name in names})
        monkeypatch.setattr(trial, "processor", lambda: on)
        monkeypatch.setattr(trial, "trained", lambda *given: (done.append(f"{given[0]} {given[2]:g}"), {}))
        asked = {name: ("toy.toml", [name]) for name in candidates.split()}
        trial.run(
            asked, lambda *_: {}, lambda result: repr(names(result)), tuple(judges), unit=unit,
            opened=lambda preset, settings: (settings[0], preset),
        )  # fmt: skip
        result = json.loads((bench / "toy.json").read_text())
        return done, result, re.findall(r"\w+", page.read_text().splitlines()[1])

    return call


def test_rows_that_other_extractors_judged_are_done_again_and_meanwhile_not_in_the_table(tried):
    first, second = {"judge": "1"}, {"judge": "2"}
    assert tried(first)[0] == ["a 240", "b 240"] and tried(first, "b", "--seconds", "9")[0] == ["b 9"]
    done, result, shown = tried(first)
    assert (done, result["made_of"], shown) == ([], first, ["a", "b", "b"])

    done, result, shown = tried(second, "b")
    assert (done, result["made_of"], shown) == (["b 240"], first, ["b"])
    assert [(row["name"], row["budget"], row["made_of"]) for row in result["rows"]] == [
        ("a", 240, first), ("b", 9, first), ("b", 240, second)
    ]  # fmt: skip
    done, result, shown = tried(second)
    assert (done, result["made_of"], shown) == (["a 240", "b 9"], second, ["b", "a", "b"])
    assert all(row["made_of"] == second for row in result["rows"])


def test_rows_at_equal_time_are_of_one_processor_each(tried):
    first, second = {"judge": "1"}, {"judge": "2"}
    tried(first, "a", on="X")
    done, result, _ = tried(first, on="Y")
    assert done == ["a 240", "b 240"]
    assert [(row["name"], row["processor"]) for row in result["rows"]] == [("a", "X"), ("a", "Y"), ("b", "Y")]
    assert tried(first, "a", on="X")[0] == []
    done, result, _ = tried(second, on="Y")  # by other extractors none stays as it was
    assert done == ["a 240", "b 240"]
    assert {(row["processor"], row["made_of"]["judge"]) for row in result["rows"]} == {("Y", "2")}


def test_rows_at_equal_images_are_of_any_processor(tried):
    assert tried({}, on="X", unit="images")[0] == ["a 240", "b 240"]
    assert tried({}, on="Y", unit="images")[0] == []


def test_rows_of_other_extractors_go_where_they_are_no_candidates_any_more(tried):
    tried({"judge": "1"})
    done, result, shown = tried({"judge": "2"}, candidates="b c")
    assert (done, result["made_of"], shown) == (["b 240", "c 240"], {"judge": "2"}, ["b", "c"])
    done, result, shown = tried({"judge": "2"}, candidates="c d")
    assert (done, shown) == (["d 240"], ["b", "c", "d"])


def test_features_of_real_images_are_kept_by_the_extractor_that_made_them(script, monkeypatch, tmp_path):
    choose, seen = script("choose"), []

    class Fake:
        def __init__(self, sha256: str):
            self.sha256 = sha256

        def __call__(self, images: torch.Tensor):
            seen.append(self.sha256)
            return SimpleNamespace(pool=images.flatten(1).double() * int(self.sha256[0]))

    images = SimpleNamespace(images=torch.arange(8, dtype=torch.uint8).reshape(4, 1, 1, 2))
    monkeypatch.setattr(choose, "open_source", lambda _: images)
    for sha256, mean in (("1" * 64, [3.0, 4.0]), ("2" * 64, [6.0, 8.0]), ("1" * 64, [3.0, 4.0])):
        monkeypatch.setattr(choose, "open_features", lambda *_, sha256=sha256: Fake(sha256))
        choose.reference.cache_clear()
        assert choose.reference("efflite0", tmp_path, 4).mean.tolist() == mean
    assert seen == ["1" * 64, "2" * 64]


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
