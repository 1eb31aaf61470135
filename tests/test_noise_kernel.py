"""The Triton kernel of `Keys.normal` equals torch to the bit, by Triton's interpreter on the CPU; launches are counted.

Whether Triton interprets is settled when it is imported, hence processes of their own.
"""

import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_key import FULL, reference_philox
from undiffuse import kernel, key
from undiffuse.key import MASK, SQRT_HALF, Key, drawn_by, normal_table

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux alone")

ROWS = {
    "the first": range(3),
    "none": range(0),
    "where the second counter word begins": range(2**32 - 2, 2**32 + 3),
    "the last of an int64": range(2**63 - 3, 2**63 - 1),
    "every third": range(5, 20, 3),
    "any, up to 2^64": [8, 0, 2**62 + 5, 2**32, -1],
}
COUNTS = (0, 1, 2, 3, 4, 5, 48, 784, 1001, 2050)
# Words of a key and a row; the first is Random123's known answer of zeros, which leaves no freedom.
ZEROS = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
VECTORS = [[0, 0, 0], [0xA4093822, 0x299F31D0, 0x0370734413198A2E], [FULL, FULL, 2**63 - 2]]

INTERPRETED = """
import json, sys, torch
from undiffuse import key, kernel

given, path = json.loads(sys.argv[1]), sys.argv[2]
table, halves = key.normal_table(torch.device("cpu")), torch.arange(65536, dtype=torch.float32)
found = {}
for name, (rows, made) in given["rows"].items():
    rows = range(*rows) if made else torch.tensor(rows, dtype=torch.int64)
    for count in given["counts"]:
        words = key.Key(7).fold(name, count).words
        found[f"{name} {count}"] = kernel.draw(words, rows, count, table, key.SQRT_HALF)
for i, (k0, k1, row) in enumerate(given["vectors"]):
    found[f"vector {i}"] = kernel.draw((k0, k1), range(row, row + 1), 8, halves, 1.0)
torch.save(found, path)
key.normal_table = lambda device: table
print(key.drawn_by(torch.device("cuda"))[1])
"""

COMPILED = """
import re, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from undiffuse import kernel
from undiffuse.key import SQRT_HALF

made = kernel._compiled()
types = dict(out="*fp32", table="*fp32", rows="constexpr", seed="u64", first="i64", step="i64", n="i64", count="i64")
types |= dict(scale="constexpr", size="constexpr")
constants = dict(rows=None, scale=SQRT_HALF, size=kernel.BLOCKS)
source = ASTSource(made, types, {(made.arg_names.index(name),): value for name, value in constants.items()})
print(compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm["ptx"])
"""


def python(code: str, *words: str, **environment: str) -> str:
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What the kernel draws, by name, and what a card would be drawn for by."""
    path = tmp_path_factory.mktemp("kernel") / "drawn.pt"
    rows = {
        name: ([each.start, each.stop, each.step], True) if isinstance(each, range) else (each, False)
        for name, each in ROWS.items()
    }
    given = json.dumps({"rows": rows, "counts": COUNTS, "vectors": VECTORS})
    said = python(INTERPRETED, given, str(path), TRITON_INTERPRET="1")
    return torch.load(path, weights_only=True), said.strip()


@linux
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ROWS)
def test_the_kernel_draws_what_torch_does(interpreted, name, count):
    rows = torch.tensor(list(ROWS[name]), dtype=torch.int64)
    expected = Key(7).fold(name, count).rows(rows).normal(count)
    found = interpreted[0][f"{name} {count}"]
    assert found.shape == (len(rows), count) and found.dtype == torch.float32
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@linux
@pytest.mark.parametrize("i", range(len(VECTORS)))
def test_known_answers(interpreted, i):
    """With a table of 0 to 65535 a draw is the sum of the halves of its word, which is exact in float32."""
    k0, k1, row = VECTORS[i]
    words = [word for block in (0, 1) for word in reference_philox((block, 0, row & FULL, row >> 32), (k0, k1))]
    assert i > 0 or words[:4] == ZEROS
    assert interpreted[0][f"vector {i}"][0].tolist() == [(word & 0xFFFF) + (word >> 16) for word in words]


@linux
def test_the_kernel_passes_the_trial_before_its_first_use(interpreted):
    assert interpreted[1] == "Triton"


@linux
@pytest.mark.slow
@pytest.mark.parametrize("generation", [75, 90])
def test_what_a_card_executes_rounds_each_sum_and_each_product(generation, tmp_path):
    """The code for a card, which can be made without one: 10 rounds of two products, and nothing fused."""
    lines = python(COMPILED, str(generation), TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    operations = [line.split()[0] for line in lines if line.startswith("\t")]
    lanes = kernel.BLOCKS // 128  # counter blocks a thread, of 4 numbers each
    assert operations.count("mul.hi.u32") == 20 * lanes
    assert operations.count("add.f32") == operations.count("mul.f32") == 4 * lanes
    assert [each for each in operations if each.startswith(("fma", "mad.f", "mad.rn.f"))] == []


def test_nothing_imports_triton_before_a_card_draws():
    code = (
        "import sys, undiffuse.key as k; k.Key(0).normal(3); print({'triton', 'undiffuse.kernel'} & set(sys.modules))"
    )
    assert python(code).strip() == "set()"


@pytest.fixture
def card(monkeypatch):
    """A device called cuda that has the CPU's memory."""
    table = normal_table(CPU)
    monkeypatch.setattr(key, "normal_table", lambda device: table)
    return torch.device("cuda")


