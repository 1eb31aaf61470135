"""Decodes a data set once, in parallel, into a packed folder; and keeps such folders in a cache.

A shard is a pure function of the plan, and a finished one has a mark beside it (`00000.json`). So what was stopped, at
any time and however hard, goes on with the shards that have none, and ends with the same bytes.
"""

import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from undiffuse.config import plain
from undiffuse.data.format import packed
from undiffuse.data.format.packed import MANIFEST, PLAN, Manifest, PackedSource, Shard, open_packed, shard_path
from undiffuse.data.listing import refuse_inside
from undiffuse.data.made import summed
from undiffuse.data.passed import frames, merged
from undiffuse.data.picture import PLAIN, Reading
from undiffuse.data.source import (
    ArraySource,
    First,
    Source,
    Wanted,
    decode,
    fingerprint,
    first_of,
    open_raw,
    refuse_bad,
    unify,
)
from undiffuse.data.subset import Subset
from undiffuse.data.workers import finished
from undiffuse.errors import Corrupt, DataError, Locked, UsageError
from undiffuse.machine import disk, log, store

LARGE = 10**9  # decoded bytes: a data set of more is packed before it is trained on,
MANY = 20_000  # and so is one of more pictures, which would be decoded at each start
SHARD = 2**24  # bytes; more only where that would be over SHARDS files
SHARDS = 4096
DIGITS = "[0-9]" * 5  # the name of a shard
RACY = 2 * 10**9  # nanoseconds; more than a tick of any file system's clock
TURN = 0.2  # seconds between two looks at who packs
# The processors that this process may use, of which a scheduler gives fewer than the machine has.
WORKERS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

Size = int | tuple[int, int] | None


