"""Layouts of memory: what is updated beside a weight lies as it does, so that one kernel takes all; no file does."""

import pytest
import torch

from tests.training.test_loop import recipe, run, state
from undiffuse.machine import dist, store
from undiffuse.machine.tensorfile import encode
from undiffuse.training.trainer import Trainer


def made(data, **train) -> Trainer:
    chosen = recipe(train={"precision": "float32", "channels_last": True, "ema_profiles": [0.1], **train})
    return Trainer(chosen, chosen.model((1, 8, 8)), data)


def beside(one: Trainer) -> dict[str, list[torch.Tensor]]:
    """What is updated beside the weights, each list in their order."""
    moments = {
        name: [one.optimizer.state[weight][name] for weight in one.weights] for name in ("exp_avg", "exp_avg_sq")
    }
    gradients = [weight.grad for weight in one.weights if weight.grad is not None]
    return {"ema": one.ema.shadow, "profile": one.profiles.shadows[0.1], **moments, "gradient": gradients}


def assert_alike(one: Trainer) -> None:
    """What torch asks of lists for its kernel of many tensors: the same strides, type and device, and no holes."""
    assert any(not weight.is_contiguous() for weight in one.weights)
    for name, tensors in beside(one).items():
        for weight, tensor in zip(one.weights, tensors, strict=name != "gradient"):
            assert tensor.stride() == weight.stride(), name
            assert (tensor.dtype, tensor.device, tensor.shape) == (weight.dtype, weight.device, weight.shape)
            assert torch.ops.aten.is_non_overlapping_and_dense(tensor)


def test_averages_and_moments_lie_as_their_weights(data):
    one = made(data)
    for weight, shadow in zip(one.weights, one.ema.shadow, strict=True):
        assert shadow.stride() == weight.stride()
    one.update(6)
    assert_alike(one)


def test_they_still_do_after_a_resume(data, tmp_path, monkeypatch):
    """Restored from a file, whose tensors are contiguous; and as a process that is sent them has them."""
    one = made(data)
    one.update(6)
    with store.Run(tmp_path).lock() as held:
        held.save(1, one.tensors(), one.meta())
    other = made(data, seed=1)
    other.restore(store.Run(tmp_path).load(1)[0], 1)
    one.optimizer.zero_grad()
    assert_alike(other)
    other.update(6)
    assert_alike(other)
    sent = made(data)
    monkeypatch.setattr(dist, "decide", lambda number: 1)
    sent.share_state()
    assert_alike(sent)


def test_files_have_the_same_bytes_in_either_layout(data):
    plain, last = made(data, channels_last=False), made(data)
    for part, named in plain.tensors().items():
        assert encode(named) == encode(last.tensors()[part])


@pytest.mark.slow
def test_a_checkpoint_of_one_layout_is_read_in_the_other(tmp_path, data):
    run(recipe(train={"precision": "float32", "channels_last": True, "steps": 1}), data, tmp_path)
    saved, one = store.Run(tmp_path).load(1)[0], made(data, channels_last=False, ema_profiles=[])
    one.restore(saved, 1)
    found = {f"{part}/{name}": tensor for part, named in one.tensors().items() for name, tensor in named.items()}
    assert all(torch.equal(tensor, found[name]) for name, tensor in state(tmp_path, 1).items())
    assert all(tensor.is_contiguous() for tensor in found.values())
