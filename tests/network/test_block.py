"""The parts that are written for the processor at hand do what torch's own do."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from undiffuse.network.attention import attend
from undiffuse.network.block import Dropout


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 49, 1024, 1025], ids="{} tokens".format)
def test_attention_and_its_gradients_are_those_of_torch(tokens):
    """Up to 1,024 tokens by two products, over that by torch's kernel."""
    inputs = [normal(seed, 2, tokens, 24).requires_grad_() for seed in range(3)]
    g = normal(4, 2, tokens, 24)
    ours = attend(*inputs)
    theirs = F.scaled_dot_product_attention(*(x.detach().double().requires_grad_() for x in inputs))
    assert (ours - theirs).abs().max() < 2e-6 * theirs.abs().max()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(F.scaled_dot_product_attention(*exact), exact, g.double())
    for mine, true in zip(torch.autograd.grad(ours, inputs, g), gradients, strict=True):
        assert (mine - true).abs().max() <= 2e-6 * max(float(true.abs().max()), 1e-3)


@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 3, 0.9999999])
@pytest.mark.parametrize("shape", [(64, 3, 41, 41), (1, 1, 1)], ids=["many", "one"])
def test_dropout_keeps_a_share_and_scales_it_by_one_over_it(p, shape):
    torch.manual_seed(0)
    dropped = min(round(p * 65536), 65535) / 65536
    y = Dropout(p)(torch.ones(shape))
    kept = y != 0
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / (1 - dropped)))
    n = y.numel()
    assert abs(int(kept.sum()) - n * (1 - dropped)) <= 4 * math.sqrt(n * dropped * (1 - dropped)) + (n == 1)


def test_the_values_that_dropout_drops_are_independent():
    """Neighbours come from one random word of 64 bits."""
    torch.manual_seed(1)
    kept = (Dropout(0.5)(torch.ones(2**20)) != 0).double() * 2 - 1
    for lag in (1, 2, 3, 4, 5):
        assert abs(float((kept[lag:] * kept[:-lag]).mean())) < 4 / 2**10


def test_dropout_drops_the_same_values_of_the_gradient():
    torch.manual_seed(2)
    x = normal(0, 5, 7).requires_grad_()
    y = Dropout(0.3)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y.detach(), x.detach() * gradient) and 0 < int((gradient == 0).sum()) < 35


def test_dropout_is_decided_by_the_seed():
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(Dropout(0.5)(torch.ones(1000)))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("p, training, value", [(0.0, True, 1), (1.0, True, 0), (0.5, False, 1)])
def test_dropout_where_nothing_is_random(p, training, value):
    state = torch.get_rng_state()
    layer: nn.Module = Dropout(p).train(training)
    assert torch.equal(layer(torch.ones(10)), torch.full((10,), float(value)))
    assert p == 1 or torch.equal(state, torch.get_rng_state())
