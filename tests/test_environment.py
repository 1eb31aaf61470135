"""No torchvision and no stray CUDA: either one is the mark of a resolver that has replaced the pinned torch."""

from importlib.metadata import distributions

import pytest


def intruders(installed: dict[str, str]) -> list[str]:
    """torchvision always; NVIDIA's packages beside a CPU build of torch (a CUDA build cannot do without its own)."""
    cpu_build = installed["torch"].endswith("+cpu")
    return sorted(name for name in installed if name == "torchvision" or (cpu_build and name.startswith("nvidia-")))


def test_nothing_got_in():
    installed = {each.metadata["Name"].lower(): each.version for each in distributions()}
    assert intruders(installed) == []


@pytest.mark.parametrize(
    "installed, found",
    [
        ({"torch": "2.13.0+cpu", "numpy": "2.4.6"}, []),
        (
            {"torch": "2.13.0+cpu", "nvidia-cublas-cu12": "12.8", "torchvision": "0.28.0"},
            ["nvidia-cublas-cu12", "torchvision"],
        ),
        ({"torch": "2.13.0", "nvidia-cublas-cu12": "12.8"}, []),
        ({"torch": "2.13.0", "torchvision": "0.28.0"}, ["torchvision"]),
    ],
)
def test_intruders_are_found(installed, found):
    assert intruders(installed) == found
