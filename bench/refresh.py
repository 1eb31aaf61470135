"""Remakes every figure whose weights have changed.

    python bench/refresh.py [--dry-run] [NAME …]

A result that says of which weights it is (`made_of` in `bench/NAME.json`: shipped models, extractors) is made anew by
the command that it records, where those are not the weights of today; with names, only these, and in any case. Each
command writes its JSON, its pictures and its table of docs/ itself. The first that fails ends the run; the same command
goes on.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from machine import made_of

HERE = Path(__file__).parent


def results() -> Iterator[tuple[str, dict]]:
    """The name and the content of each result that is made of weights."""
    for path in sorted(HERE.glob("*.json")):
        found = json.loads(path.read_text())
        if "made_of" in found:
            yield path.stem, found


def changed(found: dict) -> list[str]:
    """The weights that are others today."""
    return [name for name, sha256 in made_of(*found["made_of"]).items() if sha256 != found["made_of"][name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="results to make anew, whatever has changed: progressive, flow, …")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    given, every = parser.parse_args(), dict(results())
    strange = [name for name in given.names if name not in every]
    if strange:
        raise SystemExit(f"{strange[0]} is no result that is made of weights; give some of {', '.join(every)}")
    for name, found in every.items():
        others = changed(found)
        if not (name in given.names if given.names else others):
            print(f"{name}: of today's weights" if not others else f"{name}: left out, other {', '.join(others)}")
            continue
        print(f"{name}: {'other ' + ', '.join(others) if others else 'asked for'}: {found['command']}", flush=True)
        if not given.dry_run:
            subprocess.run([sys.executable, *shlex.split(found["command"])[1:]], cwd=HERE.parent, check=True)


if __name__ == "__main__":
    main()
