"""Named tensors from a stranger's file: safetensors, or torch's pickle, which is read behind a flag and never executed.

`weights_only=True` builds tensors and plain containers, and refuses any other name that the stream asks for.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from undiffuse.errors import Corrupt, UsageError

PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def read_tensors(path: Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of the file, on the CPU.

    Raises UsageError for a missing file; Corrupt for a damaged one, one that holds anything else than named tensors,
    and a pickle, by its ending or its first bytes, unless `allow_pickle`.
    """
    if not path.is_file():
        raise UsageError(f"{path} is missing; give a .safetensors file")
    ending = path.suffix.lower()
    if ending in PICKLES or (ending != ".safetensors" and _begins_as_pickle(path)):
        return _read_pickle(path, allow_pickle)
    try:
        return load_file(path)
    # The last three are what torch makes of the types and shapes that safetensors lets through.
    except (OSError, SafetensorError, KeyError, RuntimeError, TypeError) as error:
        raise Corrupt(f"{path} is damaged, or no safetensors file: {error}") from error


def _begins_as_pickle(path: Path) -> bool:
    """A zip, as torch writes them, or a bare pickle: safetensors begin with a length, whose upper bytes are 0."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError:  # which is said by whoever reads all of it
        return False
    return start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[4:] != bytes(4))


def _read_pickle(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if not allow_pickle:
        raise Corrupt(
            f"{path} is a pickle, which can run code when it is read; give a safetensors file, or import it with "
            "`undiffuse import SRC RUN --allow-pickle`, which reads the tensors in it and nothing else"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise Corrupt(f"{path} is damaged, or asks for more than tensors, which is not granted") from error
    if not (isinstance(state, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items())):
        raise Corrupt(f"{path} holds something else than named tensors; give a bare state dict")
    return dict(state)
