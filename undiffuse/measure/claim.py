"""A folder of results belongs to one question: another one in it would mix two answers."""

import hashlib
import json
from pathlib import Path
from typing import Any

from undiffuse.errors import Corrupt, UsageError
from undiffuse.machine import disk, dist
from undiffuse.machine.tensorfile import refuse_newer
from undiffuse.model.model import Model

FORMAT, QUERY = 1, "query.json"


def check(
    out: Path, question: dict[str, Any], name: str = QUERY, another: str = "another measurement"
) -> dict[str, Any]:
    """The question with its format, which `disk.write_json` puts into the folder. UsageError if another is there.

    `name` is that of its file, and `another` says what the folder holds then.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give the name of a folder")
    question, path = asked(question), out / name
    if not path.exists():
        return question
    before = disk.read_json(path)
    if not isinstance(before, dict):
        raise Corrupt(f"{path} is damaged: it is not a JSON object; give another --out")
    refuse_newer(path, before.get("format"))
    before = {"precision": "float32"} | before  # which older ones do not name
    changed = [key for key in question if before.get(key) != question[key]]
    if changed:
        raise UsageError(f"{out} holds {another} (other {', '.join(changed)}); give the same settings or another --out")
    return question


def asked(question: dict[str, Any]) -> dict[str, Any]:
    """With the version of its form."""
    return {"format": FORMAT} | question


def take(out: Path, question: dict[str, Any]) -> None:
    """Makes the folder that of the question. UsageError if it is another's; process 0 writes."""
    question = check(out, question)
    if dist.rank() == 0:
        disk.write_json(out / QUERY, question)


def in_other(model: Model) -> dict[str, str]:
    """What is said of the precision: nothing of float32, which older results did not name."""
    return {} if model.precision == "float32" else {"precision": model.precision}


def digest(question: Any) -> str:
    """sha256 of plain data, in hexadecimal."""
    return hashlib.sha256(json.dumps(question, sort_keys=True, default=str).encode()).hexdigest()
