"""diffusers' `UNet2DModel` and our U-Net: which of their networks ours can be, and ours as theirs.

A field that a config leaves out has the value that diffusers would give it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from undiffuse.config import Count, Fraction
from undiffuse.errors import UsageError
from undiffuse.interop.diffusers_fields import Findings
from undiffuse.network.base import NETWORKS
from undiffuse.network.unet import UNet


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
    downsample_type: str | None = "conv"
    upsample_type: str | None = "conv"
    dropout: Fraction = 0.0
    act_fn: str = "silu"
    attention_head_dim: Count | None = 8
    norm_num_groups: Count = 32
    attn_norm_num_groups: Count | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: Count | None = None
    num_train_timesteps: int | None = None  # read by learned time embeddings only


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "mish": "mish"}
MODULATIONS = {"default": "shift", "scale_shift": "scale-shift"}
RESAMPLINGS = {"conv": False, "resnet": True}
# The blocks of a level: whether they have attention, and whether they are left through a residual block; None: as
# `downsample_type` and `upsample_type` say, which the other kinds do not read.
DOWN = {"DownBlock2D": (False, False), "ResnetDownsampleBlock2D": (False, True), "AttnDownBlock2D": (True, None)}
UP = {"UpBlock2D": (False, False), "ResnetUpsampleBlock2D": (False, True), "AttnUpBlock2D": (True, None)}

CLASSES = "_undiffuse_classes"  # a private field of configs that we write: the last class is "no class"; and its names
EMA = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}


def our_network(unet: UNet2DModel, file: Path, given: Mapping[str, Any], found: Findings) -> UNet | None:
    """Ours, or None with reasons."""
    before = len(found.reasons)
    for name, values in {
        "time_embedding_type": ("positional",),
        "mid_block_type": ("UNetMidBlock2D", None),
        "downsample_padding": (0, 1),
        "act_fn": tuple(ACTIVATIONS),
        "resnet_time_scale_shift": tuple(MODULATIONS),
        "class_embed_type": (None, "timestep"),
    }.items():
        value = getattr(unet, name)
        found.need(file, name, value.lower() if name == "act_fn" else value, values, given)
    if unet.class_embed_type == "timestep" and unet.num_class_embeds is None:
        found.reasons.append(
            f'{file}: "class_embed_type" "timestep" does not say how many classes there are; write their number there, '
            'as "num_class_embeds"'
        )
    found.reasons.extend(_bad_widths(unet, file))
    down, up = _levels(unet, file, found)
    if len(found.reasons) > before:
        return None
    widths, levels = unet.block_out_channels, range(len(unet.block_out_channels))
    middle = "none" if unet.mid_block_type is None else "attention" if unet.add_attention else "plain"
    default = unet.norm_num_groups if unet.resnet_time_scale_shift == "default" else 0
    middle_groups = unet.attn_norm_num_groups or default
    attention, attention_up = (tuple(i for i in levels if way[i][0]) for way in (down, up))
    attended = {widths[i] for i in (*attention, *attention_up)} | ({widths[-1]} if middle == "attention" else set())
    head = None if attended <= {unet.attention_head_dim} else unet.attention_head_dim
    try:
        return UNet(
            widths[0],
            tuple(width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths),
            unet.layers_per_block,
            attention,
            unet.dropout,
            groups=unet.norm_num_groups,
            attention_up=None if attention_up == attention else attention_up,
            middle=middle,
            middle_groups=None if middle != "attention" or middle_groups == unet.norm_num_groups else middle_groups,
            middle_scale=unet.mid_block_scale_factor,
            head=head,
            eps=unet.norm_eps,
            activation=ACTIVATIONS[unet.act_fn.lower()],  # pyright: ignore[reportArgumentType]
            modulation=MODULATIONS[unet.resnet_time_scale_shift],  # pyright: ignore[reportArgumentType]
            residual_down=tuple(i for i in levels[:-1] if down[i][1]),
            residual_up=tuple(i for i in levels[1:] if up[i][1]),
            centred=unet.downsample_padding == 1,
            embedding=None if unet.time_embedding_dim in (None, 0, 4 * widths[0]) else unet.time_embedding_dim,
            frequency_shift=unet.freq_shift,
            cosine_first=unet.flip_sin_to_cos,
            centre_input=unet.center_input_sample,
            label="table" if unet.class_embed_type is None else "sinusoid",
        )
    except UsageError as error:
        found.reasons.append(f"{file}: {error}")
        return None


def _bad_widths(unet: UNet2DModel, file: Path) -> Iterator[str]:
    widths, groups = unet.block_out_channels, unet.norm_num_groups
    if not widths or any(width % groups for width in widths):
        yield f'{file}: "block_out_channels" is {list(widths)}; supported: multiples of "norm_num_groups", {groups}'
        return
    if unet.attn_norm_num_groups and widths[-1] % unet.attn_norm_num_groups:
        yield f'{file}: "attn_norm_num_groups" is {unet.attn_norm_num_groups}; supported: what divides {widths[-1]}'
    if not 0 <= unet.freq_shift < max(2, widths[0] // 2):
        yield f'{file}: "freq_shift" is {unet.freq_shift}; supported: 0 to {max(2, widths[0] // 2) - 1}'
    for name in ("norm_eps", "mid_block_scale_factor"):
        if getattr(unet, name) <= 0:
            yield f'{file}: "{name}" is {getattr(unet, name)}; supported: more than 0'
    sides, stride = sides_of(unet), 2 ** (len(widths) - 1)
    if sides is None:
        yield f'{file}: "sample_size" is null; write the side of the images there, or [height, width]'
    elif any(side % stride for side in sides):
        yield f'{file}: "sample_size" is {json.dumps(unet.sample_size)}; supported: multiples of {stride}'


Way = list[tuple[bool, bool]]  # by level: has attention, is left through a residual block


def _levels(unet: UNet2DModel, file: Path, found: Findings) -> tuple[Way, Way]:
    ways = []
    for name, table, resampling in (("down", DOWN, "downsample_type"), ("up", UP, "upsample_type")):
        kinds = [kind.removeprefix("UNetRes") for kind in getattr(unet, f"{name}_block_types")]
        count = len(unet.block_out_channels)
        if len(kinds) != count or any(kind not in table for kind in kinds):
            found.reasons.append(
                f'{file}: "{name}_block_types" is {json.dumps(kinds)}; supported: {", ".join(table)}, {count} of them, '
                'as many as "block_out_channels" has'
            )
            kinds = []
        attended = [kind for kind in (kinds[:-1]) if table[kind][0]]  # those that are left for another resolution
        chosen = getattr(unet, resampling) or "conv"
        if attended:
            found.need(file, resampling, chosen, RESAMPLINGS)
        read = [(table[kind][0], table[kind][1]) for kind in kinds]
        ways.append([(has, RESAMPLINGS.get(chosen, False) if left is None else left) for has, left in read])
    return ways[0], ways[1][::-1]


def sides_of(unet: UNet2DModel) -> tuple[int, int] | None:
    """(height, width) of the images."""
    size = unet.sample_size
    return (size, size) if isinstance(size, int) else size


def their_network(model: Mapping[str, Any]) -> UNet2DModel:
    """Raises UsageError, with all reasons, for a network that diffusers' class cannot be."""
    network, reasons = NETWORKS.build(model["network"]), []
    if isinstance(network, UNet):
        reasons = [reason for reason, holds in _unlike(network).items() if holds]
    if reasons or not isinstance(network, UNet):
        raise UsageError(
            f"diffusers' UNet2DModel cannot be this network: {'; '.join(reasons) or 'it is no U-Net'}; "
            "--to file keeps it whole"
        )
    channels, height, width = model["image"]
    levels, classes, groups = range(len(network.multipliers)), model.get("classes"), network.norm_groups()
    up = network.attention if network.attention_up is None else network.attention_up
    their_down = {(has, left): kind for kind, (has, left) in DOWN.items()}
    their_up = {(has, left): kind for kind, (has, left) in UP.items()}
    down_types = [their_down[i in network.attention, None if i in network.attention else i in network.residual_down]
                  for i in levels]  # fmt: skip
    up_types = [their_up[i in up, None if i in up else i in network.residual_up] for i in reversed(levels)]
    middle_groups = groups if network.middle_groups is None else network.middle_groups
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels * (2 if model["variance"]["name"] == "learned-range" else 1),
        center_input_sample=network.centre_input,
        time_embedding_dim=network.embedding,
        freq_shift=network.frequency_shift,
        flip_sin_to_cos=network.cosine_first,
        down_block_types=tuple(down_types),
        mid_block_type=None if network.middle == "none" else "UNetMidBlock2D",
        up_block_types=tuple(up_types),
        block_out_channels=tuple(network.widths()),
        layers_per_block=network.blocks,
        mid_block_scale_factor=float(network.middle_scale),
        downsample_padding=int(network.centred),
        downsample_type=_resampling(network.attention, network.residual_down, levels[:-1]),
        upsample_type=_resampling(up, network.residual_up, levels[1:]),
        dropout=network.dropout,
        act_fn=network.activation,
        attention_head_dim=network.head,
        norm_num_groups=groups,
        attn_norm_num_groups=None
        if network.modulation == "shift" and middle_groups == groups
        else middle_groups or None,
        norm_eps=network.eps,
        resnet_time_scale_shift="default" if network.modulation == "shift" else "scale_shift",
        add_attention=network.middle == "attention",
        class_embed_type="timestep" if classes and network.label == "sinusoid" else None,
        num_class_embeds=None if not classes else classes + (network.label == "table"),
    )


def _resampling(attention: tuple[int, ...], residual: tuple[int, ...], levels: range) -> str:
    """Of the levels with attention, which diffusers resamples all alike."""
    return "resnet" if any(i in attention and i in residual for i in levels) else "conv"


def _unlike(network: UNet) -> dict[str, bool]:
    widths, groups, levels = network.widths(), network.norm_groups(), range(len(network.multipliers))
    up = network.attention if network.attention_up is None else network.attention_up
    ways = ((network.attention, network.residual_down, levels[:-1]), (up, network.residual_up, levels[1:]))
    mixed = any(len({i in residual for i in left if i in attention}) > 1 for attention, residual, left in ways)
    return {
        f"patch = {network.patch} and not 1": network.patch != 1,
        f"fourier = {list(network.fourier)} and not []": bool(network.fourier),
        f'time = "{network.time}" and not "index"': network.time != "index",
        f"multipliers {list(network.multipliers)} do not begin with 1": network.multipliers[0] != 1,
        f"widths {widths} are no multiples of {groups} groups": any(width % groups for width in widths),
        "some levels with attention are left through a residual block and others are not": mixed,
        "middle_groups = 0 needs modulation scale-shift": network.middle_groups == 0 and network.modulation == "shift",
    }
