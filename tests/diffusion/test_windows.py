"""Windows over larger images: what a denoiser of every size says, a mean by hand, and each image by itself."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.numbers import F64
from undiffuse.diffusion.parameterisation import X0
from undiffuse.diffusion.process import ContinuousCosine, Linear
from undiffuse.diffusion.reverse import FixedSmall
from undiffuse.diffusion.windows import Windows, places
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.network.base import Conditioning
from undiffuse.network.unet import UNet

T = torch.tensor([0.3, 0.7, 0.5], dtype=F64)


class Says(nn.Module):
    """x̂_0 = answer(x_t, what it is told of t, label); the sizes of its batches stay in `asked`."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    def forward(self, x, time, cond):
        self.asked.append(len(x))
        label = torch.zeros_like(time) if cond.label is None else cond.label
        return self.answer(x, time[:, None, None, None], label[:, None, None, None])


def denoiser(answer) -> Denoiser:
    return by(Says(answer))


def by(network: nn.Module) -> Denoiser:
    return Denoiser(network, ContinuousCosine(), X0(), FixedSmall(), "logsnr", clip=False)


def noise(*shape: int) -> torch.Tensor:
    return Key(0).rows(shape[0]).normal(*shape[1:])


def test_an_image_of_one_window_is_as_without_windows():
    torch.manual_seed(0)
    network = UNet(8, (1, 2), 1, ()).build(3, 3)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.2)
    plain = Denoiser(network, Linear(100, 1e-3, 0.2), X0(), FixedSmall(), clip=True).eval().requires_grad_(False)
    x_t = noise(3, 3, 8, 6)
    expected, found = plain(x_t, T), Windows(plain, (8, 6))(x_t, T)
    torch.testing.assert_close(found.x_0, expected.x_0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.output, expected.output, rtol=1e-6, atol=1e-5)
    assert expected.x_0.std() > 0.1


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 17), (13, 11), (30, 7)])
def test_what_says_of_each_value_the_same_says_so_of_images_of_any_size(size):
    linear = denoiser(lambda x, time, label: 0.37 * x)
    x_t = noise(3, 2, *size)
    torch.testing.assert_close(Windows(linear, (4, 6))(x_t, T).x_0, 0.37 * x_t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", [(1, 1), (3, 5), (4, 4), (8, 2)])
def test_the_weights_of_each_value_sum_to_one(side):
    always = denoiser(lambda x, time, label: torch.full_like(x, 0.7))
    found = Windows(always, side)(noise(1, 1, 19, 10), T[:1]).x_0
    torch.testing.assert_close(found, torch.full_like(found, 0.7), rtol=1e-6, atol=0)


def test_estimates_are_averaged_with_weights_that_fall_to_the_border_in_a_straight_line():
    """By hand, with a denoiser that says the sum of its window everywhere."""
    sums = denoiser(lambda x, time, label: x.sum((2, 3), keepdim=True).expand_as(x))
    x_t = noise(1, 1, 7, 5)
    total, weight = torch.zeros(7, 5, dtype=F64), torch.zeros(7, 5, dtype=F64)
    tall, broad = [1 / 5 * 2, 2 / 5 * 2, 2 / 5 * 2, 1 / 5 * 2], [0.5, 1, 0.5]  # of 4 and of 3 values
    for i, j in itertools.product(places(7, 4), places(5, 3)):
        said = float(x_t[0, 0, i : i + 4, j : j + 3].double().sum())
        for k, m in itertools.product(range(4), range(3)):
            total[i + k, j + m] += tall[k] * broad[m] * said
            weight[i + k, j + m] += tall[k] * broad[m]
    found = Windows(sums, (4, 3))(x_t, T[:1]).x_0[0, 0]
    torch.testing.assert_close(found.double(), total / weight, rtol=1e-5, atol=1e-5)


def test_each_image_has_its_own_time_and_label_in_batches_of_any_size():
    network = Says(lambda x, time, label: x + time / 7 + label)
    x_t, labels = noise(3, 1, 9, 9), torch.tensor([2, 0, 1])
    time = ContinuousCosine().logsnr(T).float()[:, None, None, None]
    expected = x_t + time / 7 + labels[:, None, None, None]
    for batch in (1, 2, 5, 64):
        windows = Windows(by(network), (4, 4), batch)
        network.asked.clear()
        torch.testing.assert_close(windows(x_t, T, Conditioning(labels)).x_0, expected, rtol=1e-5, atol=1e-5)
        assert max(network.asked) <= batch and sum(network.asked) == 3 * len(places(9, 4)) ** 2


@given(st.integers(2, 70), st.integers(0, 200))
def test_windows_cover_an_image_and_overlap_by_half(side, more):
    found = places(side + more, side)
    assert found[0] == 0 and found[-1] == more and len(set(found)) == len(found)
    assert all(0 < b - a <= -(-side // 2) for a, b in itertools.pairwise(found))
    assert len(found) <= 1 + -(-2 * more // side)  # and there are no more than that takes


def test_windows_by_hand():
    assert places(28, 28) == [0] and places(42, 28) == [0, 14] and places(43, 28) == [0, 8, 15]


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (1, 1)])
def test_images_smaller_than_a_window_are_refused(size):
    windows = Windows(denoiser(lambda x, time, label: x), (8, 8))
    words = f"images of {size[0]}×{size[1]} are smaller than the windows of 8×8; give larger ones"
    with pytest.raises(UsageError, match=words):
        windows(noise(1, 1, *size), T[:1])
