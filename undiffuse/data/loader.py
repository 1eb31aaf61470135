"""Batches as a pure function of the step: no state, so nothing to save and nothing to restore on resume."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from undiffuse.data.order import order
from undiffuse.data.source import Source
from undiffuse.errors import UsageError
from undiffuse.key import Key


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of the global batch of one step."""

    image: UInt8[Tensor, "b c h w"]
    label: Int[Tensor, "b"] | None
    index: Int[Tensor, "b"]  # in the source
    rows: Int[Tensor, "b"]  # in the global batch


@dataclass(frozen=True, eq=False)
class Loader:
    """Shuffled batches of `size` images, with horizontal flips if asked; every epoch sees each image once."""

    source: Source
    size: int
    seed: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"a batch of {self.size} images is not possible; give at least 1")

    def batch(self, step: int, rows: Int[Tensor, "b"] | None = None) -> Batch:
        """The batch of that step, or only the given rows of it: each row is what it is in the whole batch."""
        rows = torch.arange(self.size, dtype=torch.int64, device="cpu") if rows is None else rows
        index = order(self.seed, len(self.source), step * self.size + rows)
        image, label = self.source.gather(index)
        if self.flip:
            flipped = Key(self.seed).fold("flip", step).rows(rows).integers(2).bool()
            image = torch.where(flipped[:, None, None, None], image.flip(-1), image)
        return Batch(image, label, index, rows)


class Prefetched:
    """The given rows of the batch of a step, read by a thread while the step before is at work.

    Steps may be asked for in any order: what was fetched ahead for another one is dropped. `pin` puts the images where
    a card takes them from by itself, while the processor goes on.
    """

    def __init__(self, loader: Loader, rows: Int[Tensor, "b"], pin: bool = False):
        self.loader, self.rows, self.pin = loader, rows, pin
        self._thread = ThreadPoolExecutor(1, "undiffuse-data")
        # One processor for it: a second team of threads would take turns with that of the step.
        threads = torch.get_num_threads()
        self._thread.submit(torch.get_num_threads).result()  # what torch does at first, which would undo the next line
        self._thread.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(threads)  # of this thread, and of those that are yet to come
        self._ahead: dict[int, Future[Batch]] = {}

    def at(self, step: int) -> Batch:
        batch = self._ahead.pop(step) if step in self._ahead else self._start(step)
        self._ahead = {step + 1: self._start(step + 1)}
        return batch.result()

    def _start(self, step: int) -> "Future[Batch]":
        return self._thread.submit(self._fetch, step)

    def _fetch(self, step: int) -> Batch:
        batch = self.loader.batch(step, self.rows)
        return replace(batch, image=batch.image.pin_memory()) if self.pin else batch
