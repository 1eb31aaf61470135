"""The processes of one run: which of them this is, and sums over all. One process when alone.

`torchrun`, or whatever sets RANK, WORLD_SIZE and MASTER_ADDR as it does, starts the same command several times;
without them nothing here touches `torch.distributed`. Process 0 decides, writes and speaks, and tells the others.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as group
from jaxtyping import Shaped
from torch import Tensor

from undiffuse import errors
from undiffuse.errors import Error, Stalled, UsageError

PATIENCE = timedelta(minutes=10)  # how long a sum waits for a process that is alive but does not come
LONG = timedelta(days=1)  # the same where one process may have a whole batch of a long chain more to do than another

_patient: list[Any] = []  # the one whose sums wait LONG, while the processes are joined


def size() -> int:
    return group.get_world_size() if group.is_initialized() else 1


def rank() -> int:
    return group.get_rank() if group.is_initialized() else 0


def is_first() -> bool:
    """Whether this process writes and speaks; also told before and after the processes are joined."""
    return int(os.environ.get("RANK", "0")) == 0


def together() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def turns(count: int, batch: int) -> range:
    """The first of each batch that is this process's, where the processes take turns at `count` in batches."""
    return range(rank() * batch, count, size() * batch)


def backend() -> str:
    """What sums: which device a process computes on is not known yet; sums on the CPU never touch nccl."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and group.is_nccl_available() else "gloo"


@contextmanager
def joined(patience: timedelta = PATIENCE) -> Iterator[None]:
    """Inside, the processes that were started together can sum; a process started alone is not affected.

    Raises Stalled when one of the others has ended or does not answer. After an error a group with nccl is left as it
    is, for destroying it may wait for ever for one that is gone; `end` then ends the process.
    """
    if not together() or group.is_initialized():
        yield
        return
    with lost():
        group.init_process_group(backend(), timeout=patience)
        _patient.append(group.new_group(timeout=LONG, backend="gloo"))
    orderly = "nccl" not in backend()
    try:
        with lost():
            yield
        orderly = True
    finally:
        _patient.clear()
        if orderly:
            group.destroy_process_group()


def end(code: int) -> NoReturn:
    """Ends the process, at once where a group is left: Python's own end would destroy it, as `joined` did not."""
    if group.is_available() and group.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def lost() -> Iterator[None]:
    """Turns what a broken connection raises, also from inside DistributedDataParallel, into one line."""
    try:
        yield
    except Error:
        raise
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, group.DistError) and not any(word in text for word in ("gloo", "NCCL", "peer")):
            raise
        raise Stalled(
            f"process {rank()} of {size()} lost another one ({text.splitlines()[0][:120]}); the last checkpoint is "
            "good, and the same command goes on from it, with as many processes as you like"
        ) from error


def total(values: Shaped[Tensor, "*n"]) -> Shaped[Tensor, "*n"]:
    """The sum over all processes, in place. Every process gets the same bits; which ones depends on their number."""
    if size() > 1:
        group.all_reduce(values)
    return values


def ordered_total(parts: Sequence[Shaped[Tensor, "*n"]]) -> Shaped[Tensor, "*n"]:
    """The sum of the parts of process 0, then of those of process 1, and so on, added one after the other.

    So it depends on the parts and their order alone, and not on how many processes hold them.
    """
    running = torch.zeros_like(parts[0])
    if rank() > 0:
        group.recv(running, rank() - 1)
    for part in parts:
        running += part
    if rank() < size() - 1:
        group.send(running, rank() + 1)
    share([running], source=size() - 1)
    return running


def share(tensors: Iterable[Shaped[Tensor, "..."]], source: int = 0) -> None:
    """Overwrites the tensors with those of one process."""
    if size() > 1:
        for tensor in tensors:
            sent = tensor.contiguous()
            group.broadcast(sent, source)
            if sent is not tensor:  # another layout
                tensor.copy_(sent)


def decide(number: int, source: int = 0) -> int:
    """What one process says, process 0 unless another is named, everywhere."""
    value = torch.tensor(number, dtype=torch.int64, device="cpu")
    share([value], source)
    return int(value)


def tell(text: str, source: int = 0) -> str:
    """The text of one process, everywhere."""
    data = text.encode()
    length = decide(len(data), source)
    sent = torch.tensor(list(data) if rank() == source else [0] * length, dtype=torch.uint8, device="cpu")
    share([sent], source)
    return bytes(sent.tolist()).decode()


def votes(*own: bool) -> list[bool]:
    """Whether any process says so, for each.

    It goes by the CPU, and is a sign of life: sums on cards are only queued, so that a process which waits for its card
    before it has voted waits for ever if another one is gone.
    """
    if size() == 1:
        return list(own)
    said = total(torch.tensor(own, dtype=torch.int64, device="cpu"))
    return [bool(count) for count in said]


def is_alive() -> None:
    """Raises Stalled, once that is turned by `lost`, if one of the others is gone."""
    votes(False)


@contextmanager
def alike() -> Iterator[None]:
    """An error of one process inside is raised by all, at the end, where they meet; of several that of the first.

    Nothing inside may sum over the processes: one that has failed does not come there.
    """
    failure = None
    try:
        yield
    except Error as error:
        failure = error
    failed = votes(*(failure is not None and number == rank() for number in range(size())))
    if not any(failed):
        return
    source = failed.index(True)
    kind, text = json.loads(tell(json.dumps([type(failure).__name__, str(failure)]), source))
    raise failure if failure is not None and source == rank() else getattr(errors, kind, Error)(text)


def wait_for_first() -> None:
    """Until process 0 comes here too, however long what it does alone may take."""
    if size() > 1:
        group.broadcast(torch.zeros(1, dtype=torch.float32, device="cpu"), 0, group=_patient[0] if _patient else None)


def agree(digest: str, what: str) -> None:
    """Raises UsageError in every process unless all hold the same hexadecimal digest."""
    own = int(digest[:15], 16)
    if int(total(torch.tensor(int(own != decide(own)), dtype=torch.int64, device="cpu"))):
        raise UsageError(f"the {size()} processes do not have the same {what}; give each the same files and options")
