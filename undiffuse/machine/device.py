"""What a process computes with: which device, what it does natively, and the memory that it has used."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from undiffuse.errors import UsageError


def choose(name: str = "auto") -> torch.device:
    """The device of that name; `auto` is CUDA where there is a card, else MPS, else the CPU.

    Under `torchrun` a bare `cuda` is this process's own card. Raises UsageError for one that cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f'device "{name}" cannot be used here ({reason}); try --device cpu') from error
    return device


def name_of(device: torch.device) -> str:
    """`cpu`, or the name of the card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def making_float32(device: str | torch.device = "cpu") -> Iterator[None]:
    """Inside, what torch makes when it is told no more is float32 on that device, whatever its defaults are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def native_bf16(device: torch.device) -> bool:
    """Whether the processor itself multiplies bfloat16; emulation is slower than float32 and no more exact."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def keep_memory() -> None:
    """Lets glibc keep the memory of freed tensors, instead of asking the system for it at every layer again."""
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            trim_threshold, mmap_threshold = -1, -3
            # Before 2.35 glibc refuses more than 32 MiB, and the other line alone would map and unmap every tensor.
            _ = libc.mallopt(mmap_threshold, 1 << 30) or libc.mallopt(mmap_threshold, 1 << 25)
            libc.mallopt(trim_threshold, (1 << 31) - 1)


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use: the device's, else that of the whole process, or 0 where it is not told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
