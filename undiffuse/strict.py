"""What goes out as JSON, comes in as an argument, or is imported if it is there: taken strictly.

Nothing is guessed, and nothing is bent.
"""

import importlib
import json
import math
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

from undiffuse.errors import UsageError


def to_json(value: Any, default: Callable[[Any], Any] | None = None, **form: Any) -> str:
    """Strict JSON. NaN and infinity, for which JSON has no word, are null, which every reader takes."""
    try:
        return json.dumps(value, default=default, allow_nan=False, **form)
    except ValueError:
        finite = json.loads(json.dumps(value, default=default), parse_constant=lambda _: None)
        return json.dumps(finite, allow_nan=False, **form)


def whole(what: str, value: Any, least: int | None = None) -> int:
    """An integer of any library; UsageError for what is none, as 50.0 and None are, and for one below `least`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        near = f" such as {int(value)}" if isinstance(value, float) and math.isfinite(value) else ""
        raise UsageError(f"{what} = {value!r} is not possible; give a whole number{near}")
    if least is not None and number < least:
        raise UsageError(f"{what} = {number} is not possible; give {least} or more")
    return number


def real(what: str, value: Any, least: float | int = -math.inf, wanted: str = "a number") -> float:
    """A finite number of any library; UsageError for what is none, and for one below `least`."""
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several
        number = math.nan
    if not math.isfinite(number) or number < least:
        raise UsageError(f"{what} = {value!r} is not possible; give {wanted}")
    return number


def flag(what: str, value: Any) -> bool:
    """True or False; UsageError for what is neither, as "no" and 0 are."""
    if not isinstance(value, bool):
        raise UsageError(f"{what} = {value!r} is not possible; give True or False")
    return value


def extra(module: str, name: str, what: str = "this data") -> ModuleType:
    """A module that only the optional dependencies `undiffuse[name]` bring; UsageError where they are missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f'{what} needs {module}; install the extra: pip install "undiffuse[{name}]"') from error
