"""Sets made by rule: laws whose score and entropy are known in closed form, and coloured shapes to look at.

A law is over images in [-1, 1]. Its *score* is that of the noised image x_t = alpha x_0 + sigma eps, so it says what a
perfect network would answer at any t. Its *entropy* is that of the images after rounding to 256 levels, in bits per
dimension: the expected bits/dim of no model is below it, and that of a perfect one is equal to it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from undiffuse.config import Table
from undiffuse.data.picture import Reading
from undiffuse.data.source import ArraySource, Format, Source, Split
from undiffuse.errors import UsageError
from undiffuse.key import Key, Keys

COUNT: dict[Split, int] = {"train": 8192, "test": 1024}
LEVEL = 1 / 127.5  # the distance of two levels
TAILS = 5.5  # standard deviations that must fit into [-1, 1] where clipping is left out of a closed form
KINDS = ("disc", "square", "triangle", "ring")
CERTAIN = 1e-6  # bits/dim: how well an entropy must be known


class Procedural(ABC):
    """A rule that turns keys into images."""

    classes: tuple[str, ...] | None

    @abstractmethod
    def draw(self, keys: Keys) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, "n"] | None]:
        """One image for each key, and its class."""

    def source(self, count: int, key: Key) -> ArraySource:
        """`count` images as a source."""
        images, labels = self.draw(key.rows(count))
        return ArraySource(images, labels, self.classes)


class Law(Procedural):
    """A rule whose distribution is known."""

    @abstractmethod
    def score(self, x: Float[Tensor, "b c h w"], alpha: float = 1.0, sigma: float = 0.0) -> Float[Tensor, "b c h w"]:
        """Gradient of the log-density of alpha x_0 + sigma eps at x, before any rounding."""

    @abstractmethod
    def entropy_bits_per_dim(self) -> float:
        """Entropy of the images rounded to 256 levels, over the number of values."""


PROCEDURAL = Table("procedural set", Procedural, "undiffuse.data.format.procedural")


class Rule(Format):
    """`procedural:NAME`, with the fields of NAME as they are by default."""

    names = ("procedural:shapes", "procedural:gaussian", "procedural:pixel-mixture", "procedural:image-mixture")

    @staticmethod
    def match(spec: str) -> int:
        return 2 if spec.startswith("procedural:") else 0

    @staticmethod
    def read(spec: str, split: Split, reading: Reading) -> Source:
        if reading.range is not None:
            raise UsageError(f"data.range is not for {spec}, whose levels are made; leave it out")
        rule = PROCEDURAL.build(spec.removeprefix("procedural:"))
        return rule.source(COUNT[split], Key(0).fold("procedural", spec, split))


def to_levels(x: Float[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
    """[-1, 1] to the nearest of the 256 levels k / 127.5 - 1."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def level_probabilities(mean: float, std: float) -> Float[Tensor, "256"]:
    """What a rounded normal puts on each level, float64; the outer levels hold the tails."""
    edges = (torch.arange(1, 256, dtype=torch.float64, device="cpu") - 0.5) / 127.5 - 1
    # Each mass is taken on the side where it is small, so that far tails are not lost to cancellation.
    z = torch.cat([edges.new_tensor([-math.inf]), (edges - mean) / std, edges.new_tensor([math.inf])])
    low, high = z[:-1], z[1:]
    flipped = low > 0
    low, high = torch.where(flipped, -high, low), torch.where(flipped, -low, high)
    # Not torch.special.ndtr, which keeps no relative accuracy in the tail.
    return (torch.erfc(-high / math.sqrt(2)) - torch.erfc(-low / math.sqrt(2))) / 2


def entropy_bits(p: Float[Tensor, "*n"]) -> float:
    """-sum p log2 p."""
    return float(torch.special.entr(p).sum() / math.log(2))


def _size(shape: tuple[int, int, int]) -> int:
    return math.prod(shape)


