"""What is said of a model: what it is, and how many images it has seen.

The metadata of a model has `images` and `step` of the training that made it. If that began from other weights
(`--init`, or a distillation) and these say what they had seen, `images_before` is the sum of theirs.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from undiffuse.config import plain
from undiffuse.data.made import channels
from undiffuse.errors import counted

if TYPE_CHECKING:
    from undiffuse.model.model import Model


def facts_of(model: "Model") -> dict[str, str]:
    """What it is, in words."""
    c, h, w = model.image_shape
    process, network = plain(model.config)["process"]["name"], type(model.config.network).__name__
    steps = model.process.steps
    found = {
        "images": f"{w}×{h}, {channels(c)}",
        "network": f"{network}, {model.parameters():,} weights",
        "process": f"{process}, {counted(steps, 'step')}" if steps else process,
    }
    if model.classes is not None:
        found["classes"] = model.classes.listed()
    if model.meta.get("images"):
        found["trained on"] = images_seen(model.meta, f" images in {counted(model.meta['step'], 'step')}")
    return found | {"device": str(model.device)}


def begun_with(model: "Model") -> dict[str, Any]:
    """What the metadata of a training says that begins from these weights: their sha256, and all that they had seen."""
    seen = all_seen(model.meta)
    return {"init": model.digest(), **({"images_before": seen} if seen else {})}


def all_seen(meta: Mapping[str, Any]) -> int:
    """Images, those of the weights that it began from among them."""
    return meta.get("images", 0) + meta.get("images_before", 0)


def begun(meta: Mapping[str, Any]) -> dict[str, Any]:
    """That of a training, as its metadata have it."""
    return {key: meta[key] for key in ("init", "images_before") if key in meta}


def images_seen(meta: Mapping[str, Any], during: str = "") -> str:
    """`768,000`, or `768,000 after the 1,280,000 of the weights that it began from`; `during` follows the number."""
    before = meta.get("images_before", 0)
    after = f" after the {before:,} of the weights that it began from" if before else ""
    return f"{meta['images']:,}{during}{after}"
