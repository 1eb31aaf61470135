"""What is said of scores: the table, the warnings, and the same from several processes."""

import json

import pytest

from tests.cli.toy import save
from tests.machine.test_dist import finish, start
from undiffuse.measure.scores import Result

PLAIN = {"score": "FID", "key": "fd", "value": 3.17, "better": "lower"}


def table(*rows):
    return Result([PLAIN | row for row in rows], [], {}, {}).table()


def test_a_table_has_the_columns_that_there_are():
    assert table({}) == ["score  samples", "FID       3.17"]
    assert table({"value": 0.0}, {"value": 0.00012345, "score": "KID"}) == [
        "score   samples", "FID           0", "KID    1.23e-04"
    ]  # fmt: skip
    lines = table({"real": 1.5, "real_n": 2000, "sd": 0.25, "each": [3.0, 3.34]}, {"score": "precision", "value": 0.5})
    assert [line.split() for line in lines] == [
        ["score", "samples", "±", "(2", "seeds)", "2,000", "real"],
        ["FID", "3.17", "0.25", "1.5"],
        ["precision", "0.5"],
    ]
    assert len({line.index(text) + len(text) for line, text in zip(lines, ("2,000 real", "1.5"), strict=False)}) == 1


def test_one_set_has_the_error_that_it_tells():
    lines = table({"score": "IS", "value": 9.46, "error": 0.11}, {})
    assert [line.split() for line in lines] == [
        ["score", "samples", "±", "(one", "set)"], ["IS", "9.46", "0.11"], ["FID", "3.17"]
    ]  # fmt: skip
    assert len(table({"error": 1.0, "sd": 0.25, "each": [3.0, 3.34]})[1].split()) == 3


def test_a_page_shows_markup_as_text():
    assert "<b>" not in Result([PLAIN | {"score": "<b>"}], [], {}, {})._repr_html_()


@pytest.mark.slow
@pytest.mark.parametrize("n", [40, 5], ids=["several batches", "fewer batches than processes"])
def test_two_processes_have_the_numbers_of_one(tmp_path, monkeypatch, n):
    """With every metric, samples, reference and floor divided."""
    save(tmp_path / "MODEL.safetensors")
    words = ["eval", tmp_path / "MODEL.safetensors", "digits", "--features", "tests.waves:Waves", "-n", n, "--steps", 3]
    words = [*map(str, words), "--batch", "6", "--json", "--device", "cpu", "--keep-images"]
    found = []
    for number in (1, 2):
        more = ["--out", str(tmp_path / f"out{number}"), "--save-statistics", str(tmp_path / f"{number}.npz")]
        monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / f"cache{number}"))
        ended = finish(start(number, *words, *more))
        assert [code for code, _, _ in ended] == [0] * number, ended
        assert [bool(out) for _, out, _ in ended] == [True] + [False] * (number - 1)
        found.append(json.loads(ended[0][1]))
    one, two = found
    assert [row["score"] for row in one["scores"]] == [row["score"] for row in two["scores"]]
    for alone, shared in zip(one["scores"], two["scores"], strict=True):
        for key, value in alone.items():
            assert shared[key] == (pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value)
    assert one["notes"] == two["notes"] and one["protocol"] == two["protocol"]
    assert (tmp_path / "out1" / "samples-0.npz").read_bytes() == (tmp_path / "out2" / "samples-0.npz").read_bytes()
    assert (tmp_path / "2.npz").exists()
