"""Frozen dataclasses <-> TOML <-> `--set a.b=c`. Strict, and knows no class of the project.

A *table* is an abstract base and the place where its implementations stand. They are found, not registered: a class
in that place is known by its own name (`FixedLarge` -> `fixed-large`) and configured by its own fields.
"""

import copy
import dataclasses
import importlib
import json
import pkgutil
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import tomli_w
from annotated_types import Ge, Gt, Interval
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic_core import core_schema

from undiffuse.errors import UsageError, nearest, unknown

T = TypeVar("T")

Count = Annotated[int, Ge(1)]
Kept = Annotated[int, Ge(2)]  # checkpoints: one may be damaged
Number = Annotated[int, Ge(0)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Exponent = Annotated[float, Interval(ge=0.1, le=1000)]
Half = Annotated[float, Interval(ge=0, le=0.5)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]
Width = Annotated[float, Interval(gt=0, le=12**-0.5)]  # of a profile of average.py: 12^−½ is the uniform one

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)


def kebab(name: str) -> str:
    """`FixedLarge` -> `fixed-large`, `UNet` -> `unet`, `Warmup10` -> `warmup10`, `Classifier_28` -> `classifier-28`."""
    return re.sub(r"(?<=[a-z0-9])(?:_|(?=[A-Z]))", "-", name).lower()


class Table(Generic[T]):
    """The implementations of `base` in a module or package, by name; as an annotation it validates `{name = …}`."""

    def __init__(self, kind: str, base: type[T], place: str):
        self.kind, self.base, self.place = kind, base, place

    @cached_property
    def classes(self) -> dict[str, type[T]]:
        root = importlib.import_module(self.place)
        names = [m.name for m in pkgutil.iter_modules(root.__path__)] if hasattr(root, "__path__") else []
        modules = [root] + [importlib.import_module(f"{self.place}.{name}") for name in names]
        found = [
            value
            for module in modules
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, self.base)
            and value.__module__ == module.__name__
            and not getattr(value, "__abstractmethods__", None)
            and value is not self.base
        ]
        return {kebab(cls.__name__): cls for cls in sorted(found, key=lambda cls: cls.__name__)}

    def find(self, name: str, trusted: bool = False) -> type[T]:
        """The class of that name. `my_pkg.mod:Class` is imported only where the text is the user's own."""
        if ":" in name:
            return self._user_class(name, trusted)
        if name not in self.classes:
            raise unknown(self.kind, name, self.classes)
        return self.classes[name]

    def _user_class(self, name: str, trusted: bool) -> type[T]:
        if not trusted:
            raise UsageError(
                f'{self.kind} "{name}" is code outside undiffuse, which a checkpoint may not name. '
                "Load it from Python with trusted=True if you wrote it"
            )
        module, _, attribute = name.partition(":")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: ".mod:Class", ":Class"
            raise UsageError(f'{self.kind} "{name}" cannot be imported: {error}') from error
        if not (isinstance(cls, type) and issubclass(cls, self.base) and dataclasses.is_dataclass(cls)):
            raise UsageError(f'{self.kind} "{name}" is not a frozen dataclass derived from {self.base.__name__}')
        return cls

    def name_of(self, value: T) -> str:
        cls = type(value)
        built_in = self.classes.get(kebab(cls.__name__)) is cls
        return kebab(cls.__name__) if built_in else f"{cls.__module__}:{cls.__qualname__}"

    def build(self, spec: Any, trusted: bool = False) -> T:
        """An implementation from `"name"`, `"name,field=value"`, `{name = "…", field = …}` or an instance."""
        if isinstance(spec, self.base):
            return spec
        fields = self._fields(spec) if isinstance(spec, str) else spec
        if not isinstance(fields, Mapping) or not isinstance(fields.get("name"), str):
            raise UsageError(f'{self.kind} needs a name, for example name = "{next(iter(self.classes))}"; got {spec!r}')
        cls = self.find(fields["name"], trusted)
        rest = {key: value for key, value in fields.items() if key != "name"}
        return parse(cls, rest, f"{self.kind} {fields['name']}", trusted)

    def _fields(self, text: str) -> dict[str, Any]:
        name, *settings = text.split(",")
        if wrong := [setting for setting in settings if not setting.partition("=")[1]]:
            raise UsageError(f'{self.kind} "{text}": "{wrong[0]}" is not of the form field=value, as in {name},a=1')
        names = [setting.partition("=")[0].strip() for setting in settings]
        if wrong := [name for name in names if not name.isidentifier()]:
            raise UsageError(f'{self.kind} "{text}": "{wrong[0]}" is no name of a field, as in {name},a=1')
        if twice := [each for i, each in enumerate(names) if each in names[:i]]:
            raise UsageError(f'{self.kind} "{text}" says {twice[0]} twice; say it once')
        fields = override({}, settings)
        if "name" in fields:
            raise UsageError(f'{self.kind} "{text}": the name comes first, and once')
        return {"name": name} | fields

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        def validate(spec: Any, info: Any) -> T:
            return self.build(spec, trusted=bool((info.context or {}).get("trusted")))

        return core_schema.with_info_plain_validator_function(validate)


