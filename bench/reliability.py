"""The long tests, and what came of them: which passed, and how long each took.

    python bench/reliability.py

Runs what `make test-reliability` runs. Writes `bench/reliability.json` and the table of docs/reliability.md, also if a
test has failed, and then ends with code 1.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from machine import machine, publish

from undiffuse.machine import disk

HERE = Path(__file__).parent


def run() -> list[dict[str, Any]]:
    """Name, result and seconds of each test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-m", "long", f"--junitxml={report}"], cwd=HERE.parent)
        cases = ElementTree.parse(report).iter("testcase")
        return [
            {
                "name": case.attrib["name"],
                "result": next(
                    (kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed"
                ),
                "seconds": round(float(case.attrib["time"]), 1),
            }
            for case in cases
        ]


def table(result: dict[str, Any]) -> str:
    """One row a test, its parameters taken together."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in result["tests"]:
        groups[row["name"].partition("[")[0]].append(row)
    lines = ["| test | cases | result | seconds |", "|---|---|---|---|"]
    for name, rows in groups.items():
        found = ", ".join(f"{count} {kind}" for kind, count in Counter(row["result"] for row in rows).items())
        lines.append(f"| `{name}` | {len(rows)} | {found} | {sum(row['seconds'] for row in rows):.0f} |")
    ran = result["machine"]
    made = (
        f"{ran['processor']}, {ran['threads']} threads, torch {ran['torch']}, Python {ran['python']}; {result['date']}."
    )
    return "\n".join([*lines, "", f"{made} Made by `{result['command']}`."])


def main() -> None:
    tests = run()
    result = {
        "command": "python bench/reliability.py",
        "date": date.today().isoformat(),
        "machine": machine(),
        "tests": tests,
    }
    disk.write_atomic(HERE / "reliability.json", (json.dumps(result, indent=1) + "\n").encode())
    publish("reliability.md", "long", table(result))
    sys.exit(int(any(row["result"] != "passed" for row in tests)))


if __name__ == "__main__":
    main()
