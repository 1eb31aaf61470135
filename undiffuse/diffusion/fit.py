"""Grids fitted to a model: where chains of 1, 2, 3, … steps should look, by one dynamic programme (Chen et al. 2024).

With z = x/alpha and u = sigma/alpha the probability-flow ODE is dz/du = (z − x̂_0)/u, and a step of Euler's rule, which
is DDIM, from u to v is z_v = (v/u) z_u + (1 − v/u) x̂_0(z_u, u). On trajectories of the model itself, known at many
stamps, the error of each such step can be read off; a grid of n steps is the path of n of them whose squared errors add
up to the least.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.diffusion.denoiser import Prediction
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.sampler.base import Sampler, Turn

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

    def errors(self) -> Float[Tensor, "n n+1"]:
        """Root mean square, a value of z, of the Euler step from stamp i to j > i; in the last column to u = 0."""
        n, (u, table) = len(self.u), self
        ends = torch.cat([u, torch.zeros(1, dtype=F64, device="cpu")])
        share = ends / u[:, None]  # of z_u in z_v; what is left is that of x̂_0
        z, x_0 = [*range(n)], [*range(n, 2 * n)]
        goal = [*z, 2 * n]
        found = table.diagonal()[goal] - 2 * share * table[z][:, goal] - 2 * (1 - share) * table[x_0][:, goal]
        found = found + share**2 * table.diagonal()[z, None] + (1 - share) ** 2 * table.diagonal()[x_0, None]
        found = found + 2 * share * (1 - share) * table[z, x_0][:, None]
        later = torch.ones_like(found).triu(1).bool()
        return torch.where(later, found.clamp(min=0).sqrt(), torch.inf)


def shortest(costs: Float[Tensor, "n n+1"], most: int) -> list[list[int]]:
    """For 1, 2, … `most` steps the stamps of the path from the first one to u = 0 whose costs have the least sum."""
    n, paths, before = len(costs), list[list[int]](), list[Tensor]()
    least = torch.full((n + 1,), torch.inf, dtype=F64, device="cpu")
    least[0] = 0
    for _ in range(most):
        least, came = (least[:n, None] + costs).min(0)  # by one step more
        before.append(came)
        path = [n]
        for step in reversed(before):
            path.append(int(step[path[-1]]))
        paths.append(path[:0:-1])
    return paths
