"""diffusers' folders: the network and the chain of DDPM under other names.

A `UNet2DModel` can be configured into many networks, most of which ours can be; the others are refused by name. Like
the weights of our own files, a folder is read as (tensors, meta) with the model's config under meta["model"].
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from undiffuse.config import plain
from undiffuse.errors import UsageError
from undiffuse.interop.diffusers_chain import (
    PREDICTIONS,
    DDPMScheduler,
    our_process,
    our_variance,
    read_chain,
    their_chain,
)
from undiffuse.interop.diffusers_fields import Findings, read_fields
from undiffuse.interop.diffusers_files import WEIGHTS, locate, read_json, read_weights
from undiffuse.interop.diffusers_network import CLASSES, EMA, UNet2DModel, our_network, sides_of, their_network
from undiffuse.machine import disk
from undiffuse.network.unet import UNet

WRITTEN_AS = "0.35.0"  # the release of diffusers whose names are written
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")

NAMES = {
    "temb.dense.0.": "time_embedding.linear_1.",
    "temb.dense.1.": "time_embedding.linear_2.",
    "label.dense.0.": "class_embedding.linear_1.",
    "label.dense.1.": "class_embedding.linear_2.",
    "label.": "class_embedding.",
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


def read_folder(
    path: Path, allow_pickle: bool = False, variant: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights, under our names, and meta of a pipeline, in folders or flat, of a checkpoint, or of a bare network.

    A bare network has no schedule: it is given the defaults of diffusers' `DDPMScheduler`. What was assumed stands in
    meta["imported"]["assumed"]. Raises UsageError, with all reasons, for what our U-Net and processes cannot represent,
    Corrupt for a damaged file, and for a `.bin` unless `allow_pickle`.
    """
    parts, found = locate(path), Findings()
    found.assumed.extend(parts.assumed)
    if parts.pipeline is not None:
        _check_pipeline(parts.pipeline, found)
    unet, network, given = _read_network(parts.network / "config.json", found)
    chain = DDPMScheduler()
    if parts.scheduler is not None:
        chain = read_chain(read_json(parts.scheduler), parts.scheduler, found)
    elif unet is not None:
        twice = unet.out_channels == 2 * unet.in_channels
        chain = DDPMScheduler(variance_type="learned_range" if twice else "fixed_small")
        found.assumed.append(
            "there is no scheduler, so the schedule is assumed to be that of diffusers' DDPMScheduler: linear, 1,000 "
            f"steps, eps, {'learned-range, because the network has twice as many outputs' if twice else 'fixed-small'}"
        )
    variance = (
        "fixed-small"
        if unet is None
        else our_variance(chain, unet.in_channels, unet.out_channels, parts.network / "config.json", found)
    )
    if found.reasons or unet is None or network is None:
        raise UsageError(
            f"{path} cannot be imported: {'; '.join(found.reasons)}. Sample from it with diffusers, or train such a "
            "network here"
        )
    weights, chosen = read_weights(parts.network, allow_pickle, variant)
    found.assumed.extend(chosen)
    model = {
        "image": [unet.in_channels, *(sides_of(unet) or ())],
        "process": our_process(chain),
        "parameterisation": {"name": PREDICTIONS[chain.prediction_type]},
        "variance": {"name": variance},
        "network": {"name": "unet", **plain(network)},
    }
    classes = _classes(unet, given.get(CLASSES))
    if classes is not None:
        model["classes"] = len(classes["names"])
        if unet.class_embed_type is None and CLASSES not in given:
            weights = _with_no_class(weights, model["classes"], found)
    tensors = _our_tensors(weights, network, unet, model.get("classes"), parts.network)
    imported = {
        "from": "diffusers",
        "schedule": "assumed" if parts.scheduler is None else "given",
        "assumed": found.assumed,
    }
    return tensors, {"model": model, "imported": imported, **({} if classes is None else {"classes": classes})}


def _classes(unet: UNet2DModel, ours: Any) -> dict[str, Any] | None:
    """Of the classes what `model.classes` keeps of them: as we wrote it, or numbers for names."""
    if unet.num_class_embeds is None:
        return None
    if isinstance(ours, dict):
        return ours
    count = unet.num_class_embeds - (ours is not None and unet.class_embed_type is None)
    return {"names": [str(i) for i in range(count)], "counts": [1] * count, "unlabelled": ours is not None}


def _check_pipeline(index: Path, found: Findings) -> None:
    content = read_json(index)
    parts = [name for name, each in content.items() if isinstance(each, list) and each and each[0] is not None]
    more = sorted(set(parts) - {"unet", "scheduler"})
    if more:
        found.reasons.append(f"{index}: it has {', '.join(more)} beside its network; supported: pixels, without more")
    elif not parts:  # of the first releases, which do not list them
        found.need(index, "_class_name", content.get("_class_name"), PIPELINES)


