"""The training loop, flat. Everything random is keyed by the step, so the same command again goes on as if unbroken."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse import log, store
from undiffuse.average import Ema
from undiffuse.config import plain, to_toml
from undiffuse.data.loader import Loader
from undiffuse.data.source import Source, open_source
from undiffuse.denoiser import Denoiser
from undiffuse.errors import DataError, MemoryExhausted, NotFiniteError, Preempted, UsageError
from undiffuse.figure import grid, png
from undiffuse.key import Key
from undiffuse.model import Model, from_weights, to_float, to_uint8
from undiffuse.recipe import FORMAT, ModelConfig, Recipe, TrainConfig
from undiffuse.sampler.ddim import DDIM

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


@dataclass(frozen=True)
class Budget:
    """When to stop: the first of these that is reached. Steps and images count from the start of the run."""

    steps: int | None = None
    images: int | None = None
    minutes: float | None = None

    def last_step(self, config: TrainConfig) -> int:
        steps = config.steps if self.steps is None else self.steps
        return steps if self.images is None else min(steps, -(-self.images // config.batch))


class Flag:
    """Set by a signal; looked at once a step. A second signal ends the process at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __call__(self, number: int, frame: object) -> None:
        if self.name is not None:
            raise SystemExit(128 + number)
        self.name = signal.Signals(number).name


@contextmanager
def listening() -> Iterator[Flag]:
    """A flag that the signals raise, while inside; in a thread other than the main one there are none."""
    flag, before = Flag(), {}
    for name in SIGNALS:
        number = getattr(signal, name, None)
        try:
            before[number] = signal.signal(number, flag) if number is not None else None
        except ValueError:  # not the main thread
            break
    try:
        yield flag
    finally:
        for number, handler in before.items():
            if number is not None:
                signal.signal(number, handler)


