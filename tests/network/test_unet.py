"""The paper's U-Net: its size to the weight, its initialisation, each part by its formula, the whole written twice."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from undiffuse.errors import UsageError
from undiffuse.network.attention import Attention
from undiffuse.network.base import Conditioning
from undiffuse.network.block import ResBlock, Style, norm, sinusoid
from undiffuse.network.resample import Downsample, Upsample
from undiffuse.network.unet import UNet

LARGE = {"multipliers": (1, 1, 2, 2, 4, 4), "attention": (4,)}
TINY = UNet(channels=6, multipliers=(1, 2, 3), blocks=1, attention=(1,))
NEAR_ZERO = ("conv2.weight", "proj_out.weight", "conv_out.weight")


def build(spec: UNet = TINY, images: int = 3, outputs: int = 3, classes: int | None = None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return spec.build(images, outputs, classes).eval()


@torch.no_grad()
def redrawn(module: nn.Module, seed: int = 1) -> nn.Module:
    """Every parameter random, of a size that lets each of them be seen in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * math.sqrt(3 / fan_in))
        if name.startswith("conv_in"):
            parameter.mul_(0.01)  # so small that the eps of the norms behind it matters
    return module.eval()


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- size ---


@pytest.mark.parametrize(
    "spec, outputs, parameters, tensors",
    [
        (UNet(dropout=0.1), 3, 35_746_307, 328),
        (UNet(dropout=0.1), 6, 35_749_766, 328),
        (UNet(**LARGE), 3, 113_673_219, 450),
        (UNet(channels=192, **LARGE), 3, 255_677_955, 450),
    ],
    ids=["cifar10", "learned variance", "256", "256 large"],
)
def test_the_published_sizes(spec, outputs, parameters, tensors):
    with torch.device("meta"):
        state = spec.build(3, outputs).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    assert len(state) == tensors


def test_the_cifar_network_block_by_block():
    """The channel table of §1.8: widths in and out of each block, attention on level 1 and in the middle only."""
    with torch.device("meta"):
        network = UNet().build(3, 3)

    def widths(level: nn.Module) -> list[tuple[int, int]]:
        return [(block.conv1.in_channels, block.conv1.out_channels) for block in level.block]

    assert [widths(level) for level in network.down] == [
        [(128, 128), (128, 128)],
        [(128, 256), (256, 256)],
        [(256, 256), (256, 256)],
        [(256, 256), (256, 256)],
    ]
    assert [widths(level) for level in network.up] == [
        [(384, 128), (256, 128), (256, 128)],
        [(512, 256), (512, 256), (384, 256)],
        [(512, 256), (512, 256), (512, 256)],
        [(512, 256), (512, 256), (512, 256)],
    ]
    assert [len(level.attn) for level in network.down] == [0, 2, 0, 0]
    assert [len(level.attn) for level in network.up] == [0, 3, 0, 0]
    assert network.mid["attn_1"].q.in_channels == 256


@pytest.mark.parametrize("attention", [(), (0,), (2,), (0, 1, 2)])
def test_attention_by_level(attention):
    with torch.device("meta"):
        state = UNet(channels=8, multipliers=(1, 1, 1), blocks=2, attention=attention).build(1, 1).state_dict()
    found = {name.rpartition(".q.")[0] for name in state if name.endswith("q.weight")}
    down = {f"down.{level}.attn.{i}" for level in attention for i in range(2)}
    up = {f"up.{level}.attn.{i}" for level in attention for i in range(3)}
    assert found == down | up | {"mid.attn_1"}


# --- initialisation ---


def test_every_weight_is_glorot_uniform_or_nearly_zero():
    """U(−a, a), a = √(6 scale/(fan_in + fan_out)) with scale 1, or 1e-10 at the end of each residual branch."""
    network = build(UNet(channels=32, multipliers=(1, 2), blocks=2, attention=(1,)))
    seen = set()
    for name, value in network.state_dict().items():
        if "norm" in name or name.endswith("bias"):
            expected = torch.ones_like(value) if name.endswith("weight") else torch.zeros_like(value)
            assert torch.equal(value, expected), name
            continue
        area = value[0, 0].numel()
        scale = 1e-10 if name.endswith(NEAR_ZERO) else 1.0
        seen.add((name.split(".")[-2], scale))
        bound = math.sqrt(6 * scale / (area * (value.shape[0] + value.shape[1])))
        assert 0.98 * bound < float(value.abs().max()) <= bound * (1 + 1e-6), name
        assert float(value.std()) == pytest.approx(bound / math.sqrt(3), rel=0.06), name
    ordinary = {"conv_in", "conv1", "temb_proj", "nin_shortcut", "q", "k", "v", "conv", "0", "1"}
    assert seen == {(layer, 1.0) for layer in ordinary} | {
        (layer, 1e-10) for layer in ("conv2", "proj_out", "conv_out")
    }


