"""Files of reference statistics, so that a large reference is looked at once, and published ones can be compared with.

An `.npz` with `mu` and `sigma`, as TTUR, pytorch-fid and EDM have it; in ADM's reference batches also `mu_s` and
`sigma_s`, of the spatial features. Ours adds what makes two numbers comparable: how many images, which extractor by the
sha256 of its weights, which resize, and of which data.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse.errors import Corrupt, UsageError
from undiffuse.machine.arrayfile import reading_arrays, write_arrays
from undiffuse.machine.tensorfile import refuse_newer
from undiffuse.quality.feature.base import Extractor
from undiffuse.quality.metric.base import F64, Moments

FORMAT = 1
NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
OWN = ("extractor", "sha256", "resize", "data", "fingerprint", "images")  # keys of ours, each one text
LIMIT = 1 << 31  # bytes of a file that is read
MANY = 1 << 30  # images of a file that does not say how many, so that none of its metrics finds them too few


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments by part of the features, and where they come from; `said` lacks what another tool's file does not say."""

    moments: dict[str, Moments]
    said: dict[str, str]

    @property
    def n(self) -> int | None:
        """How many images, None where the file does not say."""
        return None if self.moments["pool"].n == MANY else self.moments["pool"].n

    def check(self, extractor: Extractor, where: str) -> None:
        """Raises UsageError that names both sides unless these are of that extractor's features."""
        given = extractor.identity
        other = [key for key in given if key in self.said and self.said[key] != given[key]]
        if other:
            theirs, ours = ([f"{key} {side[key][:16]}" for key in other] for side in (self.said, given))
            raise UsageError(
                f"{where} has the statistics of {', '.join(theirs)}, and these features are of {', '.join(ours)}: no "
                "distance between them means anything; make the statistics anew, or choose the --features they are of"
            )
        if "extractor" not in self.said and extractor.title != "FID":
            raise UsageError(
                f"{where} does not say whose features its statistics are of, so that they are taken for those of FID's "
                f"Inception; {extractor.name} cannot be compared with them. Give --features inception, or images"
            )
        for part, moments in self.moments.items():
            if len(moments.mean) != extractor.dimensions.get(part, len(moments.mean)):
                raise UsageError(
                    f"{where} has statistics of {len(moments.mean)} {part} features, and {extractor.name} has "
                    f"{extractor.dimensions[part]}; choose the --features that they are of"
                )


def is_statistics(path: str | Path) -> bool:
    """Whether a file is an `.npz` with statistics in it, with or without images."""
    return {"mu.npy", "sigma.npy"} <= _members(path)


def has_images(path: str | Path) -> bool:
    """Whether images are in it too, as in ADM's reference batches."""
    return "arr_0.npy" in _members(path)


def _members(path: str | Path) -> set[str]:
    """The names in an `.npz`; none where it is something else, which whoever reads it will say."""
    if not str(path).lower().endswith(".npz") or not zipfile.is_zipfile(path):
        return set()
    try:
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return set()


def read(path: Path) -> Statistics:
    """Raises Corrupt for a damaged file, or one whose mean and covariance do not fit."""
    if path.is_file() and path.stat().st_size > LIMIT:
        raise Corrupt(f"{path} is larger than any statistics ({path.stat().st_size:,} bytes); give another file")
    with reading_arrays(path, "cannot be read as statistics ({error}); make it anew") as arrays:
        if "format" in arrays.files:
            refuse_newer(path, arrays["format"].item())
        n = int(arrays["n"]) if "n" in arrays.files else MANY
        said = {key: str(arrays[key]) for key in OWN if key in arrays.files}
        moments = {part: _moments(arrays, names, n, path) for part, names in NAMES.items() if names[0] in arrays.files}
    if "pool" not in moments or n < 2:
        what = "it has no mu" if "pool" not in moments else f"n = {n}, which has no covariance"
        raise Corrupt(f"{path} cannot be read as statistics: {what}; make it anew")
    return Statistics(moments, said)


def _moments(arrays: Any, names: tuple[str, str], n: int, path: Path) -> Moments:
    mean, covariance = (np.asarray(arrays[name], np.float64) for name in names)
    if mean.ndim != 1 or not mean.size or covariance.shape != (len(mean), len(mean)):
        raise Corrupt(
            f"{path}: {names[0]} of {list(mean.shape)} and {names[1]} of {list(covariance.shape)} are no mean and "
            "covariance of one set; expected [d] and [d, d]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise Corrupt(f"{path}: {names[0]} or {names[1]} holds NaN or infinity; make it anew")
    if not np.allclose(covariance, covariance.T, rtol=1e-6) or covariance.diagonal().min() < 0:
        raise Corrupt(f"{path}: {names[1]} is no covariance: it is not symmetric, or a variance is negative")
    return Moments.of(n, *(torch.from_numpy(array).to(F64) for array in (mean, covariance)))


def write(path: Path, statistics: Statistics) -> None:
    """Whole or not at all; pytorch-fid and EDM read `mu` and `sigma` of it. Raises StorageError."""
    arrays: dict[str, Any] = {"format": np.array(FORMAT), "n": np.array(statistics.n)}
    for part, moments in statistics.moments.items():
        tensors: tuple[Tensor, Tensor] = (moments.mean, moments.covariance)
        arrays |= {name: tensor.numpy() for name, tensor in zip(NAMES[part], tensors, strict=True)}
    arrays |= {key: np.array(statistics.said[key]) for key in OWN}
    write_arrays(path, arrays)
