"""A lock that the system takes back when its holder ends, however it ends."""

import os
import sys

from undiffuse.machine.disk import SMALL


def try_lock(file: int) -> bool:
    """Whether the lock on an open file was free; it is held until the file is closed."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, SMALL, os.SEEK_SET)  # past the end, because others cannot read a byte that is locked
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
