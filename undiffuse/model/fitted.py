"""What was fitted to the weights of a model, and is kept beside them by their hash: the times of chains.

`undiffuse fit` writes `RUN/fit/SHA256.json` and `undiffuse codec fit` `SHA256.codec.json` beside it, or into the user's
cache for what is no run folder that can be written; an exported file has both in its metadata. A checkpoint is sealed,
and has nothing added to it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.config import Positive, parse, plain
from undiffuse.diffusion.grid import Grid
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import Process
from undiffuse.errors import Corrupt, UsageError
from undiffuse.machine import disk
from undiffuse.machine.tensorfile import FORMAT, refuse_newer

NAME = "fitted"  # as the grid of a command
FOLDER = "fit"
MOST = 40  # steps for which a grid is fitted; more divide that one
CODEC = ".codec"  # the kind of a codec's tables


@dataclass(frozen=True)
class Fitted(Grid):
    """The times of 1, 2, 3, … steps, without the 0 at their end, as `diffusion.fit` finds them.

    More steps than these have the ends of the longest, and divide it evenly.
    """

    walks: tuple[tuple[Positive, ...], ...]

    def reaches(self, steps: int) -> bool:
        """Whether there are so many steps: a longest walk of one time cannot be divided."""
        return 1 <= steps <= len(self.walks) or len(self.walks) > 1

    def spread(self, process: Process, steps: int) -> Float[Tensor, "steps"]:
        if not self.reaches(steps):
            raise UsageError(
                f"the grid that was fitted to this model has one step, and {steps} is more; give 1, or --grid "
                "karras-few"
            )
        longest = len(self.walks)
        walk = torch.tensor(self.walks[min(steps, longest) - 1], dtype=F64, device="cpu")
        if steps <= longest:
            return walk
        at = torch.linspace(0, longest - 1, steps, dtype=F64, device="cpu")
        before = at.floor().clamp(max=longest - 2)
        start, end = (walk[(before + k).to(torch.int64)] for k in (0, 1))
        return torch.lerp(start, end, at - before)


@dataclass(frozen=True)
class Fit:
    """`weights` is the sha256 of those that it belongs to; `trajectories` of the model are what it was found on."""

    weights: str
    trajectories: int
    grid: Fitted
    format: int = FORMAT

    def check(self, digest: str, where: str) -> "Fit":
        """Raises UsageError if it is of other weights, Corrupt for grids that do not fall."""
        if self.weights != digest:
            raise UsageError(
                f"{where} is fitted to other weights ({self.weights[:12]}) than those of this model ({digest[:12]}); "
                "make one with `undiffuse fit`"
            )
        if not self.grid.walks:
            raise Corrupt(f"{where} is damaged: it has no grid; give `undiffuse fit --overwrite`")
        for steps, walk in enumerate(self.grid.walks, 1):
            falls = all(s < t for t, s in zip(walk, walk[1:], strict=False))
            if len(walk) != steps or not falls or walk[0] > 1:
                raise Corrupt(
                    f"{where} is damaged: its grid of {steps} steps does not fall; give `undiffuse fit --overwrite`"
                )
        return self


def parsed(found: Any, digest: str, where: str) -> Fit:
    """From plain data. Raises as `Fit.check` does."""
    if not isinstance(found, Mapping):
        raise Corrupt(f"{where} is damaged: it is not a JSON object; make it anew with `undiffuse fit --overwrite`")
    refuse_newer(Path(where), found.get("format"))
    return parse(Fit, found, where).check(digest, where)


def places(run: Path | None) -> list[Path]:
    """Folders where one may lie."""
    return [disk.cache_folder() / FOLDER, *([] if run is None else [run / FOLDER])]


def any_kept(run: Path | None) -> bool:
    """Whether it is worth while to hash the weights."""
    return any(folder.is_dir() and any(folder.iterdir()) for folder in places(run))


def found(run: Path | None, digest: str, kind: str = "") -> Path | None:
    """Where what was fitted to the weights of that hash is kept; `kind` is "" for the grid."""
    return next((path for folder in places(run) if (path := folder / f"{digest}{kind}.json").exists()), None)


def find(run: Path | None, digest: str) -> Fit | None:
    """The grid that was fitted to the weights of that hash."""
    path = found(run, digest)
    return None if path is None else parsed(read(path), digest, str(path))


def read(path: Path) -> Any:
    """What is kept there, as plain data. Raises Corrupt."""
    try:
        return disk.read_json(path)
    except Corrupt as error:
        command = "codec fit" if path.stem.endswith(CODEC) else "fit"
        raise Corrupt(f"{path} is damaged; make it anew with `undiffuse {command} --overwrite`") from error


def raw(run: Path | None, digest: str, kind: str = "") -> Any:
    """As plain data, unread. Raises Corrupt."""
    path = found(run, digest, kind)
    return None if path is None else read(path)


def keep(fit: Any, run: Path | None, kind: str = "") -> Path:
    """Beside the weights where that is possible, else in the cache. Raises StorageError."""
    cached = disk.cache_folder() / FOLDER / f"{fit.weights}{kind}.json"
    if run is None or not os.access(run, os.W_OK):
        disk.write_json(cached, plain(fit))
        return cached
    disk.write_json(path := run / FOLDER / cached.name, plain(fit))
    if cached.exists():  # it would be found first
        with disk.writing(cached, 0):
            disk.remove(cached)
    return path
