"""What a card would show, asked without one: a pretended torch.cuda, the device without data, gloo, and a compiler."""

import ctypes
import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.machine.test_dist import fit, losses, preset
from tests.training.test_loop import assert_equal, recipe, run, state
from undiffuse.config import to_toml
from undiffuse.errors import UsageError
from undiffuse.machine import device as machine
from undiffuse.machine import dist
from undiffuse.machine.device import WORKSPACE, choose, driver, full_precision, repeatable, use_tf32, versions
from undiffuse.network.attention import Attention
from undiffuse.training.plan import advice
from undiffuse.training.resume import differences
from undiffuse.training.start import train
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
    with pytest.raises(UsageError, match="train.precision = tf32 is for cards of NVIDIA, and this is cpu; give"):
        chosen = recipe(train={"precision": "tf32"})
        Trainer(chosen, chosen.model(data.image_shape), data)


def test_a_card_is_recorded_and_a_resume_on_it_is_exact_only_if_deterministic(data, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(machine, "driver", lambda: "550.54.15")
    told = {"cuda": torch.version.cuda, "cudnn": 91002, "driver": "550.54.15", "tf32": True}
    assert versions(torch.device("cuda:0")) == told
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
    config = recipe(train={"precision": "float32"}).train
    (said,) = advice(config, torch.device("cuda:0"))
    assert "--set train.precision=auto (bf16) or tf32" in said
    assert (
        advice(config, torch.device("cpu")) == advice(replace(config, precision="bf16"), torch.device("cuda:0")) == []
    )


def test_features_are_exact_also_in_a_run_of_tf32():
    """Their products too, and the run goes on as it was."""
    both = torch.backends.cuda.matmul, torch.backends.cudnn
    with full_precision():  # which puts back what a test leaves
        use_tf32(True)
        with full_precision():
            assert [each.allow_tf32 for each in both] == [False, False]
        assert [each.allow_tf32 for each in both] == [True, True]


def test_the_driver_is_told_by_its_own_library_or_not_at_all(monkeypatch):
    class Library:
        """NVML with a version, as ctypes would open it."""

        def nvmlInit_v2(self):
            return 0

        def nvmlSystemGetDriverVersion(self, text, length):
            text.value = b"550.54.15"
            return 0 if length >= 80 else 7

        def nvmlShutdown(self):
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    assert driver.__wrapped__() == "550.54.15"
    monkeypatch.setattr(Library, "nvmlSystemGetDriverVersion", lambda self, text, length: 3)
    assert driver.__wrapped__() is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: open(f"no {name}"))
    assert driver.__wrapped__() is None


def flags() -> tuple:
    """All that a run may set for the whole process."""
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
        os.environ.get(WORKSPACE),
    )  # fmt: skip


@pytest.mark.parametrize("given", [None, ":4096:8", ":16:8", ":4096:2"])
def test_determinism_is_set_and_undone_also_after_an_error(monkeypatch, given):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv(WORKSPACE, raising=False)
    if given is not None:
        monkeypatch.setenv(WORKSPACE, given)
    before = flags()
    with pytest.raises(KeyError), repeatable(torch.device("cuda:0"), used=False):
        expected = given if given in (":4096:8", ":16:8") else ":4096:8"
        assert flags() == (True, False, False, *before[3:5], expected)
        raise KeyError
    assert flags() == (*before[:5], expected)  # cuBLAS has read it, so that another run of this process may begin
    with repeatable(torch.device("cuda:0"), used=True):
        pass
    monkeypatch.delenv(WORKSPACE)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with repeatable(torch.device("cpu"), used=True):
            assert flags()[:2] == (True, False) and WORKSPACE not in os.environ
        assert flags()[:2] == (True, True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("given, told", [(None, "none"), (":4096:2", ":4096:2")])
def test_determinism_that_would_come_too_late_is_refused(monkeypatch, given, told):
    monkeypatch.delenv(WORKSPACE, raising=False)
    if given is not None:
        monkeypatch.setenv(WORKSPACE, given)
    before = flags()
    said = f"needs {WORKSPACE}=:4096:8 before a card is used, and this process has used one with {told}; set it before "
    with pytest.raises(UsageError, match=f"train.deterministic {said}Python starts, or train by the command line"):
        repeatable(torch.device("cuda:0"), used=True).__enter__()
    assert flags() == before
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with repeatable(torch.device("cuda:0"), used=True):
        assert os.environ[WORKSPACE] == ":16:8"


class Stop(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_no_flag_behind(tmp_path, data, monkeypatch, fails):
    whole, seen = Trainer.update, []

    def update(self, last, *vote):
        seen.append(torch.are_deterministic_algorithms_enabled())
        if fails:
            raise Stop
        return whole(self, last)

    monkeypatch.setattr(Trainer, "update", update)
    before = flags()
    with pytest.raises(Stop) if fails else nullcontext():
        run(recipe(train={"precision": "float32", "deterministic": True, "steps": 1}), data, tmp_path)
    assert seen == [True] and flags() == before
    chosen = recipe(train={"precision": "float32", "deterministic": True})
    Trainer(chosen, chosen.model((1, 8, 8)), data)
    assert flags() == before  # nor does a trainer


def test_tf32_is_undone(data):
    chosen = recipe(train={"precision": "float32"})
    trainer = Trainer(chosen, chosen.model((1, 8, 8)), data)
    trainer.device = torch.device("cuda:0")
    with full_precision():
        before = flags()
        for precision, on in (("tf32", True), ("bf16", False)):
            trainer.recipe = recipe(train={"precision": precision})
            use_tf32(not on)
            with trainer.computing(used_card=True):
                assert flags()[3:5] == (on, on)
            assert flags()[3:5] == (not on, not on)
        use_tf32(False)
        assert flags() == before


def test_whether_a_card_was_used_is_asked_before_the_run_uses_one(tmp_path, data, monkeypatch):
    """Choosing it uses it; a session that had done so before is refused, by either way to train, and writes nothing."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    used, asked, whole = [False], [], Trainer.computing
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used[0])
    monkeypatch.setattr(machine, "choose", lambda name: used.__setitem__(0, True) or torch.device("cpu"))
    monkeypatch.setattr(Trainer, "computing", lambda self, used: asked.append(used) or whole(self, used))
    chosen = recipe(train={"precision": "float32", "deterministic": True, "steps": 1})
    path = tmp_path / "preset.toml"
    path.write_text(to_toml(chosen))
    for number, before in enumerate((False, True)):
        used[0] = before
        run(chosen, data, tmp_path / f"loop{number}")
        used[0] = before
        train(data, tmp_path / f"start{number}", path, say=lambda text: None, show_progress=False)
    assert asked == [False, False, True, True]
