"""The loop, flat: budgets, checkpoints, previews, what ends a run. The same command again goes on as if unbroken."""

import hashlib
import math
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from undiffuse.config import plain, to_toml
from undiffuse.data.source import Source
from undiffuse.errors import Error, NotFiniteError, Preempted, Stalled, UsageError, is_out_of_memory
from undiffuse.machine import device as machine
from undiffuse.machine import disk, dist, log, sink, store
from undiffuse.machine.log import Say
from undiffuse.machine.tensorfile import write_weights
from undiffuse.machine.watch import Asked, Crowd, Flag, Watchdog, listening
from undiffuse.model.facts import begun
from undiffuse.model.load import BEST
from undiffuse.model.model import Model
from undiffuse.model.recipe import FORMAT, Recipe
from undiffuse.training import health, look, proxy
from undiffuse.training.auto import resolved
from undiffuse.training.memory import exhausted, fit_micro_batch, tell_plan
from undiffuse.training.plan import Budget, advice, conflicts, forward_flops
from undiffuse.training.profile import measure
from undiffuse.training.resume import DATA, claim_classes, claim_data, differences, refuse_changes, saved_recipe
from undiffuse.training.track import Track, said, still, track
from undiffuse.training.trainer import Trainer, classes_of


def train(
    recipe: Recipe,
    data: Source,
    out: Path,
    held_out: Source | None = None,
    init: Model | None = None,
    budget: Budget | None = None,
    device: str | torch.device = "cpu",
    say: Say = print,
    show_progress: bool = True,
    accept_data: bool = False,
    logs: Sequence[str] = (),
    profile: bool = False,
    used_card: bool | None = None,
) -> Model:
    """Trains in the run folder `out`, or goes on with the run that is there; returns the averaged model.

    `logs` names the sinks besides `log.jsonl`: tensorboard, wandb. `profile` measures 20 steps and writes where their
    time went to `profile.json`. `used_card`: whether one was used before `device` was chosen, unless that is
    done here. Under `torchrun` all processes call this with the same; process 0 writes and speaks.
    """
    sinks, budget = sink.find(logs), Budget() if budget is None else budget
    used = torch.cuda.is_initialized() if used_card is None else used_card
    with dist.joined(), listening() as flag, ExitStack() as stack:
        first, scores, on = dist.rank() == 0, None, Track(recipe, 0)
        say, warn = (say, log.warn) if first else (log.silent, log.silent)
        run, saved, held, failure = store.Run(out), None, None, None
        last = budget.last_step(recipe.train)
        _agree(recipe, data, last)  # before anything that differs with them could break a sum
        trainer = _build(recipe, data, machine.choose(str(device)), init, saved_recipe(run), say)
        stack.enter_context(trainer.computing(used))
        if first:
            try:
                held, scores = look.held_out_images(trainer, held_out), proxy.prepare(trainer)
                stack.enter_context(run.lock())
                saved, on = _begin(trainer, run, data, last, init is not None, say, warn, accept_data)
            except Error as error:
                failure = error
        if dist.decide(int(failure is not None)):
            raise failure or Stalled("process 0 could not begin, and says why")
        trainer.share_state()
        fit_micro_batch(trainer, say)
        _foretell(trainer, last, budget, init is not None, held is not None, say, warn)
        looks = Looks(held, on, scores, say)
        loop = _Loop(trainer, run, last, budget, flag, looks, show_progress and first, saved, sinks)
        try:
            _profile(loop, say) if profile else say(loop.go())
        except NotFiniteError as error:
            loop.save()
            dist.wait_for_first()  # else torchrun, which sees the first process end, ends process 0 in its save
            raise health.advised(error, trainer, run) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise exhausted(trainer, last) from error
        model = trainer.model()
        model.meta["ended"] = loop.ended
        return model


def _foretell(trainer: Trainer, last: int, budget: Budget, tuned: bool, held: bool, say: Say, warn: Say) -> None:
    """Before step 0: what cannot work, and what the run will cost."""
    if trainer.step == 0:
        for text in conflicts(trainer.recipe.train, last, budget.minutes, tuned, trainer.config, held):
            warn(text)
        tell_plan(trainer, last, say, warn)


