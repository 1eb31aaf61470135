"""Whether a run is on track: its held-out loss beside that of the runs which a preset was measured by."""

from dataclasses import dataclass, replace
from typing import Any

from undiffuse.config import Count, parse
from undiffuse.errors import UsageError
from undiffuse.model.recipe import Recipe, learning_rate

SAME = 0.01  # by which share of itself a learning rate may differ from that of the runs that were measured

Band = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """`[[expected.curve]]` of a preset: the band of the held-out loss at steps of a run on one data set.

    `steps` is the length of the whole run, which the learning rate may depend on; `data` the fingerprint of its images.
    """

    steps: Count
    data: str
    held_out: tuple[tuple[Count, float, float], ...]  # step, lower end, upper end


@dataclass(frozen=True)
class Track:
    """The curves that hold for a run of `last` steps on its data."""

    recipe: Recipe
    last: int
    curves: tuple[Curve, ...] = ()

    def band(self, step: int) -> Band | None:
        """What is expected at a step; None where nobody has measured a run with that learning rate there."""
        train = self.recipe.train
        rate = learning_rate(train, step, self.last)
        for curve in self.curves:
            if abs(learning_rate(train, step, curve.steps) - rate) <= SAME * rate:
                found = next(((low, high) for at, low, high in curve.held_out if at == step), None)
                if found is not None:
                    return found
        return None


def still(recipe: Recipe, last: int, tuned: bool, saved: dict[str, Any] | None) -> Recipe:
    """The recipe without its curves where they do not hold for this run, or no longer did at its checkpoint `saved`.

    They are of runs that begin untrained and whose last step does not change on the way.
    """
    moved = recipe.train.decay != "constant" and saved is not None and saved.get("last_step", last) != last
    lost = saved is not None and "curve" not in saved["recipe"].get("expected", {})
    if not (tuned or moved or lost):
        return recipe
    return replace(recipe, expected={name: each for name, each in recipe.expected.items() if name != "curve"})


def track(recipe: Recipe, last: int, fingerprint: str) -> Track:
    """The curves of the preset that the recipe still is, on the data they are of. Raises UsageError for bad ones."""
    given: Any = recipe.expected.get("curve", [])
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise UsageError(
            "expected.curve of this recipe is no list of tables; write [[expected.curve]], or leave it out"
        )
    curves = [parse(Curve, each, "expected.curve") for each in given]
    return Track(recipe, last, tuple(each for each in curves if each.data == fingerprint))


def said(loss: float, step: int, band: Band) -> str:
    """`held-out loss 0.1793 at step 1,000: on track (0.177–0.182 expected)`."""
    low, high = band
    where = "on track" if low <= loss <= high else "off track, too high" if loss > high else "lower than expected"
    where = where if loss == loss else "off track"
    return f"held-out loss {loss:.4f} at step {step:,}: {where} ({low:g}–{high:g} expected of this preset)"
