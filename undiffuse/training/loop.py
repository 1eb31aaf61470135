"""The loop, flat: budgets, checkpoints, previews, what ends a run. The same command again goes on as if unbroken."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse.config import plain, to_toml
from undiffuse.data.source import Source, open_raw, spread, unify
from undiffuse.diffusion.sampler.ddim import DDIM
from undiffuse.errors import (
    Corrupt,
    DataError,
    Error,
    MemoryExhausted,
    NotFiniteError,
    Preempted,
    Stalled,
    UsageError,
    is_out_of_memory,
)
from undiffuse.figure import grid, png
from undiffuse.key import Key
from undiffuse.machine import dist, log, sink, store
from undiffuse.machine.watch import Asked, Flag, Watchdog, listening
from undiffuse.model.model import Model, to_uint8
from undiffuse.model.recipe import FORMAT, Recipe, TrainConfig
from undiffuse.training.profile import measure, peak_bytes
from undiffuse.training.resume import claim_data, differences, refuse_changes
from undiffuse.training.trainer import Trainer, forward_flops

Say = Callable[[str], None]
Journal = sink.Journal | sink.Nowhere


@dataclass(frozen=True)
class Budget:
    """When to stop: the first of these that is reached. Steps and images count from the start of the run."""

    steps: int | None = None
    images: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "images", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"a budget of {value} {name} is not possible; give more than 0, or leave it out")

    def last_step(self, config: TrainConfig) -> int:
        steps = config.steps if self.steps is None else self.steps
        return steps if self.images is None else min(steps, -(-self.images // config.batch))


def train(
    recipe: Recipe,
    data: Source,
    out: Path,
    held_out: Source | None = None,
    init: Model | None = None,
    budget: Budget = Budget(),
    device: str = "cpu",
    say: Say = print,
    show_progress: bool = True,
    accept_data: bool = False,
    logs: Sequence[str] = (),
    profile: bool = False,
) -> Model:
    """Trains in the run folder `out`, or goes on with the run that is there; returns the averaged model.

    `logs` names the sinks that are told besides `log.jsonl`: tensorboard, wandb. `profile` makes 25 steps and writes
    where their time went to `profile.json`. Under `torchrun` every process calls this with the same arguments; process
    0 alone writes and speaks.
    """
    sinks = sink.find(logs)
    with dist.joined(), listening() as flag, ExitStack() as stack:
        first = dist.rank() == 0
        say, warn = (say, log.warn) if first else (_silent, _silent)
        run, saved = store.Run(out), None
        last = budget.last_step(recipe.train)
        _agree(recipe, data, last)  # before anything that differs with them could break a sum
        trainer = _build(recipe, data, device, init, _settings(run))
        failure: Error | None = None
        if first:
            try:
                stack.enter_context(run.lock())
                saved = _begin(trainer, run, data, init, say, warn, accept_data)
            except Error as error:
                failure = error
        if dist.decide(int(failure is not None)):
            raise failure or Stalled("process 0 could not begin, and says why")
        trainer.share_state()
        trainer.fit_micro_batch(say)
        if trainer.step == 0:
            say(trainer.plan(last))
            if budget.minutes is not None and recipe.train.decay != "constant":
                say(f"the learning rate falls until step {last:,}, which --minutes may not let it reach")
        loop = _Loop(trainer, run, last, budget, flag, held_out, show_progress and first, saved, sinks)
        try:
            if profile:
                _profile(trainer, run, last, say, flag)
            else:
                loop.go()
        except NotFiniteError:
            loop.save()
            dist.wait_for_first()  # else torchrun, which sees the first process end, ends process 0 in its save
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise _out_of_memory(trainer, last) from error
        return trainer.model()


def _out_of_memory(trainer: Trainer, last: int) -> MemoryExhausted:
    return MemoryExhausted(
        f"out of memory at step {trainer.step} with micro-batches of {trainer.micro}, when "
        f"{peak_bytes(trainer.device) / 1e9:.1f} GB had been in use ({trainer.plan(last)}). The last checkpoint is "
        "good; fine-tune from it with --init and a smaller one, --set train.micro_batch="
        f"{max(1, trainer.micro // 2)}, or with --set train.recompute=true"
    )


def _profile(trainer: Trainer, run: store.Run, last: int, say: Say, flag: Flag) -> None:
    measured = measure(trainer, run, last, forward_flops(trainer.config))
    if dist.rank() == 0:
        store.write_json(run.path / "profile.json", {"format": FORMAT, **trainer.environment(), **measured.plain()})
    say(str(measured))
    dist.wait_for_first()  # by all, whichever of them was sent a signal
    if flag.name is not None:
        raise Preempted(f"{flag.name}: stopped after the profile, whose state is saved")


def _silent(text: str) -> None: ...


def _agree(recipe: Recipe, data: Source, last: int) -> None:
    """Raises UsageError in every process unless all were given the same."""
    dist.agree(data.fingerprint(), "data")
    dist.agree(hashlib.sha256(repr((plain(recipe), last)).encode()).hexdigest(), "settings")


def _settings(run: store.Run) -> dict[str, Any] | None:
    """The training section of the newest checkpoint whose metadata can be read; what it is worth is seen later."""
    for step in reversed(run.steps()):
        with suppress(Corrupt):
            return run.load(step, only=())[1].get("recipe", {}).get("train", {})
    return None


def _build(recipe: Recipe, data: Source, device: str, init: Model | None, then: dict[str, Any] | None) -> Trainer:
    """Everything that can be refused is, before anything is written."""
    image = data[0].image
    config = recipe.model((image.shape[0], image.shape[1], image.shape[2]), count_classes(data))
    trainer = Trainer(resolved(recipe, then, device), config, data, dist.local_device(device))
    if init is not None and then is None:
        trainer.start_from(init)
    return trainer


def resolved(recipe: Recipe, then: dict[str, Any] | None, device: str) -> Recipe:
    """`precision = "auto"` made definite: as the run began, or as this machine has it. So is micro_batch on resume."""
    train = recipe.train
    if train.precision == "auto":
        here = native_bf16(torch.device(device)) if then is None else then.get("precision") == "bf16"
        train = replace(train, precision="bf16" if dist.decide(int(here)) else "float32")
    if train.micro_batch == "auto" and (found := dist.decide((then or {}).get("micro_batch", 0))):
        train = replace(train, micro_batch=found)
    return replace(recipe, train=train)


def native_bf16(device: torch.device) -> bool:
    """Whether the processor itself multiplies bfloat16; emulation is slower than float32 and no more exact."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def _begin(
    trainer: Trainer, run: store.Run, data: Source, init: Model | None, say: Say, warn: Say, accept_data: bool
) -> dict[str, Any] | None:
    """Under the lock: takes up what is there, or claims the folder. Returns the meta of the checkpoint resumed from."""
    step, meta = run.latest(warn=warn), None
    if step is not None:
        tensors, meta = run.load(step)
        if "recipe" not in meta or "adam" not in tensors:
            raise UsageError(f"{run.path} is no training run; fine-tune it with --init {run.path} and another --out")
        refuse_changes(meta, trainer.meta())
        trainer.restore(tensors, step)
        say(f"resuming {run.path} at step {step}")
    claim_data(run.path / "data.json", data, accept_data)
    store.write_atomic(run.path / "config.toml", f"# format {FORMAT}\n{to_toml(trainer.recipe)}".encode())
    return meta