def parse(cls: type[T], mapping: Mapping[str, Any], where: str, trusted: bool = False) -> T:
    """A frozen dataclass from plain data; an unknown key, a wrong type or a value out of range is a UsageError."""
    if "__pydantic_config__" not in vars(cls):
        with_config(STRICT)(cls)
    _refuse_unknown(cls, mapping, where)
    try:
        # By way of JSON, because only there does strict mode take an array for a tuple.
        return TypeAdapter(cls).validate_json(json.dumps(mapping), strict=True, context={"trusted": trusted})
    except ValidationError as error:
        # Of the alternatives of a union the one that went furthest; pydantic puts their types into the path.
        first = max(error.errors(), key=lambda each: len(each["loc"]))
        path = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier())
        message = first["msg"][0].lower() + first["msg"][1:] + f", given {first['input']!r}"
        raise UsageError(f'{where}: "{path}" {"is missing" if first["type"] == "missing" else message}') from error
    except TypeError as error:
        raise UsageError(f"{where}: a value is not one that TOML can hold ({error})") from error


def _refuse_unknown(cls: Any, mapping: Mapping[str, Any], where: str, path: str = "") -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    hints = get_type_hints(cls, include_extras=True)
    for key, value in mapping.items():
        if key not in known:
            raise UsageError(f'{where} has no field "{path}{key}".{nearest(str(key), known)}')
        nested = [part for part in (hints[key], *get_args(hints[key])) if dataclasses.is_dataclass(part)]
        if nested and isinstance(value, Mapping) and _table(hints[key]) is None:
            _refuse_unknown(nested[0], value, where, f"{path}{key}.")


def _table(hint: Any) -> Table | None:
    """The table of `Annotated[Base, TABLE]` or of `Annotated[Base, TABLE] | None`."""
    parts = [part for part in (hint, *get_args(hint)) if get_origin(part) is Annotated]
    return next((mark for part in parts for mark in get_args(part)[1:] if isinstance(mark, Table)), None)


def plain(value: Any) -> Any:
    """The inverse of `parse`: dataclasses to dictionaries, with the name of each member of a table; no None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = get_type_hints(type(value), include_extras=True)
        fields = {f.name: (getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(value)}
        return {name: _named(item, hint) for name, (item, hint) in fields.items() if item is not None}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _named(item: Any, hint: Any) -> Any:
    table = _table(hint)
    return {"name": table.name_of(item), **plain(item)} if table else plain(item)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; a missing file or a syntax error is a UsageError that names it."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error


def to_toml(value: Any) -> str:
    """The text of a frozen dataclass or of plain data."""
    return tomli_w.dumps(plain(value))


def override(mapping: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """`mapping` with each `a.b=c` applied; c is read as a TOML value, else as a string."""
    result = copy.deepcopy(dict(mapping))
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path.strip():
            raise UsageError(f'--set "{setting}" is not of the form a.b=c, for example --set train.batch=64')
        keys = path.strip().split(".")
        node = result
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise UsageError(f'--set "{setting}": "{key}" is a value, not a section')
        if keys[-1] == "name" and node.get("name") != _value(text):
            node.clear()  # the fields of one class mean nothing to another
        node[keys[-1]] = _value(text)
    return result


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()
