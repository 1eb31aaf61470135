"""What a run that goes on must have in common with what it was, and what is said where it has not."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from undiffuse.config import plain
from undiffuse.data.passed import counts
from undiffuse.data.source import LISTED, Source
from undiffuse.errors import Corrupt, UsageError
from undiffuse.machine import disk, store
from undiffuse.model.model import Model
from undiffuse.model.recipe import FORMAT, FREE, DataConfig, TrainConfig
from undiffuse.network.base import NETWORKS
from undiffuse.training.trainer import Trainer

DATA = "data.json"  # in a run: what it is trained on


def saved_meta(run: store.Run) -> dict[str, Any] | None:
    """The metadata of the newest checkpoint in which they can be read, None without one; they are checked later."""
    for step in reversed(run.steps()):
        with suppress(Corrupt):
            return run.load(step, only=())[1]
    return None


def saved_recipe(run: store.Run) -> dict[str, Any] | None:
    """The recipe in them."""
    meta = saved_meta(run)
    return None if meta is None else meta.get("recipe", {})


def refuse_other_init(run: store.Run, init: Model, named: str) -> None:
    """UsageError where a run did not begin from these weights, which would be left out in silence."""
    meta = saved_meta(run)  # None in a process that does not see the disk of the first
    if meta is None or meta.get("init") == init.digest():
        return
    if "init" not in meta and meta.get("recipe", {}).get("objective", {}).get("name") == "trajectory":
        return  # of before it was kept; `distill` compares the hash in the words about it
    raise UsageError(
        f"{run.path} holds a run that did not begin from {named}; leave --init out to go on with it, or give another "
        "--out"
    )


def differences(meta: dict[str, Any], trainer: Trainer, last: int) -> list[str]:
    """What is other than when the run was begun, where equal numbers are no longer promised; as `name old -> new`."""
    before, now = meta.get("environment", {}), trainer.environment()
    if trainer.recipe.train.decay != "constant":  # the rate of every step depends on the last one
        before, now = {**before, "last step": meta.get("last_step", last)}, {**now, "last step": last}
    found = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    if trainer.device.type == "cuda" and not trainer.recipe.train.deterministic:
        found.append("choices of algorithms (train.deterministic is off, and this is a card)")
    return found


def claim_classes(path: Path, data: Source, accept: bool, warn: Callable[[str], None]) -> None:
    """What a number stands for must stay what it was: for a run that is trained with labels, before `claim_data`.

    Other names in the same number may be accepted, which is told; the same names in another order may not.
    """
    old, new = (_known(path) or {}).get("classes"), list(data.classes or ())
    if not old or old == new:  # a run from before they were kept
        return
    moved = [f"{i} was {a} and is {b}" for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
    numbers = ", ".join(moved[:LISTED]) + (f" and {len(moved) - LISTED} more" if len(moved) > LISTED else "")
    if len(old) != len(new):
        added, gone = [name for name in new if name not in old], [name for name in old if name not in new]
        parts = [f"{what} {', '.join(names[:LISTED])}" for what, names in (("new:", added), ("gone:", gone)) if names]
        raise UsageError(
            f"the classes have changed since this run began ({len(old)} before, {len(new)} now; {'; '.join(parts)}), "
            "and its network has a row for each of those before; give the same classes, or another --out"
        )
    if sorted(old) == sorted(new):
        raise UsageError(
            f"the classes are in another order than when this run began ({numbers}), so each label would mean "
            "something else; give them in the order of before, or another --out"
        )
    if not accept:
        raise UsageError(
            f"the classes have changed since this run began ({numbers}); give the same names, --accept-data to go on "
            "with these, or another --out"
        )
    warn(f"these labels mean another class from here on: {numbers}")


def _known(path: Path) -> dict[str, Any] | None:
    """What the file of a run says of its data, None without one. Raises Corrupt."""
    if not path.exists():
        return None
    found = disk.read_json(path)
    if not isinstance(found, dict) or not {"images", "fingerprint"} <= found.keys():
        raise Corrupt(f"{path} is damaged: it does not say which data the run has; restore it from a copy")
    return found


def claim_data(path: Path, data: Source, accept: bool = False) -> None:
    """A run belongs to one data set: writes what it is, or refuses another unless it is accepted."""
    now = {"format": FORMAT, "images": len(data), "fingerprint": data.fingerprint(), "skipped": list(data.skipped)}
    before = _known(path) or now
    now["passed_over"] = counts(data.passed)
    labels = None if data.classes is None else data.every_label()
    if data.classes is not None and labels is not None and len(json.dumps(data.classes)) <= disk.SMALL // 4:
        each = labels.bincount(minlength=len(data.classes)).tolist()
        now |= {"classes": list(data.classes), "images_of_class": each}
    if before["fingerprint"] != now["fingerprint"] and not accept:
        what = f"{before['images']} images before, {now['images']} now"
        if before["images"] == now["images"]:
            what = f"{now['images']} images as before, but not the same ones in the same order"
        raise UsageError(
            f"the data has changed since this run began ({what}); give the same data, --accept-data to go on with "
            "this one, or another --out"
        )
    if (
        before.get("skipped", []) != now["skipped"] and not accept
    ):  # a run from before there was a list has left nothing out
        changed = sorted(set(before.get("skipped", [])) ^ set(now["skipped"]))
        raise UsageError(
            f"other images are left out than when this run began ({', '.join(changed[:20])}); "
            "give the same data, or another --out"
        )
    disk.write_json(path, now)


def _with_younger(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of the fields that this network has got since."""
    before, after = saved.get("network", {}), now.get("network", {})
    if "name" not in after or before.get("name") != after["name"]:
        return saved
    known = fields(NETWORKS.find(after["name"], trusted=True))  # pyright: ignore[reportArgumentType]
    defaults = plain({each.name: each.default for each in known if each.default is not MISSING})
    return {**saved, "network": {**defaults, **before}}


def refuse_changes(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """What decides the numbers must be what it was; how often to save or look may change."""

    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if isinstance(value, dict):
            return {
                k: v for key, item in value.items() for k, v in flat(item, f"{path}.{key}" if path else key).items()
            }
        return {path: value}

    def differ(one: Any, other: Any) -> bool:
        return one != other or isinstance(one, bool) != isinstance(other, bool)  # True is no 1 here

    # A setting that is younger than the run had its default.
    defaults = flat({"train": plain(TrainConfig()), "data": plain(DataConfig())})
    saved = {**saved, **{part: _with_younger(saved[part], now[part]) for part in ("recipe", "model")}}
    before, after = defaults | flat(saved["recipe"]), flat(now["recipe"])
    free = {f"train.{name}" for name in FREE}
    changed = [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in sorted((before.keys() | after.keys()) - free)
        if differ(before.get(name), after.get(name)) and name.split(".")[0] not in ("about", "expected")
    ]
    if changed or saved["model"] != now["model"]:
        what = "; ".join(changed) or f"model: {saved['model']['image']} -> {now['model']['image']}"
        raise UsageError(f"this run was started with other settings ({what}); give the old ones, or another --out")
