"""The long tests, and what came of them: which passed, and how long each took.

    python bench/reliability.py [-k EXPRESSION]

Runs what `make test-reliability` runs, or of these what pytest's -k chooses; the other rows stay as they are. Writes
`bench/reliability.json` and the table of docs/reliability.md, also if a test has failed, and then ends with code 1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from machine import keep, machine, publish

from undiffuse.machine.device import processor

HERE = Path(__file__).parent


def run(chosen: str) -> list[dict[str, Any]]:
    """Name, result and seconds of each test, with the day and the processor."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "long", "-k", chosen, f"--junitxml={report}"]
        subprocess.run(command, cwd=HERE.parent)
        cases = ElementTree.parse(report).iter("testcase")
        return [
            {
                "name": case.attrib["name"],
                "result": next(
                    (kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed"
                ),
                "seconds": round(float(case.attrib["time"]), 1),
                "date": date.today().isoformat(),
                "processor": processor(),
            }
            for case in cases
        ]


def table(result: dict[str, Any]) -> str:
    """One row a test, its parameters taken together."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in result["tests"]:
        groups[row["name"].partition("[")[0]].append(row)
    lines = ["| test | cases | result | seconds | run on |", "|---|---|---|---|---|"]
    for name, rows in groups.items():
        found = ", ".join(f"{count} {kind}" for kind, count in Counter(row["result"] for row in rows).items())
        days = "; ".join(sorted({f"{row['processor']}, {row['date']}" for row in rows}))
        lines.append(f"| `{name}` | {len(rows)} | {found} | {sum(row['seconds'] for row in rows):.0f} | {days} |")
    ran = result["machine"]
    return "\n".join([*lines, "", f"torch {ran['torch']}, Python {ran['python']}. Made by `{result['command']}`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", help="the tests that pytest's -k chooses")
    path, tests = HERE / "reliability.json", run(parser.parse_args().k)
    names = {row["name"] for row in tests}
    rows = [row for row in json.loads(path.read_text())["tests"] if row["name"] not in names] if path.exists() else []
    result = {
        "command": "python bench/reliability.py",
        "date": date.today().isoformat(),
        "machine": machine(),
        "tests": [*rows, *tests],
    }
    keep(path, result)
    publish("reliability.md", "long", table(result))
    sys.exit(int(any(row["result"] != "passed" for row in tests)))


if __name__ == "__main__":
    main()
