"""Whether samples are copies: how near they are to training images, beside images that the model has not seen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from undiffuse.figure import enlarged, grid
from undiffuse.machine import dist, log
from undiffuse.measure.passes import Against, Reference, Ticking, silent
from undiffuse.measure.sets import Floor, Real
from undiffuse.quality.gather import exchange
from undiffuse.quality.metric.base import Gathered
from undiffuse.quality.nearer import Rate, rate
from undiffuse.quality.nearest import Near, Points, around, near, pixels, points

FILE = "memorised.png"
PAIRS, ACROSS = 16, 4  # the worst pairs that are shown in each space; in a row
MANY = 10_000  # held-out images from which on the closest 0.1 % are told too
FEW = 5_000  # training images that a model copies easily
VAGUE = 0.05  # expected by chance: a smaller share of copies would not show


@dataclass(frozen=True)
class Space:
    """What was found in pixels, or in the features of one extractor.

    `worst`: number of the sample, number of its training image, and their distance over what is usual there.
    """

    name: str
    rates: tuple[Rate, ...]
    training: int
    around: int
    worst: tuple[tuple[int, int, float], ...]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        worst = [{"sample": sample, "training": image, "ratio": ratio} for sample, image, ratio in self.worst]
        said = {"space": self.name, "training": self.training, "around": self.around}
        return said | {"rates": [each.plain() for each in self.rates], "worst": worst}


@dataclass(frozen=True, eq=False)
class Memorisation:
    """How many samples are nearer to a training image than held-out images are, in each space."""

    spaces: tuple[Space, ...]
    held_out: str  # in words
    training: int
    pictures: UInt8[Tensor, "n c h w"]  # sample and training image in turn, ACROSS pairs in a row, space by space

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"held_out": self.held_out, "spaces": [each.plain() for each in self.spaces], "says": self.sentence()}

    def lines(self) -> list[str]:
        """A small table, and what it means."""
        said = self.plain()
        head = [f"memorisation: {told(said)}"]
        some = [
            f"in {space.name} {space.training:,} of the {self.training:,} training images are compared, spread evenly"
            for space in self.spaces
            if space.training < self.training
        ]
        return [*head, *log.aligned(rows_of(said)), *some, self.sentence()]

    def sentence(self) -> str:
        """What the first rates mean, and what to do."""
        first = {space.name: space.rates[0] for space in self.spaces}
        more = {name: each for name, each in first.items() if each.is_more}
        if not more:
            chance = max(each.expected_high for each in first.values())
            least = f"; so few held-out images show only copying beyond {_share(chance)}" if chance > VAGUE else ""
            return f"Samples are not nearer to training images than images are that the model has not seen{least}."
        found = ", ".join(
            f"{_share(each.rate)} in {name} where {_share(each.expected)} is expected" for name, each in more.items()
        )
        says = f"More samples are near to training images than new images would be ({found}): "
        says += f"the model probably copies. Look at the worst pairs ({FILE}, with --out)"
        if self.training < FEW:
            return says + (
                f". {self.training:,} training images are few: give more, or train with dropout (network.dropout) and "
                "flips (data.flip), and stop earlier, by the held-out loss (train.patience)."
            )
        return says + "; stop training earlier (train.patience), and look for duplicates in the training images."

    def picture(self) -> Image.Image:
        """The worst pairs: a sample at the left, its nearest training image at the right."""
        return grid(self.pictures, 2 * ACROSS, enlarged(self.pictures.shape[-1]))


def told(said: Mapping[str, Any]) -> str:
    """What is counted, of a memorisation as JSON has it."""
    return f"samples nearer to a training image than the closest 1 % of {said['held_out']}"


def rows_of(said: Mapping[str, Any]) -> list[list[str]]:
    """Its table, the first row of which says what stands in the others."""
    rows = [["in", "samples", "nearer", "95 %", "new images", "p"]]
    for space in said["spaces"]:
        for i, each in enumerate(space["rates"]):
            name = f"{space['space']}, closest {_share(each['level'])}" if i else space["space"]
            new = f"{_share(each['expected'])} ({_span(each['expected_low'], each['expected_high'])})"
            found = [f"{each['n']:,}", _share(each["rate"]), _span(each["low"], each["high"])]
            rows.append([name, *found, new, f"{each['p']:.2g}"])
    return rows


def _share(value: float) -> str:
    return f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:.0f} %"


def _span(low: float, high: float) -> str:
    return f"{_share(low).removesuffix(' %')}–{_share(high)}"


def memorise(
    samples: UInt8[Tensor, "n c h w"],
    gathered: Mapping[str, Gathered],
    others: Mapping[str, Against],
    reference: Reference,
    floor: Floor,
    device: torch.device,
    ticking: Ticking = silent,
) -> Memorisation | None:
    """In pixels, and in each extractor's features; None where there are too few training images to say.

    Without another split the held-out images are training images, each compared with the others: for n images of one
    law, an image beside the n − 1 others is what a new one is beside n − 1. All processes return the same.
    """
    assert reference.images is not None
    training, is_apart = reference.images, floor.apart is None
    if around(len(training), is_apart) < 1:
        return None
    found = [_in_pixels(samples, training, floor, device)]
    found += [_in_features(name, gathered[name], other, is_apart) for name, other in others.items()]
    spaces = [_space(each, len(samples), ticking) for each in found if around(each.known.n, is_apart) > 0]
    # Where all held-out images are training images too, they say nothing.
    spaces = [each for each in spaces if each.rates[0].threshold > 0]
    if not spaces:
        return None
    pictures = torch.cat([_pictures(space, samples, training) for space in spaces])[: -2 * ACROSS]
    held_out = floor.said if is_apart else f"{floor.said}, each against all the others"
    return Memorisation(tuple(spaces), held_out, len(training), pictures)


@dataclass(frozen=True, eq=False)
class _Sets:
    """Three sets in one space, and the numbers of their images. `skip`: as `near` has it, for the held-out ones."""

    name: str
    samples: Points
    known: Points
    held_out: Points
    skip: Int[Tensor, "m"] | None
    sample: Int[Tensor, "n"]
    image: Int[Tensor, "k"]


def _in_pixels(samples: UInt8[Tensor, "n c h w"], training: Real, floor: Floor, device: torch.device) -> _Sets:
    known = pixels(len(training), lambda index: training.gather(index)[0], device)
    drawn = pixels(len(samples), lambda index: samples[index], device)
    skip = None if floor.apart is None else torch.nonzero(floor.apart)[:, 0]
    other = floor.images
    if skip is not None:
        held_out = known.some(skip)
    else:
        assert other is not None
        held_out = pixels(len(other), lambda index: other.gather(index)[0], device)
    return _Sets("pixels", drawn, known, held_out, skip, _up_to(drawn.n), _up_to(known.n))


def _in_features(name: str, gathered: Gathered, against: Against, is_apart: bool) -> _Sets:
    samples, known = gathered.rows(), against.reference.rows()
    held_out = None if against.floor is None else against.floor.rows()
    assert samples is not None and known is not None and held_out is not None
    image, own = known.index(), held_out.index()
    place = torch.searchsorted(image, own).clamp(max=len(image) - 1)
    skip = None if is_apart else torch.where(image[place] == own, place, -1)  # of very many only some are kept
    drawn, real, other = (points(each.rows()) for each in (samples, known, held_out))
    return _Sets(name, drawn, real, other, skip, samples.index(), image)


def _up_to(n: int) -> Int[Tensor, "n"]:
    return torch.arange(n, dtype=torch.int64, device="cpu")


def _space(sets: _Sets, shown: int, ticking: Ticking) -> Space:
    """The rates, and the worst of the samples with numbers below `shown`."""
    k = around(sets.known.n, sets.skip is None)
    with ticking(f"nearest training images, {sets.name}", 4 * sets.known.n) as tick:
        held_out = _shared(sets.held_out, sets.known, sets.skip, k, tick).ratio
        found = _shared(sets.samples, sets.known, None, k, tick)
    levels = [0.01] + ([0.001] if len(held_out) >= MANY else [])
    order = torch.argsort(found.ratio, stable=True)
    worst = tuple(
        (int(sets.sample[i]), int(sets.image[found.number[i]]), float(found.ratio[i]))
        for i in order[sets.sample[order] < shown][:PAIRS].tolist()
    )
    return Space(sets.name, tuple(rate(found.ratio, held_out, level) for level in levels), sets.known.n, k, worst)


def _shared(x: Points, known: Points, skip: Int[Tensor, "n"] | None, k: int, tick: Callable[[int], Any]) -> Near:
    """Divided among the processes; the whole in each."""
    own = torch.arange(dist.rank(), x.n, dist.size(), dtype=torch.int64, device="cpu")
    found = near(x.some(own), known, None if skip is None else skip[own], k, tick)
    parts = zip(*exchange((own, found.number, found.distance, found.ratio)), strict=True)
    index, number, distance, ratio = (torch.cat(part) for part in parts)
    order = index.argsort()
    return Near(number[order], distance[order], ratio[order])


def _pictures(space: Space, samples: UInt8[Tensor, "n c h w"], training: Real) -> UInt8[Tensor, "p c h w"]:
    """The worst pairs, and white to the end of the row and for another."""
    pairs = [(samples[sample], training[image].image) for sample, image, _ in space.worst]
    flat = torch.stack([each for pair in pairs for each in pair])
    white = torch.full_like(flat[:1], 255).expand(-len(flat) % (2 * ACROSS) + 2 * ACROSS, -1, -1, -1)
    return torch.cat([flat, white])
