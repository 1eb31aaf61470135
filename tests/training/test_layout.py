"""Layouts of memory: which is faster, and that what is updated beside a weight lies as it does; no file does."""

import shutil

import pytest
import torch

from tests.training.test_loop import assert_equal, recipe, run, state
from undiffuse.errors import Corrupt, UsageError
from undiffuse.machine import disk, dist, store
from undiffuse.machine.tensorfile import encode
from undiffuse.training import layout
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


class Measured:
    """In place of the clock: rates of each layout, and how often they were asked for."""

    def __init__(self, monkeypatch, plain: float, channels_last: float):
        self.rates, self.asked = {"plain": plain, "channels_last": channels_last}, 0
        monkeypatch.setattr(layout, "measured", self)

    def __call__(self, config, precision, images, device):
        self.asked += 1
        return self.rates


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "layout"


def wanted(precision: str = "float32", micro: int = 8, **network):
    config = recipe(network=network).model((1, 8, 8))
    return layout.wants_channels_last(config, precision, micro, torch.device("cpu"))


@pytest.mark.parametrize(("channels_last", "answer"), [(130.0, True), (101.0, False), (60.0, False)])
def test_the_faster_layout_is_measured_once_and_kept(cache, monkeypatch, channels_last, answer):
    """By 3 % at least: moving images about must bring something."""
    clock = Measured(monkeypatch, 100.0, channels_last)
    taken, ratio = str(answer).lower(), channels_last / 100
    told = f"train.channels_last = {taken}: with it a step is {ratio:.2f} times as fast as without, measured once for"
    assert wanted() == wanted() == (answer, f"{told} this machine")
    assert clock.asked == 1 and len(list(cache.iterdir())) == 1
    for other in ({"precision": "bf16"}, {"micro": 4}, {"channels": 16}):
        wanted(**other)
    assert clock.asked == 4 and len(list(cache.iterdir())) == 4
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    wanted()
    assert clock.asked == 5


def test_both_layouts_are_run(cache):
    """Without anything in place of the clock; with classes too."""
    config = recipe(data={"labels": True}).model((1, 8, 8), 10)
    layout.wants_channels_last(config, "float32", 64, torch.device("cpu"))
    (found,) = [disk.read_json(path) for path in cache.iterdir()]
    assert found["images"] == 16 and found["plain"] > 0 and found["channels_last"] > 0
    assert found["processor"] == layout.processor() and found["torch"] == torch.__version__


def test_a_large_image_is_measured_alone(cache, monkeypatch):
    seen = []
    rates = {"plain": 1.0, "channels_last": 1.0}
    monkeypatch.setattr(layout, "measured", lambda config, precision, images, device: seen.append(images) or rates)
    for side in (16, 64, 256):
        layout.wants_channels_last(recipe().model((1, side, side)), "float32", 128, torch.device("cpu"))
    assert seen == [16, 4, 1]


def test_a_damaged_answer_is_named(cache, monkeypatch):
    Measured(monkeypatch, 1.0, 2.0)
    wanted()
    (path,) = cache.iterdir()
    path.write_text('{"plain": 1.0}')
    with pytest.raises(Corrupt, match=f"{path.name} is damaged: it does not say how fast both layouts are; remove it"):
        wanted()


def test_without_a_home_it_is_measured_each_time(monkeypatch):
    def nowhere():
        raise UsageError("there is no home folder to keep things in")

    clock = Measured(monkeypatch, 1.0, 2.0)
    monkeypatch.setattr(disk, "cache_folder", nowhere)
    assert wanted()[0] and wanted()[0] and clock.asked == 2


def test_a_cache_that_cannot_be_written_stops_no_run(cache, monkeypatch):
    Measured(monkeypatch, 1.0, 2.0)
    cache.parent.write_text("a file where the folder should be")
    answer, told = wanted()
    assert answer and told.endswith(f"times as fast as without, which could not be kept in {cache} for the next run")


def test_a_run_keeps_the_layout_that_it_began_with(cache, monkeypatch, tmp_path, data):
    """Its bits are those of that layout, whatever would be measured when it goes on."""
    Measured(monkeypatch, 1.0, 2.0)

    def chosen(channels_last: bool | str, steps: int):
        return recipe(train={"precision": "float32", "channels_last": channels_last, "steps": steps})

    run(chosen("auto", 1), data, tmp_path / "run")
    assert "channels_last = true" in (tmp_path / "run" / "config.toml").read_text()
    shutil.rmtree(cache)
    clock = Measured(monkeypatch, 2.0, 1.0)
    run(chosen("auto", 2), data, tmp_path / "run")
    run(chosen(True, 2), data, tmp_path / "other")
    assert clock.asked == 0
    assert_equal(state(tmp_path / "run", 2), state(tmp_path / "other", 2))
