"""From a model to one of one to eight steps: the same network, tuned on the same data by `trajectory.Taught`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex

import torch

from undiffuse.config import parse, plain
from undiffuse.data.format.several import spec_of
from undiffuse.data.source import Source, open_raw
from undiffuse.diffusion.grid import LogSnr
from undiffuse.diffusion.objective import Trajectory, spreads
from undiffuse.errors import UsageError, counted
from undiffuse.machine import dist, log, sink
from undiffuse.machine.log import Say
from undiffuse.model import fitted
from undiffuse.model.fit import cost, fit, steps_of
from undiffuse.model.load import load
from undiffuse.model.model import Model
from undiffuse.model.recipe import Recipe, TrainConfig, with_settings
from undiffuse.strict import whole
from undiffuse.training.resume import saved_recipe
from undiffuse.training.start import Data, asked, train

MOST = 8
TEACHING = 16  # evaluations of the teacher for a whole chain, and so many for each step at least:
LEAST = 3
FREE, FIXED = ("network.dropout", "objective.substeps"), ("data.size", "data.channels")  # among the settings
EVALUATIONS = 64  # of the student in a batch at most; each image has one for every step


def recipe_for(model: Model, bounds: tuple[float, ...]) -> Recipe:
    """What tunes a model to steps that begin at these sigma/alpha: by its own optimizer, at half of its rate."""
    said, config = model.meta.get("recipe"), model.config
    before = parse(TrainConfig, said.get("train", {}), "the recipe of this model") if isinstance(said, dict) else None
    size = model.data.size if config.image[1:] == (model.data.size,) * 2 else config.image[1:]
    data = replace(model.data, size=size, channels=config.image[0], labels=config.classes is not None)
    tuning = TrainConfig(
        steps=5000,
        batch=EVALUATIONS >> (len(bounds) - 1).bit_length(),  # a power of 2, which processes can share
        lr=1e-4 if before is None else before.lr / 2,
        optimizer="adam" if before is None else before.optimizer,
        warmup=100,
        decay="cosine",
        ema=0.999,
        ema_ramp=True,
        save_every=500,
        sample_every=500,
        held_out_every=500,
        held_out=1024 // len(bounds),
        eval_steps=len(bounds),
        channels_last="auto",
        drop_label=0.1 if before is None else before.drop_label,
    )
    about = f"{model.digest()[:12]} distilled to {counted(len(bounds), 'step')}"
    parts = (config.process, config.parameterisation, config.variance, config.network)
    each = max(LEAST, -(-TEACHING // len(bounds)))
    return Recipe(about, data, *parts, Trajectory(bounds, each), tuning)


def fitted_bounds(model: Model, steps: int, say: Say, show_progress: bool) -> tuple[float, ...]:
    """sigma/alpha at which steps begin, rising: those of the fitted grid, which is made and kept where there is none,
    but for the first one, which is of pure noise."""
    found = model.fit
    if found is None:
        say(f"no grid is fitted to this model yet: {cost(model)}")
        with log.progress(steps_of(model), "fitting", show_progress) as bar:
            found = fit(model, progress=bar.advance)
        say(f"it is kept in {fitted.keep(found, model.run)}; the teacher samples on it too from now on")
    # First a step from pure noise: at a few sigma/alpha, where a grid may begin, the mean and noise are no draw of x_t.
    times = LogSnr().times(model.process, 2)[:1]
    if steps > 1:
        times = torch.cat([times, found.grid.times(model.process, steps)[1:-1]])
    bounds = model.process.spread(times.flip(0))
    if steps > 1 and bounds[0] <= spreads(model.process)[0]:  # where the process begins, the teacher has no steps below
        bounds[0] = bounds[:2].log().mean().exp()
    return tuple(round(u, 6) for u in bounds.tolist())


def distill(
    model: Model | str | Path,
    data: Data,
    out: str | Path,
    steps: SupportsIndex = 4,
    *,
    settings: Sequence[str] = (),
    device: str = "auto",
    say: Say = log.say,
    show_progress: bool = True,
    **given: Any,
) -> Model:
    """Tunes a model to sample in 1 to 8 steps, in the run folder `out`, or goes on with the run that is there.

    `data` is what it was trained on; `images`, `minutes`, `skip_bad` and the like are those of `train`. Raises
    UsageError for a model that predicts none of v, x0 and edm, and as `train` does.
    """
    steps = whole("steps", steps, 1)
    run, _, _ = asked(data, out, None, given.get("images"), given.get("minutes"), settings)
    sink.find(given.get("logs", ()))
    _refuse_settings(settings)
    if steps > MOST:
        raise UsageError(f"steps = {steps} is not possible; give 1 to {MOST}, or sample this model in as many steps")
    teacher = model if isinstance(model, Model) else load(model, device)
    _refuse_teacher(teacher, steps)
    with dist.joined():
        before = json.loads(dist.tell(json.dumps(saved_recipe(run)) if dist.is_first() else ""))
        how: dict[str, Any] = {"settings": settings, "device": device, "say": say, "show_progress": show_progress}
        if before is not None:
            _refuse_other(run.path, before, teacher, steps)
            return train(data, out, init=teacher, **how, **given)
        # Settings and data that are refused are so before anything is computed.
        with_settings(plain(recipe_for(teacher, (1.0,))), settings, "the settings")
        if not isinstance(data, Source):
            open_raw(spec_of(data), "train", teacher.data.reading)
        own = fitted_bounds(teacher, steps, say, show_progress) if dist.is_first() else ()
        bounds = tuple(json.loads(dist.tell(json.dumps(own))))  # another machine might come to slightly others
        recipe = recipe_for(teacher, bounds)
        if dist.is_first():
            say(f"steps begin at sigma/alpha {', '.join(f'{u:g}' for u in reversed(bounds))}")
        return train(data, out, recipe, init=teacher, **how, **given)


def _refuse_settings(settings: Sequence[str]) -> None:
    """UsageError for what makes of the student another function than its teacher is."""
    for setting in settings:
        name = setting.partition("=")[0].strip()
        section = name.partition(".")[0]
        if section not in ("data", "train") and name not in FREE or name in FIXED:
            raise UsageError(
                f"--set {setting} is not possible in a distillation, whose network, images and steps are those of the "
                "teacher; change train.* and how data is read"
            )


def _refuse_teacher(teacher: Model, steps: int) -> None:
    """UsageError for what cannot be distilled at all."""
    teacher.refuse_distilled("another distillation")
    teacher.refuse_guided("a distillation")
    if teacher.config.variance.learned:
        raise UsageError("a model with a learned variance cannot be distilled; train one with a fixed one")
    Trajectory().check_answer(teacher.denoiser)
    if teacher.process.steps is not None and teacher.process.steps < steps:
        raise UsageError(f"steps = {steps} is not possible; this model takes 1 to {teacher.process.steps}")


def _refuse_other(out: Path, before: dict[str, Any], teacher: Model, steps: int) -> None:
    """UsageError for a run of another kind, or of another model."""
    objective = before.get("objective", {})
    bounds = objective.get("bounds", ()) if objective.get("name") == "trajectory" else ()
    if len(bounds) != steps:
        what = f"distillation to {counted(len(bounds), 'step')}" if bounds else "training"
        raise UsageError(f"{out} holds a {what}, and one to {counted(steps, 'step')} was asked for; give another --out")
    made_of = before.get("about", "").partition(" ")[0]
    if not teacher.digest().startswith(made_of):
        raise UsageError(
            f"{out} holds a distillation of another model ({made_of}) than this one ({teacher.digest()[:12]}); give "
            "another --out"
        )
