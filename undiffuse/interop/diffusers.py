"""diffusers' folders: the network and the chain of DDPM under other names.

A `UNet2DModel` can be configured into many networks, of which ours is one. So each field of its config is translated,
or must have the one value that ours has; a field that a config leaves out has the value that diffusers would give it.
Like the weights of our own files, a folder is read as (tensors, meta) with the model's config under meta["model"].
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from undiffuse.config import Count, Fraction, parse, plain
from undiffuse.diffusion.process import PROCESSES, Cosine
from undiffuse.errors import Corrupt, UsageError
from undiffuse.interop.torchfile import read_tensors
from undiffuse.machine import disk
from undiffuse.network.base import NETWORKS
from undiffuse.network.block import EPS
from undiffuse.network.unet import UNet

WEIGHTS = "diffusion_pytorch_model"
WRITTEN_AS = "0.35.0"  # the release of diffusers whose names are written

T = TypeVar("T")


@dataclass(frozen=True)
class UNet2DModel:
    """The fields and defaults of diffusers' class of this name."""

    sample_size: Count | tuple[Count, Count] | None = None
    in_channels: Count = 3
    out_channels: Count = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[Count, ...] = (224, 448, 672, 896)
    layers_per_block: Count = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: Fraction = 0.0
    act_fn: str = "silu"
    attention_head_dim: Count | None = 8
    norm_num_groups: Count = 32
    attn_norm_num_groups: Count | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None  # read by learned time embeddings only


@dataclass(frozen=True)
class DDPMScheduler:
    """The fields and defaults of diffusers' class of this name."""

    num_train_timesteps: Count = 1000
    beta_start: Fraction = 1e-4
    beta_end: Fraction = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995  # this and sample_max_value: read by thresholding only
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"  # this and steps_offset: how fewer steps are spread, which our samplers decide
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False


SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# Not "learned": diffusers takes the output for σ², the authors and we for log σ².
VARIANCES = {"fixed_small": "fixed-small", "fixed_large": "fixed-large", "learned_range": "learned-range"}

# What ours is; the first value of each row is the one that is written.
NETWORK: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (1,),
    "flip_sin_to_cos": (False,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1.0,),
    "downsample_padding": (0,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "norm_eps": (EPS,),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
CHAIN: dict[str, tuple[Any, ...]] = {
    "beta_schedule": tuple(SCHEDULES),
    "trained_betas": (None,),
    "variance_type": tuple(VARIANCES),
    "clip_sample": (True,),
    "prediction_type": tuple(PREDICTIONS),
    "thresholding": (False,),
    "clip_sample_range": (1.0,),
    "rescale_betas_zero_snr": (False,),
}

NAMES = {
    "temb.dense.0.": "time_embedding.linear_1.",
    "temb.dense.1.": "time_embedding.linear_2.",
    "down.": "down_blocks.",
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.attn_1.": "mid_block.attentions.0.",
    "mid.block_2.": "mid_block.resnets.1.",
    "norm_out.": "conv_norm_out.",
    ".block.": ".resnets.",
    ".attn.": ".attentions.",
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
    ".temb_proj.": ".time_emb_proj.",
    ".nin_shortcut.": ".conv_shortcut.",
    ".norm.": ".group_norm.",
}
NEW = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}
OLD = {".q.": ".query.", ".k.": ".key.", ".v.": ".value.", ".proj_out.": ".proj_attn."}  # of the first releases


def is_folder(path: Path) -> bool:
    """Whether `path` looks like a pipeline, or like a bare `UNet2DModel`."""
    return any((path / name).is_file() for name in ("model_index.json", "config.json", "unet/config.json"))