def _profile(loop: "_Loop", say: Say) -> None:
    trainer, run, flag = loop.trainer, loop.run, loop.flag
    loop.begin()
    measured = measure(trainer, loop.save, loop.last, forward_flops(trainer.config))
    if dist.rank() == 0:
        disk.write_json(run.path / "profile.json", {"format": FORMAT, **trainer.environment(), **measured.plain()})
    say(str(measured))
    dist.wait_for_first()  # by all, whichever of them was sent a signal
    if flag.name is not None:
        raise Preempted(f"{flag.name}: stopped after the profile, whose state is saved")


def _agree(recipe: Recipe, data: Source, last: int) -> None:
    """Raises UsageError in every process unless all were given the same."""
    dist.agree(data.fingerprint(), "data")
    dist.agree(hashlib.sha256(repr((plain(recipe), last)).encode()).hexdigest(), "settings")


def _build(
    recipe: Recipe, data: Source, device: torch.device, init: Model | None, then: dict[str, Any] | None, say: Say
) -> Trainer:
    """Everything that can be refused is, before anything is written."""
    image = data[0].image
    classes = classes_of(recipe, data)
    config = recipe.model((image.shape[0], image.shape[1], image.shape[2]), classes and len(classes.names))
    recipe = resolved(recipe, None if then is None else then.get("train", {}), device, config, say)
    trainer = Trainer(recipe, config, data, device, init)
    for text in trainer.start_from(init) if init is not None and then is None else []:
        say(text)
    return trainer


def _begin(
    trainer: Trainer, run: store.Run, data: Source, last: int, tuned: bool, say: Say, warn: Say, accept_data: bool
) -> tuple[dict[str, Any] | None, Track]:
    """Under the lock: takes up what is there, or claims the folder.

    Returns the meta of the checkpoint resumed from, and what is expected of the run.
    """
    step, meta = run.latest(warn=warn), None
    if step is not None:
        tensors, meta = run.load(step)
        if "recipe" not in meta or "adam" not in tensors:
            raise UsageError(f"{run.path} is no training run; fine-tune it with --init {run.path} and another --out")
        if trainer.config.classes is not None:
            claim_classes(run.path / DATA, data, accept_data, warn)
        refuse_changes(meta, trainer.meta())
        trainer.restore(tensors, step)
        trainer.begun = begun(meta)
        say(f"resuming {run.path} at step {step}")
    elif trainer.classes is not None:
        dropped = f"; told none for {share:.0%} of the images" if (share := trainer.recipe.train.drop_label) else ""
        say(f"labels: {len(trainer.classes.names)} classes, {trainer.classes.listed()}{dropped}")
        if missing := trainer.classes.untrained():
            warn(f"classes without a training picture, which cannot be drawn: {missing}")
    trainer.recipe = still(trainer.recipe, last, tuned, meta)
    on = track(trainer.recipe, last, data.fingerprint())
    claim_data(run.path / DATA, data, accept_data)
    disk.write_atomic(run.path / "config.toml", f"# format {FORMAT}\n{to_toml(trainer.recipe)}".encode())
    return meta, on


class Looks(NamedTuple):
    """What a run looks at on its way, beside previews, and whom it tells."""

    held: look.Held | None
    on: Track
    scores: proxy.Proxy | None
    say: Say


