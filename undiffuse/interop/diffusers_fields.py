"""A diffusers config as fields. What cannot be ours is collected and said all at once; so is what is assumed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from undiffuse.config import parse
from undiffuse.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Findings:
    """Why a model cannot be ours, and what is assumed of one that can."""

    reasons: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def need(self, file: Path, name: str, value: Any, values: Any, given: Mapping[str, Any] | None = None) -> None:
        """A reason against a value that is none of these."""
        if value not in values:
            source = "" if given is None or name in given else ", as diffusers takes it where it is left out"
            known = ", ".join(json.dumps(each) for each in values)
            self.reasons.append(f'{file}: "{name}" is {json.dumps(value)}{source}; supported: {known}')


def read_fields(cls: type[T], content: Mapping[str, Any], file: Path, found: Findings, harmless: set[str]) -> T:
    """The known fields; one of a wrong type is a reason, and unknown ones, which diffusers too ignores, are said."""
    known, kept, unknown = {each.name for each in fields(cls)}, {}, []  # pyright: ignore[reportArgumentType]
    for name, value in content.items():
        if name.startswith("_") or name in harmless:
            continue
        if name not in known:
            unknown.append(name)
            continue
        try:
            parse(cls, {name: value}, str(file))
            kept[name] = value
        except UsageError as error:
            found.reasons.append(str(error))
    if unknown:
        found.assumed.append(f"{file}: {', '.join(unknown)} unknown and left aside, as diffusers does")
    return parse(cls, kept, str(file))
