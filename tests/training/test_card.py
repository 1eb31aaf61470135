"""What a card would show, asked without one: a pretended torch.cuda, the device without data, gloo, and a compiler."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.machine.test_dist import fit, losses, preset
from tests.training.test_loop import assert_equal, recipe, state
from undiffuse.errors import UsageError
from undiffuse.machine import dist
from undiffuse.machine.device import choose, full_precision, use_tf32, versions
from undiffuse.network.attention import Attention
from undiffuse.training.plan import advice
from undiffuse.training.resume import differences
from undiffuse.training.trainer import Trainer


def cards(monkeypatch, count: int) -> list[torch.device]:
    """As if there were so many; the list of those that are made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose() == choose("auto") == torch.device("cpu")
    tried: list[torch.device] = []
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: tried.append(device))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose().type == "mps"
    current = cards(monkeypatch, 2)
    assert choose() == torch.device("cuda:0")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert choose("cuda:1") == tried[-1] == current[-1] == torch.device("cuda:1")
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is False
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose() == choose("cuda") == tried[-1] == torch.device("cuda:1")
    count = len(current)
    assert choose("cpu") == torch.device("cpu") and len(current) == count


def test_more_processes_than_cards_are_refused(monkeypatch):
    cards(monkeypatch, 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    said = r"process 1 of this machine has no card of its own, because there is 1; start at most 1 on each machine "
    with pytest.raises(UsageError, match=said + r"\(--nproc-per-node 1\), or give --device cpu"):
        choose("cuda")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_off_the_cpu_gives_fused_kernels_the_rows_that_they_take(monkeypatch, layout):
    """Their last stride must be 1, and they have no mask; on the device without data, `meta`."""
    seen, whole = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *each: seen.extend(each) or whole(*each))
    layer = Attention(64, head=32).to("meta")
    out = layer(torch.zeros(2, 64, 4, 5, device="meta").to(memory_format=layout))
    assert out.shape == (2, 64, 4, 5)
    assert [each.shape for each in seen] == [(4, 1, 20, 32)] * 3 and all(each.is_contiguous() for each in seen)


def test_a_process_of_several_is_given_no_card_that_it_may_not_want(monkeypatch):
    """With --device cpu there may be more of them than cards; `choose` takes one where it is wanted."""
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("a card was chosen"))
    monkeypatch.setattr(dist.group, "new_group", lambda **how: None)
    monkeypatch.setattr(dist.group, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist.group, "init_process_group", lambda backend, **how: asked.append(backend))
    for there in (True, False):
        monkeypatch.setattr(dist.group, "is_nccl_available", lambda there=there: there)
        with dist.joined():
            pass
    assert asked == ["cpu:gloo,cuda:nccl", "gloo"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_compiled_network_is_trained_the_same_and_resumed_exactly(tmp_path, processes):
    eager, compiled = (preset(tmp_path, steps=4, compile=each) for each in (False, True))
    for out, name, lives in (("eager", eager, ("4",)), ("once", compiled, ("4",)), ("twice", compiled, ("2", "4"))):
        for last in lives:
            ended = fit(processes, tmp_path / out, name, "--steps", last)
            assert [code for code, _, _ in ended] == [0] * processes, ended
    assert losses(tmp_path / "once") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    assert_equal(state(tmp_path / "once", 4), state(tmp_path / "twice", 4))


def test_tf32_is_refused_where_there_is_none(data):
    with pytest.raises(UsageError, match="train.precision = tf32 is for cards of NVIDIA, and this run is on cpu; set"):
        chosen = recipe(train={"precision": "tf32"})
        Trainer(chosen, chosen.model(data.image_shape), data)


def test_a_card_is_recorded_and_a_resume_on_it_is_exact_only_if_deterministic(data, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert versions(torch.device("cuda:0")) == {"cuda": torch.version.cuda, "cudnn": 91002, "tf32": True}
    assert versions(torch.device("cpu")) == {}
    inexact = ["choices of algorithms (train.deterministic is off, and this is a card)"]
    for deterministic, said in ((False, inexact), (True, [])):
        chosen = recipe(train={"precision": "float32", "decay": "constant"})
        trainer = Trainer(chosen, chosen.model(data.image_shape), data)
        meta = trainer.meta()
        assert differences(meta, trainer, 6) == []
        trainer.device = torch.device("cuda:0")
        trainer.recipe = recipe(train={"precision": "float32", "decay": "constant", "deterministic": deterministic})
        monkeypatch.setattr(trainer, "environment", lambda meta=meta: meta["environment"])
        assert differences(meta, trainer, 6) == said


def test_a_run_on_a_card_is_told_what_would_make_it_faster():
    train = recipe(train={"precision": "float32"}).train
    (said,) = advice(train, torch.device("cuda:0"))
    assert "--set train.precision=auto (bf16) or tf32" in said
    assert advice(train, torch.device("cpu")) == advice(replace(train, precision="bf16"), torch.device("cuda:0")) == []


def test_features_are_exact_also_in_a_run_of_tf32():
    """Their products too, and the run goes on as it was."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    with full_precision():  # which puts back what a test leaves
        use_tf32(True)
        with full_precision():
            assert [each.allow_tf32 for each in flags] == [False, False]
        assert [each.allow_tf32 for each in flags] == [True, True]