def read_folder(path: Path, allow_pickle: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights, under our names, and meta of a `DDPMPipeline`, in folders or flat, or of a bare `UNet2DModel`.

    A bare network has no schedule: it is given the defaults of diffusers' `DDPMScheduler`. Raises UsageError for what
    our U-Net and processes cannot represent, Corrupt for a damaged file, and for a `.bin` unless `allow_pickle`.
    """
    index = path / "model_index.json"
    if index.is_file():
        _read_json(index, "DDPMPipeline")
    folder = path / "unet" if (path / "unet").is_dir() else path
    file = folder / "config.json"
    unet = _read_config(UNet2DModel, file, NETWORK)
    chain = (path / "scheduler" if (path / "scheduler").is_dir() else path) / "scheduler_config.json"
    given = index.is_file() or chain.is_file()
    scheduler = _read_config(DDPMScheduler, chain, CHAIN) if given else DDPMScheduler()

    network = _our_network(unet, file)
    outputs = unet.in_channels * (2 if scheduler.variance_type == "learned_range" else 1)
    _require(file, unet, {"out_channels": (outputs,)})
    tensors = _our_tensors(_read_weights(folder, allow_pickle), network, unet.in_channels, outputs, folder)
    model = {
        "image": [unet.in_channels, *_sides(unet, file)],
        "process": _our_process(scheduler),
        "parameterisation": {"name": PREDICTIONS[scheduler.prediction_type]},
        "variance": {"name": VARIANCES[scheduler.variance_type]},
        "network": {"name": "unet", **plain(network)},
    }
    return tensors, {"model": model, "imported": {"from": "diffusers", "schedule": "given" if given else "assumed"}}


def write_folder(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """A new folder that `diffusers.DDPMPipeline.from_pretrained` loads; the whole of it appears at once.

    Raises UsageError for a model that diffusers cannot represent and for a folder that is in use, StorageError.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists already; name a folder that is new or empty")
    unet, scheduler = _their_network(meta["model"]), _their_scheduler(meta["model"])
    levels = len(unet.block_out_channels)
    renamed = {_their_name(name, levels, NEW): _as_linear(name, tensor) for name, tensor in tensors.items()}
    index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    weights = safetensors.torch.save(renamed, {"format": "pt"})
    temporary = disk.beside(path, "tmp")
    with disk.writing(path, len(weights), temporary):
        for name in ("unet", "scheduler"):
            disk.make_folder(temporary / name)
        disk.create(temporary / "unet" / f"{WEIGHTS}.safetensors", weights)
        disk.create(temporary / "unet" / "config.json", _json("UNet2DModel", asdict(unet)))
        disk.create(temporary / "scheduler" / "scheduler_config.json", _json("DDPMScheduler", asdict(scheduler)))
        disk.create(temporary / "model_index.json", _json("DDPMPipeline", index))
        disk.rename(temporary, path)
        disk.sync_folder(path.parent)


def _read_json(file: Path, class_name: str) -> dict[str, Any]:
    if not file.is_file():
        raise UsageError(f"{file} is missing; a diffusers model is a DDPMPipeline folder or a UNet2DModel folder")
    content = disk.read_json(file)
    if not isinstance(content, dict):
        raise Corrupt(f"{file} holds no JSON object")
    if content.get("_class_name") != class_name:
        given = json.dumps(content.get("_class_name"))
        raise UsageError(f'{file}: "_class_name" is {given}; supported: "{class_name}"')
    return content


def _json(class_name: str, fields: Mapping[str, Any]) -> bytes:
    return disk.to_json({"_class_name": class_name, "_diffusers_version": WRITTEN_AS, **fields})


def _read_config(cls: type[T], file: Path, supported: Mapping[str, tuple[Any, ...]]) -> T:
    """The config of that class; a field that is not known, or has a value that is not supported, is refused by name."""
    content = _read_json(file, cls.__name__)
    given = {name: value for name, value in content.items() if not name.startswith("_")}
    fields = parse(cls, given, f"{cls.__name__} of {file}")
    _require(file, fields, supported, given)
    return fields


def _require(
    file: Path, fields: Any, supported: Mapping[str, tuple[Any, ...]], given: Iterable[str] | None = None
) -> None:
    for name, values in supported.items():
        value = getattr(fields, name)
        if value not in values:
            source = "" if given is None or name in given else ", as diffusers takes it where it is left out"
            known = ", ".join(json.dumps(each) for each in values)
            raise UsageError(f'{file}: "{name}" is {json.dumps(value)}{source}; supported: {known}')


def _our_network(unet: UNet2DModel, file: Path) -> UNet:
    """Of the fields that vary, each combination that diffusers could build and ours could not is refused."""
    widths, levels = unet.block_out_channels, len(unet.block_out_channels)
    groups = unet.norm_num_groups
    if not widths or any(width % widths[0] for width in widths) or widths[0] % groups:
        raise UsageError(
            f'{file}: "block_out_channels" is {list(widths)}; '
            f'supported: multiples of the first, which is itself a multiple of "norm_num_groups", {groups}'
        )
    _require(file, unet, {"attn_norm_num_groups": (None, groups)})
    down = [{"DownBlock2D": False, "AttnDownBlock2D": True}.get(kind) for kind in unet.down_block_types]
    up = [{"UpBlock2D": False, "AttnUpBlock2D": True}.get(kind) for kind in reversed(unet.up_block_types)]
    if None in down or down != up or len(down) != levels:
        raise UsageError(
            f'{file}: "down_block_types" is {list(unet.down_block_types)} and "up_block_types" '
            f"{list(unet.up_block_types)}; supported: for each of the {levels} levels DownBlock2D and UpBlock2D, or "
            "AttnDownBlock2D and AttnUpBlock2D, with the last level first on the way up"
        )
    attention = tuple(level for level, wanted in enumerate(down) if wanted)
    attended = {widths[level] for level in attention} | {widths[-1]}  # the middle has it always
    heads = (None, *attended) if len(attended) == 1 else (None,)
    _require(file, unet, {"attention_head_dim": heads, "time_embedding_dim": (None, 4 * widths[0])})
    multipliers = tuple(width // widths[0] for width in widths)
    return UNet(widths[0], multipliers, unet.layers_per_block, attention, unet.dropout, groups=groups)


def _sides(unet: UNet2DModel, file: Path) -> tuple[int, int]:
    if unet.sample_size is None:
        raise UsageError(f'{file}: "sample_size" is null; give the side of the images, or [height, width]')
    return unet.sample_size if isinstance(unet.sample_size, tuple) else (unet.sample_size, unet.sample_size)


def _our_process(scheduler: DDPMScheduler) -> dict[str, Any]:
    process = {"name": SCHEDULES[scheduler.beta_schedule], "steps": scheduler.num_train_timesteps}
    ends = {"beta_start": scheduler.beta_start, "beta_end": scheduler.beta_end}
    return process if process["name"] == "cosine" else {**process, **ends}


def _our_tensors(
    source: dict[str, Tensor], network: UNet, channels: int, outputs: int, folder: Path
) -> dict[str, Tensor]:
    """The tensors under our names, each of the source used exactly once."""
    with torch.device("meta"):
        expected = dict(network.build(channels, outputs).named_parameters())
    levels, result, left = len(network.multipliers), {}, dict(source)
    for name, parameter in expected.items():
        names = {_their_name(name, levels, NEW), _their_name(name, levels, OLD)}
        found = sorted(names & left.keys())
        if len(found) != 1:
            what = f"both {' and '.join(found)}" if found else f"no {' or '.join(sorted(names))}"
            raise UsageError(f"{folder}: the weights hold {what}; the config asks for exactly one")
        tensor = left.pop(found[0])
        ours = tensor[:, :, None, None] if ".attn" in name and tensor.ndim == 2 else tensor
        if ours.shape != parameter.shape:
            given, asked = list(tensor.shape), list(parameter.shape)
            raise UsageError(f"{folder}: {found[0]} is {given} in the weights, and {asked} by the config")
        result[name] = ours
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise UsageError(f"{folder}: the config has no place for {', '.join(sorted(left)[:3])}{more}")
    return result


def _read_weights(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    files = [folder / f"{WEIGHTS}{suffix}" for suffix in (".safetensors", ".bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UsageError(f"{folder} holds no {files[0].name}, nor {files[1].name}")
    return read_tensors(file, allow_pickle)


def _their_name(name: str, levels: int, attention: Mapping[str, str]) -> str:
    """diffusers counts the blocks of the way up from the first that runs, we by level."""
    name = re.sub(r"^up\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", name)
    for ours, theirs in {**NAMES, **attention}.items():
        if name.startswith(ours) or ours.startswith("."):
            name = name.replace(ours, theirs, 1)
    return name


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    return (tensor[:, :, 0, 0] if ".attn" in name and tensor.ndim == 4 else tensor).cpu().contiguous()


def _their_network(model: Mapping[str, Any]) -> UNet2DModel:
    network = NETWORKS.build(model["network"])
    channels, height, width = model["image"]
    reasons = {"it is no U-Net": not isinstance(network, UNet), "it was trained with classes": "classes" in model}
    if isinstance(network, UNet):
        reasons |= {
            f"patch = {network.patch} and not 1": network.patch != 1,
            f'time = "{network.time}" and not "index"': network.time != "index",
            f"multipliers {list(network.multipliers)} do not begin with 1": network.multipliers[0] != 1,
            f"channels = {network.channels} is no multiple of {network.norm_groups()} groups": (
                network.channels % network.norm_groups() != 0
            ),
        }
    refused = [reason for reason, holds in reasons.items() if holds]
    if refused or not isinstance(network, UNet):
        raise UsageError(
            f"diffusers' UNet2DModel cannot be this network: {'; '.join(refused)}; --to file keeps it whole"
        )
    attended = [level in network.attention for level in range(len(network.multipliers))]
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels * (2 if model["variance"]["name"] == "learned-range" else 1),
        down_block_types=tuple("AttnDownBlock2D" if each else "DownBlock2D" for each in attended),
        up_block_types=tuple("AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attended)),
        block_out_channels=tuple(network.channels * multiplier for multiplier in network.multipliers),
        layers_per_block=network.blocks,
        dropout=network.dropout,
        attention_head_dim=None,
        norm_num_groups=network.norm_groups(),
        **{name: values[0] for name, values in NETWORK.items()},
    )


def _their_scheduler(model: Mapping[str, Any]) -> DDPMScheduler:
    def theirs(section: str, table: Mapping[str, str]) -> str:
        name, names = model[section]["name"], {ours: theirs for theirs, ours in table.items()}
        if name not in names:
            raise UsageError(f'diffusers has no {section} "{name}"; supported: {", ".join(names)}')
        return names[name]

    schedule = theirs("process", SCHEDULES)
    process = PROCESSES.build(model["process"])
    if isinstance(process, Cosine) and process != Cosine(process.steps):
        raise UsageError("diffusers' cosine schedule has offset 0.008 and beta_max 0.999; this model's has others")
    ends = {name: getattr(process, name) for name in ("beta_start", "beta_end") if hasattr(process, name)}
    assert process.steps is not None
    return DDPMScheduler(
        num_train_timesteps=process.steps,
        beta_schedule=schedule,
        variance_type=theirs("variance", VARIANCES),
        prediction_type=theirs("parameterisation", PREDICTIONS),
        **ends,
    )
