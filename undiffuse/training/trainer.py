"""The state of a run and one step of it. Everything random is keyed by the step, so nothing else needs to be saved.

The batch of a step is global. Each process takes its share of the rows, in micro-batches, and the gradients are
summed: by DistributedDataParallel, or, with `exact_shards`, shard by shard in an order that does not depend on how many
processes there are.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from undiffuse.config import plain
from undiffuse.data.loader import Batch, Loader, Prefetched
from undiffuse.data.source import Source
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.importance import Seen
from undiffuse.diffusion.objective import NO_TEACHER, Objective, Trajectory, by_quartile, quartile_sums
from undiffuse.diffusion.trajectory import Taught
from undiffuse.errors import DataError, NotFiniteError, UsageError
from undiffuse.key import Key, moved
from undiffuse.machine import device as machine
from undiffuse.machine import dist
from undiffuse.machine.disk import SMALL
from undiffuse.model.average import Ema, Profiles
from undiffuse.model.classes import Classes
from undiffuse.model.facts import begun_with
from undiffuse.model.load import from_weights
from undiffuse.model.model import Model, to_float
from undiffuse.model.recipe import FORMAT, ModelConfig, Recipe, learning_rate
from undiffuse.network.base import NOTHING, Conditioning, recompute
from undiffuse.timing import stage
from undiffuse.training.optimizer import optimizer_of
from undiffuse.training.plan import shares
from undiffuse.training.scale import LossScale
from undiffuse.training.tune import begin_with, teachers_labels


class Trainer:
    """Weights, their average, the optimiser's moments and the number of steps done."""

    def __init__(
        self,
        recipe: Recipe,
        config: ModelConfig,
        data: Source,
        device: str | torch.device = "cpu",
        teacher: Model | None = None,
    ):
        self.classes = classes_of(recipe, data)
        recipe = replace(recipe, data=replace(recipe.data, labels=self.classes is not None))
        self.recipe, self.config, self.device = recipe, config, torch.device(device)
        machine.refuse_precision(recipe.train.precision, self.device, "train.precision =")
        self.share, self.micro = shares(recipe.train)
        self.key = Key(recipe.train.seed).fold("train")
        torch.manual_seed(self.key.fold("init").integer())
        self.denoiser: Denoiser = config.build(clip=False).to(self.device)
        recipe.objective.check(self.denoiser)
        self.denoiser.at(torch.ones(1, dtype=torch.float64, device="cpu"))  # refuses a time that the process lacks
        if recipe.train.precision in machine.HALF:
            self.denoiser.computing = machine.in_precision(recipe.train.precision, self.device)
        if recipe.train.channels_last is True:  # before averages and moments, which take the layout of their weights
            self.denoiser.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.objective = self._objective(teacher)
        self.names = [name for name, _ in self.denoiser.network.named_parameters()]
        self.weights = list(self.denoiser.network.parameters())
        self.ema = Ema(self.weights, recipe.train.ema, recipe.train.ema_ramp)
        self.profiles = Profiles(self.weights, recipe.train.ema_profiles)
        self.optimizer = optimizer_of(recipe.train.optimizer, self.denoiser.network, recipe.train.betas)
        self.scale = LossScale(recipe.train.precision == "float16")
        self.seen = Seen(recipe.objective, recipe.process)
        self.batches = Prefetched(
            Loader(data, recipe.train.batch, recipe.train.seed, recipe.data.flip),
            torch.arange(self.share, dtype=torch.int64, device="cpu") + dist.rank() * self.share,
            pin=self.device.type == "cuda",
        )
        self.denoiser.network = self._prepared(self.denoiser.network)
        self.step, self.begun = 0, dict[str, Any]()  # begun: from which weights, and how many images they had seen

    def _objective(self, teacher: Model | None) -> Objective:
        """What is minimised; with a copy of the teacher that it learns from, if it learns from one."""
        recipe = self.recipe
        if not isinstance(recipe.objective, Trajectory):
            return recipe.objective
        if teacher is None:
            raise UsageError(NO_TEACHER)
        own = deepcopy(teacher.denoiser).to(self.device).requires_grad_(False).eval()
        own.computing = self.denoiser.computing
        labels = teachers_labels(teacher, self.classes)
        if recipe.train.channels_last is True:
            own.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return Taught(recipe.objective, own, None if labels is None else labels.to(self.device))

    def _prepared(self, network: nn.Module) -> nn.Module:
        """The network as it is run: recomputation, compilation, and the sum over processes."""
        train = self.recipe.train
        machine.keep_memory()
        recompute(self.config.network, network, train.recompute)
        if dist.size() > 1 and not train.exact_shards:
            cards = [self.device.index] if self.device.type == "cuda" else None
            network = DistributedDataParallel(network, cards, broadcast_buffers=False, gradient_as_bucket_view=True)
        if train.compile:  # with what sums over the processes, so that it sums what is ready while the rest is computed
            network.compile()
        return network

    @contextmanager
    def computing(self, used_card: bool) -> Iterator[None]:
        """Inside, torch computes as the run says; afterwards as before. Raises UsageError, as `repeatable` does."""
        train, card = self.recipe.train, self.device.type == "cuda"
        with (
            machine.full_precision(tf32=train.precision == "tf32") if card else nullcontext(),
            machine.repeatable(self.device, used_card) if train.deterministic else nullcontext(),
        ):
            yield

    def update(self, last: int, vote: Callable[[], object] = dist.is_alive) -> dict[str, float]:
        """One step. A loss or gradient that is not finite stops it before anything has changed.

        In float16 such a step is skipped as long as a smaller scale of the loss may help: weights, moments and averages
        stay, and the next step has other examples and noise. `vote` is called when all work is queued, before the
        device is waited for: there the processes meet on the CPU.
        """
        train, step = self.recipe.train, self.step
        with stage("data"):
            batch = self.batches.at(step)
        losses, t = self._gradients(batch)
        with stage("clip"):
            self.scale.unscale(self.weights)
            norm = torch.nn.utils.clip_grad_norm_(self.weights, train.clip_norm)
            queued = torch.cat([norm.to(losses).reshape(1), losses])
        vote()
        read = queued.cpu()  # the one wait for the device of a step
        norm, losses = float(read[0]), read[1:]
        density = self.seen.density()
        weight = None if density is None else density.weight(self.recipe.process, t)
        sums = self._sums(losses, t, weight)
        loss = float(sums[0].sum()) / train.batch
        rate, finite = learning_rate(train, step, last), math.isfinite(norm) and bool(sums.isfinite().all())
        seen = {"loss": loss, **by_quartile(sums)} if math.isfinite(loss) else {}
        if not finite:
            if not self.scale.overflowed():
                raise self._not_finite(batch, losses, loss, norm)
            self.step += 1
            return {**seen, "lr": rate, **self.scale.told(skipped=True)}
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with stage("optimizer"):
            self.optimizer.step()
        with stage("ema"):
            self.ema.update(self.weights, step)
            self.profiles.update(self.weights, step)
        self.scale.passed()
        if self.seen.on:
            self._observe(batch, losses if weight is None else losses / weight, t)
        self.step += 1
        return {**seen, "grad_norm": norm, "lr": rate, **self.scale.told(skipped=False)}

    def _gradients(self, batch: Batch) -> tuple[Float[Tensor, "share"], Float[Tensor, "share"]]:
        """Leaves the gradient of the mean loss of the global batch, times its scale, in `.grad`.

        Returns the losses of this process's rows, on the device, and the t they were taken at, on the CPU.
        """
        exact = self.recipe.train.exact_shards is not None
        # DistributedDataParallel takes the mean over processes, an exact sum does not.
        divisor = (self.recipe.train.batch if exact else self.share) / self.scale.scale
        self.optimizer.zero_grad(set_to_none=True)
        losses, gradients, times = [], [], []
        for first in range(0, self.share, self.micro):
            row = int(batch.rows[first])
            torch.manual_seed(self.key.fold("dropout", self.step, row).integer())
            with nullcontext() if first + self.micro >= self.share else self.unsynchronised():
                with stage("forward"):
                    loss, t = self.loss(batch, slice(first, first + self.micro))
                with stage("backward"):
                    (loss.sum() / divisor).backward()
            losses.append(loss.detach())
            times.append(t)
            if exact:
                gradients.append(torch.cat([grad_of(weight).flatten() for weight in self.weights]))
                self.optimizer.zero_grad(set_to_none=True)
        if exact:
            flat = dist.ordered_total(gradients)
            for weight, part in zip(self.weights, flat.split([w.numel() for w in self.weights]), strict=True):
                weight.grad = like(weight, part.view(weight.shape))
        return torch.cat(losses), torch.cat(times)

    def _sums(
        self, losses: Float[Tensor, "share"], t: Float[Tensor, "share"], weight: Float[Tensor, "share"] | None
    ) -> Float[Tensor, "2 4"]:
        """Over all processes the sum and count of losses by quartile of t, in an order as that of the gradients."""
        weights = [None] * len(losses.split(self.micro)) if weight is None else weight.split(self.micro)
        split = zip(losses.split(self.micro), t.split(self.micro), weights, strict=True)
        parts = [quartile_sums(*part) for part in split]
        if self.recipe.train.exact_shards is not None:
            return dist.ordered_total(parts)
        return dist.total(torch.stack(parts).sum(0))

    def _observe(self, batch: Batch, losses: Float[Tensor, "share"], t: Float[Tensor, "share"]) -> None:
        """Takes note of the losses of the whole batch, in every process alike: a row is one's, plus zeros."""
        every = torch.zeros(2, self.recipe.train.batch, dtype=torch.float64, device="cpu")
        every[:, batch.rows] = torch.stack([t, losses.double()])
        self.seen.observe(*dist.total(every))

    @contextmanager
    def unsynchronised(self) -> Iterator[None]:
        """Inside, a backward pass sums nothing over the processes."""
        network = self.denoiser.network
        with network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext():
            yield

    def loss(self, batch: Batch, part: slice) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """The loss of each example of a micro-batch, and the t it was taken at."""
        rows = batch.rows[part]
        keys = self.key.fold("noise", self.step).rows(rows, self.device)
        cond = self._told(None if batch.label is None else batch.label[part], rows)
        x_0 = to_float(batch.image[part].to(self.device, non_blocking=True))
        if self.recipe.train.channels_last is True:
            x_0 = x_0.contiguous(memory_format=torch.channels_last)
        loss = self.seen.applied(self.objective)(self.denoiser, x_0, cond, keys)
        return loss.per_example, loss.t

    def _told(self, label: Tensor | None, rows: Tensor) -> Conditioning:
        """The classes, a tenth of them replaced by "no class" so that guidance has something to guide from."""
        if self.config.classes is None or label is None:
            return NOTHING
        drop = self.key.fold("drop label", self.step).rows(rows).uniform() < self.recipe.train.drop_label
        return Conditioning(label=moved(torch.where(drop, self.config.classes, label), self.device))

    def _not_finite(self, batch: Batch, losses: Tensor, loss: float, norm: float) -> NotFiniteError:
        """Names the examples of all processes whose loss is not finite; where only the gradient is not, all it can."""
        bad = torch.zeros(self.recipe.train.batch, dtype=torch.int64, device="cpu")
        bad[batch.rows] = torch.where(losses.cpu().isfinite(), 0, batch.index + 1)
        bad = dist.total(bad)
        named = (bad[bad > 0] - 1).tolist() or batch.index.tolist()
        least = ", and their scale cannot fall below 1" if self.scale.on else ""
        return NotFiniteError(
            f"step {self.step}: the loss is {loss} and the gradient norm {norm}{least}, so the weights "
            f"were not updated; examples {named[:8]}{' …' if len(named) > 8 else ''}"
        )

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        state = [self.optimizer.state[weight] for weight in self.weights]
        moments = {
            f"{what}/{name}": value
            for name, entry in zip(self.names, state, strict=True)
            for what, value in entry.items()
        }
        weights = [weight.detach() for weight in self.weights]
        return {
            "model": dict(zip(self.names, weights, strict=True)),
            "ema": dict(zip(self.names, self.ema.shadow, strict=True)),
            "adam": moments,  # so named of old, whichever optimizer it is
            **({"profiles": self.profiles.tensors(self.names)} if self.profiles.shadows else {}),
            **({"scale": self.scale.tensors()} if self.scale.on else {}),
            **({"seen": self.seen.tensors()} if self.seen.on else {}),
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, dict[str, Tensor]], step: int) -> None:
        for name, weight, shadow in zip(self.names, self.weights, self.ema.shadow, strict=True):
            weight.copy_(tensors["model"][name])
            shadow.copy_(tensors["ema"][name])
            if f"step/{name}" in tensors["adam"]:
                moments = {of: like(weight, tensors["adam"][f"{of}/{name}"]) for of in self.optimizer.moments(weight)}
                step_of = tensors["adam"][f"step/{name}"].to(self.device)
                self.optimizer.state[weight] = {"step": step_of, **moments}
        self.profiles.restore(tensors.get("profiles", {}), self.names)
        self.scale.restore(tensors.get("scale", {}))
        self.seen.restore(tensors.get("seen", {}))
        self.step = step

    def share_state(self) -> None:
        """Process 0 gives its state to the others, which need not see its disk."""
        self.step = dist.decide(self.step)
        if self.step > 0:
            for weight in self.weights:
                self.optimizer.begin(weight)
                dist.share(self.optimizer.state[weight].values())
        scale = self.scale.tensors()
        dist.share(scale.values())
        self.scale.restore(scale)
        if self.seen.on:
            dist.share(self.seen.tensors().values())
        with torch.no_grad():
            dist.share([*self.weights, *self.ema.shadow, *self.profiles.tensors(self.names).values()])

    @torch.no_grad()
    def start_from(self, model: Model) -> list[str]:
        """Fine-tuning: the weights of another model; returns what is to be said of it. Raises UsageError, Corrupt."""
        fitted, said = begin_with(model, self.config, self.meta(), dict(zip(self.names, self.weights, strict=True)))
        for name, weight, shadow in zip(self.names, self.weights, self.ema.shadow, strict=True):
            weight.copy_(fitted[name])
            shadow.copy_(fitted[name])
        self.begun = begun_with(model)
        return said

    def model(self, averaged: bool = True) -> Model:
        """The averaged weights as a model, copied; or the weights themselves."""
        source = self.ema.shadow if averaged else self.weights
        copies = dict(zip(self.names, (weight.detach().clone() for weight in source), strict=True))
        return from_weights(self.config, copies, self.meta(), self.device)

    def meta(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": self.step,
            "images": self.step * self.recipe.train.batch,
            **self.begun,
            "model": plain(self.config),
            "recipe": plain(self.recipe),
            **({} if self.classes is None else {"classes": plain(self.classes)}),
            "environment": self.environment(),
        }

    def environment(self) -> dict[str, Any]:
        """What else decides the last bits: equal bits are promised only where all of it is equal."""
        exact = self.recipe.train.exact_shards is not None
        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": machine.name_of(self.device),
            "capability": torch.backends.cpu.get_cpu_capability(),
            **machine.versions(self.device),
            "micro_batch": self.micro,
            "processes": "any" if exact else dist.size(),
        }


def classes_of(recipe: Recipe, data: Source) -> Classes | None:
    """What a run with labels knows of its classes.

    Raises UsageError for data without, unless labels are "auto", and DataError for too many.
    """
    if not recipe.data.labels:
        return None
    classes = Classes.of(data, unlabelled=recipe.train.drop_label > 0)
    if classes is None and recipe.data.labels != "auto":
        raise UsageError(
            "data.labels is on, but this data has no labels; use two or more folders of classes, or turn it off with "
            "--set data.labels=false"
        )
    if classes is not None and len(json.dumps(plain(classes))) > SMALL // 4:
        raise DataError(
            f"{len(classes.names)} classes are more than a checkpoint can name; merge some, or turn labels off"
        )
    return classes


def like(weight: Tensor, values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The values in the layout of a weight, which a fused optimiser takes for that of its gradient and moments too."""
    return torch.empty_like(weight, requires_grad=False).copy_(values)


def grad_of(weight: nn.Parameter) -> Tensor:
    """The gradient, or zeros for a weight that took no part."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