def learning_rate(config: TrainConfig, step: int, last: int) -> float:
    """Linear warm-up from 0, as the authors: the first update has rate 0. Then constant, or a half cosine to 0."""
    warm = min(step / config.warmup, 1.0) if config.warmup else 1.0
    if config.decay == "constant":
        return config.lr * warm
    progress = max(0.0, (step - config.warmup) / max(1, last - config.warmup))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Trainer:
    """The state of a run: weights, their average, the optimiser's moments and the number of steps done."""

    def __init__(self, recipe: Recipe, config: ModelConfig, data: Source, device: str = "cpu"):
        self.recipe, self.config, self.device = recipe, config, torch.device(device)
        self.key = Key(recipe.train.seed).fold("train")
        torch.manual_seed(self.key.fold("init").integer())
        self.denoiser: Denoiser = config.build(clip=False).to(self.device)
        recipe.objective.check(self.denoiser)
        self.names = [name for name, _ in self.denoiser.network.named_parameters()]
        self.weights = list(self.denoiser.network.parameters())
        self.ema = Ema(self.weights, recipe.train.ema, recipe.train.ema_ramp)
        self.adam = torch.optim.Adam(self.weights, lr=1.0, betas=recipe.train.betas, eps=1e-8, fused=True)
        self.loader = Loader(data, recipe.train.batch, recipe.train.seed, recipe.data.flip)
        self.step = 0

    def update(self, last: int) -> dict[str, float]:
        """One step. A loss or gradient that is not finite stops it before anything has changed."""
        train, step = self.recipe.train, self.step
        batch = self.loader.batch(step)
        size = train.micro_batch or train.batch
        self.adam.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for first in range(0, train.batch, size):
            part = slice(first, first + size)
            torch.manual_seed(self.key.fold("dropout", step, first).integer())
            loss = self._loss(batch.image[part], None if batch.label is None else batch.label[part], first, step)
            (loss.sum() / train.batch).backward()
            total += loss.detach().sum() / train.batch
        norm = torch.nn.utils.clip_grad_norm_(self.weights, train.clip_norm)
        if not torch.isfinite(total) or not torch.isfinite(norm):
            raise NotFiniteError(
                f"step {step}: the loss is {float(total)} and the gradient norm {float(norm)}, so the weights were not "
                f"updated; examples {batch.index.tolist()[:8]} …. Resume with a lower --set train.lr, or "
                "--set train.precision=float32"
            )
        rate = learning_rate(train, step, last)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.ema.update(self.weights, step)
        self.step += 1
        return {"loss": float(total), "grad_norm": float(norm), "lr": rate}

    def _loss(self, image: Tensor, label: Tensor | None, first: int, step: int) -> Tensor:
        """The loss of each example of a micro-batch that starts at row `first`."""
        rows = torch.arange(first, first + len(image))
        keys = self.key.fold("noise", step).rows(rows, self.device)
        cond = self._labels(label, rows, step)
        x_0 = to_float(image.to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.train.precision == "bf16"):
            return self.recipe.objective(self.denoiser, x_0, cond, keys).per_example

    def _labels(self, label: Tensor | None, rows: Tensor, step: int) -> Tensor | None:
        """The classes, a tenth of them replaced by "no class" so that guidance has something to guide from."""
        if self.config.classes is None:
            return None
        if label is None:
            raise UsageError("data.labels is on, but this data has no labels; use folders of classes, or turn it off")
        drop = self.key.fold("drop label", step).rows(rows).uniform() < self.recipe.train.drop_label
        return torch.where(drop, self.config.classes, label).to(self.device)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        state = [self.adam.state[weight] for weight in self.weights]
        moments = {
            f"{moment}/{name}": entry[moment]
            for name, entry in zip(self.names, state, strict=True)
            for moment in ("exp_avg", "exp_avg_sq", "step")
            if entry
        }
        weights = [weight.detach() for weight in self.weights]
        return {
            "model": dict(zip(self.names, weights, strict=True)),
            "ema": dict(zip(self.names, self.ema.shadow, strict=True)),
            "adam": moments,
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, dict[str, Tensor]], step: int) -> None:
        for name, weight, shadow in zip(self.names, self.weights, self.ema.shadow, strict=True):
            weight.copy_(tensors["model"][name])
            shadow.copy_(tensors["ema"][name])
            if f"step/{name}" in tensors["adam"]:
                self.adam.state[weight] = {
                    moment: tensors["adam"][f"{moment}/{name}"].to(self.device)
                    for moment in ("step", "exp_avg", "exp_avg_sq")
                }
        self.step = step

    @torch.no_grad()
    def start_from(self, model: Model) -> None:
        """Fine-tuning: the weights of another model of this architecture."""
        given = model.denoiser.network.state_dict()
        fitted = from_weights(self.config, given, {}).denoiser.network.state_dict()
        for name, weight, shadow in zip(self.names, self.weights, self.ema.shadow, strict=True):
            weight.copy_(fitted[name])
            shadow.copy_(fitted[name])

    def model(self) -> Model:
        """The averaged weights as a model, copied."""
        averaged = dict(zip(self.names, (shadow.clone() for shadow in self.ema.shadow), strict=True))
        return from_weights(self.config, averaged, self.meta(), self.device)

    def meta(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": self.step,
            "images": self.step * self.recipe.train.batch,
            "model": plain(self.config),
            "recipe": plain(self.recipe),
            "environment": {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(self.device)},
        }

    @torch.no_grad()
    def held_out_loss(self, images: Tensor) -> float:
        """The objective on fixed images with fixed noise, by the averaged weights, in float32."""
        denoiser = self.model().denoiser
        denoiser.clip = False
        total = 0.0
        for first in range(0, len(images), 256):
            x_0 = to_float(images[first : first + 256].to(self.device))
            keys = Key(0).fold("held out").rows(torch.arange(first, first + len(x_0)), self.device)
            total += float(self.recipe.objective(denoiser, x_0, None, keys).per_example.double().sum())
        return total / len(images)


def train(
    recipe: Recipe,
    data: Source,
    out: Path,
    held_out: Source | None = None,
    init: Model | None = None,
    budget: Budget = Budget(),
    device: str = "cpu",
    say: Callable[[str], None] = print,
    show_progress: bool = True,
) -> Model:
    """Trains in the run folder `out`, or goes on with the run that is there; returns the averaged model."""
    image = data[0].image
    config = recipe.model((image.shape[0], image.shape[1], image.shape[2]), count_classes(data))
    run, last = store.Run(out), budget.last_step(recipe.train)
    trainer = Trainer(recipe, config, data, device)
    with run.lock(), listening() as flag:
        step = run.latest(warn=say)
        if step is not None:
            tensors, meta = run.load(step)
            refuse_changes(meta, trainer.meta())
            trainer.restore(tensors, step)
            say(f"resuming {out} at step {step}")
        elif init is not None:
            trainer.start_from(init)
        claim_data(out / "data.json", data)
        store.write_atomic(out / "config.toml", to_toml(recipe).encode())
        try:
            _loop(trainer, run, last, budget, flag, held_out, show_progress)
        except torch.OutOfMemoryError as error:
            raise MemoryExhausted(
                f"out of memory at step {trainer.step} with micro-batches of "
                f"{recipe.train.micro_batch or recipe.train.batch}; set a smaller one, e.g. --set train.micro_batch=8"
            ) from error
        return trainer.model()


