"""What a run that goes on must have in common with what it was, and what is said where it has not."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from undiffuse.config import plain
from undiffuse.data.source import Source
from undiffuse.errors import Corrupt, UsageError
from undiffuse.machine import disk, store
from undiffuse.model.recipe import FORMAT, FREE, DataConfig, TrainConfig
from undiffuse.training.trainer import Trainer


def saved_recipe(run: store.Run) -> dict[str, Any] | None:
    """The recipe of the newest checkpoint whose metadata can be read, None without one; it is checked later."""
    for step in reversed(run.steps()):
        with suppress(Corrupt):
            return run.load(step, only=())[1].get("recipe", {})
    return None


def differences(meta: dict[str, Any], trainer: Trainer, last: int) -> list[str]:
    """What is other than when the run was begun, where equal numbers are no longer promised; as `name old -> new`."""
    before, now = meta.get("environment", {}), trainer.environment()
    if trainer.recipe.train.decay != "constant":  # the rate of every step depends on the last one
        before, now = {**before, "last step": meta.get("last_step", last)}, {**now, "last step": last}
    return [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]


def claim_data(path: Path, data: Source, accept: bool = False) -> None:
    """A run belongs to one data set: writes what it is, or refuses another unless it is accepted."""
    now = {"format": FORMAT, "images": len(data), "fingerprint": data.fingerprint(), "skipped": list(data.skipped)}
    before = disk.read_json(path) if path.exists() else now
    if not isinstance(before, dict) or not {"images", "fingerprint"} <= before.keys():
        raise Corrupt(f"{path} is damaged: it does not say which data the run has; restore it from a copy")
    if before["fingerprint"] != now["fingerprint"] and not accept:
        counts = f"{before['images']} images before, {now['images']} now"
        if before["images"] == now["images"]:
            counts = f"{now['images']} images as before, but not the same ones in the same order"
        raise UsageError(
            f"the data has changed since this run began ({counts}); give the same data, --accept-data to go on with "
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


def refuse_changes(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """What decides the numbers must be what it was; how often to save or look may change."""

    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if isinstance(value, dict):
            return {
                k: v for key, item in value.items() for k, v in flat(item, f"{path}.{key}" if path else key).items()
            }
        return {path: value}

    # A setting that is younger than the run had its default.
    defaults = flat({"train": plain(TrainConfig()), "data": plain(DataConfig())})
    before, after = defaults | flat(saved["recipe"]), flat(now["recipe"])
    free = {f"train.{name}" for name in FREE}
    changed = [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in sorted((before.keys() | after.keys()) - free)
        if before.get(name) != after.get(name) and name.split(".")[0] not in ("about", "expected")
    ]
    if changed or saved["model"] != now["model"]:
        what = "; ".join(changed) or f"model: {saved['model']['image']} -> {now['model']['image']}"
        raise UsageError(f"this run was started with other settings ({what}); give the old ones, or another --out")
