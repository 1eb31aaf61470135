"""Models from and to files: run folders, checkpoints, exported folders, single files, and those in the package."""

from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse.config import parse, plain
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.errors import Corrupt, UsageError, unknown
from undiffuse.interop.diffusers import read_folder
from undiffuse.interop.diffusers_files import absent, is_folder
from undiffuse.interop.torchfile import PICKLES
from undiffuse.machine import dist, log, store
from undiffuse.machine.device import choose
from undiffuse.machine.tensorfile import begins_as_weights, read_weights, write_weights
from undiffuse.model import average, fitted
from undiffuse.model.model import Model
from undiffuse.model.recipe import ModelConfig
from undiffuse.model.weights import clean, digest_of_weights, weights_of

BEST = "best.safetensors"  # in a run folder: the average at the lowest held-out loss, of runs with train.patience
PARTS = {"average": "ema", "raw": "model", "best": "ema"}  # what `weights` may be, and the file that has it


def refuse_not_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises Corrupt that names the first tensor that holds NaN or infinity."""
    bad = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise Corrupt(f"{what}: {bad[0]}{more} {'hold' if more else 'holds'} NaN or infinity")


def from_weights(
    config: ModelConfig, tensors: dict[str, Tensor], meta: dict[str, Any], device: str | torch.device = "cpu"
) -> Model:
    """A model from named tensors; every name and shape must fit."""
    tensors = {clean(name): tensor for name, tensor in tensors.items()}
    denoiser = _fitting(config, tensors)
    weights = {name: tensor.to(torch.float32).to(device) for name, tensor in tensors.items()}
    denoiser.network.load_state_dict(weights, assign=True)
    return Model(config, denoiser.eval().requires_grad_(False), meta, torch.device(device))


def _fitting(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Denoiser:
    """The denoiser that the config describes, without weights. UsageError for tensors that are not its own."""
    # A line of a distilled model may lead beyond [−1, 1] on its way.
    denoiser = config.build(clip=config.bounds is None, device="meta")
    expected = {name: tuple(p.shape) for name, p in denoiser.network.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UsageError(
                f"these weights are of another architecture: {name} is {found.get(name, 'missing')} in the file "
                f"and {expected.get(name, 'absent')} in the network that its config describes"
            )
    return denoiser


def shipped() -> dict[str, Path]:
    """The models inside the package, by name."""
    folder = Path(str(resources.files("undiffuse") / "assets"))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def holds_model(source: str | Path) -> bool:
    """Whether a path or a name is that of a model, by what is there; of a file its first bytes are read."""
    path = Path(source)
    if not path.exists():
        return str(source) in shipped()
    if path.is_file():
        return path.suffix == ".safetensors" or path.suffix in PICKLES or begins_as_weights(path)
    return is_folder(path) or (path / BEST).exists() or store.is_checkpoint(path) or bool(store.Run(path).steps())


def load(
    source: str | Path, device: str | torch.device = "auto", trusted: bool = False, weights: str | None = None
) -> Model:
    """A model from a run folder, one checkpoint in it, an exported folder or file, or a shipped model's name.

    `weights` are those of a run: `average` (EMA) or `raw` of a checkpoint, or `best`, the average at the lowest
    held-out loss. Unless given, `best` of a run that is ended by its held-out loss, else `average`. `device` "auto" is
    CUDA, MPS or the CPU, whichever is there. Raises UsageError for what is not there or does not fit, Corrupt for a
    damaged file or a pickle.
    """
    if not isinstance(source, (str, Path)):
        raise UsageError(f"model {source!r} is not possible; give the path or the name of one")
    if weights not in (None, *PARTS):
        raise unknown("weights", str(weights), PARTS)
    path, device = Path(source), choose(str(device))
    if not path.exists() or (str(source) in shipped() and path.is_dir() and not holds_model(path)):  # a data set, say
        if str(source) not in shipped():
            raise UsageError(
                f'model "{source}" is not known: there is no such file or folder; '
                + (absent(str(source)) or "give a run folder, a checkpoint in it, an exported model, or one that is ")
                + ("" if absent(str(source)) else f"shipped: {', '.join(shipped())}")
            )
        path = shipped()[str(source)]
    if path.is_dir() and not is_folder(path):
        tensors, meta, used = _from_run(path, weights)
        meta = meta | {"weights": used}
    elif weights in ("raw", "best"):
        raise UsageError(f"{path} holds one set of weights; --weights {weights} needs a training run or its checkpoint")
    else:
        tensors, meta = read_folder(path) if path.is_dir() else read_weights(path)
        tell_assumed(meta, str(path))
    model, run = parse_model(tensors, meta, str(path), device, trusted), None
    if path.is_dir() and not is_folder(path):
        run = path.resolve().parent if store.is_checkpoint(path) else path
    return replace(model, run=run)


def _from_run(path: Path, weights: str | None) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Weights of the newest good checkpoint of a run, or of the checkpoint that is named; and which they are."""
    if weights in (None, "best") and (path / BEST).exists() and not store.Run(path).steps():
        return *read_weights(path / BEST), "best"  # the run was killed before its first checkpoint
    run, step = store.locate(path)
    part = PARTS.get(weights or "", "ema")
    parts, meta = run.load(step, only=(part,))
    named = run.folder(step).name == path.resolve().name
    if weights == "best" or (weights is None and not named and _ends_by_itself(meta) and (run.path / BEST).exists()):
        if named:
            raise UsageError(f"{path} is one checkpoint; --weights best needs the folder of the run")
        if not (run.path / BEST).exists():
            raise UsageError(f"{path} has no {BEST}; it is kept in the folder of a run with train.patience")
        return *read_weights(run.path / BEST), "best"
    if part not in parts:
        what = "model" if part == "ema" else "training run"
        raise (Corrupt if part == "ema" else UsageError)(
            f"{run.folder(step)} has no {part}.safetensors, so it is not a {what}"
        )
    return parts[part], meta, "raw" if part == "model" else "average"