class _Loop:
    """One call of `train`: from the step that is there to the end of the budget."""

    def __init__(
        self,
        trainer: Trainer,
        run: store.Run,
        last: int,
        budget: Budget,
        flag: Flag,
        held_out: Source | None,
        show: bool,
        resumed: dict[str, Any] | None,
        sinks: Sequence[type[sink.Sink]],
    ):
        self.trainer, self.run, self.last, self.budget, self.flag = trainer, run, last, budget, flag
        self.config, self.first = trainer.recipe.train, dist.rank() == 0
        self.held = held_out_images(held_out, self.config.held_out) if self.first else None
        self.show, self.resumed, self.sinks = show, resumed, sinks
        self.window: list[dict[str, float]] = []
        self.started = self.tick = time.monotonic()

    def go(self) -> None:
        trainer, path = self.trainer, self.run.path
        with (
            sink.journal(path, trainer.step, self.sinks, plain(trainer.recipe))
            if self.first
            else nullcontext(sink.Nowhere()) as lines,
            log.progress(self.last, "training", self.show, done=trainer.step) as bar,
            # The others wait inside a step for what process 0 does between two; a sum that fails ends them.
            Watchdog(path / f"stacks-{dist.rank()}.txt", None if self.first else dist.PATIENCE.total_seconds()) as dog,
        ):
            if self.resumed is not None and (differs := differences(self.resumed, trainer, self.last)):
                text = ", ".join(differs)
                log.warn(f"resumed with other {text}: the numbers will differ from those of an unbroken run")
                lines.write({"step": trainer.step, "exact": False, "differs": differs})
            while trainer.step < self.last:
                self.window.append(trainer.update(self.last))
                dog.stepped()
                asked, over = self._agreed()
                done = trainer.step == self.last or over
                self._log(lines, bar, done or asked)
                with dog.slow():
                    if trainer.step % self.config.ema_snapshot_every == 0 or done:
                        self._snapshot()  # before the checkpoint, for nothing makes it again after one
                    if trainer.step % self.config.save_every == 0 or done or asked:
                        self.save()
                self._look(lines, done and not asked, dog)
                if asked:
                    dist.wait_for_first()
                    name = self.flag.name or "a signal to another process"
                    raise Preempted(
                        f"{name}: stopped after step {trainer.step}, which is saved; the same command goes on"
                    )
                if over:
                    break

    def _agreed(self) -> tuple[bool, bool]:
        """Whether any process was sent a signal, and whether process 0 has reached the end of the minutes."""
        minutes = self.budget.minutes
        over = minutes is not None and self.first and time.monotonic() - self.started >= 60 * minutes
        asked = self.flag.name is not None
        if dist.size() == 1:
            return asked, over
        votes = dist.total(torch.tensor([int(asked), int(over)]))
        return bool(votes[0]), bool(votes[1])

    def _log(self, lines: Journal, bar: log.Progress, ended: bool) -> None:
        step, last = self.trainer.step, self.window[-1]
        bar.advance(1, loss=last["loss"], norm=last["grad_norm"], images_per_s=self._speed())
        if step % self.config.log_every == 0 or ended:
            names = dict.fromkeys(name for entry in self.window for name in entry)
            values = {name: [entry[name] for entry in self.window if name in entry] for name in names}
            mean = {name: sum(column) / len(column) for name, column in values.items()}
            row = {"step": step, "images": step * self.config.batch, **mean, "images_per_second": self._speed()}
            lines.write(row)
            self.window, self.tick = [], time.monotonic()

    def _speed(self) -> float:
        return len(self.window) * self.config.batch / max(time.monotonic() - self.tick, 1e-9)

    def _snapshot(self) -> None:
        trainer = self.trainer
        if self.first:
            trainer.profiles.snapshot(self.run.path, trainer.step, trainer.names, trainer.meta())

    def save(self) -> None:
        if self.first:
            self.run.save(self.trainer.step, self.trainer.tensors(), {**self.trainer.meta(), "last_step": self.last})
            self.run.retain(2)

    def _look(self, lines: Journal, ended: bool, dog: Watchdog) -> None:
        """Held-out loss and previews, by process 0. A signal leaves them undone: they are no part of the state."""
        trainer, step = self.trainer, self.trainer.step
        held, drawn = (
            every > 0 and (ended or step % every == 0)
            for every in (self.config.held_out_every, self.config.sample_every)
        )
        if not held and not drawn:
            return

        def check(*_: object) -> None:
            dog.beat()
            self.flag.check()

        with suppress(Asked):
            if held and self.held is not None:
                lines.write({"step": step, "held_out": trainer.held_out_loss(self.held, check)})
            if drawn and self.first:
                save_grids(trainer, self.run.path / "samples", lines, check)
        with nullcontext() if self.first else dog.slow(math.inf):
            dist.wait_for_first()


