"""Writes docs/cli.md from the commands themselves, so that the page cannot say anything else: `make docs`."""

from collections.abc import Iterator
from pathlib import Path

import typer

from undiffuse.cli.main import INTERRUPTED, app
from undiffuse.errors import Error

PAGE = Path(__file__).with_name("cli.md")

HEAD = """# The command line

Made by `make docs` from the commands themselves; do not edit.

- **MODEL** is a run folder, one checkpoint in it, an exported folder or file, or the name of a shipped model.
- **DATA** is a folder or zip of pictures, a packed folder, an npz, npy or IDX file, a CIFAR-10 archive, tar shards, an
  LMDB, a saved `datasets` folder, or a named data set: `digits`, `fashion-mnist`, `fashion-mnist-sample`,
  `procedural:NAME`. Several of these may be given, and a pattern in quotes such as `'photos/*.jpg'`; they are joined.
- **Times** are t in [0, 1]: 0 is the data, 1 is noise.
- `--device auto`, the default everywhere, takes CUDA if it is there, else MPS, else the CPU.

`undiffuse --version` prints the version. `undiffuse --install-completion` sets up completion in your shell.

With `--json` a command prints one JSON object on standard output, which scripts may rely on. Progress and messages go
to standard error. An error is one line on standard error, `undiffuse: what was given, what was expected, what to do`,
with one of these exit codes:
"""


def commands(group: typer.core.TyperGroup, prefix: str) -> Iterator[tuple[str, typer.core.TyperCommand]]:
    """Every command with its full name; those about files and the machine last."""
    for name, command in sorted(group.commands.items(), key=lambda entry: is_tool(entry[1])):
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def is_tool(command: typer.core.TyperCommand) -> bool:
    return getattr(command.callback, "__module__", "") == "undiffuse.cli.tools"


def cell(text: str) -> str:
    return text.replace("|", r"\|")


def parameters(command: typer.core.TyperCommand, context: typer.Context) -> Iterator[str]:
    for parameter in command.params:
        name, text = parameter.get_help_record(context) or ("", "")
        yield f"| `{cell(name)}` | {cell(text)} |"


def described(command: typer.core.TyperCommand) -> str:
    """The help of a command without its marks for lines that a terminal must not wrap."""
    return (command.help or "").replace("\b\n", "").replace("\n\n\n", "\n\n").strip()


def section(name: str, command: typer.core.TyperCommand) -> str:
    context = typer.Context(command, info_name=name, terminal_width=120, max_content_width=120)
    usage = command.get_usage(context).removeprefix("Usage: ").replace("{", "").replace("}", "")
    table = "\n".join(["| | |", "|---|---|", *parameters(command, context)])
    return f"## {name}\n\n```\n{usage}\n```\n\n{described(command)}\n\n{table}\n"


def exit_codes() -> str:
    rows = [f"| {kind.exit_code} | {(kind.__doc__ or '').strip()} |" for kind in Error.__subclasses__()]
    rows.append(
        f"| {INTERRUPTED} | Ctrl-C ended a command other than `train` and `distill`, which save and end with 143. |"
    )
    return "\n".join(["| code | what happened |", "|---|---|", *sorted(rows, key=lambda row: int(row.split()[1]))])


def page() -> str:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    listed = list(commands(group, "undiffuse"))
    summary = [
        f"- [`{name}`](#{name.replace(' ', '-')}): {(command.help or '').splitlines()[0]}" for name, command in listed
    ]
    sections = [section(name, command) for name, command in listed]
    return "\n".join([HEAD, exit_codes(), "", *summary, "", *sections])


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
