"""Where the parts of a diffusers model lie: its network, its scheduler, and its weights in one file or in shards."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from undiffuse.errors import Corrupt, UsageError
from undiffuse.interop.torchfile import read_tensors
from undiffuse.machine import disk

WEIGHTS = "diffusion_pytorch_model"
INDEX, CHAIN = "model_index.json", "scheduler_config.json"
SINGLE = re.compile(rf"{WEIGHTS}(?:\.(\w+))?\.(safetensors|bin)")
SHARDED = re.compile(rf"{WEIGHTS}\.(safetensors|bin)\.index(?:\.(\w+))?\.json")


@dataclass(frozen=True)
class Parts:
    """The folder of the network, the file of the scheduler and that of the pipeline, as far as they are there."""

    network: Path
    scheduler: Path | None
    pipeline: Path | None
    assumed: tuple[str, ...]


def is_folder(path: Path) -> bool:
    """Whether `path` looks like a pipeline, like a bare `UNet2DModel`, or like a folder that diffusers trains in."""
    names = (INDEX, "config.json", "unet/config.json", "unet_ema/config.json")
    return any((path / name).is_file() for name in names) or bool(_checkpoints(path))


def _checkpoints(path: Path) -> list[Path]:
    """Those of diffusers' training example, the newest last."""
    found = [folder for folder in path.glob("checkpoint-*") if any(folder.glob("unet*/config.json"))]
    return sorted(found, key=lambda folder: (len(folder.name), folder.name))


def locate(path: Path) -> Parts:
    """The parts of the model that a user names by its pipeline, its checkpoint or its network alone.

    `unet_ema` is preferred to `unet`. A scheduler is looked for beside the network too. Raises UsageError.
    """
    assumed = []
    inside = next((path / name for name in ("unet_ema", "unet") if (path / name).is_dir()), None)
    if inside is None and not (path / "config.json").is_file() and (checkpoints := _checkpoints(path)):
        raise UsageError(f"{path} holds the checkpoints of a training with diffusers; give one, {checkpoints[-1]}")
    if inside is not None and inside.name == "unet_ema" and (path / "unet").is_dir():
        assumed.append("the averaged weights, unet_ema, are taken and not those of unet")
    folder = inside or path
    here = Path(os.path.abspath(folder))  # of `.` too, whose parent is then not `.`
    roots = [here.parent] if inside is not None or here.name.startswith("unet") else []
    roots += [root.parent for root in roots if root.name.startswith("checkpoint-")]
    places = [here, *([here.parent / "scheduler", here.parent] if inside else [here.parent / "scheduler"])]
    places += [root / "scheduler" for root in roots]
    scheduler = next((place / CHAIN for place in places if (place / CHAIN).is_file()), None)
    if scheduler is not None and inside is None and scheduler.parent != here:
        assumed.append(f"the scheduler beside it, {scheduler.parent}, is taken for its own")
    pipeline = next((root / INDEX for root in (here, *roots) if (root / INDEX).is_file()), None)
    if (path / INDEX).is_file() and scheduler is None:
        raise UsageError(
            f"{path / 'scheduler' / CHAIN} is missing; download the whole pipeline, or give {folder} alone"
        )
    return Parts(folder, scheduler, pipeline, tuple(assumed))


def read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UsageError(f"{file} is missing; a diffusers model is a DDPMPipeline folder or a UNet2DModel folder")
    content = disk.read_json(file)
    if not isinstance(content, dict):
        raise Corrupt(f"{file} holds no JSON object")
    return content


def read_weights(folder: Path, allow_pickle: bool, variant: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the network, and what was assumed in choosing their files.

    Plain files are preferred to a variant, safetensors to pickles. Raises UsageError for a choice that is the user's.
    """
    kind, chosen = _choose(folder, _found(folder), allow_pickle, variant)
    assumed = [f'the weights are those of the variant "{chosen}"'] if chosen and variant is None else []
    tensors: dict[str, Tensor] = {}
    for file in _found(folder)[kind, chosen]:
        if not file.is_file():
            raise UsageError(f"{file} is missing; download all files that the index beside it names")
        tensors |= read_tensors(file, allow_pickle)
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", name): tensor for name, tensor in tensors.items()}, assumed


Found = dict[tuple[str, str], list[Path]]  # files by ending, and by variant or "" for the plain ones


def _found(folder: Path) -> Found:
    found: Found = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := SHARDED.fullmatch(file.name):
            found.setdefault((match[1], match[2] or ""), _shards(file))
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := SINGLE.fullmatch(file.name):
            found[match[2], match[1] or ""] = [file]
    return found


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise Corrupt(f"{index} is damaged: its weight_map does not name the files beside it")
    return [index.parent / name for name in sorted(names)]


def _choose(folder: Path, found: Found, allow_pickle: bool, variant: str | None) -> tuple[str, str]:
    """Ending and variant of the files to read."""
    safe = [name for kind, name in found if kind == "safetensors"]
    pickled = [name for kind, name in found if kind == "bin"]
    if variant is not None:
        if variant not in (*safe, *pickled):
            there = ", ".join(sorted({*safe, *pickled} - {""})) or "none"
            raise UsageError(f'{folder} has no weights of the variant "{variant}"; variants there: {there}')
        return ("safetensors" if variant in safe else "bin"), variant
    if "" in safe or ("" in pickled and (allow_pickle or not safe)):
        return ("safetensors" if "" in safe else "bin"), ""
    names, kind = (safe, "safetensors") if safe else (pickled, "bin")
    if not names:
        raise UsageError(f"{folder} holds no {WEIGHTS}.safetensors, nor {WEIGHTS}.bin")
    if len(names) > 1:
        raise UsageError(
            f"{folder} holds several variants of its weights, {', '.join(names)}, and no plain ones; choose with "
            f"`undiffuse import {folder} RUN --variant {names[0]}`"
        )
    return kind, names[0]


def absent(source: str) -> str | None:
    """What to do where a source is no path but looks like a name of the Hugging Face hub; None where it does not."""
    name = re.sub(r"^(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/+", "", source).strip("/")
    name = re.sub(r"/(?:tree|blob|resolve)/.*", "", name)
    owner, _, title = name.partition("/")
    looks = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not re.search(r"\.(safetensors|bin|ckpt|pt|pth)$", name)
    if not looks or owner in (".", "..") or Path(source).exists() or (name == source and Path(owner).is_dir()):
        return None
    return (
        f"if it is a name of the Hugging Face hub, undiffuse does not download: `hf download {name} "
        f"--local-dir {title}` or `git clone https://huggingface.co/{name}` does, then `undiffuse import {title} RUN`"
    )