def failing(error):
    def draw(*given):
        raise error

    return draw


@pytest.mark.parametrize("kind", ["cpu", "meta", "mps"])
def test_another_device_than_a_card_has_no_kernel(kind):
    assert drawn_by.__wrapped__(torch.device(kind)) == (key.draw, "torch")


def test_a_kernel_that_passes_is_taken(card, monkeypatch):
    asked = []

    def launch(*given):
        asked.append(given)
        return key.draw(*given)

    monkeypatch.setattr(kernel, "draw", launch)
    assert drawn_by.__wrapped__(card) == (launch, "Triton")
    assert {type(given[1]) for given in asked} == {range, torch.Tensor}  # the kernel is another one for either
    monkeypatch.setattr(key, "drawn_by", lambda device: drawn_by.__wrapped__(card))
    for rows in (range(4, 7), [4, 6, 5]):
        given = torch.tensor(rows)
        assert torch.equal(
            Key(0).rows(given).normal(2, 3),
            key.draw(Key(0).words, given, 6, normal_table(CPU), SQRT_HALF).view(3, 2, 3),
        )
        assert asked[-1][1] == rows if isinstance(rows, range) else torch.equal(asked[-1][1], given)


def test_a_kernel_that_draws_other_bits_is_not_used(card, monkeypatch):
    monkeypatch.setattr(kernel, "draw", lambda *given: torch.nextafter(key.draw(*given), torch.tensor(torch.inf)))
    assert drawn_by.__wrapped__(card) == (key.draw, "torch (the Triton kernel draws other numbers here)")


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError("no C compiler;\nset CC"), "fails: RuntimeError: no C compiler; set CC"),
        (AttributeError("no driver"), "fails: AttributeError: no driver"),
    ],
)
def test_a_kernel_that_cannot_be_made_here_is_not_used_and_the_reason_is_kept(card, monkeypatch, error, said):
    monkeypatch.setattr(kernel, "draw", failing(error))
    assert drawn_by.__wrapped__(card) == (key.draw, f"torch (the Triton kernel {said})")


@pytest.mark.parametrize("triton", [None, ModuleType("triton")], ids=["missing", "broken"])
def test_without_triton_torch_draws(card, monkeypatch, triton):
    """Python says by an ImportError that a module is missing, and that it is not what it should be."""
    kernel._compiled.cache_clear()
    monkeypatch.delitem(sys.modules, "triton.language", raising=False)
    monkeypatch.setitem(sys.modules, "triton", triton)
    draw, said = drawn_by.__wrapped__(card)
    assert draw is key.draw and said.startswith("torch (Triton cannot be imported: ")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: out of memory"), KeyboardInterrupt()])
def test_what_is_no_fault_of_the_kernel_is_raised(card, monkeypatch, error):
    monkeypatch.setattr(kernel, "draw", failing(error))
    with pytest.raises(type(error)):
        drawn_by.__wrapped__(card)


class Launches(TorchDispatchMode):
    """Operators that a card would execute: all but views and new memory. Of those, the copies from the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or "empty" in func.name() or func.namespace == "profiler"):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def copies(self) -> int:
        return self.names.count("aten::_to_copy")


def launches(keys) -> Launches:
    keys.normal(3, 32, 32)  # the table is made
    with Launches() as counted:
        keys.normal(3, 32, 32)
    return counted


def test_a_draw_in_torch_is_61_launches():
    """Four in each of ten rounds."""
    counted = launches(Key(0).rows(128, "meta"))
    print(f"a draw is {len(counted.names)} operators in torch, {counted.copies} of them copies to the device")
    assert len(counted.names) <= 61 and counted.copies == 0


@pytest.mark.parametrize(
    "rows, copies",
    [(range(3), 0), (range(2**32 - 1, 2**32 + 4), 0), ([7], 0), ([], 0), ([8, 0, 8], 1), ([0, 2, 3], 1), ([-1, 0], 0)],
    ids=str,
)
def test_rows_that_follow_one_another_are_not_copied(rows, copies):
    keys = Key(0).rows(torch.tensor(rows, dtype=torch.int64), "meta")
    assert launches(keys).copies == copies
    assert launches(keys.fold("a").to("meta")[1:]).copies == copies


@pytest.mark.parametrize("rows", [[2**63 - 1], [2**63 - 2, 2**63 - 1], [2**63 - 1, -(2**63)]])
def test_the_last_rows_draw_too_though_no_range_ends_there(rows):
    keys = Key(0).rows(torch.tensor(rows))
    words = [reference_philox((0, 0, row & FULL, row >> 32 & FULL), keys.key.words) for row in rows]
    assert keys.bits(4).tolist() == words and keys.known is None


@pytest.mark.parametrize(
    "part", [slice(2, 5), slice(None, None, 3), slice(-2, None), slice(7, 3), slice(0, 99, 2)], ids=str
)
def test_a_slice_keeps_what_is_known_of_its_rows(part):
    keys = Key(0).rows(torch.arange(MASK - 3, MASK + 6))[part]
    assert keys.known is not None and list(keys.known) == keys.rows.tolist()
    assert torch.equal(keys.normal(5), Key(0).rows(keys.rows.clone()).normal(5))