def _read_network(file: Path, found: Findings) -> tuple[UNet2DModel | None, UNet | None, dict[str, Any]]:
    content = read_json(file)
    if content.get("_class_name") != "UNet2DModel":
        found.need(file, "_class_name", content.get("_class_name"), ("UNet2DModel",))
        return None, None, content
    unet = read_fields(UNet2DModel, content, file, found, EMA)
    return unet, our_network(unet, file, content, found), content


def _with_no_class(weights: dict[str, Tensor], classes: int, found: Findings) -> dict[str, Tensor]:
    """Our table has one row more, for "no class", which adds nothing where it was not trained."""
    name = "class_embedding.weight"
    if name not in weights:
        return weights
    found.assumed.append(
        f'its {classes} class embeddings are classes 0 to {classes - 1}; "no class" was not trained, and adds nothing'
    )
    return {**weights, name: torch.cat([weights[name], torch.zeros_like(weights[name][:1])])}


def write_folder(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> list[str]:
    """A new folder that `diffusers.DDPMPipeline.from_pretrained` loads; the whole of it appears at once.

    Returns what its user should know. Raises UsageError for a model that diffusers cannot represent and for a folder
    that is in use, StorageError.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists already; name a folder that is new or empty")
    unet, chain, classes = their_network(meta["model"]), their_chain(meta["model"]), meta["model"].get("classes")
    levels, fields, notes = len(unet.block_out_channels), asdict(unet), []
    if classes:
        fields[CLASSES] = meta.get("classes", True)
        none = 'there is no "no class" in diffusers'
        if unet.class_embed_type is None:
            said = meta.get("classes")
            bare = isinstance(said, dict) and not said.get("unlabelled", True)
            none = f'{classes} is "no class"{", which was never trained" if bare else ""}'
        notes.append(f"class_labels 0 to {classes - 1} are the classes, and {none}")
    renamed = {_their_name(name, levels, NEW): _as_linear(name, tensor) for name, tensor in tensors.items()}
    index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    weights = safetensors.torch.save(renamed, {"format": "pt"})
    temporary = disk.beside(path, "tmp")
    with disk.writing(path, len(weights), temporary):
        for name in ("unet", "scheduler"):
            disk.make_folder(temporary / name)
        disk.create(temporary / "unet" / f"{WEIGHTS}.safetensors", weights)
        disk.create(temporary / "unet" / "config.json", _json("UNet2DModel", fields))
        disk.create(temporary / "scheduler" / "scheduler_config.json", _json("DDPMScheduler", asdict(chain)))
        disk.create(temporary / "model_index.json", _json("DDPMPipeline", index))
        disk.rename(temporary, path)
        disk.sync_folder(path.parent)
    return notes


def _json(class_name: str, fields: Mapping[str, Any]) -> bytes:
    return disk.to_json({"_class_name": class_name, "_diffusers_version": WRITTEN_AS, **fields})


def _our_tensors(
    source: dict[str, Tensor], network: UNet, unet: UNet2DModel, classes: int | None, folder: Path
) -> dict[str, Tensor]:
    """The tensors under our names, each of the source used exactly once; all that does not fit is said."""
    with torch.device("meta"):
        expected = dict(network.build(unet.in_channels, unet.out_channels, classes).named_parameters())
    levels, result, left, wrong = len(network.multipliers), {}, dict(source), []
    for name, parameter in expected.items():
        names = {_their_name(name, levels, NEW), _their_name(name, levels, OLD)}
        present = sorted(names & left.keys())
        if len(present) != 1:
            what = f"both {' and '.join(present)}" if present else f"no {' or '.join(sorted(names))}"
            wrong.append(f"the weights hold {what}; the config asks for exactly one")
            continue
        tensor = left.pop(present[0])
        ours = tensor[:, :, None, None] if ".attn" in name and tensor.ndim == 2 else tensor
        if ours.shape != parameter.shape:
            given, asked = list(tensor.shape), list(parameter.shape)
            wrong.append(f"{present[0]} is {given} in the weights, and {asked} by the config")
        result[name] = ours
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        wrong.append(f"the config has no place for {', '.join(sorted(left)[:3])}{more}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UsageError(f"{folder}: {'; '.join(wrong[:3])}{more}")
    return result


def _their_name(name: str, levels: int, attention: Mapping[str, str]) -> str:
    """diffusers counts the blocks of the way up from the first that runs, we by level."""
    name = re.sub(r"^up\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", name)
    for ours, theirs in {**NAMES, **attention}.items():
        if name.startswith(ours) or ours.startswith("."):
            name = name.replace(ours, theirs, 1)
    return name


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    return (tensor[:, :, 0, 0] if ".attn" in name and tensor.ndim == 4 else tensor).cpu().contiguous()
