"""What ran a benchmark."""

import platform
from pathlib import Path

import torch

import undiffuse


def machine() -> dict[str, object]:
    names = {
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    }
    return {
        "processor": ", ".join(sorted(names)),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "undiffuse": undiffuse.__version__,
    }
