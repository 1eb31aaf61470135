"""What `--preset auto` chooses, from the data and the device, and why; and what `auto` settings become.

The choice is a shipped preset with a few settings changed, all of them definite, so that `config.toml` says it whole.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from undiffuse.config import override, parse, plain
from undiffuse.data.made import channels
from undiffuse.data.picture import PLAIN, Reading
from undiffuse.data.source import Source, open_raw, spread
from undiffuse.diffusion.objective import OBJECTIVES
from undiffuse.errors import DataError, counted
from undiffuse.machine import device as machine
from undiffuse.machine import dist
from undiffuse.machine.log import Say
from undiffuse.model.recipe import ModelConfig, Recipe, TrainConfig, load_recipe, with_settings
from undiffuse.training.layout import wants_channels_last
from undiffuse.training.plan import Budget, shares

DEFINITE = ("float32", "bf16", "tf32", "float16")  # precisions of which none depends on the machine
LOOKED_AT = 64  # pictures, spread over the data
SIDES = (8, 16, 32, 64, 128, 256)
LARGEST = {"cpu": 32, "mps": 64, "cuda": 64}  # side that trains within a day
SMALL = 5000  # images: below, a network learns them by heart before it has learnt what they have in common
HELD_OUT = 0.1
EPOCHS, IMAGES = 100, {"cpu": (300_000, 2_000_000), "mps": (1_000_000, 10_000_000), "cuda": (5_000_000, 50_000_000)}


@dataclass(frozen=True)
class Facts:
    """What the choice is made from."""

    images: int
    sizes: tuple[tuple[int, int], ...]  # (height, width) of those looked at
    grey: bool
    channels: int | None  # where all have the same number
    has_test: bool
    device: str  # its type

    @property
    def side(self) -> int:
        """The median of the shorter sides."""
        return int(median(min(size) for size in self.sizes))

    @property
    def common(self) -> tuple[int, int] | None:
        """(height, width) where all have the same."""
        return self.sizes[0] if len(set(self.sizes)) == 1 else None


def to_look_at(settings: Sequence[str]) -> Reading:
    """How the pictures are read that the choice is made from: as the user says, and large ones decoded smaller."""
    side = max(SIDES)
    return replace(_said(settings).data.reading, least=(side, side))


def _said(settings: Sequence[str]) -> Recipe:
    """What the user says himself of data and training; the rest may be of parts that are not chosen yet."""
    sections = ("data", "train")
    return load_recipe("digits", [each for each in settings if re.split(r"[.=]", each.strip())[0].strip() in sections])


def look_at(source: Source, spec: str | None, device: torch.device, reading: Reading = PLAIN) -> Facts:
    """Looks at some pictures of a training split. Raises DataError if none of them can be read."""
    sizes, grey, counts = [], True, set[int]()
    for index in spread(len(source), LOOKED_AT):
        try:
            image = source[index].image
        except DataError:  # told, with all others, when the whole is decoded
            continue
        sizes.append((image.shape[1], image.shape[2]))
        counts.add(len(image))
        grey = grey and bool((image == image[:1]).all())
    if not sizes:
        raise DataError(f"none of {min(len(source), LOOKED_AT)} pictures can be read; `undiffuse data check` says why")
    common = counts.pop() if len(counts) == 1 else None
    return Facts(len(source), tuple(sizes), grey, common, spec is not None and _has_test(spec, reading), device.type)


def _has_test(spec: str, reading: Reading) -> bool:
    try:
        open_raw(spec, "test", reading)
    except DataError:
        return False
    return True


@dataclass(frozen=True)
class Choice:
    recipe: Recipe
    why: tuple[str, str, str]


def choose(
    facts: Facts, settings: Sequence[str] = (), budget: Budget | None = None, init: ModelConfig | None = None
) -> Choice:
    """A recipe for these pictures and this device, with the user's `a.b=c` settings applied last.

    The learning rate does not fall in a run by the clock, because its last step is not known. With `init`, the images
    and the network are those of the model that is fine-tuned.
    """
    budget = Budget() if budget is None else budget
    given = {setting.partition("=")[0].strip() for setting in settings}
    fixed = _said(settings)
    size = fixed.data.size if "data.size" in given else init.image[1:] if init else _size(facts)
    base, small = _base(facts, size), facts.images < SMALL
    batch = fixed.train.batch if "train.batch" in given else _batch(facts)
    hold_out = HELD_OUT if small and not facts.has_test and facts.images > 1 else 0.0
    ends_itself = small and (facts.has_test or (fixed.data.hold_out if "data.hold_out" in given else hold_out) > 0)
    steps = fixed.train.steps if "train.steps" in given else -(-_length(facts) // batch)
    length = TrainConfig(steps=steps, batch=batch)
    last = budget.last_step(length)
    chosen: dict[str, Any] = {
        "data": {
            "size": size,
            "channels": _channels(facts, init),
            "flip": False,
            "labels": False,
            "hold_out": hold_out,
        },
        "train": {
            "batch": batch,
            "steps": last,
            "decay": "constant" if small or budget.minutes is not None else "cosine",
            "ema": 0.999,
            "ema_ramp": True,
            "warmup": min(200, last // 10),
            "precision": "auto",
            "channels_last": "auto",
            "save_every": 1000,
            "sample_every": 2000,
            "held_out_every": max(50, min(500, 20 * facts.images // batch)) if small else 1000,
            "patience": 0.5 if ends_itself else 0.0,
        },
        "network": {"dropout": _dropout(facts)},
        # Nearer to real images in few steps for this network, and worse in bits/dim (bench/automatic.py).
        "objective": {"name": "min-snr"} if base == "emoji-32" and init is None else {},
    }
    preset = plain(load_recipe(base))
    merged = {name: {**preset[name], **chosen.get(name, {})} for name in preset if isinstance(preset[name], dict)}
    if init is not None:
        parts = plain(init)
        merged |= {name: parts[name] for name in ("process", "parameterisation", "variance", "network")}
    merged["data"] = {name: value for name, value in merged["data"].items() if value is not None}
    merged |= {"about": f"chosen by auto for {facts.images:,} images on {facts.device}, from preset {base}"}
    del merged["expected"]
    recipe = parse(Recipe, override(merged, settings), "recipe auto", trusted=True)
    return Choice(recipe, _why(facts, recipe, base, given, budget, init is not None))


def _channels(facts: Facts, init: ModelConfig | None) -> int | None:
    """Grey or RGB; None leaves other numbers of channels, which arrays may have, as they are."""
    if init is not None:
        return init.image[0]
    return None if facts.channels not in (None, 1, 3) else 1 if facts.grey else 3


def _size(facts: Facts) -> int | tuple[int, int]:
    """The pictures' own where all are alike and small; else the largest that they and the device have room for."""
    limit = _limit(facts)
    if facts.common and max(facts.common) <= limit:
        step = 8 if _paper(facts) else 4  # what the strides of the networks divide
        height, width = (max(step, step * round(side / step)) for side in facts.common)
        return height if height == width else (height, width)
    return max(side for side in SIDES if side <= max(SIDES[0], min(limit, facts.side)))


