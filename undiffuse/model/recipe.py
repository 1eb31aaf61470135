"""Everything that decides a training run, as data: what a preset holds, what `config.toml` in a run folder says."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from undiffuse.config import (
    Count,
    Decay,
    Fraction,
    Half,
    Kept,
    NonNegative,
    Number,
    Positive,
    Width,
    override,
    parse,
    read_toml,
)
from undiffuse.data.levels import Range
from undiffuse.data.picture import MAX_PIXELS, Axes, Reading
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.objective import OBJECTIVES, Objective, Simple
from undiffuse.diffusion.parameterisation import PARAMETERISATIONS, Eps, Parameterisation
from undiffuse.diffusion.process import PROCESSES, Linear, Process
from undiffuse.diffusion.reverse import VARIANCES, FixedLarge, Variance
from undiffuse.errors import DataError, UsageError, unknown
from undiffuse.machine.device import making_float32
from undiffuse.network.base import NETWORKS, Network
from undiffuse.network.unet import UNet

FORMAT = 1


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint must say for its weights to mean something. `image` is (channels, height, width).

    `bounds` are sigma/alpha at which the steps of a distilled model begin, rising; its x̂_0 means nothing between.
    """

    image: tuple[Count, Count, Count]
    process: Annotated[Process, PROCESSES]
    parameterisation: Annotated[Parameterisation, PARAMETERISATIONS]
    variance: Annotated[Variance, VARIANCES]
    network: Annotated[Network, NETWORKS]
    classes: Count | None = None
    bounds: tuple[Positive, ...] | None = None

    @property
    def hints(self) -> int:
        """How many channels the network is told beside those of x_t."""
        return self.image[0] if self.parameterisation.lattice else 0

    @property
    def asked(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the network is given."""
        channels, height, width = self.image
        return channels + self.hints, height, width

    def build(self, clip: bool, device: str | torch.device = "cpu") -> Denoiser:
        """A freshly initialised denoiser in float32; an image size that the network cannot take is a DataError."""
        channels, height, width = self.image
        stride = self.network.stride()
        if height % stride or width % stride:
            fits = (max(stride, round(height / stride) * stride), max(stride, round(width / stride) * stride))
            side = f"{fits[0]}" if fits[0] == fits[1] else f"{fits[0]}x{fits[1]}"
            raise DataError(
                f"images of {height}×{width} do not fit this network, whose strides divide by {stride}; "
                f"use --size {side} (height {fits[0]}, width {fits[1]}) or fewer network.multipliers"
            )
        outputs = channels * (2 if self.variance.learned else 1)
        hints = {"hints": self.hints} if self.hints else {}  # a network of one's own may know of none
        if hints.keys() - signature(self.network.build).parameters.keys():
            raise UsageError(
                f"network {NETWORKS.name_of(self.network)} takes no hints, which parameterisation lattice gives; "
                "let its build have an argument hints, or choose another parameterisation"
            )
        with making_float32(device):
            network = self.network.build(channels, outputs, self.classes, **hints)
        return Denoiser(network, self.process, self.parameterisation, self.variance, self.network.time, clip)


@dataclass(frozen=True)
class DataConfig:
    """How pictures become images, of one side or (height, width); `labels` trains with their classes,
    "auto" where they have any.

    `picture` names the one to take where each example has several, such as an input and a mask.

    `hold_out` is the share of the training images that is kept for the held-out loss, where the data has no test split.
    `range` are the values that become black and white, where files do not say it; `axes` those of an array. Of pictures
    `channels` 2 and 4 keep transparency. A picture of more than `max_pixels` is refused, or decoded smaller if a JPEG.
    """

    size: Count | tuple[Count, Count] | None = None
    channels: Count | None = None
    flip: bool = False
    labels: Literal[True, False, "auto"] = False
    background: str = "white"
    picture: str = ""
    hold_out: Half = 0.0
    range: Range | None = None
    axes: Axes | None = None
    max_pixels: Count = MAX_PIXELS

    @property
    def reading(self) -> Reading:
        """The part that readers of files are given."""
        return Reading(
            background=self.background,
            picture=self.picture,
            range=self.range,
            axes=self.axes,
            channels=self.channels,
            max_pixels=self.max_pixels,
        )


@dataclass(frozen=True)
class TrainConfig:
    """Adam with warm-up, clipping by the global norm and an EMA, as in DDPM; then how it is run and looked at.

    `optimizer` "muon" takes orthogonal steps for matrices and convolutions, and Adam's for the rest.

    `batch` is what one update sees, over all processes and micro-batches. `micro_batch` None is the share of a process;
    "auto" halves it, before step 0 only, until it fits into memory. `exact_shards` divides the batch into so many
    parts, whose gradients are summed in one order, so that any number of processes that divides it gives the same bits.
    `deterministic` takes only algorithms that give the same bits each time, which CUDA does not by itself.
    `recompute` keeps no activations inside the blocks, or inside those of so many levels from the largest resolution:
    less memory, for all a third more time. `channels_last` puts the channels of a pixel side by side; "auto" does so
    where a step is faster with it, which is measured once for each machine and kept in the cache.

    `precision` "auto" is bf16 where the processor is faster with it, float16 on cards without, else float32. "float16",
    on cards alone, scales the loss as `torch.amp.GradScaler` does, and skips a step whose gradient overflows; "tf32",
    for cards of NVIDIA, is float32 whose factors are rounded to 10 bits.

    `sample_every` 0 draws no previews. `keep` is how many checkpoints stay. With `patience` a run ends when the
    held-out loss has not fallen for that share of the steps up to its lowest: 0.5 stops at step 1,500 if the lowest was
    at 1,000, and the average of that step is kept as `best.safetensors`; 0 never ends it.

    Every `eval_every` steps, and at the end, `eval_images` samples in `eval_steps` steps of ddim are scored by features
    of that name, or `my_module:MyExtractor`; 0 scores none.
    """

    steps: Count = 800_000
    batch: Count = 128
    lr: Positive = 2e-4
    optimizer: Literal["adam", "muon"] = "adam"
    warmup: Number = 5000
    decay: Literal["constant", "cosine"] = "constant"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    clip_norm: Positive = 1.0
    ema: Fraction = 0.9999
    ema_ramp: bool = False
    ema_profiles: tuple[Width, ...] = ()
    ema_snapshot_every: Count = 5000
    precision: Literal["auto", "float32", "bf16", "float16", "tf32"] = "auto"
    drop_label: Fraction = 0.1
    seed: int = 0

    micro_batch: Count | Literal["auto"] | None = None
    exact_shards: Count | None = None
    recompute: Number | bool = False
    channels_last: bool | Literal["auto"] = False
    compile: bool = False
    deterministic: bool = False

    save_every: Count = 5000
    sample_every: Number = 5000
    log_every: Count = 50
    held_out_every: Count = 2000
    held_out: Number = 1024
    keep: Kept = 2
    patience: NonNegative = 0.0

    eval_every: Number = 0
    eval_images: Count = 512
    eval_steps: Count = 20
    eval_features: str = "auto"


# What may differ when a run is resumed: when to stop, and how often to look. All else decides the numbers.
FREE = frozenset({"steps", "save_every", "sample_every", "log_every", "held_out_every", "held_out", "keep", "patience"})
FREE |= {"eval_every", "eval_images", "eval_steps", "eval_features"}
# What moves a loss no more than another seed does, so that what is expected of a preset holds still.
ALIKE = (FREE - {"held_out"}) | {"seed", "precision", "micro_batch", "exact_shards", "recompute", "channels_last"}
ALIKE |= {"compile", "deterministic", "ema_profiles", "ema_snapshot_every"}


def learning_rate(config: TrainConfig, step: int, last: int) -> float:
    """Linear warm-up from 0, as the authors: the first update has rate 0. Then constant, or a half cosine to 0."""
    warm = min(step / config.warmup, 1.0) if config.warmup else 1.0
    if config.decay == "constant":
        return config.lr * warm
    progress = max(0.0, (step - config.warmup) / max(1, last - config.warmup))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True)
class Recipe:
    """A preset: settings, where they come from, and what came of them."""

    about: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    process: Annotated[Process, PROCESSES] = field(default_factory=Linear)
    parameterisation: Annotated[Parameterisation, PARAMETERISATIONS] = field(default_factory=Eps)
    variance: Annotated[Variance, VARIANCES] = field(default_factory=FixedLarge)
    network: Annotated[Network, NETWORKS] = field(default_factory=UNet)
    objective: Annotated[Objective, OBJECTIVES] = field(default_factory=Simple)
    train: TrainConfig = field(default_factory=TrainConfig)
    expected: dict[str, Any] = field(default_factory=dict)

    def model(self, image: tuple[int, int, int], classes: int | None = None) -> ModelConfig:
        return ModelConfig(
            image,
            self.process,
            self.parameterisation,
            self.variance,
            self.network,
            classes if self.data.labels else None,
            self.objective.bounds,
        )


def presets() -> list[str]:
    """The names of the presets that are shipped."""
    return sorted(p.name.removesuffix(".toml") for p in resources.files("undiffuse").joinpath("presets").iterdir())


def load_recipe(source: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """A recipe from a preset's name or a TOML file, with `a.b=c` settings applied.

    `base = "name"` in the file takes the sections that it lacks, and the keys of those it has, from that preset.
    """
    return with_settings(_plain(str(source)), settings, f"recipe {source}")


def with_settings(plain: dict[str, Any], settings: Sequence[str], where: str) -> Recipe:
    """A recipe from plain data with `a.b=c` settings; where they change what is learnt, no curve is expected of it."""
    recipe = parse(Recipe, override(plain, settings), where, trusted=True)
    if not settings or "curve" not in recipe.expected or _law(recipe) == _law(parse(Recipe, plain, where, True)):
        return recipe
    return replace(recipe, expected={name: each for name, each in recipe.expected.items() if name != "curve"})


def _law(recipe: Recipe) -> Recipe:
    """What decides the law of the losses that are measured, and nothing else."""
    default = TrainConfig()
    same: dict[str, Any] = {name: getattr(default, name) for name in ALIKE}
    return replace(recipe, about="", expected={}, train=replace(recipe.train, **same))


def _plain(source: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    if source in above:
        raise UsageError(f"preset {source} is its own base ({' -> '.join((*above, source))}); name another base")
    if source.endswith(".toml"):
        plain = read_toml(Path(source))
    elif source in presets():
        with resources.as_file(resources.files("undiffuse").joinpath("presets", f"{source}.toml")) as path:
            plain = read_toml(path)
    else:
        raise unknown("preset", source, presets())
    base = plain.pop("base", None)
    if base is None:
        return plain
    if not isinstance(base, str):
        raise UsageError(f"{source}: base = {base!r} is not possible; give the name of a preset, or a file in quotes")
    under = _plain(base, (*above, source))
    if isinstance(expected := under.get("expected"), dict):
        expected.pop("curve", None)  # it was measured without these changes
    for key in plain:
        if isinstance(plain[key], dict) and not isinstance(under.get(key, {}), dict):
            raise UsageError(f"{base}: {key} = {under[key]!r} is not possible; give a section [{key}]")
    return _merge(under, plain)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Section by section; one that names a class, or says what is expected, replaces the whole section."""
    merged = dict(base)
    for key, value in changes.items():
        whole = not isinstance(value, dict) or "name" in value or key == "expected"
        merged[key] = value if whole else {**base.get(key, {}), **value}
    return merged