def test_the_bounds_as_printed():
    network = UNet(channels=128, multipliers=(1,), blocks=1, attention=()).build(3, 3)
    for name, bound in {
        "down.0.block.0.conv1": 0.0510310,
        "down.0.block.0.conv2": 5.103e-7,
        "conv_in": 0.0713376,
        "temb.dense.0": 0.0968246,
    }.items():
        weight = network.get_submodule(name).weight.detach()
        assert float(weight.abs().max()) == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize("spec", [TINY, UNet(channels=32, multipliers=(1, 2), blocks=2, patch=2)])
def test_a_fresh_network_says_nothing(spec):
    with torch.no_grad():
        output = build(spec)(normal(0, 2, 3, 8, 8), torch.tensor([0.0, 999.0]))
    assert 0 < float(output.std()) < 3e-5


# --- parts ---


def test_the_sinusoid_as_printed():
    table = sinusoid(torch.tensor([0.0, 1.0, 999.0]), 128)
    assert torch.equal(table[0], torch.cat([torch.zeros(64), torch.ones(64)]))
    assert table[1, :3].tolist() == pytest.approx([0.84147098, 0.76043874, 0.67905609], abs=1e-7)
    assert float(table[1, 63]) == pytest.approx(1e-4, rel=1e-6)
    assert table[1, 64:67].tolist() == pytest.approx([0.54030231, 0.64940967, 0.73408639], abs=1e-7)
    assert float(table[1, 127]) == pytest.approx(0.999999995, abs=1e-7)
    assert table[2, [63, 127]].tolist() == pytest.approx([0.0997339, 0.9950141], abs=1e-6)
    slow = torch.asin(sinusoid(torch.tensor([1.0]), 128)[0, [1, 31]])
    assert slow.tolist() == pytest.approx([0.863988, 0.0107584], rel=1e-5)


def test_the_sinusoid_of_few_or_odd_channels():
    time = torch.tensor([0.5, 3.0])
    assert torch.equal(sinusoid(time, 7), F.pad(sinusoid(time, 6), (0, 1)))
    assert torch.equal(sinusoid(time, 2), torch.stack([time.sin(), time.cos()], dim=1))
    assert torch.equal(sinusoid(time, 1), torch.zeros(2, 1))


