"""Pictures with an embedded ICC profile become sRGB, which is what a picture without one is taken for."""

import io
import re
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from undiffuse.data.levels import Note

Convert = Callable[[Image.Image], Image.Image]

KEPT = 32  # profiles; a set has few, and one of CMYK is large
GRID = 9  # colours along each axis, by which a profile is compared with sRGB
CLOSE = 1  # levels: what differs by less is sRGB
KINDS = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
PASSED_OVER = "with a colour profile that cannot be used, read as sRGB"


def to_srgb(image: Image.Image) -> tuple[Image.Image, tuple[Note, ...]]:
    """Grey, RGB or CMYK, each with or without alpha, as its profile says, in grey or RGB; and what was done.

    A profile that is broken, or of another kind than the picture, is passed over. The tags gAMA and cHRM of a PNG are
    not read.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image, ()
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    plain = image if alpha is None else image.convert(image.mode[:-1])
    convert, name = _conversion(profile, plain.mode)
    if convert is None:
        return image, ((PASSED_OVER, name),) if name else ()
    changed = convert(plain)
    if alpha is not None:
        changed.putalpha(alpha)
    return changed, (("converted to sRGB", name),)


@lru_cache(maxsize=KEPT)
def _conversion(profile: bytes, mode: str) -> tuple[Convert | None, str]:
    """What makes a picture of that mode sRGB, and the profile's name; None, and "" if it is sRGB, else why not."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        known = source.profile
        assert isinstance(known, ImageCms.core.CmsProfile)
        kind, name = known.xcolor_space.strip(), _name(known.profile_description)
        if kind != KINDS.get(mode):
            return None, f"{name}, which is for {kind}"
        convert = _transform(source, mode)
        if mode == "CMYK":
            return convert, name
        colours = _colours(mode)
        differs = np.abs(np.asarray(convert(colours)).astype(int) - np.asarray(colours)).max()
        return (convert, name) if differs > CLOSE else (None, "")
    except Exception as error:  # what ImageCms raises for damaged bytes is of many types
        return None, " ".join(str(error).split())[:80] or type(error).__name__


def _transform(source: ImageCms.ImageCmsProfile, mode: str) -> Convert:
    transform = ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        # The tables that speed a transform up are off by ten levels in the dark where a profile is linear.
        ImageCms.Flags.BLACKPOINTCOMPENSATION | (ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE),
    )
    if mode != "L":
        return lambda image: _applied(transform, image)
    table = np.asarray(_applied(transform, _colours("L")))[..., 1].ravel().tolist()  # grey stays grey
    return lambda image: image.point(table)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    changed = ImageCms.applyTransform(image, transform)
    assert changed is not None  # it is in place only if that is asked for
    return changed


def _colours(mode: str) -> Image.Image:
    """All greys, or a grid over the cube of RGB."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    axis = np.linspace(0, 255, GRID).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(axis, axis, axis), -1).reshape(GRID, -1, 3))


def _name(description: str | None) -> str:
    return re.sub(r"[^ -~]+", " ", description or "").strip()[:40] or "a profile without a name"
