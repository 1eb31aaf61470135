"""What TensorBoard shows of a run, what wandb is told, and that neither can end a training run."""

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from undiffuse.errors import UsageError
from undiffuse.machine import sink
from undiffuse.machine.log import read_rows
from undiffuse.machine.sink import SINKS, Sink, find, journal

GREY = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))


@dataclass(frozen=True)
class Broken(Sink):
    """Opens, and fails at the first row."""

    told: Any

    @classmethod
    @contextmanager
    def open(cls, run, resume_step, settings):
        yield cls([])

    def write(self, step, values):
        self.told.append(step)
        raise ConnectionError("the network is gone\nand so on")

    def image(self, step, name, picture):
        self.told.append(name)


@dataclass(frozen=True)
class Shut(Broken):
    @classmethod
    def open(cls, run, resume_step, settings):
        raise PermissionError("api_key not configured (no-tty).\ncall login")


def test_the_names():
    assert set(SINKS.classes) == {"tensorboard", "wandb"}
    with pytest.raises(UsageError, match='log "tensorbord" is not known. Did you mean "tensorboard"'):
        find(["tensorbord"])
    assert find(["test_sink:Broken", "test_sink:Broken"])[0].__name__ == "Broken"  # a class of one's own, once


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_extra_is_one_line_that_says_what_to_install(name, monkeypatch):
    monkeypatch.setattr(sink.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UsageError, match=rf'^--log {name} needs a package .* pip install "undiffuse\[{name}\]"$'):
        find([name])


def test_a_sink_that_fails_is_dropped_and_the_log_goes_on(tmp_path, capsys):
    with journal(tmp_path, 0, [Broken]) as lines:
        (broken,) = lines._sinks
        for step in (1, 2):
            lines.write({"step": step, "images": 8 * step, "loss": 0.5})
            lines.image(step, "samples", GREY)
    assert broken.told == [1]
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [1, 2]
    assert capsys.readouterr().err == ("warning: Broken is told nothing more, for it failed: the network is gone\n")


@dataclass(frozen=True)
class Jammed(Broken):
    """Works, and fails when it is closed."""

    @classmethod
    @contextmanager
    def open(cls, run, resume_step, settings):
        try:
            yield cls([])
        finally:
            raise OSError(28, "No space left on device")


def test_a_sink_that_cannot_be_closed_changes_no_result(tmp_path, capsys):
    with journal(tmp_path, 0, [Jammed]):
        pass
    assert capsys.readouterr().err == "warning: a log could not be closed: [Errno 28] No space left on device\n"
    with pytest.raises(ZeroDivisionError), journal(tmp_path, 0, [Jammed]):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), journal(tmp_path, 0, [Broken]):
        raise ZeroDivisionError


def test_a_sink_that_cannot_be_opened_stops_the_run_before_it_begins(tmp_path):
    with (
        pytest.raises(UsageError, match=r"^Shut cannot be opened: api_key not configured \(no-tty\)\.; mend that, or"),
        journal(tmp_path, 0, [Shut]),
    ):
        pytest.fail("the run began")


def shown(folder):
    """The scalars and images that TensorBoard shows: {name: [step, …]} and the values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, {tag: events.Images(tag) for tag in events.Tags()["images"]}


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    """A run is killed at step 7, past its checkpoint of step 4, and goes on from there."""
    for resume, last, offset in ((0, 7, 0.0), (4, 9, 0.5)):
        with journal(tmp_path, resume, find(["tensorboard"])) as lines:
            for step in range(resume + 1, last + 1):
                lines.write({"step": step, "loss": step + offset, "held_out": None, "note": "text"})
            lines.image(last, "samples", GREY)
    scalars, images = shown(tmp_path / "tensorboard")
    assert scalars == {"loss": [*((s, float(s)) for s in (1, 2, 3, 4)), *((s, s + 0.5) for s in (5, 6, 7, 8, 9))]}
    assert [(e.step, e.width, e.height) for e in images["samples"]] == [(9, 8, 6)]


def test_tensorboard_has_a_row_when_write_returns(tmp_path):
    with journal(tmp_path, 0, find(["tensorboard"])) as lines:
        lines.write({"step": 3, "loss": 0.25})
        assert shown(tmp_path / "tensorboard")[0] == {"loss": [(3, 0.25)]}


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_tensorboard_gets_the_pixels(tmp_path, mode):
    import io

    with journal(tmp_path, 0, find(["tensorboard"])) as lines:
        lines.image(1, "samples", GREY.convert(mode))
    (event,) = shown(tmp_path / "tensorboard")[1]["samples"]
    back = Image.open(io.BytesIO(event.encoded_image_string)).convert("L")
    assert np.array_equal(np.asarray(back), np.asarray(GREY))


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that records its calls; its runs end as wandb's do, with the exception they saw."""
    calls = []

    class Run:
        def __enter__(self):
            return self

        def __exit__(self, kind, error, trace):
            calls.append(("finish", kind))

        def log(self, values, step):
            calls.append(("log", step, values))

    def init(*, project, name, id, resume, dir, config):
        calls.append(("init", SimpleNamespace(**locals())))
        return Run()

    module = ModuleType("wandb")
    module.__spec__ = SimpleNamespace()  # what find_spec looks at
    module.init, module.Image = init, lambda picture: ("image", picture.size)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_is_told_everything_under_one_id(tmp_path, wandb, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run = tmp_path / "photos"
    run.mkdir()
    with journal(run, 0, find(["wandb"]), {"train": {"lr": 1e-3}}) as lines:
        lines.write({"step": 1, "loss": 0.5, "held_out": None})
        lines.image(1, "samples", GREY)
    (_, first), *rest = wandb
    assert rest == [("log", 1, {"loss": 0.5}), ("log", 1, {"samples": ("image", (8, 6))}), ("finish", None)]
    assert (first.project, first.name, first.resume, first.dir) == ("undiffuse", "photos", "allow", str(run))
    assert first.config == {"train": {"lr": 1e-3}}
    assert json.loads((run / "wandb.json").read_text()) == {"id": first.id}

    wandb.clear()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with pytest.raises(KeyboardInterrupt), journal(run, 1, find(["wandb"])):
        raise KeyboardInterrupt
    (_, second), finish = wandb
    assert (second.id, second.project) == (first.id, "mine")
    assert finish == ("finish", KeyboardInterrupt)  # so that it is not shown as ended well
