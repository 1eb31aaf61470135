"""DPM-Solver++ (Lu et al. 2023): multistep, of x̂_0, deterministic or with noise."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from undiffuse.diffusion.numbers import added
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.sampler.base import Sampler, Turn
from undiffuse.diffusion.sampler.multistep import Chain, columns, integrals, summed


class Coefficients(NamedTuple):
    """x_s = on_x x + on_0 x̂_0 + on_1 (that of the step before) + on_2 (of the one before that)."""

    on_x: Float[Tensor, "n 1"]
    on_0: Float[Tensor, "n 1"]
    on_1: Float[Tensor, "n 1"]
    on_2: Float[Tensor, "n 1"]


def slope(chain: Chain, i: int) -> Float[Tensor, ""]:
    """What half a step of the slope through the last two answers is: (h/2)/(λ_t − the λ before)."""
    newer, older = chain.nodes(i, 2)
    return (chain.lambda_s[i] - newer) / (newer - older) / 2


@dataclass(frozen=True)
class Dpmpp(Sampler):
    """Of order 2 as published (2M): x̂_0 at the middle of the step in λ, from the last two answers.

    Of order 3 (3M) the parabola through the last three answers is integrated as it is. The published formula, and the
    code that follows it, has half of its second difference, and an error of order 2.
    """

    order: Literal[1, 2, 3] = 2

    def coefficients(self, process: Process, t: Float[Tensor, "*n"], s: Float[Tensor, "*n"]) -> Coefficients:
        chain = Chain.of(process, t, s)
        on_x, whole = chain.euler
        rows = []
        for i, order in enumerate(chain.orders(self.order).tolist()):
            if order == 1:
                rows.append([whole[i]])
            elif order == 2:
                rows.append([whole[i] * (1 + slope(chain, i)), -whole[i] * slope(chain, i)])
            else:
                weights = integrals(chain.nodes(i, 3), chain.lambda_t[i], chain.lambda_s[i], 1)
                rows.append(list(chain.alpha_s[i] * weights))
        return Coefficients(on_x[:, None], *columns(rows, 3))

    def step(self, x: Float[Tensor, "b *x"], at: Turn) -> tuple[Float[Tensor, "b *x"], Any]:
        answers = [at.denoise(x, at.t).x_0, *(at.state or [])][: self.order]
        return summed(at.c.on_x, x, at.c[1:], answers), answers


class Noisy(NamedTuple):
    """As `Coefficients` of two answers, with the standard deviation of the noise, and where there is any."""

    on_x: Float[Tensor, "n 1"]
    on_0: Float[Tensor, "n 1"]
    on_1: Float[Tensor, "n 1"]
    std: Float[Tensor, "n 1"]
    noisy: Bool[Tensor, "n 1"]


@dataclass(frozen=True)
class DpmppSde(Sampler):
    """The reverse SDE in the same way (SDE-DPM-Solver++(2M)): e^(−2h) where the ODE has e^(−h), and its noise.

    With one answer it is the ancestral step with β̃. Its order is that of the mean.
    """

    order = 2

    @property
    def noisy(self) -> bool:
        return True

    def coefficients(self, process: Process, t: Float[Tensor, "*n"], s: Float[Tensor, "*n"]) -> Noisy:
        chain = Chain.of(process, t, s)
        less = torch.expm1(2 * (chain.lambda_t - chain.lambda_s))  # e^(−2h) − 1
        on_x = (1 + less) * chain.alpha_s / chain.alpha_t
        on_x = torch.where(chain.alpha_t > 0, on_x, torch.zeros_like(on_x))
        whole, rows = -less * chain.alpha_s, []
        for i, order in enumerate(chain.orders(2).tolist()):
            lean = slope(chain, i) if order == 2 else torch.zeros_like(less[i])
            rows.append([whole[i] * (1 + lean), -whole[i] * lean])
        std = (chain.sigma_s * (-less).sqrt())[:, None]
        on_0, on_1 = columns(rows, 2)
        return Noisy(on_x[:, None], on_0, on_1, std, std > 0)

    def step(self, x: Float[Tensor, "b *x"], at: Turn) -> tuple[Float[Tensor, "b *x"], Any]:
        answers = [at.denoise(x, at.t).x_0, *(at.state or [])][:2]
        mean = summed(at.c.on_x, x, (at.c.on_0, at.c.on_1), answers)
        return added(mean, at.c.std, at.keys.normal(*x.shape[1:])) if at.c.noisy.all() else mean, answers
