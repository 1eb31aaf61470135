"""Multistep solvers of ε̂: Adams–Bashforth with the coefficients of even steps, or with those of the steps there are."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from undiffuse.diffusion.numbers import added
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.sampler.base import Sampler, Turn
from undiffuse.diffusion.sampler.multistep import Chain, columns, integrals, summed

# Of each order, the newest answer first.
BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class Coefficients(NamedTuple):
    """x_s is DDIM's, on_x x + on_x_0 x̂_0, and on_0 … on_3 of ε̂ more, newest first; ε̂ = (x + less_t x̂_0)/sigma_t."""

    on_x: Float[Tensor, "n 1"]
    on_x_0: Float[Tensor, "n 1"]
    less_t: Float[Tensor, "n 1"]
    sigma_t: Float[Tensor, "n 1"]
    on_0: Float[Tensor, "n 1"]
    on_1: Float[Tensor, "n 1"]
    on_2: Float[Tensor, "n 1"]
    on_3: Float[Tensor, "n 1"]


class Extrapolated(Sampler):
    """What both have in common; a step uses `order` answers at most."""

    @abstractmethod
    def weights(self, chain: Chain, i: int, order: int) -> list[float]:
        """Of the answers, newest first; they sum to the length of the step in σ/α, times α_s."""

    def coefficients(self, process: Process, t: Float[Tensor, "*n"], s: Float[Tensor, "*n"]) -> Coefficients:
        chain = Chain.of(process, t, s)
        on_x, on_x_0 = chain.euler
        rows = []
        for i, order in enumerate(chain.orders(self.order).tolist()):
            weights = self.weights(chain, i, order) if order > 1 else [0.0]
            rows.append([-sum(weights[1:], 0.0), *weights[1:]])  # beside an Euler step, which is DDIM's
        numbers = (on_x, on_x_0, -chain.alpha_t, chain.sigma_t)
        return Coefficients(*(number[:, None] for number in numbers), *columns(rows, 4))

    def step(self, x: Float[Tensor, "b *x"], at: Turn) -> tuple[Float[Tensor, "b *x"], Any]:
        c, x_0 = at.c, at.denoise(x, at.t).x_0
        answers = [added(x, c.less_t, x_0) / c.sigma_t, *(at.state or [])][: self.order]
        return summed(c.on_x, x, (c.on_x_0, *c[4:]), (x_0, *answers)), answers


@dataclass(frozen=True)
class Deis(Extrapolated):
    """A polynomial in λ through the last ε̂, integrated exactly (Zhang & Chen 2023, with λ as the variable)."""

    order: Literal[1, 2, 3, 4] = 3

    def weights(self, chain: Chain, i: int, order: int) -> list[float]:
        found = integrals(chain.nodes(i, order), chain.lambda_t[i], chain.lambda_s[i], -1)
        return (-chain.sigma_s[i] * found).tolist()


@dataclass(frozen=True)
class Ipndm(Extrapolated):
    """As if steps in σ/α were even (Liu et al. 2022): of order 2 where these change smoothly, else of 1."""

    order: Literal[1, 2, 3, 4] = 4

    def converges(self) -> tuple[int, int]:
        return min(self.order, 2), 1

    def weights(self, chain: Chain, i: int, order: int) -> list[float]:
        return [share * float(chain.length[i]) for share in BASHFORTH[order - 1]]
