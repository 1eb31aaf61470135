"""undiffuse: denoising diffusion for images, from the equations to bits on disk."""

from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "load": "undiffuse.model.load",
    "open_data": "undiffuse.data.pack",
    "train": "undiffuse.training.start",
    "evaluate": "undiffuse.measure.evaluate",
    "nll": "undiffuse.measure.nll",
    "nll_ode": "undiffuse.measure.flow",
    "Query": "undiffuse.measure.evaluate",
    "show": "undiffuse.figure",
    "Model": "undiffuse.model.model",
    "Key": "undiffuse.key",
    "Error": "undiffuse.errors",
}


def __getattr__(name: str) -> Any:
    """The public names, resolved on first use so that `import undiffuse` does not import torch."""
    if name not in _LAZY:
        raise AttributeError(f"module 'undiffuse' has no attribute {name!r}; it has {', '.join(sorted(_LAZY))}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return [*_LAZY, "__version__"]
