"""The tables of a model's codec: which steps a file takes, how far off x̂_0 is at each, and how many bits it gets.

A step from t to s sends a draw of q(x_s | x_t, x_0) given p, which has the same mean at x̂_0 and the variance β̃ + c² v,
where v is the mean square of x_0 − x̂_0. With c²/β̃ = SNR_s − SNR_t this takes

    KL = Σ ½ log2(1 + (SNR_s − SNR_t) v_i)    bits an image,

which is what equal variances cost where the product is small, and less elsewhere. v_i = v r h(x̂_0,i): h is a table over
the value of x̂_0 (a black background has almost no residual) of mean 1, and r = 2^(scale/4) is sent for a few steps at a
time, because pictures differ. Bits are whole numbers of these tables, so that no float steers how a file is read.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from undiffuse.codec.tail import Tail
from undiffuse.config import Positive, plain
from undiffuse.errors import Corrupt
from undiffuse.strict import to_json

FORMAT = 1
KNOTS = 13  # of h, even over [−1, 1]
MEMORY = 14  # the bits of a state of the trellis, unless another number is asked for
SCALES = 16  # a scale is −SCALES … SCALES, in quarters of an octave
LEAST, DELTA_BITS = -3, 3  # of a scale from one layer to the next: −3 … 4
WASTE = {10: 0.125, 12: 0.095, 14: 0.075, 16: 0.06}  # bits of a path on top of its KL, by the bits of a state
EXTRA = 3  # bits of a path, whatever it is over: it has to start
MOST_BITS = 64  # of a step and a value


@dataclass(frozen=True)
class Plan:
    """`times` has the start of each step and the end of the last; a layer is some steps and a scale, the first without.

    `square` is v and `shape` is h where each step begins and the last one ends. `bits` are those of an image of so many
    `values`, by its scale, and `kl` what the step costs by the formula. `images` were measured, and 99 of 100 of them
    take at most `usual` bits.
    """

    weights: str
    images: int
    values: int
    memory: int
    times: tuple[Positive, ...]
    square: tuple[float, ...]
    shape: tuple[tuple[float, ...], ...]
    bits: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    kl: tuple[float, ...]
    usual: int
    tail: Tail
    format: int = FORMAT

    def check(self, where: str) -> "Plan":
        """Raises Corrupt for tables that do not belong together."""
        n = len(self.bits)
        falls = len(self.times) == n + 1 and self.times[0] <= 1 and all(s < t for t, s in pairwise(self.times))
        sizes = len(self.shape) == len(self.square) == n + 1 == len(self.kl) + 1 == sum(self.layers) + 1 <= 256
        wide = all(len(h) == KNOTS and min(h) > 0 for h in self.shape) and all(v > 0 for v in self.square)
        whole = all(
            len(row) == 2 * SCALES + 1 and 0 <= min(row) and max(row) <= MOST_BITS * self.values for row in self.bits
        )
        end = 1 <= self.tail.step <= n and self.tail.check() and len(self.tail.spreads) == KNOTS
        if not (
            falls and end and sizes and wide and whole and min(self.layers) > 0 < self.values and self.memory in WASTE
        ):
            raise Corrupt(
                f"{where} is damaged: its tables do not belong together; give `undiffuse codec fit --overwrite`"
            )
        return self

    @property
    def steps(self) -> int:
        return len(self.bits)

    @cached_property
    def ident(self) -> bytes:
        """Four bytes that a file carries: of the weights and of every number here."""
        return hashlib.sha256(to_json(plain(self), sort_keys=True).encode()).digest()[:4]

    def starts(self) -> dict[int, int]:
        """The first step of each layer, with the number of the layer."""
        return {end - size: k for k, (end, size) in enumerate(zip(accumulate(self.layers), self.layers, strict=True))}

    def budget(self, step: int, scale: int, values: int) -> int:
        """The bits of an image of that scale and so many values."""
        return (self.bits[step][scale + SCALES] * values + self.values // 2) // self.values

    def budgets(self, step: int, scales: list[int], values: int) -> list[int]:
        """Those of the images of a group, whose path is one: the first one's start it."""
        first, *others = (self.budget(step, scale, values) for scale in scales)
        return [first + EXTRA, *others]

    def usual_of(self, steps: int) -> float:
        """Which bits 99 of 100 images take in the first steps, as far as `usual`, which is of all, tells.

        What lies above the bits of scale 0 is scaled by the square root of their share, as a percentile of sums of
        independent numbers is: scales of one layer tell little of those of another.
        """
        whole, some = (sum(row[SCALES] for row in rows) for rows in (self.bits, self.bits[:steps]))
        return some + (self.usual - whole) * (some / whole) ** 0.5
