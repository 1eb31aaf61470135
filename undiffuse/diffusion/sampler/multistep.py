"""Multistep solvers: the answers of earlier steps stand in for further evaluations.

With λ = log(α/σ) the probability-flow ODE has two exact forms (Lu et al. 2022, Eq. 3.4 and 4.1; Zhang & Chen 2023),

    x_s/σ_s = x_t/σ_t + ∫ e^λ x̂_0 dλ        and        x_s/α_s = x_t/α_t − ∫ e^(−λ) ε̂ dλ        from λ_t to λ_s,

and a solver is what it puts in place of x̂_0 or ε̂: here a polynomial in λ through the last answers, or less. A step is
then x_s = on_x x + Σ_k on_k m_k, with numbers of the times alone, which are computed once for a chain.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.diffusion.numbers import F64, added
from undiffuse.diffusion.process import Process

FAR = -20  # λ below which a step is as good as infinite, and its answer tells no slope: alpha is 0, but for rounding
SHORT = 50  # a step so many times shorter than the next tells no slope either: only what two answers are rounded to
NODES, SHARES = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(24))


class Chain(NamedTuple):
    """What multistep solvers ask of the times of a chain; [n] for its n steps."""

    alpha_t: Float[Tensor, "n"]
    sigma_t: Float[Tensor, "n"]
    alpha_s: Float[Tensor, "n"]
    sigma_s: Float[Tensor, "n"]
    lambda_t: Float[Tensor, "n"]
    lambda_s: Float[Tensor, "n"]
    known: Int[Tensor, "n"]  # how many answers there are that a polynomial may go through, the step's own included
    to_come: Int[Tensor, "n"]  # how many steps there are to s = 0, this one included; many, if the chain ends before

    @classmethod
    def of(cls, process: Process, t: Float[Tensor, "*n"], s: Float[Tensor, "*n"]) -> "Chain":
        t, s = t.flatten(), s.flatten()
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(t), process.alpha_sigma(s)
        lambda_t, lambda_s = process.logsnr(t) / 2, process.logsnr(s) / 2
        known = torch.ones(len(t), dtype=torch.int64, device="cpu")
        for i in range(1, len(t)):
            tells = SHORT * (lambda_t[i] - lambda_t[i - 1]) >= lambda_s[i] - lambda_t[i] or s[i] == 0
            if s[i - 1] < t[i - 1] and lambda_t[i - 1] >= FAR and tells:
                known[i] = known[i - 1] + 1
        to_come = torch.arange(len(t), 0, -1, dtype=torch.int64, device="cpu") + (len(t) if s[-1] > 0 else 0)
        return cls(alpha_t, sigma_t, alpha_s, sigma_s, lambda_t, lambda_s, known, to_come)

    def orders(self, most: int) -> Int[Tensor, "n"]:
        """Of each step: what its past allows, falling to 1 at the one to s = 0, where λ is infinite."""
        return torch.minimum(self.known, self.to_come).clamp(max=most)

    def nodes(self, i: int, count: int) -> Float[Tensor, "count"]:
        """λ of the last answers before step i is taken, its own first."""
        return self.lambda_t[i - count + 1 : i + 1].flip(0)

    @property
    def euler(self) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """DDIM: (on_x, on_0) of x̂_0, also where λ is infinite."""
        on_x = self.sigma_s / self.sigma_t
        return on_x, self.alpha_s - on_x * self.alpha_t

    @property
    def length(self) -> Float[Tensor, "n"]:
        """α_s (σ_s/α_s − σ_t/α_t): what an Euler step has of ε̂."""
        return self.sigma_s - self.alpha_s * self.sigma_t / self.alpha_t


def lagrange(nodes: Float[Tensor, "*b k"], at: Float[Tensor, "*b m"]) -> Float[Tensor, "*b k m"]:
    """The polynomials that are 1 at one of the nodes and 0 at the others."""
    rows = []
    for i in range(nodes.shape[-1]):
        others = torch.cat([nodes[..., :i], nodes[..., i + 1 :]], -1)[..., None]
        rows.append(((at[..., None, :] - others) / (nodes[..., i, None, None] - others)).prod(-2))
    return torch.stack(rows, -2)


def integrals(
    nodes: Float[Tensor, "*b k"], first: Float[Tensor, "*b"], last: Float[Tensor, "*b"], rate: int
) -> Float[Tensor, "*b k"]:
    """∫ e^(rate (λ − last)) ℓ_k(λ) dλ from first to last, for the polynomial of each node, by Gauss's rule.

    With no difference of nearly equal numbers, however short the step; exact to 1e-12 for steps up to 30.
    """
    middle, half = ((first + last) / 2)[..., None], ((last - first) / 2)[..., None]
    at = middle + half * NODES
    shares = SHARES * torch.exp(rate * (at - last[..., None]))
    return half * (shares[..., None, :] * lagrange(nodes, at)).sum(-1)


def columns(rows: Sequence[Sequence[float | Tensor]], count: int) -> list[Float[Tensor, "n 1"]]:
    """Weights of each step, of different numbers of answers, as `count` columns that are 0 where there are fewer."""
    table = torch.zeros(len(rows), count, dtype=F64, device="cpu")
    for i, row in enumerate(rows):
        for k, weight in enumerate(row):
            table[i, k] = weight
    return list(table[:, :, None].unbind(1))


def summed(on_x: Tensor, x: Float[Tensor, "b *x"], weights: Sequence[Tensor], answers: Sequence[Tensor]) -> Any:
    """on_x x + Σ_k weights_k answers_k, over the answers that there are."""
    total = on_x * x
    for weight, answer in zip(weights, answers, strict=False):
        total = added(total, weight, answer)
    return total
