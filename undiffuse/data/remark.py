"""What looks wrong with the values of a set: images that are nearly black, nearly white, or not to be seen at all.

Each image is judged when it is read, and `made` counts them; so `train`, `data inspect`, `check` and `pack` agree.
"""

from typing import NamedTuple

from undiffuse.data import made
from undiffuse.data.levels import BLACK, HIDDEN, WHITE, Own, Range, beyond, combined, extent, said, shown
from undiffuse.data.made import Made
from undiffuse.data.picture import Reading
from undiffuse.data.source import Source, open_raw, spread
from undiffuse.errors import DataError
from undiffuse.machine import log

LOOKED_AT = 1024  # images, of which the values are looked up for the message
LEAST, SHARE = 2, 0.1  # images of a set: what fewer look like is not said
NAMED = 3  # images left out, of which name and reason are said
UNSEEN = (
    "transparent, or of the colour of the background, so that nothing of them is seen. Give another with "
    "--set data.background=black, keep the transparency with --set data.channels=4, or say --set 'data.range=[0,255]' "
    "if this is meant"
)


class Remark(NamedTuple):
    """One line, and whether nothing is trained on such a set; else it is a warning."""

    line: str
    refused: bool


def judge(raw: Source, done: Made, total: int, reading: Reading) -> Remark | None:
    """What looks wrong with a set of which `total` images could be read. `done` counts what was made of them."""
    for what in (BLACK, WHITE, HIDDEN):
        many = made.count(done, what)
        if total and many >= total:
            return Remark(_all("all images", what, raw, reading.range, whole_set=True), True)
        for part, spec in zip(raw.parts, raw.specs, strict=True) if many else ():
            if _is_all(part, what):
                return Remark(_all(f"all images of {spec}", what, part, reading.range, whole_set=False), True)
    some = [
        f"{many:,} of {total:,} images are {what} ({of}{', for one' if many > 1 else ''})"
        for what, many, of in done
        if what in (BLACK, WHITE, HIDDEN) and many >= max(LEAST, SHARE * total)
    ]
    meant = "Leave them out, or bring them to the range of the others, unless this is meant"
    return Remark(f"{', and '.join(some)}. {meant}", False) if some else None


def _all(which: str, what: str, source: Source, span: Range | None, whole_set: bool) -> str:
    own = _own(source)
    if what == HIDDEN or own is None:
        return f"{which} are {UNSEEN}"
    whole = span or {"uint8": (0, 255), "bool": (0, 1)}.get(own.kind, (0, 65535))
    given, least = said(whole), said((own.least, max(own.most, own.least + 1)))
    likely = own.range if what == BLACK and own.range != given else least
    now = f"--set 'data.range={given}'"
    ask = f"Say what they are with --set 'data.range={likely}'" if whole_set else "Leave them out, or convert them"
    scale = f"where {shown(whole[0])} is black and {shown(whole[1])} white"
    return f"{which} are {what}: {own.span}, {scale}. {ask}, or {now} if this is meant"


def _is_all(part: Source, what: str) -> bool:
    """Whether all images of a part look so; reads them until one does not."""
    if many := made.count(part.made, what):
        return many >= len(part)
    found = False
    for index in range(len(part)):
        try:
            item = part[index]
        except DataError:  # left out, and told
            continue
        if all(each != what for each, _ in item.made):
            return False
        found = True
    return found


def _own(source: Source) -> Own | None:
    """The values of the images, of many as of some; None if none can be read."""
    if source.own is not None:
        return source.own
    found = list[tuple[Own, int]]()
    for index in spread(len(source), LOOKED_AT):
        try:
            item = source[index]
        except DataError:  # left out, and told
            continue
        low, high = (int(edge[0]) for edge in extent(item.image[None].numpy()))
        found.append((item.own or Own(low, high, 0.0, "uint8"), item.image.numel()))
    return combined(found)


def of(source: Source, spec: str, split: str, reading: Reading) -> Remark | None:
    """The same of images of one shape, which were read from `spec`; it is read again only for the line."""
    if not any(what in (BLACK, WHITE, HIDDEN) for what, _, _ in source.made):
        return None
    return judge(open_raw(spec, split, reading), source.made, len(source), reading)


def refuse(source: Source, spec: str, split: str, reading: Reading, is_meant: bool) -> None:
    """DataError for a set, or a part of it, that looks wrong throughout, and a warning for one of which some does.

    `is_meant`: the range was given for this set, so that its values are what they should be.
    """
    found = None if is_meant else of(source, spec, split, reading)
    if found is not None and found.refused:
        raise DataError(found.line)
    if found is not None:
        log.warn(found.line)


def refuse_clipped(source: Source, reading: Reading) -> None:
    """DataError for a set that mostly lies outside of a range, which was not given for this set."""
    if reading.range is None:
        return
    what = beyond(reading.range)
    many, of = next(((many, of) for each, many, of in source.made if each == what), (0, ""))
    if 2 * many > len(source):
        raise DataError(
            f"{many:,} of {len(source):,} images have values outside of {said(reading.range)}, the data.range that the "
            f"model was trained with, one from {of}; say how these are read, for example with "
            "--set 'data.range=[0,255]'"
        )


def left_out(source: Source) -> str:
    """`2 left out: a.png (not a picture in a known format), …`, of the first few; empty where none is."""
    if not source.skipped:
        return ""
    why = dict(source.reasons)
    names = [f"{name} ({why[name]})" if name in why else name for name in source.skipped[:NAMED]]
    more = f" and {len(source.skipped) - NAMED:,} more" if len(source.skipped) > NAMED else ""
    return f"{len(source.skipped):,} left out: {', '.join(names)}{more}"
