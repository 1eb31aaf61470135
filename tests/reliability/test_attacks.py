"""Files from a stranger: nothing in them runs, nothing makes the reader slow or large, any bytes get an answer."""

import hashlib
import io
import json
import pickle
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from undiffuse.errors import Corrupt, UsageError
from undiffuse.machine.disk import to_json
from undiffuse.machine.store import Run, _seal
from undiffuse.machine.tensorfile import WEIGHTS, read_weights, write_weights


class Evil:
    """Unpickling one creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickles(victim):
    """Every form in which a pickle comes: of each protocol, and from torch.save of each age."""
    evil = Evil(victim)
    yield from (pickle.dumps(evil, protocol) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1))
    for modern in (True, False):
        buffer = io.BytesIO()
        torch.save({"weights": torch.ones(2), "evil": evil}, buffer, _use_new_zipfile_serialization=modern)
        yield buffer.getvalue()


PICKLES = 6


@pytest.fixture
def victim(tmp_path):
    return tmp_path / "victim"


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "a.safetensors"
    write_weights(
        path, {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).half()}, {"name": "ü", "n": [1, float("inf")]}
    )
    return path


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    with run.lock():
        run.save(1, {"model": {"w": torch.ones(2)}}, {"a": 1})
    return run


def forge(run, **files):
    """A checkpoint as someone would make it who knows the format."""
    entries = {}
    for name, data in files.items():
        name = name.replace("__", ".")
        (run.folder(1) / name).write_bytes(data)
        entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = to_json({"format": 1, "step": 1, "files": entries}).removesuffix(b"\n}\n")
    (run.folder(1) / "manifest.json").write_bytes(_seal(text))


def tensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_the_evil_is_real(victim):
    made = list(pickles(victim))
    assert len(made) == PICKLES
    pickle.loads(made[0])
    assert victim.exists()


@pytest.mark.parametrize("kind", range(PICKLES))
def test_a_pickle_for_weights(tmp_path, victim, kind):
    path = tmp_path / "model.pt"
    path.write_bytes(list(pickles(victim))[kind])
    with pytest.raises(
        Corrupt, match=r"model\.pt is a pickle, as torch\.save writes; .* it is never executed"
    ) as caught:
        read_weights(path)
    assert caught.value.exit_code == 5 and not victim.exists()


@pytest.mark.parametrize("kind", range(PICKLES))
def test_a_pickle_in_a_checkpoint(run, victim, kind):
    evil, meta = list(pickles(victim))[kind], (run.folder(1) / "meta.json").read_bytes()
    for path in sorted(run.folder(1).iterdir()):
        whole = path.read_bytes()
        path.write_bytes(evil)
        for read in (run.verify, run.load):
            with pytest.raises(Corrupt, match=f"{path} is a pickle"):
                read(1)
        path.write_bytes(whole)
    forge(run, model__safetensors=evil, meta__json=meta)
    run.verify(1)
    with pytest.raises(Corrupt, match=r"model\.safetensors is a pickle"):
        run.load(1)
    forge(run, meta__json=evil)
    with pytest.raises(Corrupt, match=r"meta\.json is damaged: it is not JSON"):
        run.load(1)
    assert not victim.exists()


def test_a_header_of_640_bytes_is_no_pickle(tmp_path):
    """Its first two bytes are 80 02, as those of a pickle of protocol 2."""
    path = tmp_path / "a.safetensors"
    for length in range(0, 800, 8):
        write_weights(path, {"w": torch.ones(2)}, {"text": "x" * length})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    data = bytearray(path.read_bytes())
    assert data[:9] == b"\x80\x02\0\0\0\0\0\0{"
    assert read_weights(path)[1] == {"text": "x" * length}
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Corrupt, match="is damaged: its sha256 is not the one that it carries"):
        read_weights(path)


def test_one_file_holds_weights_and_meta(weights):
    found, meta = read_weights(weights)
    assert meta == {"name": "ü", "n": [1, None]}
    assert torch.equal(found["w"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(found["b"], torch.ones(2).half())
    before = weights.read_bytes()
    write_weights(weights, found, meta)
    assert weights.read_bytes() == before  # the same in, the same bytes out


def test_every_bit_and_every_length_of_a_weights_file(weights):
    whole = weights.read_bytes()
    bits = [whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :] for i in range(len(whole)) for bit in range(8)]
    for data in [*bits, *(whole[:length] for length in range(len(whole))), whole + b"\0"]:
        weights.write_bytes(data)
        with pytest.raises(Corrupt, match=f"{weights} is damaged"):
            read_weights(weights)


def test_safetensors_of_others_are_told_from_ours(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(tensors({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"1"))
    with pytest.raises(Corrupt, match=r"is damaged, or not undiffuse's; .* see `undiffuse import --help`"):
        read_weights(path)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HUGE = 2**62
BOMBS = {
    "length of 2^63": b"\xff" * 7 + b"\x7f{",
    "length past the end": (2**19).to_bytes(8, "little") + b"{}",
    "nothing": b"",
    "eight bytes": bytes(8),
    "no object": tensors(b"[]"),
    "nested": tensors(b'{"a":' * 100_000),
    "a hundred thousand tensors": tensors(
        {f"{i:05d}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    ),
    "shape overflows": tensors({"a": {**ONE, "shape": [HUGE, HUGE]}}, bytes(4)),
    "empty, and overflows": tensors({"a": {**ONE, "shape": [0, HUGE, HUGE], "data_offsets": [0, 0]}}),
    "empty, past 63 bits": tensors({"a": {**ONE, "shape": [2**64 - 1, 0], "data_offsets": [0, 0]}}),
    "offsets past the end": tensors({"a": {**ONE, "data_offsets": [2**40, 2**40 + 4]}}, bytes(4)),
    "overlap": tensors({"a": ONE, "b": ONE}, bytes(4)),
    "hole": tensors({"a": {**ONE, "data_offsets": [4, 8]}}, bytes(8)),
    "polyglot tail": tensors({"a": ONE}, bytes(4) + b"PK\x03\x04"),
    "type without a torch type": tensors({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, bytes(2)),
    "unknown type": tensors({"a": {**ONE, "dtype": "PICKLE"}}, bytes(4)),
    "metadata of numbers": tensors({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_fast_and_small(run, name):
    """Row 17, in a checkpoint whose manifest vouches for them."""
    forge(run, model__safetensors=BOMBS[name], meta__json=b"{}")
    started = time.process_time()
    tracemalloc.start()
    with pytest.raises(Corrupt, match=r"model\.safetensors is damaged"):
        run.load(1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - started < 1
    assert peak < max(2 * len(BOMBS[name]), 2**20)


def test_a_bomb_is_not_even_read(tmp_path):
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write((2**39).to_bytes(8, "little") + b"{")
        file.truncate(2**40)
    with pytest.raises(Corrupt, match="does not begin as a safetensors file does"):
        read_weights(path)


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"format": "1", "step": 1, "files": {}},
        {"format": None},
        {"format": 1, "step": 1},
        {"format": 1, "step": 1, "files": []},
        {"format": 1, "step": 1, "files": {}},
        {"format": 1, "step": 1, "files": {"meta.json": {}, "../../secret": {}}},
        {"format": 1, "step": 1, "files": {"meta.json": {}, "/etc/hostname": {}}},
        {"format": 1, "step": [], "files": {"meta.json": {}}},
        {"format": 1, "step": 1, "files": {"meta.json": None}},
        {"format": 1, "step": 1, "files": {"meta.json": 7}},
        {"format": 1, "step": 1, "files": {"meta.json": {}, "manifest.json": {}}},
    ],
)
def test_a_forged_manifest_is_corrupt(run, manifest):
    (run.folder(1) / "manifest.json").write_bytes(_seal(to_json(manifest).removesuffix(b"\n}\n")))
    for read in (run.verify, run.load):
        with pytest.raises(Corrupt, match=r"(manifest|meta)\.json is damaged"):
            read(1)


def test_meta_that_is_no_object_is_corrupt(run):
    forge(run, meta__json=b"[1]")
    with pytest.raises(Corrupt, match=r"meta\.json is damaged: it is not a JSON object"):
        run.load(1)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 6), st.binary(max_size=6)), max_size=5),
    honest=st.booleans(),
)
def test_any_bytes_give_corrupt_or_the_tensors(weights, edits, honest):
    """Row 17. Half of the files carry the right digest, so that the parsers below it are reached too."""
    path, data = weights.with_name("b.safetensors"), bytearray(weights.read_bytes())
    for place, gone, new in edits:
        data[place : place + gone] = new
    if honest and (match := WEIGHTS.match(data, 8)):
        data[match.start(1) : match.end(1)] = b"0" * 64
        data[match.start(1) : match.end(1)] = hashlib.sha256(data).hexdigest().encode()
    path.write_bytes(data)
    try:
        found, meta = read_weights(path)
    except (Corrupt, UsageError) as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert isinstance(meta, dict) and all(isinstance(tensor, torch.Tensor) for tensor in found.values())
        assert honest or data == weights.read_bytes()
