"""A measurement in parts: each finished batch of images is a file, so that the same command goes on where it stopped.

The processes of a run take turns at the batches.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, SupportsIndex, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from undiffuse.config import plain
from undiffuse.data.source import Source
from undiffuse.errors import UsageError
from undiffuse.machine import disk, dist
from undiffuse.machine.arrayfile import reading_arrays, write_arrays
from undiffuse.machine.tensorfile import refuse_newer
from undiffuse.measure.claim import FORMAT, QUERY, check
from undiffuse.model.classes import ALL, RANDOM, Told, told_of
from undiffuse.model.model import Model

P = TypeVar("P")


@dataclass(frozen=True)
class Parts(Generic[P]):
    """`kind` is a dataclass of arrays, with a row for each image but for those that are `shared` by all images."""

    kind: type[P]
    shared: tuple[str, ...] = ()

    def columns(self, part: P) -> dict[str, np.ndarray]:
        return {each.name: getattr(part, each.name) for each in fields(self.kind)}  # pyright: ignore

    def joined(self, parts: list[P]) -> P:
        """Several batches of images, one after the other."""
        each = [self.columns(part) for part in parts]
        return self.kind(
            **{
                name: each[0][name] if name in self.shared else np.concatenate([c[name] for c in each])
                for name in each[0]
            }
        )

    def head(self, part: P, rows: int) -> P:
        """The first `rows` images."""
        return self.kind(
            **{name: array if name in self.shared else array[:rows] for name, array in self.columns(part).items()}
        )

    def write(self, path: Path, part: P) -> None:
        write_arrays(path, {"format": np.array(FORMAT)} | self.columns(part))

    def read(self, path: Path, rows: int) -> P | None:
        """The first `rows` images of a finished batch; None where it was measured on fewer. Raises Corrupt."""
        with reading_arrays(path, "is damaged; delete it, and the same command measures that batch again") as arrays:
            refuse_newer(path, arrays["format"].item())
            part = self.kind(**{each.name: arrays[each.name] for each in fields(self.kind)})  # pyright: ignore
        least = min(len(array) for name, array in self.columns(part).items() if name not in self.shared)
        return None if least < rows else self.head(part, rows)

    def gathered(self, parts: list[P], firsts: range, count: int) -> P:
        """All images, of processes that hold every so many batches of them; process 0 holds the first."""
        mine = [self.columns(part) for part in parts]
        shapes = json.loads(
            dist.tell(json.dumps({n: [a.dtype.str, a.shape] for n, a in mine[0].items()} if mine else {}))
        )
        every = {}
        for name, (dtype, shape) in shapes.items():
            every[name] = np.zeros(shape if name in self.shared else (count, *shape[1:]), np.dtype(dtype))
            for first, part in zip(firsts, mine, strict=True):
                if name not in self.shared:
                    every[name][first : first + len(part[name])] = part[name]
                elif first == 0:
                    every[name][:] = part[name]
            dist.total(torch.from_numpy(every[name]))  # in place: the two share their memory
        return self.kind(**every)


def divided(count: int, batch: int) -> int:
    """How many of `count` images this process measures."""
    return sum(min(first + batch, count) - first for first in dist.turns(count, batch))


def told(model: Model, source: Source, count: int, label: str | SupportsIndex | None, seed: int) -> Told:
    """The labels of the first `count` images, or one for all. Raises UsageError for words that say how to draw."""
    names = () if model.classes is None else model.classes.names
    if label in (ALL, RANDOM) and label not in names:
        raise UsageError(f"label {label} is not possible for images that are measured; give one class, or none")
    return told_of(model.classes, source, torch.arange(count, dtype=torch.int64, device="cpu"), label, seed)


def measured(
    parts: Parts[P],
    count: int,
    batch: int,
    measure: Callable[[Int[Tensor, "b"]], P],
    out: Path | None = None,
    claim: dict[str, Any] | None = None,
    kept: Callable[[P], None] = lambda part: None,
) -> P:
    """What `measure(rows)` says of the first `count` images. Each process returns all.

    Finished batches are kept in `out`, whose question is `claim`; `kept(part)` is called for those that were there.
    """
    found, firsts = [], dist.turns(count, batch)
    with dist.alike():
        for first in firsts:
            rows = torch.arange(first, min(first + batch, count), dtype=torch.int64, device="cpu")
            path = None if out is None else out / f"part-{first:08d}.npz"
            part = None if path is None or not path.exists() else parts.read(path, len(rows))
            if part is not None:
                kept(part)
            else:
                part = measure(rows)
                if out is not None and path is not None:
                    if not (out / QUERY).exists():
                        disk.write_json(out / QUERY, claim)
                    parts.write(path, part)
            found.append(part)
    return parts.joined(found) if dist.size() == 1 else parts.gathered(found, firsts, count)


def claimed(out: Path | None, model: Model, source: Source, question: dict[str, Any]) -> dict[str, Any]:
    """What the folder is for: these weights, this data, and the rest of the question. Raises UsageError for another."""
    if out is None:
        return {}
    return check(out, {"model": identity(model), "data": source.fingerprint()} | question)


def identity(model: Model) -> str:
    """sha256 of the weights of a model and of its config, the variance left out, which is said beside it."""
    config = {name: value for name, value in plain(model.config).items() if name != "variance"}
    return model.digest(json.dumps(config, sort_keys=True).encode())
