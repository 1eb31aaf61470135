"""LSUN as its authors publish it: an LMDB of encoded pictures, one a key. Needs the extra `lmdb`."""

import os
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

from undiffuse.data.format.arrays import whole
from undiffuse.data.format.folder import Pictures
from undiffuse.data.listing import is_hidden
from undiffuse.data.passed import Passed, beside
from undiffuse.data.picture import Reading
from undiffuse.data.source import Format, Source, Split
from undiffuse.errors import DataError
from undiffuse.strict import extra

FILE, LOCK = "data.mdb", "lock.mdb"
COUNTS = ("__len__", "__keys__", "length", "num-samples", "num_samples")  # keys that tools put beside those of pictures
TRAIN, VAL = "_train_lmdb", "_val_lmdb"  # how the two splits of a category are named


class Lmdb(Format):
    """A folder with `data.mdb`, such as `bedroom_train_lmdb`, or that file; the order is that of the keys.

    The test split of `bedroom_train_lmdb` is `bedroom_val_lmdb` beside it.
    """

    @staticmethod
    def match(spec: str) -> int:
        path = Path(spec)
        return 2 if (path / FILE).is_file() or (path.name == FILE and path.is_file()) else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        path = Path(spec) if Path(spec).is_dir() else Path(spec).parent
        real = Path(os.path.abspath(path))  # "." has no name
        held_out = real.with_name(real.name.removesuffix(TRAIN) + VAL)
        if split == "test" and real.name.endswith(TRAIN) and (held_out / FILE).is_file():
            path = held_out
        else:
            whole(split, spec)
        database = Database(path, extra("lmdb", "lmdb"))
        keys = database.keys()
        names = [key.decode("utf-8", "surrogateescape") for key in keys]
        visible = tuple(name for name in names if name not in COUNTS and not is_hidden(name))
        counts = sum(name in COUNTS for name in names)
        passed = (Passed(counts, "that hold numbers", "key"),) if counts else ()
        near = beside(path, [FILE, LOCK], split == "train")
        return Pictures(visible, database.read, None, None, reading, (*passed, *near))


class Database:
    """Reads by key. Opened anew each time, which takes far less than to decode a picture: LMDB allows one opening a
    process, and none that was made before a fork."""

    def __init__(self, path: Path, lmdb: ModuleType):
        self.path, self.lmdb, self.lock = path, lmdb, threading.Lock()

    def read(self, name: str) -> bytes:
        """The value of a key, given as UTF-8."""
        with self.lock:
            try:
                with self._open() as environment, environment.begin() as transaction:
                    return transaction.get(name.encode("utf-8", "surrogateescape"), b"")
            except self.lmdb.Error as error:
                raise DataError(str(error)) from error

    def keys(self) -> list[bytes]:
        """All keys, in order. DataError for a file that is damaged."""
        try:
            with self._open() as environment, environment.begin() as transaction:
                size = environment.stat()["psize"] * (environment.info()["last_pgno"] + 1)
                found = (self.path / FILE).stat().st_size
                if found < size:  # to read past the end would end the process
                    raise DataError(f"{self.path / FILE} has {found} bytes, not {size}; it is cut")
                return list(transaction.cursor().iternext(values=False))
        except self.lmdb.Error as error:
            raise DataError(f"{self.path} cannot be read as an LMDB: {error}") from error

    def _open(self) -> Any:
        return self.lmdb.open(str(self.path), readonly=True, lock=False, create=False, readahead=False)
