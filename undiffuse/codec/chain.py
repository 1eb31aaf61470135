"""The chain that encoder and decoder walk alike: what is known before the bits of a step, and where they lead.

Nothing here steers how a file is read: that the network answers a little differently on another machine moves the
picture as little.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.codec.plan import KNOTS, Plan
from undiffuse.diffusion.numbers import F64, combined, ready
from undiffuse.diffusion.windows import Windows
from undiffuse.errors import UsageError
from undiffuse.key import Keys
from undiffuse.model.model import Model
from undiffuse.network.base import NOTHING, Conditioning

Numbers = Float[Tensor, "b"]


def hats(x_0: Float[Tensor, "*x"]) -> tuple[Int[Tensor, "*x"], Float[Tensor, "*x"]]:
    """The knot below each value, and how far the value is on the way to the next one."""
    place = (x_0.clamp(-1, 1) + 1) * ((KNOTS - 1) / 2)
    below = place.floor().clamp(max=KNOTS - 2)
    return below.long(), place - below


def at_knots(h: tuple[float, ...], x_0: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
    """h at each value, linear between knots."""
    table = torch.tensor(h, dtype=x_0.dtype, device=x_0.device)
    below, share = hats(x_0)
    return torch.lerp(table[below], table[below + 1], share)


class Terms(NamedTuple):
    """Numbers of a step: the mean of p is b x_t + c x̂_0, the variance of q is `small`, and v is that of x_0 − x̂_0."""

    b: Numbers
    c: Numbers
    small: Numbers
    v: Numbers


class Step(NamedTuple):
    """p of a step, N(mean, spread²) of each value, and what its search needs of q."""

    x_0: Float[Tensor, "b c h w"]
    mean: Float[Tensor, "b c h w"]
    spread: Float[Tensor, "b c h w"]
    terms: Terms

    def weights(self, truth: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """w₁ and w₂ of 2 log q/p = 2⟨w₁, z⟩ − ⟨w₂, z²⟩ + const."""
        residual = self.terms.c * (truth - self.x_0)
        linear, square = self.spread * residual / self.terms.small, self.spread.square() / self.terms.small - 1
        return linear.flatten(1), square.flatten(1)


class Order(NamedTuple):
    """In which order, and with which signs, a path meets the values of each image: others in each step."""

    places: Int[Tensor, "b d"]
    signs: Float[Tensor, "b d"]

    @classmethod
    def of(cls, keys: Keys, step: int, values: int) -> "Order":
        """Values in the order of their random words; of equal words the first one comes first."""
        places, signs = (keys.fold(name, step).bits(values)[:, :values] for name in ("places", "signs"))
        return cls(places.argsort(dim=1, stable=True), 1.0 - 2.0 * (signs & 1).float())

    def along(self, values: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Values of images as a path meets them."""
        return values.gather(1, self.places)

    def back(self, path: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """What a path says where it belongs."""
        return torch.empty_like(path).scatter_(1, self.places, path)


def refuse_computing(model: Model) -> None:
    """UsageError for a model whose estimates are not those of whoever shares its files, which no check would tell."""
    model.refuse_guided("a codec")
    said = "of a model is not possible for the codec, whose files are written and read"
    if model.precision != "float32":
        raise UsageError(f'precision {model.precision} {said} in float32; give variant(precision="float32")')
    if not model.denoiser.clip:
        raise UsageError(f"clip=False {said} with x̂_0 clipped; give variant(clip=True)")


class Chain:
    """Images on their way together, from the noise of their keys. UsageError for a model that computes otherwise."""

    def __init__(self, model: Model, plan: Plan, keys: Keys, shape: tuple[int, int, int], cond: Conditioning = NOTHING):
        refuse_computing(model)
        own = shape == model.image_shape
        self.denoise = model.denoiser if own else Windows(model.denoiser, model.image_shape[1:])
        self.process, self.device = model.process, model.device
        self.plan, self.shape, self.cond = plan, shape, cond.to(model.device)
        self.keys = keys.fold("codec").to(model.device)
        self.times = torch.tensor(plan.times, dtype=F64, device="cpu")
        self.x = float(self.process.sigma(self.times[0])) * self.keys.fold("x_T").normal(*shape)

    @torch.no_grad()
    def estimate(self, step: int) -> Float[Tensor, "b c h w"]:
        """x̂_0 where a step begins; after the last one where it ends."""
        return self.denoise(self.x, self.times[step].expand(len(self.x)), self.cond).x_0

    def step(self, number: int, x_0: Float[Tensor, "b c h w"], scales: list[int]) -> Step:
        """p, once the scales are known."""
        t, s = (self.times[n].expand(len(scales)) for n in (number, number + 1))
        v = self.plan.square[number] * 2.0 ** (torch.tensor(scales, dtype=F64, device="cpu") / 4)
        small = self.process.small_variance(t, s)
        terms: Terms = ready(x_0, Terms(*self.process.posterior_coefficients(t, s), small, v))
        spread = (terms.small + terms.c.square() * terms.v * at_knots(self.plan.shape[number], x_0)).sqrt()
        return Step(x_0, combined(terms.b, self.x, terms.c, x_0), spread, terms)

    def move(self, step: Step, z: Float[Tensor, "b d"]) -> None:
        """To the state that p draws from this noise."""
        self.x = step.mean + step.spread * z.view_as(self.x)

    def rest(self, number: int) -> Float[Tensor, "b d"]:
        """Noise for values that no bits speak of, as in sampling."""
        return self.keys.fold("rest", number).normal(*self.shape).flatten(1)


def wanted_scales(plan: Plan, number: int, x_0: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"]) -> list[int]:
    """The scale at which v is the energy of each residual."""
    energy = (truth - x_0).square().flatten(1).mean(1) / at_knots(plan.shape[number], x_0).flatten(1).mean(1)
    return (4 * (energy / plan.square[number]).clamp(min=1e-9).log2()).round().int().tolist()
