"""Weights by the signal-to-noise ratio: by their formulas, on whatever the network is asked for."""

import math

import pytest
import torch

from tests.diffusion.test_objective import Wave, images
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.objective import P2, MinSnr, Sigmoid, Simple
from undiffuse.diffusion.parameterisation import PARAMETERISATIONS, Eps
from undiffuse.diffusion.process import Linear
from undiffuse.diffusion.reverse import FixedLarge
from undiffuse.key import Key
from undiffuse.network.base import NOTHING

IN_TERMS_OF = pytest.mark.parametrize(
    "name, share",
    [("eps", lambda snr: 1 / snr), ("x0", lambda snr: snr**0), ("v", lambda snr: 1 / (snr + 1))],
)


@IN_TERMS_OF
@pytest.mark.parametrize(
    "objective, on_eps",
    [
        (P2(), lambda snr: 1 / (1 + snr)),
        (P2(gamma=0.5, k=3.0), lambda snr: (3 + snr) ** -0.5),
        (P2(gamma=0.0), lambda snr: snr**0),
        (Sigmoid(), lambda snr: 1 / (1 + math.exp(-2) * snr)),
        (Sigmoid(bias=-1.0), lambda snr: 1 / (1 + math.e * snr)),
    ],
)
def test_weights_on_the_error_of_eps(objective, on_eps, name, share):
    """With v the error of eps is SNR/(SNR + 1) of that of v, and so on, as in `test_min_snr_weights`."""
    model = Denoiser(Wave(), Linear(), PARAMETERISATIONS.build(name), FixedLarge(), clip=False)
    with torch.no_grad():
        loss = objective(model, images(64), NOTHING, Key(7).rows(64))
    snr = Linear().logsnr(loss.t).exp()
    assert (snr > 10).any() and (snr < 0.1).any()
    weight = snr * share(snr) * on_eps(snr)
    torch.testing.assert_close(loss.per_example, weight.float() * loss.terms["simple"], rtol=1e-6, atol=0)


def test_what_weights_are_equal():
    """P2 without its gamma is L_simple; the sigmoid is P2 with k = e^bias, times e^bias."""
    model, x_0, keys = Denoiser(Wave(), Linear(), Eps(), FixedLarge(), clip=False), images(16), Key(7).rows(16)
    with torch.no_grad():
        one, two, three, four = (
            objective(model, x_0, NOTHING, keys).per_example
            for objective in (P2(gamma=0.0), Simple(), Sigmoid(bias=1.5), P2(k=math.exp(1.5)))
        )
    torch.testing.assert_close(one, two, rtol=1e-6, atol=0)
    torch.testing.assert_close(three, math.exp(1.5) * four, rtol=1e-6, atol=0)


@IN_TERMS_OF
def test_min_snr_weights(name, share):
    """min(SNR, 5) on the error of x̂_0 is min(SNR, 5)/SNR on that of eps and min(SNR, 5)/(SNR + 1) on that of v."""
    model = Denoiser(Wave(), Linear(), PARAMETERISATIONS.build(name), FixedLarge(), clip=False)
    with torch.no_grad():
        loss = MinSnr()(model, images(64), NOTHING, Key(7).rows(64))
    snr = Linear().logsnr(loss.t).exp()
    assert (snr > 5).any() and (snr < 5).any()
    weight = snr.clamp(max=5) * share(snr)
    torch.testing.assert_close(loss.per_example, weight.float() * loss.terms["simple"], rtol=1e-6, atol=0)
