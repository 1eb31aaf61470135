"""Grids fitted to a model: where chains of 1, 2, 3, … steps should look, by one dynamic programme.

With z = x/alpha, u = sigma/alpha and λ = −log u a step of the probability-flow ODE from u to v is exactly

    z_v = (v/u) z_u + ∫ e^(λ − λ_v) x̂_0 dλ,

and a solver puts a polynomial through some answers in place of x̂_0. On trajectories of the model itself, known at many
stamps, the error of such a step can be read off: of UniPC's corrector, whose polynomial goes through the answers at
both ends and the one before, and of its predictor, which does not know the answer at v (DPM-Solver++(2M)). A grid of n
steps is the path of n of them that costs the least. GITS (Chen et al. 2024) finds such a path for Euler's rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.reverse import Prediction
from undiffuse.diffusion.sampler.base import Sampler, Turn
from undiffuse.diffusion.sampler.multistep import integrals

# What the predictor's square error counts beside the corrector's: it puts the answer at the end of a step off, the more
# so the longer the step is in λ. Too little of it, and two steps go from 60 to 0.006; too much, and all are Euler's.
PREDICTED, LONG = 0.03, 1.8
LEVEL = 1 / 127.5  # of grey: an answer so near to the end is as good as it, and no reason to ask further down
Seen = tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]


@dataclass(frozen=True)
class Watched(Sampler):
    """Another sampler; `seen` has z and x̂_0 wherever it asks, in float64 on the CPU."""

    of: Sampler
    seen: list[Seen] = field(default_factory=list)

    def coefficients(self, process: Process, t: Float[Tensor, "*n"], s: Float[Tensor, "*n"]) -> Any:
        return self.of.coefficients(process, t, s)

    def step(self, x: Float[Tensor, "b *x"], at: Turn) -> tuple[Float[Tensor, "b *x"], Any]:
        def denoise(x_t: Float[Tensor, "b *x"], t: Float[Tensor, "b"]) -> Prediction:
            prediction = at.denoise(x_t, t)
            z, x_0 = (each.flatten(1).to("cpu", F64) for each in (x_t, prediction.x_0))
            self.seen.append((z / at.process.alpha(t[:1]), x_0))
            return prediction

        return self.of.step(x, at._replace(denoise=denoise))


class Products(NamedTuple):
    """Mean products of all pairs of 2n + 1 images, a value: z and x̂_0 at n stamps, and z(0)."""

    u: Float[Tensor, "n"]
    table: Float[Tensor, "m m"]

    @classmethod
    def of(
        cls, process: Process, times: Float[Tensor, "times"], seen: Sequence[Seen], end: Float[Tensor, "b *x"]
    ) -> "Products":
        """Of a batch of trajectories, seen at each of the times but the last, which is 0."""
        last = end.flatten(1).to("cpu", F64)
        images = torch.stack([*(z for z, _ in seen), *(x_0 for _, x_0 in seen), last]).flatten(1)
        return cls(process.spread(times[:-1]), images @ images.T / images.shape[1])

    def missed(
        self, i: Int[Tensor, "k"], j: Int[Tensor, "k"], asked: Int[Tensor, "k m"], weights: Float[Tensor, "k m"]
    ) -> Float[Tensor, "k"]:
        """Mean square, a value of z, of what (v/u) z_u + Σ weights x̂_0 misses of z_v, from stamps i to j."""
        n, u = len(self.u), self.u
        images = torch.cat([i[:, None], n + asked, j[:, None]], 1)
        shares = torch.cat([(u[j] / u[i])[:, None], weights, torch.full_like(weights[:, :1], -1)], 1)
        products = self.table[images[:, :, None], images[:, None]]
        return torch.einsum("ka,kab,kb->k", shares, products, shares).clamp(min=0)

    def costs(self) -> "Costs":
        """Of all steps between stamps, and of those to u = 0, which are x̂_0 itself, off by a grey level at least."""
        n, lambdas = len(self.u), -self.u.log()
        start, first = lambdas.new_full((n,), torch.inf), lambdas.new_full((n, n + 1), torch.inf)
        later = lambdas.new_full((n, n, n + 1), torch.inf)

        i, j = torch.triu_indices(n, n, 1, dtype=torch.int64, device="cpu")
        predicted = self.missed(i, j, i[:, None], -torch.expm1(lambdas[i] - lambdas[j])[:, None])  # Euler's step
        start[j[i == 0]] = predicted[i == 0]
        first[i, j] = self.corrected(i, j, torch.stack([j, i], 1)) + counted(lambdas[j] - lambdas[i]) * predicted
        squares, goal = self.table.diagonal(), self.table[2 * n]
        first[:, n] = (squares[n : 2 * n] - 2 * goal[n : 2 * n] + squares[2 * n]).clamp(min=LEVEL**2)

        h, i, j = torch.combinations(torch.arange(n, dtype=torch.int64, device="cpu"), 3).unbind(1)
        step = lambdas[j] - lambdas[i]
        lean, whole = step / (lambdas[i] - lambdas[h]) / 2, -torch.expm1(-step)
        weights = torch.stack([whole * (1 + lean), -whole * lean], 1)
        predicted = self.missed(i, j, torch.stack([i, h], 1), weights)
        later[h, i, j] = self.corrected(i, j, torch.stack([j, i, h], 1)) + counted(step) * predicted
        h, i = torch.triu_indices(n, n, 1, dtype=torch.int64, device="cpu")
        later[h, i, n] = first[i, n]
        return Costs(start, first, later)

    def corrected(self, i: Int[Tensor, "k"], j: Int[Tensor, "k"], asked: Int[Tensor, "k m"]) -> Float[Tensor, "k"]:
        """What the polynomial through these answers misses."""
        lambdas = -self.u.log()
        return self.missed(i, j, asked, integrals(lambdas[asked], lambdas[i], lambdas[j], 1))


def counted(step: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    """How much the predictor's square error counts in a step of this length in λ."""
    return PREDICTED * (1 + (step / LONG) ** 4)


class Costs(NamedTuple):
    """Of beginning at stamp i with mean and noise; of i → j as the first step; and of i → j after h → i."""

    start: Float[Tensor, "n"]
    first: Float[Tensor, "n ends"]
    later: Float[Tensor, "n n ends"]

    def grids(self, most: int) -> list[list[int]]:
        """For 1, 2, … `most` steps the stamps where they begin, of the path to u = 0 that costs the least."""
        n, came, found = len(self.start), list[Tensor](), list[list[int]]()
        least = self.start[:, None] + self.first  # of all paths of so many steps, by their last one
        for _ in range(most):
            path = [int(least[:, n].argmin()), n]
            for before in reversed(came):
                path.insert(0, int(before[path[0], path[1]]))
            found.append(path[:-1])
            least, before = (least[:, :n, None] + self.later).min(0)
            came.append(before)
        return found
