"""Muon against its definition and torch's; what is Adam's stays Adam's; a run goes on to the bit."""

import pytest
import torch
from torch import nn

from undiffuse.network.unet import UNet
from undiffuse.training.optimizer import MOMENTUM, Adam, Muon, is_matrix, optimizer_of, orthogonal


def weights(*shapes):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(*shape)) for shape in shapes]


def stepped(optimizer, each, count=3, rate=0.01):
    """Steps along gradients that are the same for each optimizer."""
    torch.manual_seed(1)
    for group in optimizer.param_groups:
        group["lr"] = rate
    for _ in range(count):
        for weight in each:
            weight.grad = torch.empty_like(weight).copy_(torch.randn(weight.shape))
        optimizer.step()
    return [weight.detach().clone() for weight in each]


@pytest.mark.parametrize("shape", [(32, 32), (24, 200), (200, 24)])
def test_orthogonal_keeps_the_singular_vectors_and_makes_the_values_about_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(*shape)  # of other rows first and other sizes: its singular values, no tiny ones among them
    matrices = torch.stack([matrix, 1e-3 * matrix.roll(5, 0), 1e3 * matrix.flip(1)])
    u, _, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = u.mT @ orthogonal(matrices).double() @ v.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert 0.6 < diagonal.min() and diagonal.max() < 1.25
    assert (values - diagonal.diag_embed()).abs().max() < 1e-5


def test_a_matrix_steps_as_torch_says():
    """torch computes in bfloat16, and its root mean square is a fifth of the rate (Liu et al. 2025)."""
    shapes = (48, 64), (96, 32), (48, 64)
    ours, theirs = weights(*shapes), weights(*shapes)
    before = [weight.detach().clone() for weight in ours]
    reference = torch.optim.Muon(
        theirs, lr=1.0, momentum=MOMENTUM, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", nesterov=True
    )
    for one, other, old in zip(
        stepped(Muon(ours, (0.9, 0.999)), ours), stepped(reference, theirs), before, strict=True
    ):
        moved, expected = one - old, 5 * (other - old)
        assert (moved - expected).norm() / expected.norm() < 0.02


def test_the_first_step_of_a_convolution_has_the_size_of_the_rate():
    (weight,) = weights((48, 48, 3, 3))
    before = weight.detach().clone()
    (after,) = stepped(Muon([weight], (0.9, 0.999)), [weight], count=1)
    assert (after - before).square().mean().sqrt() == pytest.approx(0.01, rel=0.15)


def test_what_is_narrow_or_a_vector_is_adams():
    shapes = (64,), (8, 4, 3, 3), (5, 256), (12, 64)
    assert not any(is_matrix(weight) for weight in weights(*shapes))
    both = zip(
        stepped(Muon(one := weights(*shapes, (32, 32)), (0.9, 0.99)), one),
        stepped(Adam(other := weights(*shapes, (32, 32)), (0.9, 0.99)), other),
        strict=True,
    )
    assert [torch.equal(ours, adams) for ours, adams in both] == [True] * 4 + [False]


def test_a_table_of_classes_is_adams_and_only_rows_that_were_seen_move():
    """Of 40 classes 3 were in the batch; an orthogonal step would move them all as far."""
    (table,) = weights((40, 64))
    before, muon = table.detach().clone(), Muon([table], (0.9, 0.99), rows=[table])
    assert muon.moments(table) == ("exp_avg", "exp_avg_sq") and Muon([table], (0.9, 0.99)).moments(table) == (
        "momentum",
    )
    muon.param_groups[0]["lr"] = 0.1
    table[:3].square().sum().backward()
    muon.step()
    assert (table != before).any(1).tolist() == [True] * 3 + [False] * 37


def test_a_network_says_which_weights_are_tables():
    network = UNet(channels=16, multipliers=(1,), blocks=1, attention=()).build(1, 1, 40)
    muon = optimizer_of("muon", network, (0.9, 0.99))
    others = [name for name, weight in network.named_parameters() if is_matrix(weight) and not muon.takes(weight)]
    assert others == ["label.weight"]


def test_a_layout_changes_no_step():
    plain, last = weights((32, 16, 3, 3)), weights((32, 16, 3, 3))
    with torch.no_grad():
        last[0].data = last[0].contiguous(memory_format=torch.channels_last)
    (one,), (other,) = stepped(Muon(plain, (0.9, 0.999)), plain), stepped(Muon(last, (0.9, 0.999)), last)
    assert torch.allclose(one, other, rtol=0, atol=1e-6)
