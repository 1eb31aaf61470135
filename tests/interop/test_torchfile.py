"""Files of strangers: pickles are refused without leave, and with leave never executed."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from undiffuse.errors import Corrupt, UsageError
from undiffuse.interop.torchfile import PICKLES, read_tensors


class Evil:
    """Makes a file of this name when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(params=["torch.save", "pickle"])
def evil(request, tmp_path):
    path, trace = tmp_path / "weights.bin", tmp_path / "trace"
    if request.param == "pickle":
        path.write_bytes(pickle.dumps({"conv_in.weight": Evil(trace)}))
    else:
        torch.save({"conv_in.weight": Evil(trace)}, path)
    return path, trace


def test_the_evil_pickle_does_run_where_it_is_trusted(tmp_path):
    """Else the tests below could not fail."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "trace"))).close()
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("allow", [False, True])
def test_an_evil_pickle_is_refused_and_does_not_run(evil, allow):
    path, trace = evil
    message = "asks for more than tensors" if allow else r"weights\.bin is a pickle.*--allow-pickle"
    with pytest.raises(Corrupt, match=message) as caught:
        read_tensors(path, allow)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", PICKLES)
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_are_read_with_the_flag(tmp_path, suffix, legacy):
    path = tmp_path / f"weights{suffix}"
    weights = {"a": torch.randn(2, 3), "b": torch.nn.Parameter(torch.randn(4).half())}
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    found = read_tensors(path, True)
    assert found.keys() == weights.keys()
    assert torch.equal(found["a"], weights["a"])
    assert found["b"].dtype == torch.float16


@pytest.mark.parametrize("content", [{"state_dict": {"a": torch.zeros(1)}}, [torch.zeros(1)], {1: torch.zeros(1)}])
def test_only_named_tensors_are_taken(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(Corrupt, match=r"weights\.pt holds something else than named tensors; give a bare state dict"):
        read_tensors(tmp_path / "weights.pt", True)


@pytest.mark.parametrize("keep", [0, 1, 10, 300, 500])
def test_a_file_cut_short_is_corrupt(tmp_path, keep):
    path = tmp_path / "weights.bin"
    torch.save({"a": torch.zeros(10)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Corrupt, match="is damaged"):
        read_tensors(path, True)


@pytest.mark.parametrize("name", ["download", "x.weights", "x.PTH"])
def test_a_pickle_is_one_by_its_first_bytes_too(tmp_path, name):
    torch.save({"a": torch.ones(2)}, tmp_path / name)
    assert torch.equal(read_tensors(tmp_path / name, True)["a"], torch.ones(2))
    with pytest.raises(Corrupt, match="is a pickle, which can run code when it is read"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("name", ["none.bin", "none.safetensors"])
def test_a_missing_file_is_the_users(tmp_path, name):
    with pytest.raises(UsageError, match="is missing; give a .safetensors file"):
        read_tensors(tmp_path / name, True)


def test_safetensors_need_no_flag(tmp_path):
    weights = {"a": torch.randn(2, 3)}
    save_file(weights, tmp_path / "weights.safetensors")
    assert torch.equal(read_tensors(tmp_path / "weights.safetensors")["a"], weights["a"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x08\0\0\0\0\0\0\0{       "])
def test_damaged_safetensors_are_corrupt(tmp_path, content):
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises(Corrupt, match=r"weights\.safetensors is damaged, or no safetensors file"):
        read_tensors(tmp_path / "weights.safetensors", True)
