"""How many images a model has seen, those of the weights that it began from among them.

The metadata of a model has `images` and `step` of the training that made it. If that began from other weights
(`--init`, or a distillation) and these say what they had seen, `images_before` is the sum of theirs.
"""

from collections.abc import Mapping
from typing import Any


def total(meta: Mapping[str, Any]) -> int:
    """Of this training and of those before it; 0 where nothing is known."""
    return meta.get("images", 0) + meta.get("images_before", 0)


def words(meta: Mapping[str, Any], during: str = "") -> str:
    """`768,000`, or `768,000 after the 1,280,000 of the weights that it began from`; `during` follows the number."""
    before = meta.get("images_before", 0)
    after = f" after the {before:,} of the weights that it began from" if before else ""
    return f"{meta['images']:,}{during}{after}"
