"""Where a step's time goes: on a pretended card by its own clock, and after all that is compiled has been."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests import warm
from tests.machine.test_dist import finish, preset, start
from tests.training.test_loop import recipe
from undiffuse.machine import dist
from undiffuse.timing import stage, timed
from undiffuse.training import profile
from undiffuse.training.profile import PARTS, compilations, measure
from undiffuse.training.trainer import Trainer

WORK = {"data": 1, "forward": 30, "noise": 5, "backward": 60, "clip": 2, "optimizer": 3, "ema": 4}  # ms of the card


class Card:
    """Its clock, which stands at the end of all that was queued, and the processor's, which queues and waits."""

    def __init__(self, monkeypatch):
        self.queued, self.now = 0.0, 0.0
        card = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(card.queued, card.now)

            def elapsed_time(self, end):
                return 1000 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(profile.time, "perf_counter", lambda: self.now)

    def queue(self, ms):
        self.queued = max(self.queued, self.now) + ms / 1000
        self.now += 0.0001  # what it takes to start it

    def wait(self):
        self.now = max(self.queued, self.now)


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


def a_step(card, last=6):
    """As that of `Trainer`, with noise inside the forward pass and the wait behind the clip."""
    with stage("data"):
        card.queue(WORK["data"])
    with stage("forward"):
        with stage("noise"):
            card.queue(WORK["noise"])
        card.queue(WORK["forward"] - WORK["noise"])
    for name in ("backward", "clip"):
        with stage(name):
            card.queue(WORK[name])
    card.wait()
    card.now += 0.007  # the copy, the vote
    for name in ("optimizer", "ema"):
        with stage(name):
            card.queue(WORK[name])


def test_on_a_card_each_part_has_the_time_of_its_own_work(card):
    """The processor queues a step in less than a millisecond and waits a hundred behind the clip."""
    with timed() as passed:
        for _ in range(3):
            a_step(card)
        seconds = passed.seconds()
    assert seconds == pytest.approx({name: 3 * ms / 1000 for name, ms in WORK.items()}, abs=5e-4)
    assert card.now == pytest.approx(3 * (sum(WORK.values()) - WORK["noise"] + 7) / 1000, abs=3e-3)


def test_nothing_is_timed_unless_it_is_asked_for(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: pytest.fail("an event was made"))
    a_step(card)
    with timed():
        pass
    a_step(card)


def test_a_profile_on_a_card_adds_up(card, monkeypatch):
    """The parts, and as the rest what the card waits; operators by the card's time, compiled ones too."""
    events = [
        ("aten::mm", 9e5, 2e5),
        ("aten::cat", 8e5, 1e5),
        ("triton_poi_fused_add_0", 0.0, 3e5),
        ("undiffuse clip", 1e6, 1e6),
        ("cudaStreamSynchronize", 9e6, 0.0),
    ]

    class Profiler:
        def __init__(self, activities):
            assert len(activities) == 2

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def key_averages(self):
            names = ("key", "self_cpu_time_total", "self_device_time_total")
            each = [dict(zip(names, event, strict=True)) for event in events]
            return [SimpleNamespace(**event, cpu_time_total=event["self_cpu_time_total"]) for event in each]

    monkeypatch.setattr(profile, "profile", Profiler)
    monkeypatch.setattr(profile.device, "peak_bytes", lambda device: 10**9)
    found = measure(pretended("cuda", lambda last: a_step(card, last)), lambda: None, 6, 10**9)
    rows = {name: ms for name, ms, _ in found.rows()}
    expected = {**WORK, "forward": WORK["forward"] - WORK["noise"], "rest": 7}
    assert {name: rows[name] for name in expected} == pytest.approx(expected, abs=0.5)
    assert sum(rows[name] for name in expected) == pytest.approx(1000 * found.step)
    assert found.operators == pytest.approx({"triton_poi_fused_add_0": 0.03, "mm": 0.02, "cat": 0.01})
    assert found.warm_up == 5 and "compiled" not in found.plain() and "measured after 5 steps" in str(found)


def pretended(device, update) -> Trainer:
    trainer = Trainer.__new__(Trainer)
    trainer.recipe, trainer.device, trainer.update = recipe(), torch.device(device), update
    return trainer


