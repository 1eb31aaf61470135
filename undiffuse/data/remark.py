"""What looks wrong with the values of a whole set: nearly black or nearly white throughout."""

import torch

from undiffuse.data import made
from undiffuse.data.levels import Own, beyond, combined, said
from undiffuse.data.picture import LAID, WIDE, Reading
from undiffuse.data.source import Source, open_raw, spread
from undiffuse.errors import DataError

# Levels of 255: what stays within so many of black or of white is refused. A mask of a few classes does, or 12 bits in
# a file of 16; photographs of a night do not, since one lamp or the noise of one picture is enough.
FEW = 16
QUARTER = 64  # of files of 16 bits, whose upper two are then never used: 14 bits, or fewer
PART, LOOKED_AT = 256, 256  # images at a time; and of how many the values are looked up for the message


def wrong(least: int, most: int, is_wide: bool, own: Own) -> str | None:
    """One line about levels from `least` to `most` over a whole set, whose values were `own`; None if they are good."""
    black, white = most <= (QUARTER if is_wide else FEW), least >= 255 - FEW
    if not (black or white):
        return None
    whole = (0, 65535) if is_wide else (0, 255)
    meant = own.range if black and own.range != said(whole) else said((own.least, max(own.most, own.least + 1)))
    return (
        f"all images are nearly {'black' if black else 'white'}: {own.span}, where {whole[0]} is black and {whole[1]} "
        f"white. Say what they are with --set data.range={meant}, or --set data.range={said(whole)} if this is meant"
    )


def laid(done: made.Made, total: int) -> bool:
    """Whether all images were laid on a background, which is told and may be all that is seen of them."""
    return any(what.startswith(LAID) and many == total for what, many, _ in done)


def narrow(source: Source, raw: Source | None = None) -> str | None:
    """The same about images of one shape; `raw` are those as they were, for their own values. Reads until it is good.

    A last channel that is 255 throughout counts as the opacity that it may be, and not as white.
    """
    if laid(source.made, len(source)):
        return None
    is_wide = made.count(source.made, WIDE) == len(source)
    least, most, opaque = 255, 0, 255
    for first in range(0, len(source), PART):
        images = source.gather(torch.arange(first, min(first + PART, len(source)), dtype=torch.int64, device="cpu"))[0]
        if images.shape[1] in (2, 4):
            opaque = min(opaque, int(images[:, -1].min()))
            images = images[:, :-1] if opaque == 255 else images
        least, most = min(least, int(images.min())), max(most, int(images.max()))
        if wrong(least, most, is_wide, Own(least, most, 0.0, "")) is None:
            return None
    own = source.own or (_own(raw) if raw is not None else None) or Own(least, most, 0.0, "uint8")
    return wrong(least, most, is_wide, own)


def refuse(source: Source, spec: str, split: str, reading: Reading) -> None:
    """DataError for a set that is nearly black or white, unless its range was given."""
    if reading.range is None and narrow(source) is not None:
        raise DataError(f"{narrow(source, open_raw(spec, split, reading))}")


def refuse_clipped(source: Source, reading: Reading) -> None:
    """DataError for a set that mostly lies outside of a range, which was not given for this set."""
    if reading.range is None:
        return
    what = beyond(reading.range)
    many, of = next(((many, of) for each, many, of in source.made if each == what), (0, ""))
    if 2 * many > len(source):
        raise DataError(
            f"{many:,} of {len(source):,} images have values outside of {said(reading.range)}, the data.range that the "
            f"model was trained with, one from {of}; say how these are read, for example with --set data.range=[0,255]"
        )


def _own(raw: Source) -> Own | None:
    """Of some images, where they are not of 8 bits."""
    found = []
    for index in spread(len(raw), LOOKED_AT):
        try:
            item = raw[index]
        except DataError:  # left out, and told
            continue
        if item.own is not None:
            found.append((item.own, item.image.numel()))
    return raw.own or combined(found)
