"""Three closed forms of the bound: KL of Gaussians, the discretised decoder, the prior. All in nats per value.

Ho, Jain & Abbeel 2020, Eqs. 5 and 13, with the choices of the authors' code (tanh approximation of the normal CDF,
arguments floored at 1e-12).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

LN2 = math.log(2)


def kl(
    mean_1: Float[Tensor, "*x"],
    log_var_1: Float[Tensor, "*#x"],
    mean_2: Float[Tensor, "*x"],
    log_var_2: Float[Tensor, "*#x"],
) -> Float[Tensor, "*x"]:
    """KL(N(mean_1, var_1) ‖ N(mean_2, var_2)) for each value."""
    ratio = log_var_1 - log_var_2
    return 0.5 * (torch.expm1(ratio) - ratio + (mean_1 - mean_2).square() * torch.exp(-log_var_2))


def cdf_logit(x: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
    """The logit of `approximate_cdf`, an odd function: ½(1 + tanh u) = sigmoid(2u)."""
    return 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def approximate_cdf(x: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
    """The normal CDF to 1.8e-4, as in the authors' code: ½(1 + tanh(√(2/π)(x + 0.044715 x³)))."""
    return torch.sigmoid(cdf_logit(x))


def decoder_nll(
    x_0: Float[Tensor, "*x"], mean: Float[Tensor, "*x"], log_var: Float[Tensor, "*#x"]
) -> Float[Tensor, "*x"]:
    """−log p(x_0 | x_1) of data on the grid k/127.5 − 1; the bins of 0 and 255 reach to ∓∞ (Eq. 13)."""
    scale, half_bin = torch.exp(-0.5 * log_var), 1 / 255
    # Nothing is left beyond 100 standard deviations, where a cube could overflow.
    high = (scale * (x_0 - mean + half_bin)).clamp(-100, 100)
    low = (scale * (x_0 - mean - half_bin)).clamp(-100, 100)
    below, above = approximate_cdf(high), approximate_cdf(-low)
    # cdf(high) − cdf(low) as a product, which keeps its digits in both tails.
    between = below * above * -torch.expm1(cdf_logit(low) - cdf_logit(high))
    mass = torch.where(x_0 < -0.999, below, torch.where(x_0 > 0.999, above, between))
    return -torch.log(mass.clamp(min=1e-12))


def prior_kl(x_0: Float[Tensor, "b *x"], alpha: float, sigma: float, prior_std: float) -> Float[Tensor, "b *x"]:
    """L_T: KL(q(x_T | x_0) ‖ N(0, prior_std²))."""
    log_var = torch.tensor(2 * math.log(sigma), dtype=x_0.dtype, device=x_0.device)
    prior = torch.tensor(2 * math.log(prior_std), dtype=x_0.dtype, device=x_0.device)
    return kl(alpha * x_0, log_var, torch.zeros_like(x_0), prior)


def bits(nats: Float[Tensor, "b *x"]) -> Float[Tensor, "b"]:
    """The mean over the values of each image, in bits."""
    return nats.flatten(1).mean(1) / LN2
