"""One `.npz` of named arrays: written whole or not at all, and one line for what is damaged. Pickles are refused."""

import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from undiffuse.errors import Corrupt
from undiffuse.machine.disk import write_atomic


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Raises StorageError."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


@contextmanager
def reading_arrays(path: Path, damaged: str) -> Iterator["np.lib.npyio.NpzFile"]:
    """The arrays by name. Raises Corrupt, the path and `damaged`, for bytes that are others; `{error}` is why."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            yield arrays
    # What numpy, zip and the shapes that are declared make of bytes that are not ours.
    except (OSError, ValueError, TypeError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise Corrupt(f"{path} {damaged.format(error=error)}") from error