@dataclass(frozen=True)
class Gaussian(Law):
    """Pixels normal with one mean and std, and the same correlation between any two of them.

    The covariance std^2 ((1 - r) I + r 11') has the eigenvalues std^2 (1 - r + r d), once, and std^2 (1 - r), d - 1
    times. Rounding adds a twelfth of a squared level to each (Sheppard); the entropy is then the differential one plus
    log2 127.5, exact to 1e-6 bits/dim where the tails stay inside [-1, 1] and std (1 - r)^1/2 is two levels or more.
    """

    shape: tuple[int, int, int] = (1, 8, 8)
    mean: float = 0.1
    std: float = 0.16
    correlation: float = 0.5
    classes = None

    def __post_init__(self) -> None:
        if not 0 <= self.correlation < 1 or self.std * math.sqrt(1 - self.correlation) < 2 * LEVEL:
            raise UsageError(
                f"a Gaussian of std {self.std} and correlation {self.correlation} is not possible; give a correlation "
                "in [0, 1) and std (1 - correlation)^1/2 of at least two levels, 2 / 127.5"
            )
        if abs(self.mean) + TAILS * self.std > 1:
            raise UsageError(f"a Gaussian of mean {self.mean} and std {self.std} leaves [-1, 1]; give a smaller std")

    def draw(self, keys: Keys) -> tuple[UInt8[Tensor, "n c h w"], None]:
        common = keys.fold("common").normal(1, 1, 1)
        own = keys.fold("own").normal(*self.shape)
        mixed = math.sqrt(self.correlation) * common + math.sqrt(1 - self.correlation) * own
        return to_levels(self.mean + self.std * mixed), None

    def score(self, x: Float[Tensor, "b c h w"], alpha: float = 1.0, sigma: float = 0.0) -> Float[Tensor, "b c h w"]:
        rest = alpha * self.mean - x
        average = rest.mean(dim=(1, 2, 3), keepdim=True)
        one, others = ((alpha * self.std) ** 2 * value + sigma**2 for value in self._eigenvalues())
        return average / one + (rest - average) / others

    def entropy_bits_per_dim(self) -> float:
        d = _size(self.shape)
        one, others = (self.std**2 * value + LEVEL**2 / 12 for value in self._eigenvalues())
        log_det = math.log2(one) / d + math.log2(others) * (d - 1) / d
        return 0.5 * (math.log2(2 * math.pi * math.e) + log_det) - math.log2(LEVEL)

    def _eigenvalues(self) -> tuple[float, float]:
        r = self.correlation
        return 1 - r + r * _size(self.shape), 1 - r


@dataclass(frozen=True)
class PixelMixture(Law):
    """Every value by itself from a mixture of normals: the entropy is that of one value, a sum over 256 levels."""

    shape: tuple[int, int, int] = (1, 8, 8)
    weights: tuple[float, ...] = (0.3, 0.7)
    means: tuple[float, ...] = (-0.5, 0.4)
    stds: tuple[float, ...] = (0.1, 0.05)
    classes = None

    def __post_init__(self) -> None:
        _check_mixture(self.weights, self.means, self.stds)

    def draw(self, keys: Keys) -> tuple[UInt8[Tensor, "n c h w"], None]:
        component = _choose(keys.fold("component").uniform(*self.shape), self.weights)
        noise = keys.fold("noise").normal(*self.shape).double()
        return to_levels(_of(self.means)[component] + _of(self.stds)[component] * noise), None

    def score(self, x: Float[Tensor, "b c h w"], alpha: float = 1.0, sigma: float = 0.0) -> Float[Tensor, "b c h w"]:
        log_density, slope = _components(x, self.means, self.stds, alpha, sigma)
        posterior = (log_density + _log_weights(self.weights, x)).softmax(dim=0)
        return (posterior * slope).sum(dim=0)

    def entropy_bits_per_dim(self) -> float:
        return entropy_bits(self.probabilities())

    def probabilities(self) -> Float[Tensor, "256"]:
        """Of each level, for one value."""
        levels = torch.stack([level_probabilities(*pair) for pair in zip(self.means, self.stds, strict=True)])
        return _of(self.weights) @ levels


@dataclass(frozen=True)
class ImageMixture(Law):
    """Two kinds of image: one coin for the whole image, then every value by itself from the normal of its kind.

    H(X) = H(K) + H(X | K) - H(K | X). The last term, how much an image leaves open of its kind, is at most
    2 (w_1 w_2)^1/2 rho^d with rho the sum over levels of (p_1 p_2)^1/2; a law is refused where that is not negligible.
    """

    shape: tuple[int, int, int] = (1, 8, 8)
    weights: tuple[float, float] = (0.3, 0.7)
    means: tuple[float, float] = (-0.3, 0.3)
    stds: tuple[float, float] = (0.15, 0.1)
    classes = ("first", "second")

    def __post_init__(self) -> None:
        _check_mixture(self.weights, self.means, self.stds)
        if self.open_bits() > CERTAIN * _size(self.shape):
            raise UsageError(
                f"the kinds {self.means} with std {self.stds} overlap too much for a known entropy; move the means "
                "apart or give more pixels"
            )

    def draw(self, keys: Keys) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, "n"]]:
        kind = _choose(keys.fold("kind").uniform(), self.weights)
        noise = keys.fold("noise").normal(*self.shape).double()
        mean, std = (_of(values)[kind].reshape(-1, 1, 1, 1) for values in (self.means, self.stds))
        return to_levels(mean + std * noise), kind

    def score(self, x: Float[Tensor, "b c h w"], alpha: float = 1.0, sigma: float = 0.0) -> Float[Tensor, "b c h w"]:
        log_density, slope = _components(x, self.means, self.stds, alpha, sigma)
        whole = log_density.sum(dim=(2, 3, 4), keepdim=True)
        posterior = (whole + _log_weights(self.weights, x)).softmax(dim=0)
        return (posterior * slope).sum(dim=0)

    def entropy_bits_per_dim(self) -> float:
        each = [entropy_bits(level_probabilities(*pair)) for pair in zip(self.means, self.stds, strict=True)]
        coin = entropy_bits(_of(self.weights)) / _size(self.shape)
        return coin + sum(w * bits for w, bits in zip(self.weights, each, strict=True))

    def open_bits(self) -> float:
        """An upper bound of H(K | X), in bits per image."""
        p, q = (level_probabilities(*pair) for pair in zip(self.means, self.stds, strict=True))
        return 2 * math.sqrt(math.prod(self.weights)) * float((p * q).sqrt().sum()) ** _size(self.shape)


