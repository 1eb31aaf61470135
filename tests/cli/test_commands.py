"""All commands, their options and their help."""

import dataclasses
import re
import shlex

import pytest
import typer

from undiffuse.cli import main as cli
from undiffuse.cli.chain import Chain


def commands(group, prefix: str) -> dict:
    """Every command of the application by its full name."""
    found = {}
    for name, command in group.commands.items():
        full = f"{prefix} {name}"
        found |= commands(command, full) if isinstance(command, typer.core.TyperGroup) else {full: command}
    return found


APP = typer.main.get_command(cli.app)
COMMANDS = commands(APP, "undiffuse")


def test_the_commands():
    assert {"undiffuse train", "undiffuse demo", "undiffuse import", "undiffuse data build"} < COMMANDS.keys()
    groups = (cli.app, cli.data.app, cli.codec.app)
    assert len(COMMANDS) == sum(len(group.registered_commands) for group in groups) == 30


def test_all_commands_that_draw_have_the_same_options():
    """Pages and distillations have a --solver too, and no more of them."""
    own, having = {each.name for each in dataclasses.fields(Chain)}, dict[str, set[str]]()
    for name, command in COMMANDS.items():
        having[name.partition(" ")[2]] = own & {each.name for each in command.params}
    drawing = {name for name, options in having.items() if options >= {"solver", "times"}}
    assert drawing == {"sample", "eval", "progressive", "shared", "interpolate", "neighbours"}
    assert all(having[name] == own for name in drawing)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_has_examples_that_parse_and_json(call, name):
    """An example is an `undiffuse …` in backquotes; its options are looked up, and nothing is run."""
    code, text, _ = call(*name.split()[1:], "--help")
    assert code == 0 and "--json" in text
    examples = re.findall(r"`(undiffuse [^`]+)`", COMMANDS[name].help.partition("Example")[2])
    assert examples, f"{name} --help has no example"
    for example in examples:
        assert example.startswith(name) and "".join(example.split()) in "".join(text.split())  # but for its lines
        COMMANDS[name].make_context(name, shlex.split(example)[len(name.split()) :], parent=None)