class _Loop:
    """One call of `train`: from the step that is there to the end of the budget."""

    def __init__(
        self,
        trainer: Trainer,
        run: store.Run,
        last: int,
        budget: Budget,
        flag: Flag,
        looks: Looks,
        show: bool,
        resumed: dict[str, Any] | None,
        sinks: Sequence[type[sink.Sink]],
    ):
        self.trainer, self.run, self.last, self.budget, self.flag = trainer, run, last, budget, flag
        self.config, self.first, self.looks = trainer.recipe.train, dist.rank() == 0, looks
        self.show, self.resumed, self.sinks = show, resumed, sinks
        before = resumed or {}
        self.lowest = look.Lowest(**plain(before.get("held_out", {})))
        if self.config.patience and not (run.path / BEST).exists():
            self.lowest = look.Lowest(measured=self.lowest.measured)  # what was the lowest was not kept
        self.first_loss: float | None = before.get("health", {}).get("first")
        self.window: list[dict[str, float]] = []
        self.asked = self.over = False  # whether any process was sent a signal, and process 0's minutes are over
        self.ended = ""  # what ended the run: steps, minutes, held-out loss
        self.seconds = 0.0  # that the steps of the window took
        self.paces = deque[float](maxlen=101)  # seconds of the latest steps
        self.started, self.crowd = time.monotonic(), Crowd()

    def go(self) -> str:
        """Steps until the end, which is told."""
        trainer, path, minutes = self.trainer, self.run.path, self.budget.minutes
        if trainer.step >= self.last or self._no_better():
            self.ended = "steps" if trainer.step >= self.last else "held-out loss"
            return f"{path} is finished already, at step {trainer.step:,}"
        self.begin()
        for text in advice(self.config, trainer.device):
            self.looks.say(text)
        if self.looks.scores is not None:
            self.looks.say(self.looks.scores.plan(len(trainer.batches.loader.source)))
        with (
            sink.journal(path, trainer.step, self.sinks, plain(trainer.recipe))
            if self.first
            else nullcontext(sink.Nowhere()) as lines,
            log.progress(self.last, "training", self.show, trainer.step, minutes and 60.0 * minutes) as bar,
            # The others wait inside a step for what process 0 does between two; a sum that fails ends them.
            Watchdog(path / f"stacks-{dist.rank()}.txt", None if self.first else dist.PATIENCE.total_seconds()) as dog,
        ):
            if self.resumed is not None and (differs := differences(self.resumed, trainer, self.last)):
                text = ", ".join(differs)
                log.warn(f"resumed with other {text}: the numbers may differ from those of an unbroken run")
                lines.write({"step": trainer.step, "exact": False, "differs": differs})
            while trainer.step < self.last and not self.ended:
                self.ended = self._step(lines, bar, dog)
        return f"finished at step {trainer.step:,}: {self._why()}"

    def begin(self) -> None:
        """What every later checkpoint is compared with."""
        if self.trainer.step == 0 and self.first:
            self.first_loss = health.fixed_loss(self.trainer, averaged=False)

    def _step(self, lines: look.Journal, bar: log.Progress, dog: Watchdog) -> str:
        """One step and all that is due after it. Returns what ended the run, if it was the last."""
        trainer, config = self.trainer, self.config
        began = time.monotonic()
        self.window.append(trainer.update(self.last, self._vote))
        self.paces.append(time.monotonic() - began)
        self.seconds += self.paces[-1]
        dog.stepped()
        if dist.size() == 1:  # alone a process need not stop where it voted
            self._vote()
        asked = self.asked
        done = "steps" if trainer.step == self.last else "minutes" if self.over else ""
        due = bool(done) or trainer.step % config.held_out_every == 0
        # What may end the run is measured even after a signal, so that the run ends where an unbroken one does.
        if due and (config.patience or not asked) and self._measure(lines, dog, bar):
            done = "held-out loss"
        self._log(lines, bar, bool(done) or asked)
        with dog.slow(), bar.aside():
            if trainer.step % config.ema_snapshot_every == 0 or done:
                self._snapshot()  # before the checkpoint, for nothing makes it again after one
            if trainer.step % config.save_every == 0 or done or asked:
                self.save()
        if not asked and config.sample_every and (done or trainer.step % config.sample_every == 0):
            self._preview(lines, dog, bar)
        if not asked and config.eval_every and (done or trainer.step % config.eval_every == 0):
            self._score(lines, dog, bar)
        if asked:
            dist.wait_for_first()
            name = self.flag.name or "a signal to another process"
            raise Preempted(f"{name}: stopped after step {trainer.step}, which is saved; the same command goes on")
        return done

    def _vote(self) -> None:
        """In every step once, before it waits for its card: what all processes do after this step."""
        minutes = self.budget.minutes
        over = minutes is not None and self.first and time.monotonic() - self.started >= 60 * minutes
        self.asked, self.over = dist.votes(self.flag.name is not None, over)

    def _log(self, lines: look.Journal, bar: log.Progress, ended: bool) -> None:
        step, last = self.trainer.step, self.window[-1]
        speed = len(self.window) * self.config.batch / max(self.seconds, 1e-9)
        shown = {"loss": last.get("loss"), "norm": last.get("grad_norm")}  # a step that was skipped may have neither
        bar.advance(1, **{name: value for name, value in shown.items() if value is not None}, images_per_s=speed)
        if crowded := self.crowd.look(torch.get_num_threads() if self.trainer.device.type == "cpu" else 1):
            self.looks.say(crowded)
        if step % self.config.log_every == 0 or ended:
            names = dict.fromkeys(name for entry in self.window for name in entry)
            values = {name: [entry[name] for entry in self.window if name in entry] for name in names}
            mean = {name: sum(column) / len(column) for name, column in values.items()}
            lines.write({"step": step, "images": step * self.config.batch, **mean, "images_per_second": speed})
            if skipped := round(sum(values.get("skipped", []))):
                self.looks.say(
                    f"step {step:,}: float16 overflowed in {skipped} of {len(self.window)} steps, which were skipped; "
                    f"the loss is scaled by {last['loss_scale']:g} from here on"
                )
            self.window, self.seconds = [], 0.0

    def _snapshot(self) -> None:
        trainer = self.trainer
        if self.first:
            trainer.profiles.snapshot(self.run.path, trainer.step, trainer.names, trainer.meta())

    def save(self) -> None:
        if self.first:
            found = health.examine(self.trainer, self.first_loss)
            state = {"last_step": self.last, "held_out": plain(self.lowest), "health": found}
            self.run.save(self.trainer.step, self.trainer.tensors(), {**self.trainer.meta(), **state})
            self.run.retain(self.config.keep, also=health.known_good(self.run, before=self.trainer.step))

    def _measure(self, lines: look.Journal, dog: Watchdog, bar: log.Progress) -> bool:
        """Held-out loss, by process 0; returns whether it ends the run. A signal leaves it undone, unless it may."""
        trainer, patience = self.trainer, self.config.patience

        def check() -> None:
            dog.beat()
            if not patience:
                self.flag.check()

        held, on, _, say = self.looks
        if held is not None:
            with suppress(Asked), bar.aside():
                loss = look.held_out_loss(trainer, held, check)
                band = on.band(trainer.step)
                lines.write(
                    {"step": trainer.step, "held_out": loss, **({} if band is None else {"expected": list(band)})}
                )
                if band is not None:
                    say(said(loss, trainer.step, band))
                # The end of a budget is no place that an unbroken run would look at.
                due = trainer.step % self.config.held_out_every == 0
                if due and self.lowest.note(trainer.step, loss) and patience:
                    meta = {**trainer.meta(), "held_out": loss}
                    with dog.slow():
                        weights = dict(zip(trainer.names, trainer.ema.shadow, strict=True))
                        write_weights(self.run.path / BEST, weights, meta)
        self._wait(dog)
        return self._no_better()

    def _no_better(self) -> bool:
        """Whether the held-out loss ends the run; what process 0 says."""
        if not self.config.patience:
            return False
        over = self.lowest.is_over(self.config.patience, self.config.held_out_every)
        return bool(dist.decide(int(over)))

    def _wait(self, dog: Watchdog) -> None:
        """For what process 0 does alone, however long it takes."""
        with nullcontext() if self.first else dog.slow(math.inf):
            dist.wait_for_first()

    def _preview(self, lines: look.Journal, dog: Watchdog, bar: log.Progress) -> None:
        """Previews, by process 0. A signal leaves them undone: they are no part of the state."""
        with suppress(Asked), bar.aside(look.preview_steps(self.trainer), "preview") as advance:

            def tick(n: int) -> None:
                dog.beat()
                self.flag.check()
                advance(n)

            if self.first:
                look.save_grids(self.trainer, self.run.path / "samples", lines, tick)
        self._wait(dog)

    def _score(self, lines: look.Journal, dog: Watchdog, bar: log.Progress) -> None:
        """Proxy scores of samples, by process 0. A signal leaves them undone, as previews."""
        scores = self.looks.scores
        total = 0 if scores is None else look.drawing_steps(self.trainer, scores.images, scores.steps)
        with suppress(Asked), bar.aside(total, "proxy") as advance:

            def tick(n: int) -> None:
                dog.beat()
                self.flag.check()
                advance(n)

            if scores is not None:
                proxy.tell(scores, self.trainer, lines, median(self.paces), tick, self.looks.say)
        self._wait(dog)

    def _why(self) -> str:
        """What ended the run."""
        lowest = self.lowest
        if self.ended == "steps":
            return f"all {self.last:,} steps are done"
        if self.ended == "held-out loss":
            return (
                f"the held-out loss was lowest, {lowest.loss:.4g}, at step {lowest.step:,}, and has not fallen since; "
                f"the average of that step is what is sampled"
            )
        return f"the time is over, {log.duration(60 * (self.budget.minutes or 0))}"