def _ends_by_itself(meta: dict[str, Any]) -> bool:
    recipe = meta.get("recipe")
    train = recipe.get("train") if isinstance(recipe, dict) else None
    return isinstance(train, dict) and bool(train.get("patience"))


def averaged(run: Path, sigma_rel: float, step: int | None = None) -> Model:
    """A run's model with an average of another relative width, from its EMA snapshots; see `average.reconstruct`."""
    tensors, meta = average.reconstruct(average.snapshots(run), sigma_rel, step)
    return parse_model(tensors, meta, str(run))


def parse_model(
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    where: str,
    device: str | torch.device = "cpu",
    trusted: bool = False,
) -> Model:
    """A model from weights and from the metadata beside them; names in it resolve to built-ins unless `trusted`."""
    if "model" not in meta:
        raise Corrupt(f"{where} holds no undiffuse model: its metadata has no model section")
    model = from_weights(parse(ModelConfig, meta["model"], where, trusted), tensors, meta, device)
    refuse_not_finite(weights_of(model.denoiser.network), f"{where} cannot be used")
    return model


def tell_assumed(meta: dict[str, Any], where: str) -> None:
    """Warns of what was assumed of a model of another project."""
    assumed = meta.get("imported", {}).get("assumed", [])
    if assumed and dist.is_first():
        log.warn(f"{where}: {'; '.join(assumed)}")


def as_written(model: Model, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights in that type, on the CPU. Raises Corrupt for one that is not finite, or is not so in that type."""
    weights = weights_of(model.denoiser.network)
    refuse_not_finite(weights, "this model cannot be written")
    tensors = {name: tensor.to("cpu", dtype) for name, tensor in weights.items()}
    beyond = next((name for name, tensor in sorted(tensors.items()) if not tensor.isfinite().all()), None)
    if beyond is not None:
        raise Corrupt(
            f"this model cannot be written in {str(dtype).removeprefix('torch.')}, which ends at "
            f"{torch.finfo(dtype).max:g}: {beyond} has {float(weights[beyond].abs().max()):g}; write it in float32"
        )
    return tensors


def save(model: Model, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """One safetensors file that `load` reads: weights, config and history. Raises Corrupt for what is not finite."""
    tensors, meta = as_written(model, dtype), {**model.meta, "model": plain(model.config)}
    _fitting(model.config, tensors)  # refuses what `load` would, such as a network inside of another
    fit, digest = model.fit, model.digest()
    tables = fitted.raw(model.run, digest, fitted.CODEC) or meta.get("codec")
    written = digest_of_weights({name: tensor.float() for name, tensor in tensors.items()})
    for name, found in (("fit", None if fit is None else plain(fit)), ("codec", tables)):
        meta.pop(name, None)  # it is of what the file holds, whose weights may be rounded
        if isinstance(found, Mapping) and found.get("weights") == digest:
            meta[name] = {**found, "weights": written}
    write_weights(path, tensors, meta)
