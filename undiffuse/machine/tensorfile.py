"""One safetensors file: named tensors, JSON beside them, and a checksum that it carries itself. Pickles are refused."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Shaped
from safetensors import SafetensorError
from torch import Tensor

from undiffuse.errors import Corrupt, UsageError
from undiffuse.machine.disk import SMALL, reading, write_atomic
from undiffuse.strict import to_json

FORMAT = 1
# torch.save writes a zip, or did write a pickle; 80 02 00 … { is a safetensors header of 640 bytes, though.
PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05](?!\0{6}\{)")
WEIGHTS = re.compile(rb'\{"__metadata__":\{"undiffuse":"\{\\"sha256\\": \\"([0-9a-f]{64})\\"')

Tensors = Mapping[str, Shaped[Tensor, "..."]]
Loaded = dict[str, Shaped[Tensor, "..."]]


def encode(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    data = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)
    length = int.from_bytes(data[:8], "little")
    if length > SMALL:
        raise UsageError(f"{len(tensors)} tensors need a header of {length} bytes, more than {SMALL}; use fewer")
    return data


def damaged(path: Path, head: bytes, why: str) -> Corrupt:
    if PICKLE.match(head):
        return Corrupt(
            f"{path} is a pickle, as torch.save writes; a pickle can run a stranger's code, so it is never executed. "
            "Convert it to safetensors, or see `undiffuse import --help`"
        )
    return Corrupt(f"{path} is damaged: {why}; restore it from a copy")


def _header_length(path: Path, head: bytes, size: int) -> int:
    """The length of a safetensors header, from the first nine bytes. Raises Corrupt if there can be none."""
    length = int.from_bytes(head[:8], "little")
    if head[8:] != b"{" or length > min(size - 8, SMALL):
        raise damaged(path, head, "it does not begin as a safetensors file does")
    return length


def begins_as_weights(path: Path) -> bool:
    """Whether the first bytes of a file are those of safetensors, whatever its name."""
    with reading(path) as file:
        head, size = file.read(9), os.fstat(file.fileno()).st_size
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= min(size - 8, SMALL)


def decode(path: Path, data: bytes) -> Loaded:
    _header_length(path, data[:9], len(data))
    try:
        with torch.device("cpu"):  # else an empty tensor would be made on the caller's default device
            return safetensors.torch.load(data)
    # The last three are what torch makes of the types and shapes that safetensors lets through.
    except (SafetensorError, KeyError, RuntimeError, TypeError) as error:
        raise damaged(path, data[:9], str(error).partition("\n")[0]) from error


def refuse_newer(path: Path, found: Any) -> None:
    """Raises UsageError for a format version that only a later undiffuse reads, Corrupt for what is none."""
    if not isinstance(found, int):
        raise Corrupt(f"{path} is damaged: its format version is {found!r}, no integer; restore it from a copy")
    if found > FORMAT:
        raise UsageError(f"{path} has format {found}, and this undiffuse reads up to {FORMAT}; upgrade undiffuse")


def write_weights(path: Path, tensors: Tensors, meta: Mapping[str, Any]) -> None:
    """One safetensors file that carries `meta` and a sha256 of all its bytes, taken with zeros in the digest's place.

    Raises StorageError.
    """
    header = to_json({"sha256": "0" * 64, "format": FORMAT, "meta": dict(meta)})
    data = bytearray(encode(tensors, {"undiffuse": header}))
    place = WEIGHTS.match(data, 8)
    assert place, "safetensors no longer writes its metadata first"
    data[place.start(1) : place.end(1)] = hashlib.sha256(data).hexdigest().encode()
    write_atomic(path, data)


def read_weights(path: Path) -> tuple[Loaded, dict[str, Any]]:
    """The tensors, on the CPU, and the `meta` of such a file.

    Raises Corrupt if a bit differs or the file is not undiffuse's, UsageError for a newer format.
    """
    with reading(path) as file:
        length = _header_length(path, head := file.read(9), os.fstat(file.fileno()).st_size)
        file.seek(0)
        data = file.read()
    place = WEIGHTS.match(data, 8)
    if not place:
        raise Corrupt(f"{path} is damaged, or not undiffuse's; for other weights see `undiffuse import --help`")
    digest = hashlib.sha256(data[: place.start(1)] + b"0" * 64)
    digest.update(memoryview(data)[place.end(1) :])
    if digest.hexdigest().encode() != place[1]:
        raise damaged(path, head, "its sha256 is not the one that it carries")
    try:
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["undiffuse"])
        version, meta = header["format"], dict(header["meta"])
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise damaged(path, head, "its metadata is not what undiffuse writes") from error
    refuse_newer(path, version)
    return decode(path, data), meta