@pytest.mark.parametrize("channels, groups", [(32, 32), (128, 32), (48, 16), (6, 2), (7, 1), (512, 32)])
def test_norm_has_the_authors_groups_and_eps(channels, groups):
    layer = norm(channels)
    assert (layer.num_groups, layer.eps) == (groups, 1e-6)
    x = 1e-3 * normal(1, 2, channels, 3, 5)
    parts = x.double().reshape(2, groups, -1)
    mean, variance = parts.mean(2, keepdim=True), parts.var(2, correction=0, keepdim=True)
    expected = ((parts - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels, groups", [(6, 1), (16, 4), (64, 16), (128, 32), (192, 32)])
def test_a_narrow_network_has_groups_of_four_channels(channels, groups):
    """A group of one channel would subtract what the time embedding adds to it."""
    with torch.device("meta"):
        network = UNet(channels=channels, multipliers=(1, 2), blocks=1, attention=(0,)).build(3, 3)
    found = {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)}
    assert found == {groups}
    assert UNet(channels=channels, groups=2).norm_groups() == 2


def test_downsampling_pads_at_the_bottom_and_the_right():
    """out[i, j] = Σ w[a, b] x[2i + a, 2j + b]: an impulse at (r, c) shows where TF's SAME puts it."""
    layer = redrawn(Downsample(1))
    for row, column in [(0, 0), (0, 5), (3, 2), (4, 4), (5, 7)]:
        x = torch.zeros(1, 1, 6, 8)
        x[0, 0, row, column] = 1
        expected = torch.full((3, 4), layer.conv.bias.item())
        for a in range(3):
            for b in range(3):
                if (row - a) % 2 == 0 and (column - b) % 2 == 0 and row >= a and column >= b:
                    expected[(row - a) // 2, (column - b) // 2] += layer.conv.weight[0, 0, a, b]
        torch.testing.assert_close(layer(x)[0, 0], expected)


def test_upsampling_repeats_pixels_and_then_convolves():
    layer, x = redrawn(Upsample(2)), normal(2, 1, 2, 3, 4)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(layer(x), F.conv2d(repeated, layer.conv.weight, layer.conv.bias, padding=1))
    assert layer(x).shape == (1, 2, 6, 8)


def test_attention_is_the_explicit_softmax():
    layer, x = redrawn(Attention(6)), normal(3, 2, 6, 3, 4)
    h = layer.norm(x).flatten(2)  # (b, c, hw)
    q, k, v = (m.weight[:, :, 0, 0] @ h + m.bias[:, None] for m in (layer.q, layer.k, layer.v))
    weight = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) * 6**-0.5, dim=2)
    mixed = torch.einsum("bqk,bck->bcq", weight, v)
    out = layer.proj_out.weight[:, :, 0, 0] @ mixed + layer.proj_out.bias[:, None]
    torch.testing.assert_close(layer(x), x + out.reshape(x.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inputs, outputs", [(6, 6), (6, 9)])
def test_the_residual_block_by_its_formula(inputs, outputs):
    block, x, embedding = redrawn(ResBlock(inputs, outputs, Style(8, 0.3))), normal(4, 2, inputs, 4, 5), normal(5, 2, 8)
    h = block.conv1(F.silu(block.norm1(x))) + block.temb_proj(F.silu(embedding)).reshape(2, outputs, 1, 1)
    h = block.conv2(F.silu(block.norm2(h)))
    shortcut = x if inputs == outputs else F.conv2d(x, block.nin_shortcut.weight, block.nin_shortcut.bias)
    torch.testing.assert_close(block(x, embedding), shortcut + h)


def test_dropout_is_of_single_values_just_before_the_second_convolution_and_in_training_only():
    block, x, embedding = redrawn(ResBlock(6, 6, Style(8, 0.4))), normal(6, 2, 6, 8, 8), normal(7, 2, 8)
    seen = []
    block.conv2.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    still = block(x, embedding)
    torch.manual_seed(3)
    moved = block.train()(x, embedding)
    kept, dropped = seen
    zero = dropped == 0
    assert 0.3 < float(zero.float().mean()) < 0.5
    assert not zero.flatten(2).all(2).any() and not (~zero).flatten(2).all(2).any()  # never a whole channel
    torch.testing.assert_close(dropped[~zero], kept[~zero] / (1 - round(0.4 * 65536) / 65536))  # 16 random bits a value
    assert not torch.equal(still, moved)
    assert torch.equal(block.eval()(x, embedding), still)


def test_dropout_is_in_every_residual_block():
    network = build(UNet(channels=8, multipliers=(1, 1), blocks=2, attention=(), dropout=0.25))
    blocks = [module for module in network.modules() if isinstance(module, ResBlock)]
    assert len(blocks) == 4 + 2 + 6
    assert {block.dropout.p for block in blocks} == {0.25}
    assert len([module for module in network.modules() if isinstance(module, nn.Dropout)]) == len(blocks)


# --- the whole ---


def flat_unet(w: dict[str, torch.Tensor], spec: UNet, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The network a second time, from its weights by name alone: §1.1 of the authors' code, line by line."""

    def conv(name: str, h: torch.Tensor, **how: int) -> torch.Tensor:
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **how)

    def dense(name: str, h: torch.Tensor) -> torch.Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def group_norm(name: str, h: torch.Tensor) -> torch.Tensor:
        groups = math.gcd(spec.norm_groups(), h.shape[1])
        return F.group_norm(h, groups, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def res(name: str, h: torch.Tensor) -> torch.Tensor:
        y = conv(f"{name}.conv1", F.silu(group_norm(f"{name}.norm1", h)), padding=1)
        y = y + dense(f"{name}.temb_proj", F.silu(embedding))[:, :, None, None]
        y = conv(f"{name}.conv2", F.silu(group_norm(f"{name}.norm2", y)), padding=1)
        return y + (conv(f"{name}.nin_shortcut", h) if f"{name}.nin_shortcut.weight" in w else h)

    def attend(name: str, h: torch.Tensor) -> torch.Tensor:
        y = group_norm(f"{name}.norm", h)
        q, k, v = (conv(f"{name}.{part}", y).flatten(2) for part in "qkv")
        y = v @ torch.softmax(q.transpose(1, 2) @ k * h.shape[1] ** -0.5, dim=2).transpose(1, 2)
        return h + conv(f"{name}.proj_out", y.reshape(h.shape))

    half = spec.channels // 2
    angle = time[:, None] * torch.tensor([10000 ** (-j / (half - 1)) for j in range(half)])
    embedding = dense("temb.dense.0", torch.cat([angle.sin(), angle.cos()], 1))
    embedding = dense("temb.dense.1", F.silu(embedding))

    levels = range(len(spec.multipliers))
    stack = [conv("conv_in", F.pixel_unshuffle(x, spec.patch), padding=1)]
    for level in levels:
        for i in range(spec.blocks):
            h = res(f"down.{level}.block.{i}", stack[-1])
            stack.append(attend(f"down.{level}.attn.{i}", h) if level in spec.attention else h)
        if level != levels[-1]:
            stack.append(conv(f"down.{level}.downsample.conv", F.pad(stack[-1], (0, 1, 0, 1)), stride=2))
    h = res("mid.block_2", attend("mid.attn_1", res("mid.block_1", stack[-1])))
    for level in reversed(levels):
        for i in range(spec.blocks + 1):
            h = res(f"up.{level}.block.{i}", torch.cat([h, stack.pop()], 1))
            h = attend(f"up.{level}.attn.{i}", h) if level in spec.attention else h
        if level != 0:
            h = conv(f"up.{level}.upsample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    assert not stack
    return F.pixel_shuffle(conv("conv_out", F.silu(group_norm("norm_out", h)), padding=1), spec.patch)


@pytest.mark.parametrize(
    "spec, images, outputs, height, width",
    [
        (TINY, 3, 3, 8, 12),
        (TINY, 5, 7, 4, 4),
        (UNet(channels=6, multipliers=(1, 2), blocks=2, attention=(0, 1), patch=2), 1, 2, 8, 16),
        (UNet(channels=10, multipliers=(2,), blocks=1, attention=()), 2, 2, 5, 3),
    ],
)
@torch.no_grad()
def test_the_whole_network_written_a_second_time(spec, images, outputs, height, width):
    network = redrawn(build(spec, images, outputs))
    x, time = normal(8, 3, images, height, width), torch.tensor([0.0, 17.0, 999.0])
    found = network(x, time)
    assert found.shape == (3, outputs, height, width)
    assert 0.5 < float(found.std()) < 10
    torch.testing.assert_close(found, flat_unet(network.state_dict(), spec, x, time), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["swap q and k", "swap q and v", "eps", "padding", "time"])
@torch.no_grad()
def test_the_comparison_can_fail(change):
    network = redrawn(build())
    x, time = normal(8, 3, 3, 8, 12), torch.tensor([0.0, 17.0, 999.0])
    w = network.state_dict()
    expected = flat_unet(w, TINY, x, time)
    if change == "time":
        time = time / 1000
    if change == "padding":
        for level in network.down[:-1]:
            level.downsample.forward = lambda x, m=level.downsample: F.conv2d(
                x, m.conv.weight, m.conv.bias, stride=2, padding=1
            )
    if change.startswith("swap"):
        attention = network.mid["attn_1"]
        other = change[-1]
        first, second = getattr(attention, other), attention.q
        attention.q = first
        setattr(attention, other, second)
    if change == "eps":
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = 1e-5  # torch's default
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(network(x, time), expected, rtol=1e-4, atol=1e-4)


def test_each_image_has_its_own_time():
    network, x = redrawn(build()), normal(9, 1, 3, 8, 8)
    with torch.no_grad():
        one, two = (network(x, torch.tensor([t])) for t in (3.0, 400.0))
        both = network(x.expand(2, -1, -1, -1), torch.tensor([3.0, 400.0]))
    assert float((one - two).abs().max()) > 0.1
    torch.testing.assert_close(both, torch.cat([one, two]), rtol=1e-4, atol=1e-4)


def test_every_parameter_has_a_gradient():
    network = redrawn(build(classes=2))
    told = Conditioning(torch.tensor([0, 2]))
    network(normal(10, 2, 3, 8, 8), torch.tensor([1.0, 2.0]), told).square().sum().backward()
    flat = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # A key's bias shifts all logits of a query alike, which softmax does not see.
    assert all(name.endswith("k.bias") for name in flat)


def test_a_label_changes_the_output_and_the_last_row_is_none():
    network = redrawn(build(classes=3))
    x, time = normal(11, 2, 3, 8, 8), torch.tensor([5.0, 5.0])
    with torch.no_grad():
        labels = [None if c is None else torch.full((2,), c) for c in (None, 0, 1, 2, 3)]
        answers = [network(x, time, Conditioning(label)) for label in labels]
    assert torch.equal(answers[0], answers[4])
    for i in range(1, 5):
        for j in range(1, i):
            assert float((answers[i] - answers[j]).abs().max()) > 0.01


def test_the_stride():
    assert UNet().stride() == 8
    assert UNet(**LARGE).stride() == 32
    assert UNet(multipliers=(1,), attention=(0,), patch=4).stride() == 4


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"multipliers": ()}, r"network unet: multipliers is empty; give one a level, for example \[1, 2, 2\]"),
        (
            {"attention": (4,)},
            r"attention \[4\] names a level that is not there; 4 multipliers make levels \[0, 1, 2, 3\]",
        ),
        ({"attention": (-1,)}, r"attention \[-1\] names a level that is not there"),
    ],
)
def test_levels_that_are_not_there_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        UNet(**fields)