def _limit(facts: Facts) -> int:
    return LARGEST.get(facts.device, LARGEST["cuda"])


def _paper(facts: Facts) -> bool:
    """Whether there are enough pictures, and a card, for the network of the paper."""
    return facts.device == "cuda" and facts.images >= SMALL


def _base(facts: Facts, size: Any) -> str:
    side = max(size) if isinstance(size, (tuple, list)) else size
    if _paper(facts):
        return "cifar10"
    if side <= 16:
        return "digits"
    odd = any(part % 8 for part in (size if isinstance(size, (tuple, list)) else (size,)))
    return "fashion-mnist" if facts.grey or odd else "emoji-32"


def _batch(facts: Facts) -> int:
    """64, or 128 on a card; for fewer images the power of two that does not exceed them."""
    most = 128 if facts.device == "cuda" else 64
    return max(4, min(most, 2 ** (facts.images.bit_length() - 1)))


def _length(facts: Facts) -> int:
    """Images to see: a hundred epochs, within what the device does in half an hour and in a day."""
    low, high = IMAGES.get(facts.device, IMAGES["cuda"])
    return min(max(EPOCHS * facts.images, low), high)


def _dropout(facts: Facts) -> float:
    return 0.0 if facts.images >= SMALL else 0.1 if facts.images >= 1000 else 0.2


