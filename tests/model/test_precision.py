"""What a network computes in when it draws and measures; all around it is float32."""

import json
from dataclasses import replace

import pytest
import torch

from tests.measure.test_nll import model
from undiffuse.data.source import ArraySource
from undiffuse.diffusion.likelihood import Terms
from undiffuse.errors import UsageError
from undiffuse.machine import device as machine
from undiffuse.machine.device import full_precision, use_tf32
from undiffuse.measure import flow, nll, sets
from undiffuse.measure.flow import Ode
from undiffuse.measure.nll import Nll, terms_of
from undiffuse.measure.sets import Drawing
from undiffuse.model.model import Model

PICTURES = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def toy() -> Model:
    return model()


@pytest.fixture(scope="module")
def source() -> ArraySource:
    return ArraySource(PICTURES)


def types(one: Model) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Of what goes through the convolutions of a drawn chain, and of what a denoiser says."""
    inside, said, hooks = set(), set(), []
    for module in one.denoiser.network.modules():
        if isinstance(module, torch.nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda module, given, found: inside.add(found.dtype)))
    hooks.append(one.denoiser.register_forward_hook(lambda module, given, found: said.update((found[0].dtype,))))
    one.sample(2, steps=3, solver="ddim")
    for hook in hooks:
        hook.remove()
    return inside, said


def test_the_network_computes_in_it_and_the_chain_in_float32(toy):
    """bf16 has 8 bits: images are off by little, but they are off; back in float32 they are what they were."""
    exact, half = toy.sample(4), toy.variant(precision="bf16")
    assert types(half) == ({torch.bfloat16}, {torch.float32}) and types(toy) == ({torch.float32}, {torch.float32})
    off = (half.sample(4).int() - exact.int()).abs()
    assert 0 < off.max() and off.float().mean() < 3
    assert half.precision == "bf16" and half.variant(clip=False).precision == "bf16"
    assert types(half.variant(clip=False))[0] == {torch.bfloat16}
    assert torch.equal(half.variant(precision="float32").sample(4), exact)


def test_tf32_is_on_while_the_network_computes_and_at_no_other_time(toy):
    on_card = replace(toy, device=torch.device("cuda:0"), precision="float32").variant(precision="tf32")
    seen = []
    on_card.denoiser.network.register_forward_pre_hook(
        lambda *given: seen.append(torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32)
    )
    with full_precision():
        use_tf32(False)
        on_card.denoiser(torch.zeros(1, 1, 8, 8), torch.ones(1, dtype=torch.float64))
        assert seen == [True] and not torch.backends.cudnn.allow_tf32


def test_auto_is_what_the_processor_is_faster_with(toy, monkeypatch):
    for native, card, cpu in ((True, "bf16", "bf16"), (False, "float16", "float32")):
        monkeypatch.setattr(machine, "native_bf16", lambda device, native=native: native)
        assert replace(toy, device=torch.device("cuda:0")).variant(precision="auto").precision == card
        assert toy.variant(precision="auto").precision == cpu


@pytest.mark.parametrize("seconds, pays", [(0.5, True), (0.8, True), (0.9, False), (2.0, False)])
def test_instructions_for_bf16_that_are_slower_are_not_taken(monkeypatch, seconds, pays):
    """By a clock that only products move; a float32 one takes a second, but for one that another process disturbed."""
    clock, taken, whole = [0.0], iter([9.0] * 15 + [1.0] * 5), torch.mm

    def mm(a, b):
        clock[0] += seconds if a.dtype == torch.bfloat16 else next(taken)
        return whole(a, b)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(machine.time, "thread_time", lambda: clock[0])
    assert machine.bf16_pays.__wrapped__() is pays
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(machine, "bf16_pays", lambda: pays)
    assert machine.native_bf16(torch.device("cpu")) is pays
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not machine.native_bf16(torch.device("cpu"))


@pytest.mark.parametrize(
    "name, said",
    [
        ("float16", r"precision float16 is for cards \(cuda\), and this is cpu; give float32, bf16 or auto"),
        ("tf32", "precision tf32 is for cards of NVIDIA, and this is cpu; give float32 or auto"),
        ("half", 'precision "half" is not known'),
    ],
)
def test_what_a_device_has_not_is_refused(toy, name, said):
    with pytest.raises(UsageError, match=said):
        toy.variant(precision=name)


def test_a_measurement_says_it_and_does_not_mix_it(toy, source, tmp_path):
    half, query = toy.variant(precision="bf16"), Nll(3, draws=2)
    terms = [terms_of(each, source, query, tmp_path / each.precision) for each in (toy, half)]
    assert isinstance(terms[0], Terms) and (terms[0].bits != terms[1].bits).any()
    found = [nll.summary(each, one, source, query) for each, one in zip(terms, (toy, half), strict=True)]
    assert "precision" not in found[0] and found[1]["precision"] == "bf16"
    assert found[0]["bits_per_dim"] == pytest.approx(found[1]["bits_per_dim"], rel=0.05)
    assert json.loads((tmp_path / "bf16" / "summary.json").read_text())["precision"] == "bf16"
    for one, folder in ((toy, "bf16"), (half, "float32")):
        with pytest.raises(UsageError, match=f"{folder} holds another measurement .other precision."):
            terms_of(one, source, query, tmp_path / folder)


def test_the_ode_is_float32(toy, source):
    with pytest.raises(UsageError, match="the ODE is solved in float32, and this model computes in bf16; leave that"):
        flow.terms_of(toy.variant(precision="bf16"), source, Ode(2))


def test_an_evaluation_has_it_in_its_protocol_and_keeps_its_images_apart(toy):
    half, how = toy.variant(precision="bf16"), Drawing(2, "ddim", None, None)
    exact, other = (sets.drawn_by(each, how, 4, 0) for each in (toy, half))
    assert exact.digest != other.digest
    assert "precision" not in exact.said and other.said["precision"] == "bf16"
    assert "bf16" in repr(sets.said_of(half, "half")) and "float32" in repr(sets.said_of(toy, "exact"))
