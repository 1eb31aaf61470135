"""The one object that users hold: a trained denoiser that knows its own shape, process and history."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from undiffuse.config import parse
from undiffuse.data.format.packed import PackedSource
from undiffuse.data.made import Made
from undiffuse.data.pack import open_data
from undiffuse.data.picture import Reading
from undiffuse.data.single import read_picture
from undiffuse.data.source import ArraySource
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.grid import Grid, suited
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.reverse import Variance, other_variance
from undiffuse.diffusion.sampler.base import Along, Denoise, Sampler, sample
from undiffuse.errors import Corrupt, NotFiniteError, UsageError, unknown
from undiffuse.key import Key, Keys, Seed
from undiffuse.machine import device as machine
from undiffuse.machine import dist
from undiffuse.model import distilled, fitted, walk
from undiffuse.model.classes import ALL, Classes, Label, Told, told
from undiffuse.model.facts import facts_of
from undiffuse.model.fitted import Fit
from undiffuse.model.guide import Guide, guide_of
from undiffuse.model.mean import DRAWS, mean_of
from undiffuse.model.recipe import DataConfig, ModelConfig
from undiffuse.model.walk import Steps, Walk
from undiffuse.model.weights import digest_of_weights, weights_of
from undiffuse.network.base import NOTHING, Conditioning
from undiffuse.strict import flag, whole

PRECISIONS = ("auto", "float32", *machine.HALF, "tf32")


def to_float(image: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """0 … 255 to [−1, 1], exactly x/127.5 − 1."""
    return image.float() / 127.5 - 1


def to_uint8(x: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
    """[−1, 1] to 0 … 255, rounded; what lies outside is clipped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class Model:
    """`denoiser` holds the averaged weights, in evaluation mode, x̂_0 clipped; `meta` tells where they come from."""

    config: ModelConfig
    denoiser: Denoiser
    meta: dict[str, Any]
    device: torch.device = torch.device("cpu")
    precision: str = "float32"
    run: Path | None = None  # the folder of the run that it was read from
    guide: Guide | None = None  # what leads it where it draws

    def facts(self) -> dict[str, str]:
        """What it is, in words: for `_repr_html_`, which a notebook shows."""
        return facts_of(self)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in self.facts().items()
        )
        return f"<table><caption>undiffuse model</caption>{rows}</table>"

    @property
    def process(self) -> Process:
        """The noise schedule that the network was trained with."""
        return self.config.process

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.config.image

    @property
    def data(self) -> DataConfig:
        """How pictures became images in training; the defaults where `meta` does not say."""
        recipe = self.meta.get("recipe")
        found = recipe.get("data") if isinstance(recipe, dict) else None
        return parse(DataConfig, found if isinstance(found, dict) else {}, "the data section of this model")

    @cached_property
    def classes(self) -> Classes | None:
        """The classes that it was trained on, None without labels. Raises Corrupt if `meta` has others."""
        count, said = self.config.classes, self.meta.get("classes")
        if count is None:
            return None
        if said is None:
            recipe = self.meta.get("recipe")
            train = recipe.get("train") if isinstance(recipe, dict) else None
            return Classes.unknown(count, bool(train.get("drop_label", 1.0)) if isinstance(train, dict) else True)
        found = parse(Classes, said if isinstance(said, dict) else {}, "the classes of this model")
        if len(found.names) != count or len(found.counts) != count:
            raise Corrupt(f"this model has {count} classes and names for {len(found.names)}; it is damaged")
        return found

    def digest(self, before: bytes = b"") -> str:
        """sha256 of what stands before, and of the weights by name."""
        return digest_of_weights(weights_of(self.denoiser.network), before)

    @cached_property
    def fit(self) -> Fit | None:
        """What was fitted to these weights, by `undiffuse fit`. Raises UsageError if `meta` has that of others."""
        found = fitted.find(self.run, self.digest()) if fitted.any_kept(self.run) else None
        if found is None and (said := self.meta.get("fit")):
            return fitted.parsed(said, self.digest(), "the grid in the file of this model")
        return found

    def told(self, label: Label, n: int, seed: Seed = 0) -> Told:
        """The labels of n images: see `classes.py` for what `label` may be. Raises UsageError."""
        found = told(self.classes, label, n, seed)
        if self.guide is not None:
            self.guide.refuse(found.label)
        return found

    def variant(
        self,
        clip: bool | None = None,
        variance: str | Variance | None = None,
        precision: str | None = None,
        guidance: SupportsFloat | None = None,
        guide: "Model | None" = None,
    ) -> "Model":
        """The same weights with x̂_0 not clipped, as in the bare Algorithm 2, or with the other fixed variance.

        `precision` is what the network computes in: float32, bf16, float16 or tf32 (cards only), or `auto`: bf16 where
        the processor is faster with it, float16 on cards without, else float32. All around it stays float32.

        With `guidance`, 1 for none, what is drawn is led away from the answer of this model without a class, or from
        that of `guide`, a worse model of the same kind: see `diffusion/guide.py`. Raises UsageError.
        """
        new, clip = other_variance(self.config.variance, variance), None if clip is None else flag("clip", clip)
        computing, precision = self.denoiser.computing, self.precision if precision is None else precision
        if precision != self.precision:
            if precision not in PRECISIONS:
                raise unknown("precision", str(precision), PRECISIONS)
            precision = machine.native_precision(self.device) if precision == "auto" else precision
            machine.refuse_precision(precision, self.device, "precision")
            computing = machine.in_precision(precision, self.device)
        config, denoiser = replace(self.config, variance=new), self.denoiser.but(clip, new, computing)
        led = None if self.guide is None else self.guide.computing(computing)
        found = replace(self, config=config, denoiser=denoiser, precision=precision, guide=led)
        if guidance is None and guide is None:
            return found
        if guidance is None:
            raise UsageError("a guide says what to lead away from, and not how much; give guidance too, such as 2")
        return replace(found, guide=guide_of(found, guidance, guide))

    def source(
        self,
        data: str | Path,
        split: str = "train",
        skip_bad: bool = False,
        reading: Reading | None = None,
        own_size: bool = False,
        count: int | None = None,
    ) -> ArraySource | PackedSource:
        """A data set made into images as those of the training were: of this shape, and read in the same way.

        In memory, or as it is if it is packed in this shape. `reading` says it in another way; `own_size` keeps the
        size of its images, and `count` takes the first ones alone.
        """
        c, size = self.image_shape[0], None if own_size else self.image_shape[1:]
        reading = reading or self.data.reading
        return open_data(data, size, c, reading, skip_bad, use_cache=False, split=split, count=count)

    def picture(self, path: Path) -> UInt8[Tensor, "c h w"]:
        """One picture file made into such an image. Raises DataError."""
        return self.read_picture(path)[0]

    def read_picture(self, path: Path, reading: Reading | None = None) -> tuple[UInt8[Tensor, "c h w"], Made]:
        """One picture file made into such an image, and what that took; `reading` as in `source`. Raises DataError."""
        return read_picture(path, self.image_shape, reading or self.data.reading)

    def sampler(self, solver: str | Sampler | None = None, eta: SupportsFloat | None = None) -> Sampler:
        """A solver by name, with its order, `unipc-2`, or its fields, `heun,churn=40`; the ancestral one unless given.

        The ancestral one takes the model's variance; `eta` is DDIM's. A distilled model takes DPM-Solver++(2M) alone.
        """
        return walk.sampler(self.config, solver, eta)

    def sample(
        self,
        n: SupportsIndex,
        steps: Steps = None,
        solver: str | Sampler | None = None,
        seed: Seed = 0,
        batch: SupportsIndex = 64,
        label: Label = None,
        progress: Callable[[int], None] | None = None,
    ) -> UInt8[Tensor, "n c h w"]:
        """n images; image i depends on the seed and on i alone. Steps and solver are those of `walk` unless named.

        Of n seeds each makes the image that it makes alone, the first of its own.

        `label` is a class by name or number, one for each image, `random` (as often as in training), `none`, or `all`:
        then n images of each class that was trained on, class by class. The processes of a run take turns at the
        batches, and each returns all. `progress(k)` is called after every k steps of a batch, of which there are
        `sampling_steps`, given the times.
        """
        n, batch = self.count(whole("n", n, 1), label), whole("batch", batch, 1)
        told, keys, way = self.told(label, n, seed), Key.each(seed, n).fold("sample"), self.walk(steps, solver)
        images, batch = torch.zeros(n, *self.image_shape, dtype=torch.uint8, device="cpu"), share_of(n, batch)
        for first, some in self.draw(keys, way.times, way.sampler, told.conditioning, batch, progress):
            images[first : first + len(some)] = some
        return images

    def draw(
        self,
        keys: Keys,
        times: Float[Tensor, "times"],
        sampler: Sampler,
        cond: Conditioning = NOTHING,
        batch: int = 64,
        progress: Callable[[int], None] | None = None,
        starts: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, UInt8[Tensor, "b c h w"]]]:
        """The images of `sample` batch by batch, with the number of the first; only those that begin at `starts`.

        The processes of a run take turns at the batches, and each is given all of them.
        """
        n = len(keys.rows)
        starts = range(0, n, batch) if starts is None else starts
        for turn in range(0, len(starts), dist.size()):
            part = starts[turn : turn + dist.size()]
            images = torch.zeros(len(part), batch, *self.image_shape, dtype=torch.uint8, device="cpu")
            with dist.alike():
                if dist.rank() < len(part):
                    some = slice(part[dist.rank()], part[dist.rank()] + batch)
                    x = self.chain(keys[some], times, sampler, cond.at(some), progress=progress)
                    images[dist.rank(), : len(x)] = to_uint8(x)
            for first, made in zip(part, dist.total(images), strict=True):
                yield first, made[: n - first]

    def count(self, n: int, label: Label = None) -> int:
        """How many images `sample` draws: n, or n of each class."""
        every = isinstance(label, str) and label == ALL and self.classes is not None and ALL not in self.classes.names
        return n * len(self.classes.trained) if every and self.classes else n

    def sampling_steps(self, n: int, steps: Steps = None, batch: int = 64) -> int:
        """How many steps of a batch `sample` takes in this process, of which each has a batch if there are enough."""
        batch = share_of(n, batch)
        return len(dist.turns(n, batch)) * (len(self.times(steps)) - 1)

    def times(self, steps: Steps = None, grid: str | Grid | None = None) -> Float[Tensor, "times"]:
        """The times that sampling walks: all of the table, that many steps of a grid, or these times and 0.

        `grid` is what suits the process unless it is named. Times fall strictly, and need not be points of a table but
        where the model predicts mu. A distilled model has its own.
        """
        if self.config.bounds is not None:
            if grid is not None:
                self.refuse_distilled(f"grid {grid}")
            asked = walk.listed(self.process, steps).tolist() if walk.are_times(steps) else steps
            return distilled.times(self.config.bounds, self.process, asked)
        if not walk.are_times(steps):
            chosen = suited(self.process) if grid is None else self.grid(grid)
            count = None if steps is None else whole("steps", steps)
            return walk.on_table(self.config, self.process, chosen.times(self.process, count))
        if grid is not None:
            raise UsageError(f"the times are given, so that no grid ({grid}) can choose them; leave one of them out")
        return walk.on_table(self.config, self.process, walk.listed(self.process, steps))

    def walk(
        self,
        steps: Steps = None,
        solver: str | Sampler | None = None,
        eta: SupportsFloat | None = None,
        grid: str | Grid | None = None,
        noisy: bool = False,
    ) -> Walk:
        """The times and the solver of a chain, as `times` and `sampler` have them where a solver is named.

        Else few evaluations of a fast one (`noisy`: that adds noise), on the grid that is fitted to the model or, where
        there is none, on one that suits it. mu, which holds for the steps of its table only, takes all of them.
        """
        if solver is not None or eta is not None or self.config.bounds is not None:
            return walk.fitting(self.config, Walk(self.times(steps, grid), self.sampler(solver, eta)), solver)
        if self.config.parameterisation.needs_table:
            return Walk(walk.whole_table(self.process, self.times(steps, grid)), self.sampler(), walk.MU)
        name = walk.NOISY if noisy else walk.SOLVER
        if walk.are_times(steps):
            return Walk(self.times(steps, grid), walk.sampler(self.config, name))
        own, count = walk.best(self.process, self.fit, None if steps is None else whole("steps", steps))
        chosen = own if grid is None else self.grid(grid)
        return Walk(
            chosen.times(self.process, count),
            walk.sampler(self.config, name),
            walk.words(self.process, chosen, count, name, grid is None and self.fit is None, self.guide is not None),
        )

    def refuse_distilled(self, what: str) -> None:
        """UsageError for a model that was made for few steps, which has no x̂_0 but at their starts."""
        distilled.refuse(self.config.bounds, what)

    def refuse_guided(self, what: str) -> None:
        """UsageError for a model that is guided: what leads it where it draws is no part of what it knows."""
        if self.guide is not None:
            raise UsageError(f"{what} is of a model without guidance; give variant(guidance=1)")

    def grid(self, grid: str | Grid) -> Grid:
        """One by name, `fitted` included, or with its fields, `karras,rho=5`. Raises UsageError."""
        return walk.grid(self.fit, grid)

    def chain(
        self,
        keys: Keys,
        times: Float[Tensor, "times"],
        sampler: Sampler,
        cond: Conditioning = NOTHING,
        start: Float[Tensor, "b c h w"] | None = None,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        progress: Callable[[int], None] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "b c h w"]:
        """One batch along `times`, on the model's device, returned on the CPU.

        x is kept in `dtype`, float32 or float64, in which all is computed but the network.

        From `start`, or from noise at the first of the times; below t = 1 with `mean` in it, which noise alone would
        lack. `callback(remaining, x, t)` is called before each step, `progress(1)` after it, first `progress(0)`.
        """
        self.config.parameterisation.check(self.process)
        like = torch.empty(1, *self.config.image, dtype=dtype, device=self.device)
        denoise = self.denoise(times, like, cond)

        def watch(remaining: int, x: Tensor, t: Tensor) -> None:
            if progress is not None:
                progress(int(remaining < len(times) - 1))
            if callback is not None:
                callback(remaining, x, t)

        keys, start = keys.to(self.device), None if start is None else start.to(like)
        if start is None and times[0] < 1:
            eps = keys.fold("x_T").normal(*self.config.image).to(dtype)
            start = self.process.marginal(self.means(cond).to(eps).expand_as(eps), eps, times[:1].expand(len(eps)))
        x = sample(sampler, denoise, self.process, keys, self.config.image, times, watch, start, dtype)
        if progress is not None and len(times) > 1:
            progress(1)
        if not bool(x.isfinite().all()):
            raise NotFiniteError(
                "the chain ended in values that are not finite, so nothing is drawn: the weights or the times are at "
                "fault; `undiffuse verify` checks a run, --weights raw and an older checkpoint are others to try"
                + ("" if self.precision == "float32" else f"; so is another --precision than {self.precision}")
            )
        return x.cpu()

    def denoise(self, times: Float[Tensor, "times"], like: Float[Tensor, "b c h w"], cond: Conditioning) -> Denoise:
        """What a chain along these times asks, for x_t like this: the denoiser, guided where the model is."""
        cond = cond.to(self.device)
        if self.guide is None:
            return Along(self.denoiser, times, like, cond)
        return self.guide.along(self.denoiser, times, like, cond)

    def mean(self, label: int | None = None) -> Float[Tensor, "c h w"]:
        """E[x_0] of a class as the network has it, in [−1, 1]: x̂_0 at t = 1, where x_t tells nothing.

        Over 8 draws of x_1, each an evaluation for one image; it is kept, so that it costs that once. 0 where nothing
        can be read off the network there: one that predicts the noise leaves σ/α times its error in x̂_0. Of a
        distilled model, whose x̂_0 is a sample, over 64 draws at the start of its first step.
        """
        if label not in self._means:
            at, draws = torch.ones(1, dtype=F64, device="cpu"), DRAWS
            if self.config.bounds is not None:
                at, draws = self.times()[:1], 8 * DRAWS
            self._means[label] = mean_of(self.denoise, self.config, label, at, draws, self.device)
        return self._means[label]

    @cached_property
    def _means(self) -> dict[int | None, Tensor]:
        return {}

    def means(self, cond: Conditioning) -> Float[Tensor, "#b c h w"]:
        """`mean` of each image of a batch, or of all."""
        return torch.stack([self.mean(label) for label in ([None] if cond.label is None else cond.label.tolist())])

    def parameters(self) -> int:
        """How many weights the network has."""
        return sum(parameter.numel() for parameter in self.denoiser.parameters())


def share_of(n: int, batch: int) -> int:
    """A batch small enough that each process of the run has one."""
    return max(1, min(batch, -(-n // dist.size())))
