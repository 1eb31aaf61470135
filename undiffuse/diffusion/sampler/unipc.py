"""UniPC (Zhao et al. 2023): a multistep predictor of x̂_0, and a corrector that needs no evaluation of its own."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from undiffuse.diffusion.process import Process
from undiffuse.diffusion.sampler.base import Sampler, Turn
from undiffuse.diffusion.sampler.multistep import Chain, columns, integrals, summed


class Coefficients(NamedTuple):
    """The predictor of a step, on_x x + Σ on_k x̂_0(k), and the corrector of the step before, whose end this t is.

    The corrector is was_x (x before) + was_0 x̂_0(now) + was_1 x̂_0(before) + …; `corrects` says where there is one.
    """

    on_x: Float[Tensor, "n 1"]
    on_0: Float[Tensor, "n 1"]
    on_1: Float[Tensor, "n 1"]
    on_2: Float[Tensor, "n 1"]
    was_x: Float[Tensor, "n 1"]
    was_0: Float[Tensor, "n 1"]
    was_1: Float[Tensor, "n 1"]
    was_2: Float[Tensor, "n 1"]
    was_3: Float[Tensor, "n 1"]
    corrects: Bool[Tensor, "n 1"]


@dataclass(frozen=True)
class Unipc(Sampler):
    """Polynomials in λ, of degree order − 1 for the predictor and one more for the corrector, integrated exactly.

    A single unknown is not solved for but taken as ½ of B(h): h in variant "bh1", e^h − 1 in "bh2" (§3.4). So it is in
    the predictor of order 2, where bh2 is DPM-Solver++(2M), and in the corrector of order 1.
    """

    order: Literal[1, 2, 3] = 3
    variant: Literal["bh1", "bh2"] = "bh2"

    def converges(self) -> tuple[int, int]:
        """The corrector adds one."""
        return self.order + 1, self.order + 1

    def half(self, chain: Chain, i: int) -> Float[Tensor, ""]:
        """½ α_s B(h), with B as it is for x̂_0."""
        h = chain.lambda_s[i] - chain.lambda_t[i]
        return chain.alpha_s[i] * (h if self.variant == "bh1" else -torch.expm1(-h)) / 2

    def predictor(self, chain: Chain, i: int, order: int, whole: Float[Tensor, ""]) -> list[Tensor]:
        if order == 1:
            return [whole]
        if order == 2:
            newer, older = chain.nodes(i, 2)
            lean = self.half(chain, i) * (chain.lambda_s[i] - newer) / (newer - older)
            return [whole + lean, -lean]
        return list(chain.alpha_s[i] * integrals(chain.nodes(i, order), chain.lambda_t[i], chain.lambda_s[i], 1))

    def corrector(self, chain: Chain, i: int, order: int, whole: Float[Tensor, ""]) -> list[Tensor]:
        """Of the step i, with the answer at its end first."""
        if order == 1:
            return [self.half(chain, i), whole - self.half(chain, i)]
        nodes = torch.cat([chain.lambda_s[i : i + 1], chain.nodes(i, order)])
        return list(chain.alpha_s[i] * integrals(nodes, chain.lambda_t[i], chain.lambda_s[i], 1))

    def corrects(self, chain: Chain, i: int, order: int, whole: Float[Tensor, ""]) -> bool:
        """Whether the step i is corrected: not one of infinite length, nor by more than all of the answer at its end.

        bh1 would put h/2 of it, which is no longer near the ½ (1 − e^−h) that it stands for.
        """
        return bool(chain.known[i + 1] > 1 and (order > 1 or self.half(chain, i) <= whole))

    def coefficients(self, process: Process, t: Float[Tensor, "*n"], s: Float[Tensor, "*n"]) -> Coefficients:
        chain = Chain.of(process, t, s)
        on_x, whole = chain.euler
        orders = chain.orders(self.order).tolist()
        ahead = [self.predictor(chain, i, order, whole[i]) for i, order in enumerate(orders)]
        before = [False, *(self.corrects(chain, i, order, whole[i]) for i, order in enumerate(orders[:-1]))]
        behind = [
            self.corrector(chain, i - 1, orders[i - 1], whole[i - 1]) if corrects else []
            for i, corrects in enumerate(before)
        ]
        on_0, on_1, on_2 = columns(ahead, 3)
        was_0, was_1, was_2, was_3 = columns(behind, 4)
        was_x = torch.cat([on_x[:1], on_x[:-1]])[:, None]
        corrects = torch.tensor(before, dtype=torch.bool, device="cpu")[:, None]
        return Coefficients(on_x[:, None], on_0, on_1, on_2, was_x, was_0, was_1, was_2, was_3, corrects)

    def step(self, x: Float[Tensor, "b *x"], at: Turn) -> tuple[Float[Tensor, "b *x"], Any]:
        c, answers = at.c, [at.denoise(x, at.t).x_0]
        if at.state is not None:
            before, past = at.state
            if c.corrects.all():
                x = summed(c.was_x, before, c[5:9], [*answers, *past])
            answers += past
        return summed(c.on_x, x, c[1:4], answers), (x, answers[: self.order])
