"""Where a run's rows and pictures go besides its folder: TensorBoard or wandb, each an extra, or a class of yours."""

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from undiffuse.config import Table
from undiffuse.errors import UsageError
from undiffuse.machine import disk, log


class Sink(ABC):
    """Takes what `log.jsonl` takes, and pictures. `needs` is the package that it stands on, and the extra's name."""

    needs: ClassVar[str | None] = None

    @classmethod
    @abstractmethod
    def open(cls, run: Path, resume_step: int, settings: Mapping[str, Any]) -> AbstractContextManager["Sink"]:
        """Goes on after `resume_step` of the run in that folder; `settings` are its recipe."""

    @abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    @abstractmethod
    def image(self, step: int, name: str, picture: Image.Image) -> None: ...


@dataclass(frozen=True)
class Tensorboard(Sink):
    """Event files in `RUN/tensorboard`; what a killed run logged past its checkpoint is hidden when it goes on."""

    writer: Any
    needs: ClassVar[str | None] = "tensorboard"

    @classmethod
    @contextmanager
    def open(cls, run: Path, resume_step: int, settings: Mapping[str, Any]) -> Iterator["Tensorboard"]:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(run / "tensorboard"), purge_step=resume_step + 1) as writer:
            yield cls(writer)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # else a kill takes the last two minutes with it, and nothing logs them again

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        pixels = np.asarray(picture.convert("RGBA") if picture.mode == "LA" else picture)
        self.writer.add_image(name, pixels, step, dataformats="HWC"[: pixels.ndim])
        self.writer.flush()


@dataclass(frozen=True)
class Wandb(Sink):
    """One wandb run for the life of the folder, its id in `RUN/wandb.json`; wandb's own variables, WANDB_…, apply."""

    run: Any
    needs: ClassVar[str | None] = "wandb"

    @classmethod
    @contextmanager
    def open(cls, run: Path, resume_step: int, settings: Mapping[str, Any]) -> Iterator["Wandb"]:
        import wandb  # pyright: ignore[reportMissingImports]

        path = run / "wandb.json"
        if not path.exists():
            disk.write_json(path, {"id": os.urandom(8).hex()})
        name, project = run.resolve().name, os.environ.get("WANDB_PROJECT", "undiffuse")
        given = {"id": disk.read_json(path)["id"], "resume": "allow", "dir": str(run), "config": dict(settings)}
        with wandb.init(project=project, name=name, **given) as opened:
            yield cls(opened)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.run.log({name: wandb.Image(picture)}, step=step)


SINKS: Table[Sink] = Table("log", Sink, "undiffuse.machine.sink")


def find(names: Sequence[str]) -> list[type[Sink]]:
    """The sinks of those names, or `my_pkg.mod:Class`. Raises UsageError for an unknown one, or a missing extra."""
    found = [SINKS.find(name, trusted=True) for name in dict.fromkeys(names)]
    for name, kind in zip(dict.fromkeys(names), found, strict=True):
        if kind.needs is not None and importlib.util.find_spec(kind.needs) is None:
            raise UsageError(
                f'--log {name} needs a package that is not installed; pip install "undiffuse[{kind.needs}]"'
            )
    return found


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


class Journal:
    """`log.jsonl`, and the sinks beside it. A sink that fails is dropped with a warning: the run is worth more."""

    def __init__(self, lines: log.JsonLines, sinks: list[Sink]):
        self._lines, self._sinks = lines, sinks

    def write(self, row: Mapping[str, Any]) -> None:
        """One row, with its "step"; the sinks get its other numbers."""
        self._lines.write(row)
        values = {
            name: float(value) for name, value in row.items() if name != "step" and isinstance(value, (int, float))
        }
        self._tell(lambda sink: sink.write(row["step"], values))

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """A picture, for the sinks alone: the folder has it as a file."""
        self._tell(lambda sink: sink.image(step, name, picture))

    def _tell(self, what: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                what(sink)
            except Exception as error:  # whatever a network or a stranger's library may raise
                self._sinks.remove(sink)
                log.warn(f"{type(sink).__name__} is told nothing more, for it failed: {_first_line(error)}")


class Nowhere:
    """The journal of every process but the first."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def image(self, step: int, name: str, picture: Image.Image) -> None: ...


class _Forgiving(AbstractContextManager[Sink]):
    """A sink that fails when it is closed is told of too, and no more than that."""

    def __init__(self, opening: AbstractContextManager[Sink]):
        self._opening = opening

    def __enter__(self) -> Sink:
        return self._opening.__enter__()

    def __exit__(self, *why: Any) -> None:
        try:
            self._opening.__exit__(*why)
        except Exception as error:  # likewise
            if error is not why[1]:
                log.warn(f"a log could not be closed: {_first_line(error)}")


@contextmanager
def journal(
    run: Path, resume_step: int, sinks: Sequence[type[Sink]] = (), settings: Mapping[str, Any] | None = None
) -> Iterator[Journal]:
    """The log of a run that goes on after `resume_step`. Raises UsageError for a sink that cannot be opened."""
    with ExitStack() as stack:
        opened = []
        lines = stack.enter_context(log.JsonLines(run / "log.jsonl", resume_step))
        for kind in sinks:
            try:
                opened.append(stack.enter_context(_Forgiving(kind.open(run, resume_step, settings or {}))))
            except Exception as error:  # likewise, such as a key that wandb lacks
                raise UsageError(
                    f"{kind.__name__} cannot be opened: {_first_line(error)}; mend that, or leave its --log out"
                ) from error
        yield Journal(lines, opened)
