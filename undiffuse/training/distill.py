"""From a model to one of one to eight steps: the same network, tuned on the same data by `objective.Consistency`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex

import torch

from undiffuse.config import parse
from undiffuse.diffusion.objective import Consistency
from undiffuse.errors import UsageError
from undiffuse.machine import log, store
from undiffuse.model import fitted
from undiffuse.model.fit import fit
from undiffuse.model.load import load
from undiffuse.model.model import Model
from undiffuse.model.recipe import Recipe, TrainConfig
from undiffuse.strict import whole
from undiffuse.training.resume import saved_recipe
from undiffuse.training.start import Data, Say, train

MOST = 8
SEEN = 64  # samples of the model whose values say what the standard deviation of the data is


def recipe_for(model: Model, steps: int) -> Recipe:
    """What tunes a model to so many steps: begun at the times that are fitted to it."""
    said = model.meta.get("recipe")
    size, channels = model.image_shape[1:], model.image_shape[0]
    data = replace(model.data, size=size, channels=channels, flip=False, labels=model.config.classes is not None)
    drop = parse(TrainConfig, said.get("train", {}), "the recipe of this model") if isinstance(said, dict) else None
    config = model.config
    times = torch.tensor(_fit(model).grid.walks[steps - 1], dtype=torch.float64, device="cpu").flip(0)
    bounds = tuple(round(u, 6) for u in torch.exp(-model.process.logsnr(times) / 2).tolist())
    spread = round(float(model.sample(SEEN, min(20, config.process.steps or 20), "dpmpp").float().std()) / 127.5, 2)
    tuning = TrainConfig(steps=10_000, batch=128, lr=1e-4, warmup=1000, ema=0.9993)
    return Recipe(
        f"{model.digest()[:12]}, distilled to {steps} steps",
        data,
        config.process,
        config.parameterisation,
        config.variance,
        config.network,
        Consistency(bounds, max(spread, 0.01)),
        replace(
            tuning,
            channels_last=drop is not None and drop.channels_last,
            drop_label=0.1 if drop is None else drop.drop_label,
            save_every=500,
            sample_every=500,
            held_out_every=500,
        ),
    )


def _fit(model: Model) -> fitted.Fit:
    """That of the model; made and kept where there is none."""
    if model.fit is not None:
        return model.fit
    found = fit(model)
    fitted.keep(found, model.run)
    return found


def distill(
    model: Model | str | Path,
    data: Data,
    out: str | Path,
    steps: SupportsIndex = 4,
    *,
    settings: Sequence[str] = (),
    device: str = "auto",
    say: Say = log.say,
    **given: Any,
) -> Model:
    """Tunes a model to sample in 1 to 8 steps, in the run folder `out`, or goes on with the run that is there.

    `data` is what it was trained on; other arguments are those of `train`. Raises UsageError for a model that predicts
    neither v nor edm, and as `train` does.
    """
    steps = whole("steps", steps, 1)
    if steps > MOST:
        raise UsageError(f"steps = {steps} is not possible; give 1 to {MOST}, or sample this model in as many steps")
    before = saved_recipe(store.Run(Path(out)))
    if before is not None:
        _refuse_other(Path(out), before, steps)
        return train(data, out, settings=settings, device=device, say=say, **given)
    teacher = model if isinstance(model, Model) else load(model, device)
    teacher.refuse_distilled("another distillation")
    Consistency().check_answer(teacher.denoiser)
    recipe = recipe_for(teacher, steps)
    say(f"steps begin at sigma/alpha {', '.join(f'{u:g}' for u in reversed(recipe.objective.bounds or ()))}")
    return train(data, out, recipe, settings=settings, init=teacher, device=device, say=say, **given)


def _refuse_other(out: Path, before: dict[str, Any], steps: int) -> None:
    """UsageError for a run of another kind."""
    objective = before.get("objective", {})
    bounds = objective.get("bounds", ()) if objective.get("name") == "consistency" else ()
    if len(bounds) != steps:
        what = f"distillation to {len(bounds)} steps" if bounds else "training"
        raise UsageError(f"{out} holds a {what}, and {steps} steps were asked for; give another --out")
