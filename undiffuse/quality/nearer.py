"""How many of one set lie nearer than the closest 1 % of another, and what that says of their laws."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

F64 = torch.float64
TAIL = 0.025  # on each side of an interval of 95 %


@dataclass(frozen=True)
class Rate:
    """`nearer` of n samples lie below the k-th smallest of m held-out values, `threshold`.

    `low` to `high` is the interval of 95 % of the share; `expected`, and `expected_low` to `expected_high`, are what n
    new values of the held-out law would show; `p` is how often they show as many, or more.
    """

    level: float
    nearer: int
    n: int
    held_out: int
    threshold: float
    rate: float
    low: float
    high: float
    expected: float
    expected_low: float
    expected_high: float
    p: float

    @property
    def is_more(self) -> bool:
        """Whether more are near than new values would be, in 39 of 40 cases."""
        return self.rate > self.expected_high

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"more_than_expected": self.is_more}


def rate(samples: Float[Tensor, "n"], held_out: Float[Tensor, "m"], level: float = 0.01) -> Rate:
    """The share of samples below the closest `level` of the held-out values; the law of neither is assumed.

    *Threshold.* With u_1 < … < u_m the held-out values in order, it is u_k, k the whole number nearest to
    level (m + 1), at least 1, and at least one more than there are zeros among them: held-out images that are training
    images too say nothing of how near others are. The share of new values of the same law below u_k is a
    Beta(k, m + 1 − k) variable of mean q = k/(m + 1), which is `expected`: 1 % but for rounding, and more where m is
    below 99 or there are such copies.

    *If the samples had the held-out law*, every order of the n + m values would be as likely as another, so that of S,
    the number of samples below u_k, is negative hypergeometric (beta-binomial):
    P(S = s) = C(s + k − 1, s) C(n − s + m − k, n − s) / C(n + m, n). The expected range and `p` are exact.

    *Interval* of G(t_q): the share under the samples' law G below the true q-quantile t_q of the held-out law. The
    number J of held-out values below t_q is Binomial(m, q), and u_J < t_q ≤ u_{J+1}. So let S_j be the samples below
    u_j and take Clopper & Pearson's tails (1934) on average over where the threshold may be:

        low  = the p where Σ_j P(J = j) P(Binomial(n, p) ≥ S_j)     = 2.5 %
        high = the p where Σ_j P(J = j) P(Binomial(n, p) ≤ S_{j+1}) = 2.5 %

    the melded interval of Fay, Proschan & Brittain (2015, Biometrics 71), which in tests on known laws covers at least
    95 %. u_{m+1} is infinite. u_0 is u_1/2: distances of images thin out towards zero at least as r³, so that t_q lies
    below u_1/2 in less than one case in 40 where m is 50 or more. With u_0 = 0 nothing could be said of exact copies
    before there are 368 held-out values.
    """
    values, ordered = samples.to(F64).sort().values, held_out.to(F64).sort().values
    n, m = len(values), len(ordered)
    copies = int((ordered == 0).sum())
    k = min(m, max(1, round(level * (m + 1)), copies + 1))
    if copies < m:
        ordered = ordered.clamp(min=float(ordered[copies]) / 2)
    q, nearer = k / (m + 1), int((values < ordered[k - 1]).sum())
    law = beta_binomial(n, k, m)
    below = law.cumsum(0)
    edges = torch.cat([ordered[:1] / 2, ordered, torch.full((1,), torch.inf, dtype=F64, device="cpu")])
    counts = torch.searchsorted(values, edges)  # values strictly below each edge
    weights, drawn = binomial(m)(q), binomial(n)
    return Rate(
        level=level,
        nearer=nearer,
        n=n,
        held_out=m,
        threshold=float(ordered[k - 1]),
        rate=nearer / n,
        low=_root(lambda p: float(weights @ drawn(p).flip(0).cumsum(0).flip(0)[counts[:-1]]) - TAIL),
        high=_root(lambda p: TAIL - float(weights @ drawn(p).cumsum(0)[counts[1:]])),
        expected=q,
        expected_low=int((below <= TAIL).sum()) / n,
        expected_high=int((below < 1 - TAIL).sum()) / n,
        p=min(1.0, float(law[nearer:].sum())),
    )


def beta_binomial(n: int, k: int, m: int) -> Float[Tensor, "n_1"]:
    """P(S = s), s = 0 … n: how many of n new values lie below the k-th smallest of m of the same law."""
    s = torch.arange(n + 1, dtype=F64, device="cpu")
    return torch.exp(_log_choose(s + k - 1, s) + _log_choose(n - s + m - k, n - s) - _log_choose(n + m, n))


def binomial(n: int) -> Callable[[float], Float[Tensor, "n_1"]]:
    """P(S = s), s = 0 … n, as a function of 0 < p < 1."""
    s = torch.arange(n + 1, dtype=F64, device="cpu")
    ways = _log_choose(n, s)
    return lambda p: torch.exp(ways + s * math.log(p) + (n - s) * math.log1p(-p))


def _log_choose(n: Any, k: Any) -> Tensor:
    n, k = torch.as_tensor(n, dtype=F64, device="cpu"), torch.as_tensor(k, dtype=F64, device="cpu")
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function of a share crosses zero; 0 or 1 where it does not."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return low if low == 0 else high if high == 1 else (low + high) / 2