def _of(values: tuple[float, ...]) -> Float[Tensor, "k"]:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _check_mixture(weights: tuple[float, ...], means: tuple[float, ...], stds: tuple[float, ...]) -> None:
    if not len(weights) == len(means) == len(stds) or min(weights) <= 0 or abs(sum(weights) - 1) > 1e-12:
        raise UsageError(f"a mixture needs one mean and std a weight, weights above 0 with sum 1; got {weights}")
    if min(stds) <= 0:
        raise UsageError(f"a mixture needs standard deviations above 0; got {stds}")


def _choose(uniform: Float[Tensor, "*n"], weights: tuple[float, ...]) -> Int[Tensor, "*n"]:
    return torch.searchsorted(_of(weights).cumsum(0)[:-1], uniform.contiguous(), right=True)


def _log_weights(weights: tuple[float, ...], x: Tensor) -> Float[Tensor, "k 1 1 1 1"]:
    return _of(weights).log().to(x).reshape(-1, 1, 1, 1, 1)


def _components(
    x: Float[Tensor, "b c h w"], means: tuple[float, ...], stds: tuple[float, ...], alpha: float, sigma: float
) -> tuple[Float[Tensor, "k b c h w"], Float[Tensor, "k b c h w"]]:
    """Log-density of each value under each noised component, and its slope."""
    mean = (alpha * _of(means)).to(x).reshape(-1, 1, 1, 1, 1)
    variance = ((alpha * _of(stds)) ** 2 + sigma**2).to(x).reshape(-1, 1, 1, 1, 1)
    rest = mean - x
    return -0.5 * (rest**2 / variance + (2 * math.pi * variance).log()), rest / variance


@dataclass(frozen=True)
class Shapes(Procedural):
    """A disc, a square, a triangle or a ring, of any colour, place and size, with soft edges on a light ground."""

    size: int = 32
    classes = KINDS

    def __post_init__(self) -> None:
        if self.size < 8:
            raise UsageError(f"shapes of {self.size} pixels cannot be told apart; give a size of at least 8")

    def draw(self, keys: Keys) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, "n"]]:
        kind = keys.fold("kind").integers(len(KINDS))
        radius, *centre = keys.fold("place").uniform(3).float().unsqueeze(-1).unsqueeze(-1).unbind(1)  # each (n, 1, 1)
        radius = 0.35 + 0.35 * radius
        at = (torch.arange(self.size, dtype=torch.float32, device="cpu") + 0.5) * 2 / self.size - 1
        y, x = (axis - (2 * c - 1) * (1 - radius) for axis, c in zip((at[:, None], at[None]), centre, strict=True))
        distance = torch.stack(_distances(x.expand(-1, self.size, -1), y.expand(-1, -1, self.size), radius))
        chosen = distance[kind, torch.arange(len(kind), dtype=torch.int64, device="cpu")]  # (n, h, w)
        cover = (0.5 - chosen * self.size / 2).clamp(0, 1)[:, None]
        colour = keys.fold("colour").uniform(3, 1, 1).float() * 1.6 - 1
        ground = keys.fold("ground").uniform(3, 1, 1).float() * 0.3 + 0.7
        return to_levels(cover * colour + (1 - cover) * ground), kind


def _distances(
    x: Float[Tensor, "n h w"], y: Float[Tensor, "n h w"], radius: Float[Tensor, "n 1 1"]
) -> list[Float[Tensor, "n h w"]]:
    """Signed distances to the edge of each of KINDS within a circle of that radius, below 0 inside."""
    from_centre = (x**2 + y**2).sqrt()
    square = torch.maximum(x.abs(), y.abs()) - radius / math.sqrt(2)
    triangle = torch.maximum(x.abs() * math.sqrt(3) / 2 - y / 2, y) - radius / 2
    ring = (from_centre - 0.8 * radius).abs() - 0.2 * radius
    return [from_centre - radius, square, triangle, ring]
