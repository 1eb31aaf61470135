"""The one object that users hold: a trained denoiser that knows its own shape, process and history."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from undiffuse import average, store
from undiffuse.config import parse, plain
from undiffuse.denoiser import Denoiser
from undiffuse.errors import Corrupt, UsageError, unknown
from undiffuse.interop import diffusers
from undiffuse.key import Key, Keys
from undiffuse.process import Process
from undiffuse.recipe import ModelConfig
from undiffuse.sampler.ancestral import Ancestral
from undiffuse.sampler.base import SAMPLERS, Sampler, sample


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

    @property
    def process(self) -> Process:
        return self.config.process

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.image

    def sampler(self, solver: str | Sampler = "ancestral", **fields: float) -> Sampler:
        """A solver by name; the ancestral one takes the variance that the model was trained with."""
        if isinstance(solver, Sampler):
            return solver
        if solver == "ancestral" and not fields:
            return Ancestral(self.config.variance)
        return SAMPLERS.build({"name": solver, **fields}, trusted=True)

    def sample(
        self,
        n: int,
        steps: int | None = None,
        solver: str | Sampler = "ancestral",
        seed: int = 0,
        batch: int = 64,
        label: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> UInt8[Tensor, "n c h w"]:
        """n images; image i depends on the seed and on i alone. All steps of the table unless `steps` says fewer.

        `progress(k)` is called after every k network evaluations of a batch.
        """
        if n < 1:
            raise UsageError(f"n = {n} images were asked for; give 1 or more")
        keys = Key(seed).fold("sample").rows(n)
        parts = [
            self.chain(keys[i : i + batch], self.times(steps), self.sampler(solver), label=label, progress=progress)
            for i in range(0, n, batch)
        ]
        return to_uint8(torch.cat(parts))

    def times(self, steps: int | None = None) -> Float[Tensor, "times"]:
        """The grid that sampling walks; more steps than the table has are refused."""
        total = self.process.steps
        if steps is not None and (steps < 1 or (total and steps > total)):
            raise UsageError(f"steps = {steps} is not possible; this model takes 1 to {total}")
        return self.process.grid(steps)

    def chain(
        self,
        keys: Keys,
        times: Float[Tensor, "times"],
        sampler: Sampler,
        start: Float[Tensor, "b c h w"] | None = None,
        label: int | None = None,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """One batch along `times`, in float32 on the model's device, returned on the CPU."""
        self.config.parameterisation.check(self.process)
        cond = self._labels(label, len(keys.rows))

        def denoise(x_t: Tensor, t: Tensor) -> Any:
            prediction = self.denoiser(x_t, t, cond)
            if progress is not None:
                progress(1)
            return prediction

        start = None if start is None else start.to(self.device)
        x = sample(sampler, denoise, self.process, keys.to(self.device), self.config.image, times, callback, start)
        return x.cpu()

    def _labels(self, label: int | None, count: int) -> Tensor | None:
        if label is None:
            return None
        classes = self.config.classes
        if classes is None or not 0 <= label < classes:
            what = "this model was trained without labels" if classes is None else f"it knows 0 to {classes - 1}"
            raise UsageError(f"label {label} is not possible: {what}")
        return torch.full((count,), label, dtype=torch.int64, device=self.device)

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.denoiser.parameters())


def from_weights(
    config: ModelConfig, tensors: dict[str, Tensor], meta: dict[str, Any], device: str | torch.device = "cpu"
) -> Model:
    """A model from named tensors; every name and shape must fit."""
    with torch.device("meta"):
        denoiser = config.build(clip=True)
    expected = {name: tuple(p.shape) for name, p in denoiser.network.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UsageError(
                f"these weights are of another architecture: {name} is {found.get(name, 'missing')} in the file "
                f"and {expected.get(name, 'absent')} in the network that its config describes"
            )
    weights = {name: tensor.to(device=device, dtype=torch.float32) for name, tensor in tensors.items()}
    denoiser.network.load_state_dict(weights, assign=True)
    return Model(config, denoiser.eval().requires_grad_(False), meta, torch.device(device))


def shipped() -> dict[str, Path]:
    """The models inside the package, by name."""
    folder = Path(str(resources.files("undiffuse") / "assets"))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def load(source: str | Path, device: str | torch.device = "cpu", trusted: bool = False) -> Model:
    """A model from a run folder, one checkpoint in it, an exported folder or file, or a shipped model's name.

    Raises UsageError for what is not there or does not fit, Corrupt for a damaged file or a pickle.
    """
    path = Path(source)
    if not path.exists():
        if str(source) not in shipped():
            raise unknown("model", str(source), shipped())
        path = shipped()[str(source)]
    if diffusers.is_folder(path):
        tensors, meta = diffusers.read_folder(path)
    elif path.is_file():
        tensors, meta = store.read_weights(path)
    else:
        tensors, meta = _from_run(path)
    return parse_model(tensors, meta, str(path), device, trusted)


def _from_run(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The averaged weights of the newest good checkpoint of a run, or of the checkpoint that is named."""
    run, step = store.locate(path)
    parts, meta = run.load(step, only=("ema",))
    if "ema" not in parts:
        raise Corrupt(f"{run.folder(step)} has no ema.safetensors, so it is not a model")
    return parts["ema"], meta


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
    return from_weights(parse(ModelConfig, meta["model"], where, trusted), tensors, meta, device)


def save(model: Model, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """One safetensors file that `load` reads: weights, config and history."""
    tensors = {name: tensor.to("cpu", dtype) for name, tensor in model.denoiser.network.state_dict().items()}
    store.write_weights(path, tensors, {**model.meta, "model": plain(model.config)})