def warmed(monkeypatch, seconds, made) -> int:
    """The steps that it takes where fives of steps take so long and so much was compiled after each."""
    now, steps = [0.0], []

    def step(last):
        now[0] += seconds[min(len(steps) // 5, len(seconds) - 1)] / 5
        steps.append(last)

    monkeypatch.setattr(profile.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(
        profile, "compilations", lambda trainer: made and {"graphs": made[min(len(steps) // 5, len(made) - 1)]}
    )
    assert profile._warm_up(pretended("cpu", step), 6) == len(steps)
    return len(steps)


@pytest.mark.parametrize(
    "seconds, made, steps",
    [
        ([9, 5, 1], None, 5),  # not compiled
        ([90, 1.0, 1.05], [0, 3], 15),
        ([90, 1.0, 1.0], [0, 3, 3, 4], 20),  # compiled again in the third five
        ([90, 4.0, 3.0, 2.0, 1.9], [0, 3], 25),
        ([1.0, 2.0] * 20, [0, 3], 60),
    ],
)
def test_a_compiled_network_is_measured_when_its_steps_have_settled(monkeypatch, seconds, made, steps):
    assert warmed(monkeypatch, seconds, made) == steps


def test_process_0_says_for_all_when_they_have_settled(monkeypatch):
    said = iter([0, 0, 1])
    monkeypatch.setattr(dist, "decide", lambda own: next(said))
    assert warmed(monkeypatch, [1.0], [3]) == 15


AS_ON_A_CARD = """
from torch import nn
from undiffuse.cli import main as cli
from undiffuse.network import block
from undiffuse.training import profile
compile = nn.Module.compile
nn.Module.compile = lambda module: compile(module, backend="aot_eager")  # what is a graph does not depend on it
block.Dropout.forward, profile.STEPS = nn.Dropout.forward, 4
cli.main()
"""


@pytest.mark.slow
def test_our_network_is_one_graph_that_is_never_compiled_again(tmp_path):
    """As on a card, where dropout is torch's own; and the profile says so."""
    name = preset(tmp_path, steps=100, compile=True)
    ((code, out, err),) = finish(
        start(1, "train", "digits", "--preset", name, "--out", str(tmp_path / "run"), "--profile", script=AS_ON_A_CARD)
    )
    assert code == 0, err
    found = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert found["compiled"] == {"graphs": 1, "recompilations": 0, "graph breaks": 0}
    assert 10 <= found["warm_up_steps"] <= 60 and set(PARTS) < set(found["parts"])
    said = f"measured after {found['warm_up_steps']} steps, in which were compiled: graphs 1, recompilations 0, graph"
    assert said in out + err


AGAIN = """
import json
from torch import nn
from tests.training.test_loop import recipe
from undiffuse.data.source import open_source
from undiffuse.network import block
from undiffuse.training.profile import compilations
from undiffuse.training.trainer import Trainer
compile, data, found = nn.Module.compile, open_source("digits"), []
block.Dropout.forward = nn.Dropout.forward
nn.Module.compile = lambda module: compile(module, backend="aot_eager")
chosen = recipe(train={"precision": "float32", "compile": True})
trainer = Trainer(chosen, chosen.model((1, 8, 8)), data)
for trainer.micro in (8, 8, 4):
    found.append(compilations(trainer))
    trainer.update(6)
print(json.dumps([*found, compilations(trainer)]))
"""


@pytest.mark.slow
def test_what_is_compiled_again_for_another_batch_is_counted(data):
    (_, first, second, third) = json.loads(warm.run(AGAIN).stdout)
    assert first == second == {"graphs": 1, "recompilations": 0, "graph breaks": 0}
    assert third == {"graphs": 2, "recompilations": 1, "graph breaks": 0}
    chosen = recipe(train={"precision": "float32"})
    assert compilations(Trainer(chosen, chosen.model(data.image_shape), data)) is None


WHOLE = """
import json, sys
from torch import nn
from torch._dynamo.utils import counters, get_compilation_metrics
from tests.training.test_loop import recipe
from undiffuse.network import block
from undiffuse.training.start import train
compile = nn.Module.compile
block.Dropout.forward = nn.Dropout.forward
nn.Module.compile = lambda module: compile(module, backend="aot_eager")
often = {"steps": 12, "held_out": 40, "held_out_every": 2, "sample_every": 6, "save_every": 5}
chosen = recipe(train={"precision": "float32", "compile": True, **often})
train("digits", sys.argv[1], chosen, device="cpu", show_progress=False)
again = [each.recompile_reason for each in get_compilation_metrics() if each.recompile_reason is not None]
print(json.dumps([counters["stats"]["unique_graphs"], again, list(counters["graph_break"])]))
"""


@pytest.mark.slow
def test_previews_held_out_losses_and_checkpoints_compile_nothing_again(tmp_path):
    """They ask the network for other batches and without gradients, for which a graph of fixed shapes would not do."""
    assert json.loads(warm.run(WHOLE, str(tmp_path / "run")).stdout.splitlines()[-1]) == [1, [], []]
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 4
