"""What guides a model where it draws: its own answer without a class, or a worse model. See `diffusion/guide.py`."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, SupportsFloat

from jaxtyping import Float
from torch import Tensor

from undiffuse.diffusion.denoiser import Computing, Denoiser
from undiffuse.diffusion.guide import Guided
from undiffuse.diffusion.sampler.base import Along, Denoise
from undiffuse.errors import UsageError
from undiffuse.model.classes import Classes
from undiffuse.network.base import NOTHING, Conditioning
from undiffuse.strict import real

if TYPE_CHECKING:
    from undiffuse.model.model import Model

NO_CLASS = "no class"


@dataclass(frozen=True, eq=False)
class Guide:
    """How much, and what by: another network, by the hash of its weights, or the model itself, told no class."""

    scale: float
    weak: Denoiser | None = None
    name: str = NO_CLASS
    classes: Classes | None = None  # of the worse one, where it is told the class

    def along(
        self, denoiser: Denoiser, times: Float[Tensor, "times"], like: Float[Tensor, "b *x"], cond: Conditioning
    ) -> Denoise:
        """The guided `denoise` for the times of a chain, as `Along` is the one without."""
        strong, weak = denoiser.but(clip=False), (self.weak or denoiser).but(clip=False)
        others = Along(weak, times, like, NOTHING if self.classes is None else cond)
        return Guided(Along(strong, times, like, cond), others, self.scale, denoiser.clip)

    def computing(self, computing: Computing) -> "Guide":
        """The same in another precision."""
        return self if self.weak is None else replace(self, weak=self.weak.but(computing=computing))

    def refuse(self, label: Tensor | None) -> None:
        """UsageError where a model would be led from its answer without a class to the same, or a guide knows less."""
        if self.weak is None and label is None:
            raise UsageError(
                f"guidance = {self.scale:g} leads towards a class, and none is asked for; give a label, random or all"
            )
        if self.classes is not None:
            names, none = self.classes.names, len(self.classes.names)
            asked = [none] if label is None else label.unique().tolist()
            strange = [names[number] for number in asked if number < none and not self.classes.counts[number]]
            if none in asked and not self.classes.unlabelled:
                strange.append("images without a class")
            if strange:
                raise UsageError(
                    f"the guide was never trained on {', '.join(strange)}, for which it is asked; give another guide, "
                    "or another label"
                )

    @property
    def said(self) -> dict[str, Any]:
        """What a protocol says of it."""
        return {"guidance": self.scale, "guide": self.name}


def guide_of(model: "Model", scale: SupportsFloat, weak: "Model | None") -> Guide | None:
    """None for a scale of 1, which is no guidance. Raises UsageError for what cannot guide."""
    scale = real("guidance", scale, 0, "a number of 0 or more, of which 1 is no guidance")
    if weak is not None:
        _refuse_guide(model, weak)
    if scale == 1:
        return None
    model.refuse_distilled("guidance")
    if model.config.parameterisation.needs_table:
        raise UsageError("guidance is not possible: this model predicts mu, whose x̂_0 the chain does not follow")
    if weak is None and model.guide is not None and model.guide.weak is not None:
        return replace(model.guide, scale=scale)
    if weak is None:
        if model.classes is None:
            raise UsageError(
                "guidance needs something to lead away from, and this model was trained without labels; give a guide "
                "too: a model of the same kind that was trained less"
            )
        if not model.classes.unlabelled:
            raise UsageError(
                "guidance needs the answer without a class, for which this model was never trained (train.drop_label = "
                "0); give a guide too: a model of the same kind that was trained less"
            )
        return Guide(scale)
    classes = None if model.classes is None else weak.classes
    return Guide(scale, weak.variant(precision=model.precision).denoiser, weak.digest()[:12], classes)


def _refuse_guide(model: "Model", weak: "Model") -> None:
    """UsageError for a guide that says another thing, or of other images or classes."""
    weak.refuse_distilled("guiding")
    weak.refuse_guided("a guide")
    for name in ("image", "process", "parameterisation"):
        own, other = getattr(model.config, name), getattr(weak.config, name)
        if own != other:
            raise UsageError(f"{name} of the guide is {other}, and of the model {own}; give a model of the same kind")
    if model.classes and weak.classes and model.classes.names != weak.classes.names:
        raise UsageError(f"the guide knows other classes ({weak.classes.listed()}). {model.classes.known()}")
    if weak.classes is not None and model.classes is None and not weak.classes.unlabelled:
        raise UsageError(f"the guide wants a class, of which this model knows none. {weak.classes.known()}")
    if weak.device != model.device:
        raise UsageError(f"the guide is on {weak.device}, and the model on {model.device}; load both on one device")