def held_out_split(data: str, recipe: Recipe, shape: tuple[int, int, int], skip_bad: bool = False) -> Source | None:
    """What process 0 measures of the test split of a data set, in the training images' shape; None without one."""
    count = recipe.train.held_out
    if count < 1 or not dist.is_first():
        return None
    channels = shape[0] if shape[0] in (1, 3) else None  # arrays may have other numbers, which nothing is turned into
    try:
        return unify(open_raw(data, "test", recipe.data.background), shape[1:], channels, skip_bad, count)
    except DataError as error:
        log.warn(f"no held-out loss: {error}")
        return None


def count_classes(data: Source) -> int | None:
    """How many classes the data names, or None."""
    return None if data.classes is None else len(data.classes)


def held_out_images(source: Source | None, count: int) -> Tensor | None:
    """`count` images of a held-out split, spread evenly over it, or None."""
    if source is None or count < 1:
        return None
    return torch.stack([source[i].image for i in spread(len(source), count)])


def save_grids(trainer: Trainer, folder: Path, lines: Journal, check: Callable[[], None]) -> None:
    """64 samples in 50 steps of the averaged weights, and of the weights as they are, from the same noise each time.

    None if they cannot be drawn; `check` may raise between two steps, and then nothing is written.
    """
    for averaged, name in ((True, f"step-{trainer.step:09d}.png"), (False, f"step-{trainer.step:09d}-raw.png")):
        model = trainer.model(averaged)
        try:
            model.config.parameterisation.check(model.process)
        except UsageError as error:  # training it is allowed, and the reason is told to whoever asks for a sample
            log.warn(f"no preview at step {trainer.step}: {error}")
            return
        times = model.times(min(50, model.process.steps or 50))
        # Without a backward pass an image takes less than half the room of one in a step; all at once may not fit.
        keys, size = Key(0).fold("preview").rows(64), trainer.micro * (1 if trainer.recipe.train.recompute else 2)
        parts = (keys[i : i + size] for i in range(0, 64, size))
        x = torch.cat([model.chain(part, times, DDIM(), progress=lambda n: check()) for part in parts])
        picture = grid(to_uint8(x))
        store.write_atomic(folder / name, png(picture))
        lines.image(trainer.step, "samples" if averaged else "samples of the raw weights", picture)
