"""The command line. Each command is a short call into the library; torch is imported only when one runs."""

import errno
import os
import re
import sys
from typing import Annotated, NoReturn

import typer

from undiffuse import __version__
from undiffuse.cli import codec, data, distill, encode, evaluate, figures, fit, measure, report, sample, tools, train
from undiffuse.cli.train import again
from undiffuse.errors import Error, MemoryExhausted, NotFiniteError, is_out_of_memory

INTERRUPTED = 130  # the exit code after Ctrl-C
NAMES = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM)  # errors of a place that only the user can mend

app = typer.Typer(
    name="undiffuse",
    help="Denoising diffusion for images: train on your own pictures, sample and measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool | None) -> None:
    if asked:
        typer.echo(f"undiffuse {__version__}")
        raise typer.Exit


@app.callback()
def every(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit")
    ] = None,
) -> None:
    """Denoising diffusion for images: train on your own pictures, sample and measure."""


for group in (train, sample, figures, fit, distill, measure, evaluate, encode, report):
    group.register(app)
app.add_typer(codec.app, name="codec")
app.add_typer(data.app, name="data")
tools.register(app)


def main() -> None:
    """The entry point: an error is one line on standard error and the exit code of its kind."""
    try:
        code = app(standalone_mode=False)
    except NotFiniteError as error:
        code = _fail(str(error), error.exit_code, after_nan(error) if error.run else "")
    except Error as error:
        code = _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        code = _fail(error.format_message(), 2)
    except OSError as error:
        if error.filename is None or error.errno not in NAMES:
            raise
        code = _fail(f"{error.filename} cannot be used: {error.strerror}; give another name or place", 2)
    except (typer.Abort, KeyboardInterrupt):
        code = _fail("interrupted", INTERRUPTED)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        said = f" ({asked[0].lower()})" if asked else ""
        code = _fail(
            f"out of memory{said}; give a smaller --batch, -n or --set train.micro_batch=8", MemoryExhausted.exit_code
        )
    _end(code or 0)


def _end(code: int) -> NoReturn:
    """Ends the process; a command that has not used torch has no processes to leave."""
    if "torch" in sys.modules:
        from undiffuse.machine import dist

        dist.end(code)
    sys.exit(code)


def after_nan(error: NotFiniteError) -> str:
    """A command that trains, in a new folder, from the newest checkpoint that is known to be good."""
    changed = {} if error.good is None else {"--init": error.good}
    if error.lr is not None:
        changed["--set train.lr"] = f"{error.lr:g}"
    return again(changed | {"--out": _fresh(error.run or "runs/again")}, without=("--init",))


def _fresh(run: str) -> str:
    """A folder beside that of the run which is not there yet."""
    return next(name for n in range(2, 10**6) if not os.path.exists(name := f"{run.rstrip('/')}-{n}"))


def _fail(message: str, code: int, command: str = "") -> int:
    line = " ".join(message.split())
    typer.echo(f"undiffuse: {line}: {command}" if command else f"undiffuse: {line}", err=True)
    return code
