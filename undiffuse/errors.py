"""Every error that a user can cause, each with the exit code that the command line returns for it."""

import difflib
from collections.abc import Iterable


class Error(Exception):
    """Base class. The message is one line: what was given, what was expected, what to do."""

    exit_code = 1


class UsageError(Error):
    """An unknown name, an option out of range, a combination that has no meaning."""

    exit_code = 2


class DataError(Error):
    """Images that cannot be used: none found, unreadable, of mixed shapes, of a size the network cannot take."""

    exit_code = 2


class Mixed(DataError):
    """Images of several sizes where one is expected."""


class NoSplit(DataError):
    """A data set has not the split that is asked for."""


class NotFiniteError(Error):
    """A loss or gradient is NaN or infinite; raised before the update."""

    exit_code = 3
    good: str | None = None  # the newest checkpoint, a folder, that is known to be good from before
    lr: float | None = None  # a learning rate to go on with
    run: str | None = None  # the folder of the run


class StorageError(Error):
    """The disk is full, read-only or failing; nothing older was touched."""

    exit_code = 4


class Corrupt(Error):
    """A file is damaged, or is a pickle, which is never executed."""

    exit_code = 5


class MemoryExhausted(Error):
    """The machine or the device has too little memory."""

    exit_code = 6


class Locked(Error):
    """Another process is using the run folder."""

    exit_code = 7


class Stalled(Error):
    """Nothing has moved for too long."""

    exit_code = 8


class Preempted(Error):
    """A signal asked the process to stop; its state is saved."""

    exit_code = 143


OUT_OF_MEMORY = (
    "DefaultCPUAllocator: ",
    "not enough memory: ",
    "backend out of memory",
    "could not create a primitive",  # oneDNN, where there is no memory for the code that it makes for a convolution
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",  # cuDNN, where no algorithm has room for its workspace
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch on any device, asked for more memory than there is; torch has no one type for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)


def counted(number: int, what: str) -> str:
    """`1 step`, `1,000 steps`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def nearest(given: str, known: Iterable[str]) -> str:
    """The hint of a message: ` Did you mean "x"? Known: …`; the question is left out when nothing is close."""
    names = sorted(known)
    if not names:
        return " It has none"
    close = difflib.get_close_matches(given, names, n=1)
    return (f' Did you mean "{close[0]}"?' if close else "") + f" Known: {', '.join(names)}"


def unknown(kind: str, given: str, known: Iterable[str]) -> UsageError:
    """`schedule "cosin" is not known. Did you mean "cosine"? Known: cosine, linear, …`."""
    return UsageError(f'{kind} "{given}" is not known.{nearest(given, known)}')
