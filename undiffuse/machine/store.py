"""The run folder: a checkpoint is a directory that one rename makes visible, once all of it is on the disk.

Written: each file into `.tmp-…` and synced; the manifest, with the size and sha256 of each, last; the directory synced,
renamed to `step-000000500`, its parent synced. Read: only what the manifest vouches for, compared in full. So whatever
a kill or a power cut leaves behind is a whole checkpoint, or a name that the next lock sweeps away.

Order is by step number, never by a clock. Tensors are safetensors, the rest is JSON; a pickle is refused unread.
"""

import errno
import hashlib
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from undiffuse.errors import Corrupt, Locked, StorageError, UsageError
from undiffuse.machine import disk, log
from undiffuse.machine.disk import from_json, reading, to_json, writing
from undiffuse.machine.lock import try_lock
from undiffuse.machine.tensorfile import FORMAT, Loaded, Tensors, damaged, decode, encode, refuse_newer

MANIFEST, META = "manifest.json", "meta.json"
STEP = re.compile(r"step-(\d{9,})")
FILE = re.compile(r"[\w-]+\.safetensors|meta\.json|manifest\.json")
LEFTOVER = re.compile(r"\.(tmp|trash)-[0-9a-f]{12}-.+")


def _seal(text: bytes) -> bytes:
    """Ends the text of a manifest with its own sha256, so that damage to it is never taken for a newer format."""
    return text + b',\n "sha256": "%b"\n}\n' % hashlib.sha256(text).hexdigest().encode()


def _entry(size: int, sha256: str) -> dict[str, Any]:
    return {"bytes": size, "sha256": sha256}


def _whole(path: Path) -> bytes:
    with reading(path) as file:
        return file.read()


def _compare(path: Path, found: dict[str, Any], expected: Any, head: bytes) -> None:
    if found != expected:
        raise damaged(path, head, "its size or sha256 is not what the manifest says")


