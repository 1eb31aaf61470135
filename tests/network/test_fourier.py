"""Fourier features before the patches: what the first convolution is given, and in what precision."""

import math

import pytest
import torch

from undiffuse.config import parse
from undiffuse.errors import UsageError
from undiffuse.interop.diffusers_network import their_network
from undiffuse.network.unet import UNet

WAVES = (127.5, 255)
SPEC = UNet(channels=16, multipliers=(1, 1), blocks=1, attention=(), patch=2, time="logsnr", fourier=WAVES)


def built(spec: UNet = SPEC, images: int = 2, hints: int = 1):
    """The network, and a list that what its first convolution is given is added to."""
    torch.manual_seed(0)
    network, given = spec.build(images, images, hints=hints), []
    torch.nn.init.normal_(network.conv_out.weight)
    network.conv_in.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    return network.eval(), given


def asked(network, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network(x, torch.zeros(len(x)))


def test_x_comes_first_then_sin_and_cos_of_the_image_at_each_frequency():
    network, given = built()
    x = 2 * torch.rand(3, 3, 8, 4, generator=torch.Generator().manual_seed(1)) - 1  # two channels and a hint
    assert asked(network, x).shape == (3, 2, 8, 4)
    assert network.conv_in.weight.shape == (16, (2 * 5 + 1) * 4, 3, 3)
    seen, image = torch.nn.functional.pixel_shuffle(given[0], 2), x[:, :2].double()
    assert torch.equal(seen[:, :3], x)
    expected = [wave(frequency * math.pi * image) for frequency in WAVES for wave in (torch.sin, torch.cos)]
    torch.testing.assert_close(seen[:, 3:].double(), torch.cat(expected, 1), rtol=0, atol=1e-4)


def test_on_levels_one_frequency_says_odd_or_even_and_the_other_that_it_is_a_level():
    network, given = built(images=1, hints=0)
    k = torch.arange(256)
    asked(network, (k / 127.5 - 1).reshape(1, 1, 16, 16))
    seen = torch.nn.functional.pixel_shuffle(given[0], 2)[0].flatten(1)
    sign = torch.where(k % 2 == 0, 1.0, -1.0)  # sin(πk − 127.5π)
    for found, expected in zip(seen[1:], (sign, 0 * sign, 0 * sign, -torch.ones(256)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_they_and_the_first_convolution_are_float32_in_bf16_too():
    """Of two images a quarter of a level apart, which bf16 takes for one, the answers differ as they do in float32."""
    network, given = built(images=1, hints=0)
    x = torch.full((1, 1, 8, 8), 0.8984375 - 0.125 / 127.5)  # around a number of bf16
    near = x + 0.25 / 127.5
    exact = asked(network, near) - asked(network, x)
    outputs: list[torch.Tensor] = []
    network.conv_in.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        half = asked(network, near).float() - asked(network, x).float()
        assert network.down[0].block[0].norm1(network._begun(x)).dtype == torch.bfloat16  # the rest is as without them
    assert torch.equal(given[0], given[2]) and {each.dtype for each in (*given, *outputs)} == {torch.float32}
    assert x.bfloat16().equal(near.bfloat16())
    assert (half - exact).norm() < 0.2 * exact.norm()


def test_without_them_nothing_has_changed():
    plain, _ = built(UNet(channels=16, multipliers=(1, 1), blocks=1, attention=(), patch=2), hints=0)
    assert plain.conv_in.weight.shape == (16, 8, 3, 3)
    assert SPEC.meaning() != {**SPEC.meaning(), "fourier": ()}


def test_diffusers_has_no_such_network():
    model = {"network": {"name": "unet", "fourier": [127.5, 255]}, "image": [1, 8, 8]}
    with pytest.raises(UsageError, match=r"cannot be this network: fourier = \[127\.5, 255\] and not \[\]; --to file"):
        their_network(model)


@pytest.mark.parametrize("fourier", [(0,), (-1.0,)])
def test_a_frequency_is_above_0(fourier):
    with pytest.raises(UsageError, match="fourier"):
        parse(UNet, {"fourier": list(fourier)}, "network unet")