@dataclass(frozen=True)
class Job:
    """What is packed, and into which shape."""

    spec: str
    split: str
    reading: Reading
    wanted: Wanted
    source: str  # its fingerprint

    def key(self, raw: Source) -> str:
        """sha256 of all that decides the result. `skip_bad` does not: which images are bad follows from the source."""
        shape = [self.wanted.pair, self.wanted.channels, plain(self.reading)]
        content: list[Any] = [self.source, raw.classes, raw.skipped]
        if raw.classes is not None and (labels := raw.every_label()) is not None:  # a file of labels may say others
            content.append(hashlib.sha256(labels.numpy().tobytes()).hexdigest())
        return hashlib.sha256(json.dumps([packed.FORMAT, content, shape]).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of each shard."""

    job: Job
    first: First
    total: int
    per_shard: int

    @property
    def shards(self) -> int:
        return -(-self.total // self.per_shard)

    def indices(self, k: int) -> range:
        """Which images of the source are in shard k, if they can be read."""
        return range(k * self.per_shard, min((k + 1) * self.per_shard, self.total))


def pack(
    spec: str | Path,
    out: Path,
    size: Size = None,
    channels: int | None = None,
    reading: Reading = PLAIN,
    split: str = "train",
    skip_bad: bool = False,
    workers: int = 1,
    show_progress: bool = False,
) -> PackedSource:
    """Decodes a data set into the folder `out`, or goes on where that was stopped; the arguments as `open_source`.

    With more than one worker the caller's script needs `if __name__ == "__main__":`. Raises UsageError if `out` holds
    anything else, Locked if it is being packed already.
    """
    if workers < 1:
        raise UsageError(f"{workers} workers are not possible; give at least 1")
    refuse_inside(out, str(spec), "--out")
    wanted = Wanted.of(size, channels)
    reading = wanted.reading(reading)
    raw = open_raw(spec, split, reading)
    job = Job(str(spec), split, reading, wanted, raw.fingerprint())
    return _pack(raw, job, out, skip_bad, workers, show_progress)


def open_data(
    spec: str | Path,
    size: Size = None,
    channels: int | None = None,
    reading: Reading = PLAIN,
    skip_bad: bool = False,
    use_cache: bool | None = None,
    workers: int = 1,
    show_progress: bool = False,
    split: str = "train",
    stride: int = 8,
    count: int | None = None,
) -> ArraySource | PackedSource:
    """A split of a data set in one shape: in memory, or packed in the cache if it is large or `use_cache` says so.

    Large is over 1 GB, or over 20,000 pictures to decode. What is packed already, or an array already, and fits, is
    given as it is. Where sizes differ and none is given, the error proposes a multiple of `stride`. With `count` it is
    the first ones alone. Of several processes that ask for the same, one packs it and the others wait.
    """
    wanted = Wanted.of(size, channels, stride)
    reading = wanted.reading(reading)
    raw = open_raw(spec, split, reading)
    if count is not None and count < len(raw):
        raw = Subset(raw, torch.arange(count, dtype=torch.int64, device="cpu"))
    if isinstance(raw, PackedSource) and wanted.accepts(raw.image_shape):
        return raw
    if use_cache is None:
        use_cache = not isinstance(raw, ArraySource) and (
            len(raw) > MANY or len(raw) * math.prod(first_of(raw, wanted).shape) > LARGE
        )
    if not use_cache:
        return unify(raw, size, channels, skip_bad, stride=stride)
    job = Job(str(spec), split, reading, wanted, _remembered(raw, spec))
    return _pack(raw, job, disk.cache_folder() / "packed" / job.key(raw), skip_bad, workers, show_progress, wait=True)


def _remembered(raw: Source, spec: str | Path) -> str:
    """The fingerprint; from the cache where no file was written since it was taken, because it takes reading them all.

    What was written within the last seconds may be written again within the same tick of the file system's clock.
    """
    began, stamp = time.time_ns(), raw.stamp()
    if stamp is None or max(map(max, stamp)) > began - RACY:
        return raw.fingerprint()
    names = [raw.name(i) for i in range(len(raw))]
    key = hashlib.sha256(json.dumps([os.path.abspath(spec), names, stamp]).encode()).hexdigest()
    path = disk.cache_folder() / "fingerprints" / f"{key}.json"
    if not path.exists():
        disk.write_json(path, {"fingerprint": raw.fingerprint()})
    found = disk.read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("fingerprint"), str):
        raise Corrupt(f"{path} is damaged: it holds no fingerprint; remove it")
    return found["fingerprint"]


def _pack(
    raw: Source, job: Job, out: Path, skip_bad: bool, workers: int, show_progress: bool, wait: bool = False
) -> PackedSource:
    key = job.key(raw)
    if not (out / MANIFEST).exists() or (out / PLAN).exists():
        _refuse_strange(out)
        with ExitStack() as stack:
            _take_turn(stack, store.Run(out), wait, show_progress)
            if not (out / MANIFEST).exists():  # it may have been finished meanwhile
                _build(raw, job, key, out, skip_bad, workers, show_progress)
            _tidy(out)
    done = open_packed(out)
    if done.manifest.key != key:
        raise _other(out)
    refuse_bad([bad for bad in done.manifest.skipped if bad[0] not in raw.skipped], len(raw), skip_bad)
    # What lies beside the pictures may have changed since it was packed, which decides nothing.
    return dataclasses.replace(done, passed=merged(raw.passed, frames(done.manifest.frames)))


def _take_turn(stack: ExitStack, out: store.Run, wait: bool, say: bool) -> None:
    """The lock. Of several processes that want the same of the cache one packs, and the others wait for it."""
    while True:
        try:
            stack.enter_context(out.lock())
            return
        except Locked as error:
            if not wait:
                raise
            if say:
                log.warn(f"waiting for another process that packs this data: {error}")
            say = False
            time.sleep(TURN)


def _other(out: Path) -> UsageError:
    return UsageError(f"{out} holds other data, or the same in another shape; give another folder, or remove it")


def _refuse_strange(out: Path) -> None:
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not {MANIFEST, PLAN} & names and any(name != "lock" and not store.LEFTOVER.fullmatch(name) for name in names):
        raise UsageError(f"{out} is not empty and holds no packed data; give a new folder")


def _build(raw: Source, job: Job, key: str, out: Path, skip_bad: bool, workers: int, show_progress: bool) -> None:
    """Decodes the shards that are missing, and writes the manifest. Raises DataError for what may not be left out."""
    if len(json.dumps(raw.classes)) > disk.SMALL // 4:
        raise DataError(
            f"{job.spec} has {len(raw.classes or ())} classes, more than a packed folder can name; merge some"
        )
    if not (out / PLAN).exists():
        disk.write_json(out / PLAN, {"key": key})
    elif disk.read_json(out / PLAN) != {"key": key}:
        raise _other(out)
    first = first_of(raw, job.wanted)
    size = math.prod(first.shape)
    plan = Plan(job, first, len(raw), max(1, max(SHARD, len(raw) * size // SHARDS) // size))
    missing = [k for k in range(plan.shards) if not _mark(out, k).exists()]
    left = sum(len(plan.indices(k)) for k in missing)
    _refuse_full(out, left * size)
    with log.progress(plan.total, "packing", show_progress, done=plan.total - left) as bar:
        for k in _write_all(raw, plan, out, missing, workers):
            bar.advance(len(plan.indices(k)))
    marks = [disk.read_json(_mark(out, k)) for k in range(plan.shards)]
    bad = [(name, reason) for mark in marks for name, reason in mark["skipped"]]
    refuse_bad(bad, plan.total, skip_bad)
    shards = tuple(Shard(mark["images"], mark["sha256"]) for mark in marks)
    skipped = (*((name, "left out before") for name in raw.skipped), *bad)
    made = summed(raw.made, *(tuple(map(tuple, mark["made"])) for mark in marks))
    said = {"passed": raw.passed, "frames": sum(mark["frames"] for mark in marks), "made": made}
    draft = Manifest(key, job.source, "", first.shape, first.labelled, shards, skipped, raw.classes)
    _finish(out, dataclasses.replace(draft, range=job.reading.range, **said))


def _finish(out: Path, manifest: Manifest) -> None:
    """Reads back what was written, so that what the disk holds is what was decoded."""
    draft = packed.mapped(out, manifest)
    draft.verify()
    digest = fingerprint((len(draft), *manifest.shape), draft.images, draft.labels)
    packed.write_manifest(out, dataclasses.replace(manifest, fingerprint=digest))


def _tidy(out: Path) -> None:
    """Removes the marks, and the plan last, so that a kill in between is seen."""
    with disk.writing(out, 0):
        for path in [*sorted(out.glob(f"{DIGITS}.json")), out / PLAN]:
            if path.exists():
                disk.remove(path)


def _mark(out: Path, k: int) -> Path:
    return shard_path(out, k).with_suffix(".json")


def _refuse_full(out: Path, needed: int) -> None:
    with disk.writing(out / MANIFEST, needed):
        if shutil.disk_usage(out).free < needed:
            raise OSError(errno.ENOSPC, "the disk is too full")


def _write_all(raw: Source, plan: Plan, out: Path, missing: list[int], workers: int) -> Iterator[int]:
    """Yields each shard as it is finished."""
    if isinstance(raw, ArraySource) or min(workers, len(missing)) < 2:
        for k in missing:
            _write(raw, plan, out, k)
            yield k
        return
    yield from finished(partial(_work, plan, out), missing, min(workers, len(missing)))


def _work(plan: Plan, out: Path, k: int) -> None:
    source = _open_once(plan.job)
    if len(source) != plan.total:
        raise DataError(f"{plan.job.spec} has changed while it was packed; leave it as it is, and pack it again")
    _write(source, plan, out, k)


@lru_cache(maxsize=1)
def _open_once(job: Job) -> Source:
    """In a worker, which lives no longer than the packing."""
    return open_raw(job.spec, job.split, job.reading)


def _write(source: Source, plan: Plan, out: Path, k: int) -> None:
    """One shard, then its mark."""
    part = decode(source, plan.indices(k), plan.job.wanted, plan.first)
    refuse_bad(part.bad, plan.total, skip_bad=True)
    labels = np.array(part.labels, "<i8").tobytes() if plan.first.labelled else b""
    data = labels + part.images.tobytes()
    disk.write_atomic(shard_path(out, k), data)
    told = {"skipped": part.bad, "frames": part.frames, "made": part.made}
    mark = {"images": len(part.labels), "sha256": hashlib.sha256(data).hexdigest(), **told}
    disk.write_json(_mark(out, k), mark)
