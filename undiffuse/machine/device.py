"""What a process computes with: which device, what it does natively, and the memory that it has used."""

import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from undiffuse.errors import UsageError

WORKSPACE, EQUAL_BITS = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # with which cuBLAS gives the same bits
MEMINFO, CPUINFO, CGROUP = Path("/proc/meminfo"), Path("/proc/cpuinfo"), Path("/sys/fs/cgroup")  # of Linux
HALF = {"bf16": torch.bfloat16, "float16": torch.float16}  # precisions by autocast: of products, not of norms or sums


def choose(name: str = "auto") -> torch.device:
    """The device of that name; `auto` is CUDA where there is a card, else MPS, else the CPU.

    Under `torchrun` a bare `cuda` is this process's own card. A card that is chosen is from then on that of which torch
    is asked without one being named, and float32 on it is float32: torch alone would compute convolutions in TF32, of
    10 bits. Raises UsageError for a device that cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{_own_card()}"
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f'device "{name}" cannot be used here ({reason}); try --device cpu') from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        use_tf32(False)
    return device


def _own_card() -> int:
    """The card of this process: that of its place on the machine under `torchrun`, else the current one."""
    if "LOCAL_RANK" not in os.environ:
        return torch.cuda.current_device()
    place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= count:
        raise UsageError(
            f"process {place} of this machine has no card of its own, because there {'is' if count == 1 else 'are'} "
            f"{count}; start at most {count} on each machine (--nproc-per-node {count}), or give --device cpu"
        )
    return place


def use_tf32(on: bool) -> None:
    """Whether products and convolutions of float32 on cards of NVIDIA round their factors to 10 bits."""
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def name_of(device: torch.device) -> str:
    """`cpu`, or the name of the card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def processor() -> str:
    """The name of the processor, as Linux says it, or its kind."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.machine()


@contextmanager
def full_precision(tf32: bool = False) -> Iterator[None]:
    """Inside, float32 on a card is float32, also in a run whose own precision is TF32; or, with `tf32`, just that."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    use_tf32(tf32)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def repeatable(device: torch.device, used: bool) -> Iterator[None]:
    """Inside, torch takes only algorithms that give the same bits each time; afterwards as before, also after an error.

    cuBLAS reads its variable once, at its first product, so where it comes later it does nothing; once set it stays.
    Raises UsageError in a process that had `used` a card before the run did, unless the variable was set.
    """
    card, given = device.type == "cuda", os.environ.get(WORKSPACE)
    if card and used and given not in EQUAL_BITS:
        raise UsageError(
            f"train.deterministic needs {WORKSPACE}={EQUAL_BITS[0]} before a card is used, and this process has used "
            f"one with {'none' if given is None else given}; set it before Python starts, or train by the command line"
        )
    mode, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # which takes the algorithm that happened to be fastest
    if card and given not in EQUAL_BITS:
        os.environ[WORKSPACE] = EQUAL_BITS[0]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark


def versions(device: torch.device) -> dict[str, Any]:
    """What decides the last bits on a card, besides its name and torch; nothing elsewhere."""
    if device.type != "cuda":
        return {}
    tf32 = torch.backends.cudnn.allow_tf32
    return {
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": driver(), "tf32": tf32
    }  # fmt: skip


@cache
def driver() -> str | None:
    """The version of NVIDIA's driver, by the library that comes with it (NVML); None where there is none."""
    import ctypes

    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(80)
    if library.nvmlInit_v2() != 0:
        return None
    told = library.nvmlSystemGetDriverVersion(text, len(text)) == 0
    library.nvmlShutdown()
    return text.value.decode() if told else None


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
    """Whether the processor itself multiplies bfloat16, and gains by it; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names) and bf16_pays()


@cache
def bf16_pays() -> bool:
    """Whether a CPU multiplies matrices faster in bfloat16, by a fifth or more, tried once, in some 50 ms.

    With matrix tiles it is several times as fast; with the instructions of AVX-512 alone it was half as fast on a Xeon.
    """
    least = {dtype: math.inf for dtype in (torch.float32, torch.bfloat16)}
    for dtype in (*least,) * 20:  # short ones in turns, of which some are disturbed by no other process
        a = torch.ones(256, 256, dtype=dtype, device="cpu")
        began = time.thread_time()
        torch.mm(a, a)
        least[dtype] = min(least[dtype], time.thread_time() - began)
    return 1.2 * least[torch.bfloat16] < least[torch.float32]


def has_float16(device: torch.device) -> bool:
    """Whether training in float16 is for this device: a CPU has no use for it, and MPS was never tried."""
    return device.type == "cuda"


def native_precision(device: torch.device) -> str:
    """The fastest precision that has the range or the scale to train in: bf16, float16 or float32."""
    return "bf16" if native_bf16(device) else "float16" if has_float16(device) else "float32"


def refuse_precision(name: str, device: torch.device, what: str) -> None:
    """Raises UsageError for one that this device has not; `what` is where the user sets it."""
    if name == "tf32" and device.type != "cuda":
        raise UsageError(f"{what} tf32 is for cards of NVIDIA, and this is {device}; give float32 or auto")
    if name == "float16" and not has_float16(device):
        raise UsageError(f"{what} float16 is for cards (cuda), and this is {device}; give float32, bf16 or auto")


def in_precision(name: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What a network is called inside, in a definite precision."""
    if name == "tf32":
        return partial(full_precision, tf32=True)
    return partial(torch.autocast, device.type, HALF[name]) if name in HALF else nullcontext


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


def free_bytes(device: torch.device) -> int | None:
    """The memory that this process may still take: of the card, or its share of the machine's. None if not told."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by torch, for the next tensors
        return torch.cuda.mem_get_info()[0] + kept
    if device.type != "cpu" or not MEMINFO.exists():
        return None
    lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    if "MemAvailable" not in lines:
        return None
    # What the system could give, not what it has left: it fills what nobody needs with files.
    free = min(1024 * int(lines["MemAvailable"].split()[0]), _container_bytes())
    return int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _container_bytes() -> int | float:
    """What a container may still take of the machine's memory (cgroups 2 and 1), ∞ without a limit."""
    for most, now in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if (CGROUP / most).exists() and (CGROUP / now).exists():
            limit = (CGROUP / most).read_text().strip()
            return math.inf if limit == "max" else int(limit) - int((CGROUP / now).read_text())
    return math.inf