def _why(facts: Facts, recipe: Recipe, base: str, given: set[str], budget: Budget, tuned: bool) -> tuple[str, str, str]:
    """What was chosen, in three lines: the pictures, the network, the length."""
    data, train = recipe.data, recipe.train
    height, width = data.size if isinstance(data.size, tuple) else (data.size, data.size)
    kind = channels(data.channels or facts.channels or 3)
    size = facts.sizes[0]
    seen = (
        f"{size[1]}×{size[0]}" if facts.common else f"of many sizes, half of them with a shorter side over {facts.side}"
    )
    limit = _limit(facts)
    larger = f"; larger ones train slowly on {facts.device}, --size 64 asks for them" if facts.side > limit else ""
    seen_as = "grey" if facts.grey else "in colour" if facts.channels in (3, None) else f"of {channels(facts.channels)}"
    because = f"because the pictures are {seen_as} and {seen}{larger}"
    if "data.size" in given or tuned:
        because = "as asked" if "data.size" in given else "as those of the model to begin with"
    dropout = getattr(recipe.network, "dropout", 0.0)
    few = f" with dropout {dropout:g}, because {facts.images:,} images are few" if dropout else ""
    network = "the network to begin with" if tuned else f"the network of preset {base}{few}"
    kept = f"{data.hold_out:.0%} of the pictures, kept for this,"
    held = "the test split" if facts.has_test and not data.hold_out else kept
    limited = budget.steps is not None or budget.images is not None or "train.steps" in given
    share = train.patience / (1 + train.patience)
    part = {1 / 3: "a third", 1 / 2: "half"}.get(share, f"{share:.0%}")
    until = f"until the loss on {held} has not fallen for {part} of the run, at most " if train.patience else ""
    day = "" if limited or train.patience else ", as many as a day allows"
    turn = "pictures are flipped" if data.flip else "none is flipped, --set data.flip=true does"
    return (
        f"auto: images of {width}×{height}, {kind}, {because}",
        f"auto: {network}; loss {OBJECTIVES.name_of(recipe.objective)}; batches of {train.batch}; {facts.device}",
        f"auto: trains {until}{counted(train.steps, 'step')}{day}; {turn}",
    )


def resolved(
    recipe: Recipe, then: dict[str, Any] | None, device: torch.device, config: ModelConfig, say: Say
) -> Recipe:
    """`precision` and `channels_last` of "auto" made definite: as the run began, or as suits this machine.

    So is micro_batch on resume. `then` is the training section of the run that goes on, None for a new one.
    """
    train = recipe.train
    if train.precision == "auto":
        here = machine.native_precision(device) if then is None else then.get("precision")
        train = replace(train, precision=DEFINITE[dist.decide(DEFINITE.index(here) if here in DEFINITE else 0)])
    if train.channels_last == "auto":
        taken = False if then is None else then.get("channels_last") is True
        if then is None and dist.is_first():
            taken, told = wants_channels_last(config, train.precision, shares(train)[1], device)
            say(told)
        train = replace(train, channels_last=bool(dist.decide(taken)))
    then_micro = (then or {}).get("micro_batch")  # "auto" with exact shards, which say it themselves
    if train.micro_batch == "auto" and (found := dist.decide(then_micro if isinstance(then_micro, int) else 0)):
        train = replace(train, micro_batch=found)
    return replace(recipe, train=train)


def recipe_of(saved: dict[str, Any], settings: Sequence[str] = ()) -> Recipe:
    """The recipe that a run was started with, from its checkpoint, with settings applied.

    A class outside undiffuse must be named by the user: code that only a checkpoint names is not run.
    """
    named = {setting.partition(".name=")[0].strip() for setting in settings if ".name=" in setting}
    parse(Recipe, {name: value for name, value in saved.items() if name not in named}, "the recipe of this run")
    return with_settings(saved, settings, "the recipe of this run")
