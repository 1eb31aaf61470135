"""Remakes every figure whose weights have changed.

    python bench/refresh.py [--dry-run] [NAME …]

A result that says of which weights it is (`made_of` in `bench/NAME.json`: shipped models, extractors) is made anew by
the command that it records, where those are not the weights of today; with names, only these, and in any case. Each
command writes its JSON, its pictures and its table of docs/ itself. What no single command makes is only told.
Where one fails the run goes on with the rest, names it at the end, and has code 1; the same command tries again.
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
BY_HAND = {
    "distilled": "`undiffuse distill fashion-mnist fashion-mnist --steps N --out RUN` for each N of its table, then "
    "`python bench/distilled.py RUN …`",
    "guidance-emoji-32": "`python bench/guidance.py emoji-32 --data emoji`, also with `--guide FILE --scales 1.5,2,3` "
    "for weights of before, with `--steps 6 --solver unipc-3 --scales 1,2` and with `--grid karras-few --scales 1,2`",
    "solvers": "`python bench/solvers.py` for each of its tables, with --n, --seed, --evaluations and names of its "
    "rows, and with --chain",
}


def results() -> Iterator[tuple[str, dict]]:
    """The name and the content of each result that is made of weights."""
    for path in sorted(HERE.glob("*.json")):
        found = json.loads(path.read_text())
        if found.get("made_of"):
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
    failed = list[str]()
    for name, found in every.items():
        others = changed(found)
        if not (name in given.names if given.names else others):
            print(f"{name}: of today's weights" if not others else f"{name}: left out, other {', '.join(others)}")
            continue
        why = f"{name}: {'other ' + ', '.join(others) if others else 'asked for'}"
        if name in BY_HAND:
            print(f"{why}; by hand: {BY_HAND[name]}")
            continue
        print(f"{why}: {found['command']}", flush=True)
        if not given.dry_run:
            ended = subprocess.run([sys.executable, *shlex.split(found["command"])[1:]], cwd=HERE.parent, check=False)
            failed += [name] if ended.returncode else []
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
