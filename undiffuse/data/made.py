"""What was made of the images of a set when they were read, counted: for one line that says it."""

from collections.abc import Iterable

from undiffuse.data.levels import BLACK, HIDDEN, WHITE, Note

Made = tuple[tuple[str, int, str], ...]  # what was done, to how many images, and what the first of them was


def tally(notes: Iterable[Note]) -> Made:
    """Counts equal deeds, in the order in which they were met."""
    return summed(*(((what, 1, of),) for what, of in notes))


def summed(*parts: Made) -> Made:
    """Several counts as one."""
    counts: dict[str, tuple[int, str]] = {}
    for what, count, of in (each for part in parts for each in part):
        before, first = counts.get(what, (0, of))
        counts[what] = before + count, first
    return tuple((what, count, first) for what, (count, first) in counts.items())


def count(made: Made, what: str) -> int:
    """To how many images that was done."""
    return next((many for each, many, _ in made if each == what), 0)


def done(made: Made) -> Made:
    """What was done, without what looks wrong, which `remark` says."""
    return tuple(each for each in made if each[0] not in (BLACK, WHITE, HIDDEN))


def channels(count: int) -> str:
    """`grey`, `RGB`, `5 channels`."""
    return {1: "grey", 3: "RGB"}.get(count, f"{count} channels")


def listed(made: Made) -> str:
    """`10 cropped (64×48), 3 made grey`."""
    return ", ".join(
        f"{many:,} {what}" + (f" ({of}{', for one' if many > 1 else ''})" if of else "") for what, many, of in made
    )


def line(made: Made, total: int, shape: tuple[int, int, int]) -> str:
    """What became of the images, of which `shape` (channels, height, width) is what they are now; empty for nothing."""
    c, h, w = shape
    made = done(made)
    kind = channels(c) if c in (1, 3) else f"with {channels(c)}"
    images = "1 image becomes" if total == 1 else f"{total:,} images become"
    return f"{images} {w}×{h} {kind}: {listed(made)}" if made else ""
