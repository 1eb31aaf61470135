"""What a model that a run begins with has to have in common with it, and how its weights become those of the run.

Names and shapes of weights do not say what a network computes: groups, eps, heads, the process and what is predicted
decide it as well. Classes, image size and dropout may be others.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from undiffuse.config import plain
from undiffuse.errors import DataError, UsageError
from undiffuse.model.classes import SHOWN, Classes
from undiffuse.model.load import from_weights, refuse_not_finite
from undiffuse.model.model import Model
from undiffuse.model.recipe import ModelConfig
from undiffuse.model.weights import weights_of
from undiffuse.network.base import NETWORKS

TABLE, TIME_BIAS = "label.weight", "temb.dense.1.bias"
WHOLE = "image channels"


def begin_with(
    model: Model, config: ModelConfig, meta: Mapping[str, Any], fresh: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that a run of this config and meta begins with, given fresh ones; and what is to be said of it.

    Raises UsageError where the model is another function, naming both sides, Corrupt for weights that are not finite.
    """
    refuse_another(model.config, config)
    given, said = weights_of(model.denoiser.network), []
    if model.config.image != config.image:
        was, now = ("×".join(map(str, image[1:])) for image in (model.config.image, config.image))
        said.append(f"the images are {now} here, and were {was}")
    dropout = [getattr(each.network, "dropout", None) for each in (model.config, config)]
    if dropout[0] != dropout[1]:
        said.append(f"dropout is {dropout[1]:g} here, and was {dropout[0]:g}")
    weights = _labelled(model, config, meta, given, fresh, said)
    refuse_not_finite(weights, "the model to begin with cannot be used")
    fitted = from_weights(config, weights, {}).denoiser.network
    return weights_of(fitted), [f"init: {text}" for text in said]


def refuse_another(given: ModelConfig, asked: ModelConfig) -> None:
    """Raises UsageError, with all of them, for differences on which the function depends."""
    before, now = _meaning(given), _meaning(asked)
    said = [_flat(plain(each)) for each in (given, asked)]  # what follows from another field is not said beside it
    names = [
        name
        for name in before | now
        if before.get(name) != now.get(name) and (name in said[0] or name in said[1] or name == WHOLE)
    ]
    if names:
        other = [name.removesuffix("name") for name in names if name.endswith(".name")]
        whole = [name for name in names if name.endswith(".name") or not name.startswith(tuple(other))]
        sides = "; ".join(f"{name} is {_shown(before, name)} there and {_shown(now, name)} here" for name in whole)
        known = [name for name in names if before.get(name) is not None and name != WHOLE]
        how = " ".join(f"--set {shlex.quote(f'{name}={_shown(before, name)}')}" for name in known)
        raise UsageError(
            f"the model to begin with is another function: {sides}; "
            + (f"give {how}, or no preset, " if how else "give another model, or no preset, ")
            + "to go on with what it is"
        )


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """What the output depends on besides the weights; a fixed variance is a matter of sampling."""
    parts = plain(config)
    sections = {name: parts[name] for name in ("process", "parameterisation")}
    if config.variance.learned:
        sections["variance"] = parts["variance"]
    sections["network"] = {"name": NETWORKS.name_of(config.network), **config.network.meaning()}
    learned = {} if config.variance.learned else {"variance.name": None}
    return {WHOLE: config.image[0], **learned, **_flat(sections)}


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    tables = {section: fields for section, fields in sections.items() if isinstance(fields, dict)}
    return {f"{section}.{name}": value for section, fields in tables.items() for name, value in fields.items()}


def _shown(meaning: Mapping[str, Any], name: str) -> str:
    value = meaning.get(name)
    if value is None:
        return "not learned" if name == "variance.name" else "unset"
    if isinstance(value, tuple):
        return json.dumps([int(part) if part == int(part) else part for part in value], separators=(",", ":"))
    return str(value) if isinstance(value, str) else json.dumps(value)


def _labelled(
    model: Model,
    config: ModelConfig,
    meta: Mapping[str, Any],
    given: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
    said: list[str],
) -> dict[str, Tensor]:
    """The given weights, with the label embedding that this config asks for."""
    rest = {name: tensor for name, tensor in given.items() if not name.startswith("label.")}
    label = {name: tensor for name, tensor in given.items() if name.startswith("label.")}
    mine = {name: tensor for name, tensor in fresh.items() if name.startswith("label.")}
    if config.classes is None and model.config.classes is None:
        return rest
    if model.config.classes is None:
        said.append(f"the model was trained without labels, so the embedding of {config.classes} classes is new")
        return {**rest, **mine}
    if config.classes is None:
        return _without_labels(model, rest, label, said)
    rows = _rows(_names(model.meta), _names(meta), model.config.classes, config.classes)
    if rows is None:
        return {**rest, **label}
    if TABLE not in mine:
        said.append("its labels are told as numbers, and its classes are others, so that part begins anew")
        return {**rest, **mine}
    table = mine[TABLE].clone()
    for row, source in rows.items():
        table[row] = label[TABLE][source]
    kept = [row for row in rows if row < config.classes]
    said.append(f"of {config.classes} classes {len(kept)} are the model's too; the embeddings of the others are new")
    return {**rest, TABLE: table}


def _without_labels(
    model: Model, rest: dict[str, Tensor], label: dict[str, Tensor], said: list[str]
) -> dict[str, Tensor]:
    """The network that is always told "no class": what that adds to the time embedding becomes a part of its bias."""
    if not _unlabelled(model.meta):
        raise UsageError(
            "the model to begin with has labels and was never trained without; give --set data.labels=true, and data "
            "with classes"
        )
    said.append('the model was trained with labels, and goes on as it is for "no class"')
    if TABLE not in label or TIME_BIAS not in rest:
        return rest
    return {**rest, TIME_BIAS: rest[TIME_BIAS] + label[TABLE][-1]}


def teachers_labels(teacher: Model, classes: Classes | None) -> Int[Tensor, "classes"] | None:
    """What the teacher calls each class of the data, and "no class" at the end; None where it calls them the same.

    Raises DataError for a class that it does not know.
    """
    known = teacher.classes
    if classes is None or known is None:
        return None
    names, now = _names(teacher.meta), list(classes.names)
    rows = _rows(names, now, len(known.names), len(now))
    if rows is None:
        return None
    if strange := [name for row, name in enumerate(now) if row not in rows]:
        raise DataError(
            f"the data has classes that the teacher does not know: {', '.join(strange[:SHOWN])}. {known.known()}. Give "
            "other data, or --set data.labels=false"
        )
    return torch.tensor([rows[row] for row in range(len(now) + 1)], dtype=torch.int64, device="cpu")


def _names(meta: Mapping[str, Any]) -> list[str] | None:
    classes = meta.get("classes")
    return list(classes["names"]) if isinstance(classes, dict) and "names" in classes else None


def _unlabelled(meta: Mapping[str, Any]) -> bool:
    """Whether "no class" was trained."""
    classes, recipe = meta.get("classes"), meta.get("recipe")
    if isinstance(classes, dict):
        return bool(classes.get("unlabelled", True))
    train = recipe.get("train") if isinstance(recipe, dict) else None
    return not isinstance(train, dict) or train.get("drop_label", 1.0) > 0


def _rows(before: Sequence[str] | None, now: Sequence[str] | None, count: int, wanted: int) -> dict[int, int] | None:
    """For each row of the new table that is known the old one; None where the classes are the same ones."""
    if before == now or before is None or now is None:
        if count == wanted:
            return None
        return {wanted: count}
    return {**{row: before.index(name) for row, name in enumerate(now) if name in before}, wanted: count}
