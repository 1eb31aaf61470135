"""Images to files and back: Algorithms 3 and 4 of DDPM with bits on disk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import prod

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from undiffuse.codec import container, tail, trellis
from undiffuse.codec.chain import Chain, Order, wanted_scales
from undiffuse.codec.container import Group, Header, Parsed, canvas
from undiffuse.codec.plan import DELTA_BITS, LEAST, SCALES, Plan
from undiffuse.codec.trellis import Problem
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.reverse import FixedSmall
from undiffuse.diffusion.sampler.ancestral import Ancestral
from undiffuse.diffusion.sampler.base import sample
from undiffuse.errors import Corrupt, UsageError
from undiffuse.key import Key, Keys
from undiffuse.model.model import Model, to_float, to_uint8
from undiffuse.network.base import NOTHING, Conditioning

GROUP = 32  # images of an archive that share their paths
BATCH = 64  # images that the network is asked about at once
Tick = Callable[[int], None] | None


@dataclass(frozen=True)
class Written:
    """A file, and the images that it decodes to."""

    data: bytes
    shown: UInt8[Tensor, "n c h w"]


@dataclass(frozen=True)
class Codec:
    """A model with its tables."""

    model: Model
    plan: Plan

    def turns(self, n: int, steps: int | None = None, group: int = GROUP) -> int:
        """How often `encode` ticks, and `decode` of what it makes."""
        return -(-n // group) * (self.plan.steps if steps is None else steps)

    def encode(
        self,
        images: UInt8[Tensor, "n c h w"],
        steps: int | None = None,
        group: int = GROUP,
        seed: int = 0,
        label: int | None = None,
        lossless: bool = False,
        tick: Tick = None,
    ) -> bytes:
        """A file: see `write`."""
        return self.write(images, steps, group, seed, label, lossless, tick).data

    def write(
        self,
        images: UInt8[Tensor, "n c h w"],
        steps: int | None = None,
        group: int = GROUP,
        seed: int = 0,
        label: int | None = None,
        lossless: bool = False,
        tick: Tick = None,
    ) -> Written:
        """A file of one image or of many; of fewer steps than all, it is smaller and coarser.

        A lossless one has as many steps as its tables say, and then each value. `tick(1)` is called after each step of
        a group. Raises UsageError.
        """
        self.refuse(images)
        self._refuse_numbers(group, seed, label)
        n, pair = len(images), tuple(images.shape[2:])
        if lossless and steps is not None:
            raise UsageError(
                f"{steps} steps were given for a lossless file, which takes {self.plan.tail.step}; leave them out"
            )
        steps = self.plan.tail.step if lossless else self.plan.steps if steps is None else steps
        if not 1 <= steps <= self.plan.steps:
            raise UsageError(f"{steps} steps are not possible; the tables of this model have 1 to {self.plan.steps}")
        size = None if pair == self.model.image_shape[1:] else (pair[0], pair[1])
        header = Header(self.plan.ident, steps, n, min(group, n), size, seed, label, lossless)
        seen = list[list[Float[Tensor, "_ c hh ww"]]]()
        groups = self.groups(images, header, tick, seen, last=True)
        return self.packed(images, header, groups, [x_0 for (x_0,) in seen])

    def packed(
        self,
        images: UInt8[Tensor, "n c h w"],
        header: Header,
        groups: Sequence[Group],
        ends: Sequence[Float[Tensor, "_ c hh ww"]],
    ) -> Written:
        """The file of groups of bits that lead to these estimates; where the header says so, without loss."""
        h, w = images.shape[2:]
        if not header.lossless:
            shown = to_uint8(torch.cat([x_0[:, :, :h, :w].cpu() for x_0 in ends]))
            return Written(container.pack(header, groups, self.plan), shown)
        rest = [
            tail.encode(self.plan.tail, images[some.start : some.stop].numpy(), _levels(x_0, h, w), group.scales[-1])
            for some, group, x_0 in zip(header.groups(), groups, ends, strict=True)
        ]
        return Written(container.pack(header, groups, self.plan, rest), images)

    def first(self, group: Group, steps: int) -> Group:
        """The bits of its first steps, which are those of a shorter file."""
        layers = sum(start < steps for start in self.plan.starts())
        return Group(group.scales[:layers], group.paths[:steps])

    def groups(
        self,
        images: UInt8[Tensor, "n c h w"],
        header: Header,
        tick: Tick = None,
        seen: list[list[Float[Tensor, "_ c hh ww"]]] | None = None,
        last: bool = False,
        cond: Conditioning | None = None,
    ) -> list[Group]:
        """The bits of images, before they are packed; `cond` is said of them in place of the class of the header.

        Into `seen` goes x̂_0 of each group before each step and after the last one, or that `last` one alone.
        """
        keys, cond = Key(header.seed).rows(len(images)), cond or self.told(header.label, len(images))
        images, found = _on_canvas(images, canvas(header.size, self.model.image_shape)), list[Group]()
        every = header.groups()
        for numbers in self._together(header):
            some, estimates = _images(every, numbers), list[Float[Tensor, "b c h w"]]()
            parts = [slice(every[number].start - some.start, every[number].stop - some.start) for number in numbers]
            found += self._encoded(images[some], parts, keys[some], header.steps, cond.at(some), tick, estimates)
            if seen is not None:
                estimates = estimates[-1:] if last else estimates
                seen += [[x_0[part] for x_0 in estimates] for part in parts]
        return found

    def layers_of(self, group: Group) -> list[int]:
        """Of each step."""
        starts = self.plan.starts().items()
        return [max(k for start, k in starts if start <= n) for n in range(len(group.paths))]

    def bits(self, group: Group, values: int) -> list[int]:
        """Of each image of a group."""
        rows = [self.plan.budgets(n, group.scales[k], values) for n, k in enumerate(self.layers_of(group))]
        return [sum(column) for column in zip(*rows, strict=True)]

    def decode(self, data: bytes, tick: Tick = None) -> "Decoded":
        """What a file says, as far as it is there. Raises Corrupt where nothing of it can be used."""
        parsed = container.parse(data, self.plan, self.model.image_shape)
        label, classes = parsed.header.label, self.model.config.classes or 0
        if label is not None and label >= classes:
            raise Corrupt(f"the file is damaged: it says class {label}, and this model has {classes} classes")
        header, shape = parsed.header, canvas(parsed.header.size, self.model.image_shape)
        keys, cond = Key(header.seed).rows(header.count), self.told(header.label, header.count)
        chains, values = list[tuple[Chain, int]](), prod(shape)

        def length(number: int) -> tuple[int, int]:
            """In steps, which groups that are decoded together share; one whose last path is cut off has its own."""
            group = parsed.groups[number]
            whole = sum(map(len, group.paths)) == sum(self.bits(group, values))
            return len(group.paths), -1 if whole else number

        for numbers in self._together(header):
            for _, alike in groupby(numbers, length):
                same = list(alike)
                some = _images(header.groups(), same)
                chain = Chain(self.model, self.plan, keys[some], shape, cond.at(some))
                chains.append((chain, self._decoded(chain, [parsed.groups[number] for number in same], tick)))
        return Decoded(parsed, chains, self.model, self.plan)

    def _together(self, header: Header) -> list[range]:
        """The numbers of groups that walk together: in batches of the network, which large images fill alone."""
        count = len(header.groups())
        each = max(1, BATCH // header.group) if header.size is None else 1
        return [range(i, min(i + each, count)) for i in range(0, count, each)]

    def refuse(self, images: UInt8[Tensor, "n c h w"]) -> None:
        """UsageError for what no file holds."""
        c, most = self.model.image_shape[0], container.MOST_SIDE
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != c or not images.numel():
            raise UsageError(
                f"images of shape {list(images.shape)} and {images.dtype} cannot be encoded by this model; give uint8 "
                f"of shape [n, {c}, h, w]"
            )
        values = len(images) * prod(canvas((images.shape[2], images.shape[3]), self.model.image_shape))
        if len(images) > container.MOST_IMAGES or max(images.shape[2:]) > most or values > container.MOST_VALUES:
            raise UsageError(
                f"{len(images)} × {images.shape[3]}×{images.shape[2]} (width × height) is more than a file holds: "
                f"{container.MOST_IMAGES} images, sides of {most}, and {container.MOST_VALUES} values; give fewer"
            )

    def _refuse_numbers(self, group: int, seed: int, label: int | None) -> None:
        """What a header cannot say, or the model does not know."""
        classes = self.model.config.classes or 0
        for what, value, low, high in (
            ("group", group, 1, container.MOST_GROUP),
            ("seed", seed, 0, container.MOST_SEED),
            ("class", label, 0, classes - 1),
        ):
            if value is not None and not low <= value <= high:
                there = f"give {low} to {high}" if high >= low else "this model was trained without classes"
                raise UsageError(f"{what} = {value} is not possible; {there}")
        known = self.model.classes
        if label is None and known is not None and not known.unlabelled:
            raise UsageError(f"this model was never trained without a class; give a label. {known.known()}")

    def told(self, label: int | None, n: int) -> Conditioning:
        """A class, or none, of n images."""
        if label is None:
            return NOTHING
        return Conditioning(torch.full((n,), label, dtype=torch.int64, device="cpu"))

    def _encoded(
        self,
        images: UInt8[Tensor, "b c h w"],
        parts: list[slice],
        keys: Keys,
        steps: int,
        cond: Conditioning,
        tick: Tick,
        seen: list[Float[Tensor, "b c h w"]],
    ) -> list[Group]:
        """Of the parts of images that share their paths."""
        truth, shape = to_float(images.to(self.model.device)), (images.shape[1], images.shape[2], images.shape[3])
        chain, found = Chain(self.model, self.plan, keys, shape, cond), Group()
        values, memory, paths = prod(shape), self.plan.memory, [list[np.ndarray]() for _ in parts]

        def take(
            number: int, order: Order, linear: Float[Tensor, "b d"], square: Float[Tensor, "b d"]
        ) -> Float[Tensor, "b d"]:
            scales = [found.scales[-1][part] for part in parts]
            bits = [self.plan.budgets(number, each, values) for each in scales]
            ends = [trellis.edges(values, each, memory) for each in bits]
            said = trellis.search(
                [
                    Problem(linear[part].flatten(), square[part].flatten(), end, sum(each))
                    for part, end, each in zip(parts, ends, bits, strict=True)
                ],
                memory,
            )
            for path, mine in zip(said, paths, strict=True):
                mine.append(path)
            if tick is not None:
                tick(len(parts))
            return self._noise(chain, order, number, said, scales)[0]

        lead(chain, truth, steps, found, take, seen)
        return [Group([row[part] for row in found.scales], mine) for part, mine in zip(parts, paths, strict=True)]

    def _decoded(self, chain: Chain, found: list[Group], tick: Tick) -> int:
        """Walks as many steps as these groups have, and returns their number."""
        starts, layer = self.plan.starts(), 0
        for number, paths in enumerate(zip(*(group.paths for group in found), strict=True)):
            layer = starts.get(number, layer)
            scales = [group.scales[layer] for group in found]
            order = Order.of(chain.keys, number, prod(chain.shape))
            z, share = self._noise(chain, order, number, paths, scales)
            if share < 0.5:  # mostly noise: the estimate before the step is the better one
                return number
            chain.move(chain.step(number, chain.estimate(number), sum(scales, [])), z)
            if tick is not None:
                tick(len(found))
        return len(found[0].paths)

    def _noise(
        self, chain: Chain, order: Order, number: int, paths: Sequence[np.ndarray], scales: list[list[int]]
    ) -> tuple[Float[Tensor, "b d"], float]:
        """z of a step, and of which share of the values its paths speak."""
        memory, (count, values) = self.plan.memory, order.signs.shape
        ends = (trellis.edges(values, self.plan.budgets(number, each, values), memory) for each in scales)
        parts = [trellis.read(path, end, memory) for path, end in zip(paths, ends, strict=True)]
        said = torch.from_numpy(np.concatenate(parts)).to(chain.device)
        if len(said) == count * values:
            return order.back(said.view(count, values) * order.signs), 1.0
        z = order.along(chain.rest(number)) * order.signs
        z.view(-1)[: len(said)] = said
        return order.back(z * order.signs), len(said) / (count * values)


Take = Callable[[int, Order, Float[Tensor, "b d"], Float[Tensor, "b d"]], Float[Tensor, "b d"]]


def lead(
    chain: Chain,
    truth: Float[Tensor, "b c h w"],
    steps: int,
    found: Group,
    take: Take,
    seen: list[Float[Tensor, "b c h w"]],
) -> None:
    """Walks a chain towards images; z of a step, each value where it belongs, is what `take` makes of it.

    It is told the step, the order, and w₁ and w₂ as a path meets them. Scales go into `found`; into `seen` goes x̂_0
    before each step and after the last one.
    """
    starts = chain.plan.starts()
    for number in range(steps):
        seen.append(x_0 := chain.estimate(number))
        if number in starts:
            found.scales.append(near(found, wanted_scales(chain.plan, number, x_0, truth)))
        step, order = chain.step(number, x_0, found.scales[-1]), Order.of(chain.keys, number, prod(chain.shape))
        linear, square = (order.along(each) for each in step.weights(truth))
        chain.move(step, take(number, order, linear * order.signs, square))
    seen.append(chain.estimate(steps))


def near(found: Group, wanted: list[int]) -> list[int]:
    """As near to the scales that are wanted as three bits each allow; all 0 in the first layer, which has none."""
    if not found.scales:
        return [0] * len(wanted)
    most = LEAST + 2**DELTA_BITS - 1
    return [
        max(-SCALES, min(SCALES, before + max(LEAST, min(most, scale - before))))
        for before, scale in zip(found.scales[-1], wanted, strict=True)
    ]


def _images(groups: list[range], numbers: Sequence[int]) -> slice:
    """Of groups that follow one another."""
    return slice(groups[numbers[0]].start, groups[numbers[-1]].stop)


def _levels(x_0: Float[Tensor, "b c hh ww"], height: int, width: int) -> Float[np.ndarray, "b c h w"]:
    """An estimate in grey levels, without what was added around it."""
    return ((x_0[:, :, :height, :width].cpu().double() + 1) * 127.5).numpy()


def _on_canvas(images: UInt8[Tensor, "n c h w"], shape: tuple[int, int, int]) -> UInt8[Tensor, "n c hh ww"]:
    """Small ones are continued to the right and below by their last pixels."""
    rows, columns = (
        torch.arange(most, dtype=torch.int64, device="cpu").clamp(max=side - 1)
        for most, side in zip(shape[1:], images.shape[2:], strict=True)
    )
    return images[:, :, rows][:, :, :, columns]


@dataclass(frozen=True)
class Decoded:
    """Where the bits of a file lead; what is made of it is chosen here."""

    parsed: Parsed
    chains: list[tuple[Chain, int]]
    model: Model
    plan: Plan

    def lossless(self) -> UInt8[Tensor, "n c h w"] | None:
        """The images as they were, of a file that has all that they take.

        Raises `tail.Differs` where this machine's arithmetic does not lead to the numbers of the one that wrote it.
        """
        if not self.parsed.ends:
            return None
        header, x_0 = self.parsed.header, self.estimate()
        h, w = header.size or self.model.image_shape[1:]
        found = [
            tail.decode(self.plan.tail, end, _levels(x_0[some.start : some.stop], h, w), group.scales[-1])
            for end, group, some in zip(self.parsed.ends, self.parsed.groups, header.groups(), strict=True)
        ]
        return torch.from_numpy(np.concatenate(found))

    def estimate(self) -> Float[Tensor, "n c hh ww"]:
        """x̂_0 of each image, with what was added around it, on the CPU."""
        return torch.cat([chain.estimate(step).cpu() for chain, step in self.chains])

    def mean(self) -> UInt8[Tensor, "n c h w"]:
        """x̂_0: the least mean square error."""
        return self._cut(self.estimate())

    def drawn(self, solver: str = "unipc-2", steps: int = 10, realism: float = 1.0) -> UInt8[Tensor, "n c h w"]:
        """Where a solver leads from there in that many steps: a picture, where the mean is one of many at once.

        `realism` 0 is the mean, and what lies between both is between them: the least error at a distance from what
        pictures are (Freirich, Michaeli & Meir 2021). Raises UsageError.
        """
        if not 0 <= realism <= 1:
            raise UsageError(f"realism = {realism:g} is not possible; give 0 (the mean) to 1")
        images, sampler = [], self.model.sampler(solver)
        if isinstance(sampler, Ancestral) and sampler.variance.learned:
            sampler = Ancestral(FixedSmall())  # the steps are no table's, and windows say no variance
        for chain, step in self.chains:
            start = chain.times[step]
            own = self.model.times(min(40, self.model.process.steps or 40), "log-snr")[:-1]
            below = own[own < start]
            pick = torch.linspace(0, len(below) - 1, min(steps - 1, len(below)), dtype=F64, device="cpu").round().long()
            times = torch.cat([start[None], below[pick], torch.zeros(1, dtype=F64, device="cpu")])
            denoise = partial(chain.denoise, cond=chain.cond)
            x = sample(sampler, denoise, chain.process, chain.keys, chain.shape, times, start=chain.x)
            images.append((chain.estimate(step) + realism * (x - chain.estimate(step)) if realism < 1 else x).cpu())
        return self._cut(torch.cat(images))

    def _cut(self, x: Float[Tensor, "n c hh ww"]) -> UInt8[Tensor, "n c h w"]:
        h, w = self.parsed.header.size or x.shape[2:]
        return to_uint8(x[:, :, :h, :w])