def _loop(
    trainer: Trainer, run: store.Run, last: int, budget: Budget, flag: Flag, held_out: Source | None, show: bool
) -> None:
    config, started = trainer.recipe.train, time.monotonic()
    held = held_out_images(held_out, config.held_out)
    window: list[dict[str, float]] = []
    tick = started
    with (
        log.JsonLines(run.path / "log.jsonl", trainer.step) as lines,
        log.progress(last, "training", show, done=trainer.step) as bar,
    ):
        while trainer.step < last:
            window.append(trainer.update(last))
            step = trainer.step
            bar.advance(1, loss=window[-1]["loss"])
            over = budget.minutes is not None and time.monotonic() - started >= 60 * budget.minutes
            end = step == last or over or flag.name is not None
            if step % config.log_every == 0 or end:
                now = time.monotonic()
                mean = {name: sum(entry[name] for entry in window) / len(window) for name in window[0]}
                rate = len(window) * config.batch / (now - tick)
                lines.write({"step": step, "images": step * config.batch, **mean, "images_per_second": rate})
                window, tick = [], now
            if held is not None and (step % config.held_out_every == 0 or end):
                lines.write({"step": step, "held_out": trainer.held_out_loss(held)})
            if step % config.save_every == 0 or end:
                run.save(step, trainer.tensors(), trainer.meta())
                run.retain(2)
            if step % config.sample_every == 0 or end and flag.name is None:
                save_grid(trainer, run.path / "samples" / f"step-{step:09d}.png")
            if flag.name is not None:
                raise Preempted(f"{flag.name}: stopped after step {step}, which is saved; the same command goes on")
            if over:
                break


def claim_data(path: Path, data: Source) -> None:
    """A run belongs to one data set: writes what it is, or refuses another."""
    now = {"format": FORMAT, "images": len(data), "fingerprint": data.fingerprint(), "skipped": list(data.skipped)}
    before = store.read_json(path) if path.exists() else now
    if before["fingerprint"] != now["fingerprint"]:
        raise UsageError(
            f"the data has changed since this run began ({before['images']} images before, {now['images']} now); "
            "give the same data, or another --out"
        )
    if before.get("skipped", []) != now["skipped"]:  # a run from before there was a list has left nothing out
        changed = sorted(set(before.get("skipped", [])) ^ set(now["skipped"]))
        raise UsageError(
            f"other images are left out than when this run began ({', '.join(changed[:20])}); "
            "give the same data, or another --out"
        )
    store.write_json(path, now)


def held_out_split(data: str, recipe: Recipe) -> Source | None:
    """The test split of a data set in the recipe's shape, or None where it has none."""
    config = recipe.data
    try:
        return open_source(data, config.size, config.channels, config.background, split="test")
    except DataError:
        return None


def count_classes(data: Source) -> int | None:
    """How many classes the data names, or None."""
    return None if data.classes is None else len(data.classes)


def held_out_images(source: Source | None, count: int) -> Tensor | None:
    """The first `count` images of a held-out split, or None."""
    if source is None or count < 1:
        return None
    return torch.stack([source[i].image for i in range(min(count, len(source)))])


def save_grid(trainer: Trainer, path: Path) -> None:
    """64 samples of the averaged weights in 50 steps, from the same noise each time; none if they cannot be drawn."""
    model = trainer.model()
    try:
        model.config.parameterisation.check(model.process)
    except UsageError as error:  # training it is allowed, and the reason is told to whoever asks for a sample
        log.warn(f"no preview at step {trainer.step}: {error}")
        return
    x = model.chain(Key(0).fold("preview").rows(64), model.times(min(50, model.process.steps or 50)), DDIM())
    store.write_atomic(path, png(grid(to_uint8(x))))


def refuse_changes(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """What decides the numbers must be what it was; how often to save or look may change."""
    free = {"steps", "save_every", "sample_every", "log_every", "held_out_every", "held_out"}

    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if isinstance(value, dict):
            return {
                k: v for key, item in value.items() for k, v in flat(item, f"{path}.{key}" if path else key).items()
            }
        return {path: value}

    before, after = flat(saved["recipe"]), flat(now["recipe"])
    changed = [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
        and name.split(".")[0] not in ("about", "expected")
        and not (name.startswith("train.") and name[6:] in free)
    ]
    if changed or saved["model"] != now["model"]:
        what = "; ".join(changed) or f"model: {saved['model']['image']} -> {now['model']['image']}"
        raise UsageError(f"this run was started with other settings ({what}); give the old ones, or another --out")