class Run:
    """The folder of one training run. Reading creates nothing; `save` and `retain` are for the holder of `lock`."""

    def __init__(self, path: Path):
        self.path = path
        self._held: list[BinaryIO] = []

    def folder(self, step: int) -> Path:
        return self.path / f"step-{step:09d}"

    @contextmanager
    def lock(self) -> Iterator["Run"]:
        """Makes the folder, holds it for writing, and sweeps what a killed writer left in it.

        Raises Locked at once if it is held already, StorageError if it cannot be written.
        """
        path = self.path / "lock"
        with writing(path, 0):
            disk.make_folder(self.path)
            disk.hook("create", path)
            file = open(path, "a+b", buffering=0)
        with file:
            with writing(path, 0):
                self._take(file, path)
                self._sweep()
            self._held.append(file)
            if sys.platform != "win32":  # a worker would go on holding the lock of a parent that was killed
                os.register_at_fork(after_in_child=self._let_go)
            try:
                yield self
            finally:
                self._let_go()

    def refuse_second(self) -> None:
        """Locked if another process writes in this folder; the folder is not made."""
        if os.path.exists(self.path / "lock"):
            with self.lock():
                pass

    def _take(self, file: BinaryIO, path: Path) -> None:
        if not try_lock(file.fileno()):
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip() or "another process"
            raise Locked(f"{self.path} is in use by {holder}; wait for its end, or give another folder")
        disk.hook("write", path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _let_go(self) -> None:
        while self._held:
            self._held.pop().close()

    def _sweep(self) -> None:
        for folder in (self.path, self.path / "samples", self.path / "ema"):
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if LEFTOVER.fullmatch(path.name):
                    disk.remove(path)

    def save(self, step: int, tensors: Mapping[str, Tensors], meta: Mapping[str, Any]) -> Path:
        """Writes a checkpoint of one `name.safetensors` for each name in `tensors`, and returns its folder.

        A good checkpoint of that step is never replaced; a damaged one is set aside as `.bad-…`.
        Raises StorageError, with nothing older touched and the bytes written so far freed.
        """
        assert self._held, "save needs the lock"
        final = self.folder(step)
        if os.path.lexists(final) and self._is_good(step):
            return final
        temporary = disk.beside(final, "tmp")
        needed = round(1.1 * sum(t.numel() * t.element_size() for part in tensors.values() for t in part.values()))
        with writing(final, needed, temporary):
            if shutil.disk_usage(self.path).free < needed:
                raise OSError(errno.ENOSPC, "the disk is too full")
            disk.make_folder(temporary)
            files = {f"{name}.safetensors": part for name, part in tensors.items()}
            entries = {name: self._put(temporary / name, encode(part)) for name, part in files.items()}
            entries[META] = self._put(temporary / META, to_json(meta))
            manifest = to_json({"format": FORMAT, "step": step, "files": entries})
            self._put(temporary / MANIFEST, _seal(manifest.removesuffix(b"\n}\n")))
            disk.sync_folder(temporary)
            if os.path.lexists(final):
                disk.rename(final, disk.beside(final, "bad"))
            disk.rename(temporary, final)
            disk.sync_folder(self.path)
        return final

    def _put(self, path: Path, data: bytes) -> dict[str, Any]:
        assert FILE.fullmatch(path.name), f"{path.name} is not a name for a file of a checkpoint"
        disk.create(path, data)
        return _entry(len(data), hashlib.sha256(data).hexdigest())

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, good or not, in order. Raises StorageError for an unreadable folder."""
        try:
            names = [entry.name for entry in os.scandir(self.path) if entry.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error.strerror}; give a run folder") from error
        steps = [int(match[1]) for match in map(STEP.fullmatch, names) if match]
        return sorted(step for step in steps if self.folder(step).name in names)

    def _entries(self, step: int) -> dict[str, Any]:
        """The files of a checkpoint and what its manifest says of each."""
        path = self.folder(step) / MANIFEST
        data = disk.read_small(path)
        if _seal(data[: -len(_seal(b""))]) != data:
            raise damaged(path, data[:9], "its sha256 is not the one that it carries")
        manifest = from_json(path, data)
        refuse_newer(path, manifest.get("format"))
        files = manifest.get("files")
        if not isinstance(files, dict) or META not in files or not all(map(FILE.fullmatch, files)):
            raise damaged(path, data[:9], "it does not list the files of a checkpoint")
        if manifest.get("step") != step:
            raise damaged(path, data[:9], f"it belongs to step {manifest.get('step')}")
        return files

    def verify(self, step: int) -> None:
        """Compares a checkpoint with its manifest. Raises Corrupt, naming the file; UsageError for a newer format."""
        for name, expected in self._entries(step).items():
            with reading(path := self.folder(step) / name) as file:
                head = file.read(9)
                file.seek(0)
                found = _entry(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())
            _compare(path, found, expected, head)

    def _is_good(self, step: int) -> bool:
        try:
            self.verify(step)
        except Corrupt:
            return False
        return True

    def load(self, step: int, only: tuple[str, ...] | None = None) -> tuple[dict[str, Loaded], dict[str, Any]]:
        """The tensors, on the CPU, by file and name, and the meta of a checkpoint; verified as it is read.

        Reads all files, or those named in `only`. Raises as `verify` does.
        """
        tensors, meta = {}, None
        for name, expected in self._entries(step).items():
            path = self.folder(step) / name
            if name != META and only is not None and path.stem not in only:
                continue
            data = disk.read_small(path) if name == META else _whole(path)
            _compare(path, _entry(len(data), hashlib.sha256(data).hexdigest()), expected, data[:9])
            if name == META:
                meta = from_json(path, data)
            else:
                tensors[path.stem] = decode(path, data)
        if not isinstance(meta, dict):
            raise Corrupt(f"{self.folder(step) / META} is damaged: it is not a JSON object; restore it from a copy")
        return tensors, meta

    def latest(self, warn: Callable[[str], None] = log.warn) -> int | None:
        """The newest step that is good, None if there is no checkpoint at all; `warn` is told of each damaged one.

        Raises Corrupt if there are checkpoints and none is good: a run never begins anew in silence.
        """
        newest = None
        for step in reversed(self.steps()):
            try:
                self.verify(step)
            except Corrupt as error:
                warn(f"step {step} is passed over: {error}")
                newest = newest or error
            else:
                return step
        if newest is not None:
            raise Corrupt(f"no checkpoint in {self.path} is good. {newest}, or train into another folder") from newest
        return None

    def retain(self, keep: int, also: int | None = None) -> None:
        """Removes checkpoints older than the newest `keep` good ones, of which two are always kept, but step `also`.

        A folder with a file that is not ours is left alone. Raises StorageError.
        """
        assert self._held, "retain needs the lock"
        good = 0
        with writing(self.path, 0):
            for step in (step for step in reversed(self.steps()) if step != also or good < max(keep, 2)):
                if good < max(keep, 2):
                    good += 1 if good >= 2 else self._is_good(step)  # two that are whole are enough to read
                elif all(map(FILE.fullmatch, os.listdir(self.folder(step)))):
                    trash = disk.beside(self.folder(step), "trash")
                    disk.rename(self.folder(step), trash)
                    disk.sync_folder(self.path)  # else a power cut could bring back the name without the files
                    disk.remove(trash)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is named as the checkpoint of a run is."""
    return STEP.fullmatch(path.resolve().name) is not None


def locate(path: Path) -> tuple[Run, int]:
    """What a path means: a checkpoint, or the newest good one of a run folder. Raises UsageError if there is none."""
    place = path.resolve()
    if match := STEP.fullmatch(place.name):
        return Run(place.parent), int(match[1])
    step = Run(path).latest()
    if step is None:
        raise UsageError(f"{path} holds no checkpoint; give a run folder, or one checkpoint in it")
    return Run(path), step
