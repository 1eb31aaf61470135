"""Configuration is strict: whatever is misspelt, of a wrong type or out of range is named, with the nearest name."""

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undiffuse.config import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    Table,
    kebab,
    override,
    parse,
    plain,
    read_toml,
    to_toml,
)
from undiffuse.errors import DataError, Error, Preempted, UsageError, nearest, unknown


class Shape(ABC):
    @abstractmethod
    def area(self) -> float: ...


SHAPES: Table[Shape] = Table("shape", Shape, __name__)


@dataclass(frozen=True)
class Square(Shape):
    side: Positive = 1.0

    def area(self) -> float:
        return self.side**2


@dataclass(frozen=True)
class UnitDisc(Shape):
    def area(self) -> float:
        return 3.14


@dataclass(frozen=True)
class Scaled(Shape):
    shape: Annotated[Shape, SHAPES]
    by: NonNegative = 2.0

    def area(self) -> float:
        return self.shape.area() * self.by


class Loose(Shape):
    """Not a dataclass, so not to be configured."""

    def area(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Training:
    batch: Count = 8
    warm_up: Annotated[int, "steps"] = 0
    dropout: Fraction = 0.1


@dataclass(frozen=True)
class Recipe:
    shape: Annotated[Shape, SHAPES]
    train: Training = field(default_factory=Training)
    other: Annotated[Shape, SHAPES] | None = None
    sizes: tuple[Count, ...] = (1, 2)
    mode: Literal["fast", "exact"] = "exact"
    note: str | None = None


def refused(mapping, where="preset p", cls=Recipe, **options):
    with pytest.raises(UsageError) as caught:
        parse(cls, mapping, where, **options)
    return str(caught.value)


def test_parse_builds_the_tree():
    mapping = {
        "shape": {"name": "scaled", "shape": {"name": "square", "side": 3}, "by": 0.5},
        "train": {"batch": 4},
        "other": "unit-disc",
        "sizes": [3, 4, 5],
    }
    expected = Recipe(Scaled(Square(3.0), 0.5), Training(batch=4), UnitDisc(), (3, 4, 5))
    assert parse(Recipe, mapping, "preset p") == expected


@pytest.mark.parametrize(
    "mapping, message",
    [
        (
            {"shpe": 1},
            'preset p has no field "shpe". Did you mean "shape"? Known: mode, note, other, shape, sizes, train',
        ),
        (
            {"shape": "square", "train": {"bach": 1}},
            'preset p has no field "train.bach". Did you mean "batch"? Known: batch, dropout, warm_up',
        ),
        (
            {"shape": {"name": "square", "sied": 1}},
            'shape square has no field "sied". Did you mean "side"? Known: side',
        ),
        ({"shape": "sqare"}, 'shape "sqare" is not known. Did you mean "square"? Known: '),
        ({"shape": "xyz"}, 'shape "xyz" is not known. Known: '),
        ({"shape": {"side": 1}}, "shape needs a name, for example name = "),
        ({"shape": 3}, "shape needs a name, for example name = "),
        ({}, 'preset p: "shape" is missing'),
        ({"shape": "scaled"}, 'shape scaled: "shape" is missing'),
        ({"shape": {"name": "square", "side": 0}}, 'shape square: "side" input should be greater than 0, given 0'),
        ({"shape": {"name": "square", "side": -1.5}}, "should be greater than 0, given -1.5"),
        ({"shape": {"name": "square", "side": "1"}}, "\"side\" input should be a valid number, given '1'"),
        ({"shape": {"name": "square", "side": True}}, '"side" input should be a valid number, given True'),
        ({"shape": {"name": "square", "side": float("inf")}}, '"side" input should be a finite number, given inf'),
        ({"shape": {"name": "square", "side": float("nan")}}, '"side" input should be a finite number, given nan'),
        (
            {"shape": "square", "train": {"batch": 0}},
            '"train.batch" input should be greater than or equal to 1, given 0',
        ),
        ({"shape": "square", "train": {"batch": 2.5}}, '"train.batch" input should be a valid integer'),
        ({"shape": "square", "train": {"dropout": 1.1}}, "should be less than or equal to 1, given 1.1"),
        ({"shape": "square", "train": 3}, '"train" input should be an object, given 3'),
        ({"shape": "square", "sizes": [1, 0]}, '"sizes.1" input should be greater than or equal to 1, given 0'),
        ({"shape": "square", "mode": "slow"}, "\"mode\" input should be 'fast' or 'exact', given 'slow'"),
        ({"shape": "square", "note": {1, 2}}, "preset p: a value is not one that TOML can hold"),
    ],
)
def test_what_is_wrong_is_named(mapping, message):
    text = refused(mapping)
    assert message in text
    assert "\n" not in text


def test_a_table_finds_its_classes_and_nothing_else():
    assert set(SHAPES.classes) == {"square", "unit-disc", "scaled", "loose"}
    assert SHAPES.find("unit-disc") is UnitDisc
    assert SHAPES.build(Square(2.0)) == Square(2.0)
    assert SHAPES.build({"name": "square", "side": 2}) == Square(2.0)


def test_a_table_walks_a_package(tmp_path, monkeypatch):
    """Only what a module defines counts: not the base, not what it merely imports."""
    package = tmp_path / "place_of_shapes"
    package.mkdir()
    (package / "__init__.py").write_text("")
    code = f"import dataclasses\nfrom {__name__} import Shape, Square\n\n@dataclasses.dataclass(frozen=True)\n"
    (package / "star.py").write_text(code + "class FiveStar(Shape):\n    def area(self): return 5\n")
    (package / "rest.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    table = Table("shape", Shape, "place_of_shapes")
    assert list(table.classes) == ["five-star"]
    assert table.name_of(table.build("five-star")) == "five-star"
    assert table.name_of(Square()) == f"{__name__}:Square"


USER_MODULE = f"""
from dataclasses import dataclass
from {__name__} import Shape

@dataclass(frozen=True)
class Blob(Shape):
    size: int = 1

    def area(self):
        return self.size

class Rough(Blob.__mro__[1]):
    def area(self):
        return 1
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "shapes_of_a_user.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "shapes_of_a_user"
    sys.modules.pop("shapes_of_a_user", None)


def test_a_class_of_the_user_is_refused_unless_trusted(user_module):
    spec = {"shape": {"name": "scaled", "shape": {"name": f"{user_module}:Blob", "size": 5}}}
    assert refused(spec) == (
        f'shape "{user_module}:Blob" is code outside undiffuse, which a checkpoint may not name. '
        "Load it from Python with trusted=True if you wrote it"
    )
    assert user_module not in sys.modules
    recipe = parse(Recipe, spec, "preset p", trusted=True)
    assert recipe.shape.area() == 10
    assert plain(recipe)["shape"]["shape"] == {"name": f"{user_module}:Blob", "size": 5}


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_module:Blob", "cannot be imported: No module named 'no_such_module'"),
        ("shapes_of_a_user:Bolb", "cannot be imported: module 'shapes_of_a_user' has no attribute 'Bolb'"),
        (":Blob", "cannot be imported: Empty module name"),
        (".shapes:Blob", "cannot be imported: the 'package' argument is required"),
        ("pathlib:Path", "is not a frozen dataclass derived from Shape"),
        ("shapes_of_a_user:Rough", "is not a frozen dataclass derived from Shape"),
        ("shapes_of_a_user:dataclass", "is not a frozen dataclass derived from Shape"),
    ],
)
def test_what_is_wrong_with_a_class_of_the_user_is_named(user_module, name, message):
    assert f'shape "{name}" {message}' in refused({"shape": name}, trusted=True)


SQUARES = st.builds(Square, st.floats(1e-300, 1e300))
TREES = st.recursive(SQUARES | st.just(UnitDisc()), lambda inner: st.builds(Scaled, inner, st.floats(0, 1e300)))
COUNTS = st.integers(1, 2**62)
RECIPES = st.builds(
    Recipe,
    TREES,
    st.builds(Training, COUNTS, st.integers(-(2**62), 2**62), st.floats(0, 1)),
    st.none() | TREES,
    st.lists(COUNTS).map(tuple),
    st.sampled_from(["fast", "exact"]),
    st.none() | st.text(),
)


@settings(max_examples=40)
@given(recipe=RECIPES)
def test_parse_inverts_plain_and_toml_holds_everything(recipe, tmp_path_factory):
    assert parse(Recipe, plain(recipe), "round trip") == recipe
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_text(to_toml(recipe), "utf-8", newline="")
    assert parse(Recipe, read_toml(path), "round trip") == recipe


def test_plain_leaves_out_what_is_none():
    assert plain({"a": None, "b": [1, {"c": None, "d": (2, 3)}]}) == {"b": [1, {"d": [2, 3]}]}
    assert plain(Recipe(UnitDisc())) == {
        "shape": {"name": "unit-disc"},
        "train": {"batch": 8, "warm_up": 0, "dropout": 0.1},
        "sizes": [1, 2],
        "mode": "exact",
    }


def test_read_toml_names_the_file(tmp_path):
    with pytest.raises(UsageError, match=r"none\.toml cannot be read: No such file or directory"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = \n")
    with pytest.raises(UsageError, match=r"bad\.toml is not valid TOML: .*line 1"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"binary\.toml is not valid TOML: 'utf-8'"):
        read_toml(Path(tmp_path / "binary.toml"))


@pytest.mark.parametrize(
    "setting, expected",
    [
        ("train.batch=64", {"train": {"batch": 64, "dropout": 0.5}, "shape": {"name": "square", "side": 2}}),
        ("train.dropout=1e-2", {"train": {"batch": 1, "dropout": 0.01}, "shape": {"name": "square", "side": 2}}),
        ("shape.side=3", {"train": {"batch": 1, "dropout": 0.5}, "shape": {"name": "square", "side": 3}}),
        ("shape.name=square", {"train": {"batch": 1, "dropout": 0.5}, "shape": {"name": "square", "side": 2}}),
        ("shape.name=unit-disc", {"train": {"batch": 1, "dropout": 0.5}, "shape": {"name": "unit-disc"}}),
        ('shape.name="unit-disc"', {"train": {"batch": 1, "dropout": 0.5}, "shape": {"name": "unit-disc"}}),
        ("shape=unit-disc", {"train": {"batch": 1, "dropout": 0.5}, "shape": "unit-disc"}),
    ],
)
def test_override(setting, expected):
    given = {"train": {"batch": 1, "dropout": 0.5}, "shape": {"name": "square", "side": 2}}
    assert override(given, [setting]) == expected
    assert given == {"train": {"batch": 1, "dropout": 0.5}, "shape": {"name": "square", "side": 2}}


def test_override_reads_toml_values_else_text():
    settings = ["a=true", "b=[1, 2]", "c=x=y", "d= spaced out ", "e=", "f.g.h=0x10", "f.g.i='3'"]
    expected = {"a": True, "b": [1, 2], "c": "x=y", "d": "spaced out", "e": "", "f": {"g": {"h": 16, "i": "3"}}}
    assert override({}, settings) == expected


def test_a_name_comes_before_the_fields_of_its_class():
    given = {"shape": {"name": "square", "side": 2}}
    assert override(given, ["shape.name=scaled", "shape.by=3"]) == {"shape": {"name": "scaled", "by": 3}}


@pytest.mark.parametrize(
    "setting, message",
    [
        ("train", '--set "train" is not of the form a.b=c, for example --set train.batch=64'),
        ("=3", '--set "=3" is not of the form a.b=c'),
        ("note.x=3", '--set "note.x=3": "note" is a value, not a section'),
    ],
)
def test_a_wrong_setting_is_named(setting, message):
    with pytest.raises(UsageError) as caught:
        override({"note": "n"}, [setting])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("FixedLarge", "fixed-large"),
        ("UNet", "unet"),
        ("Warmup10", "warmup10"),
        ("DDIM", "ddim"),
        ("X0", "x0"),
        ("Classifier_28", "classifier-28"),
    ],
)
def test_names_of_classes(name, expected):
    assert kebab(name) == expected


def test_the_hint_of_an_unknown_name():
    assert str(unknown("schedule", "cosin", ["linear", "cosine"])) == (
        'schedule "cosin" is not known. Did you mean "cosine"? Known: cosine, linear'
    )
    assert nearest("zzz", {"b", "a"}) == " Known: a, b"


def test_every_error_has_its_exit_code():
    codes = {cls.__name__: cls.exit_code for cls in Error.__subclasses__()}
    assert codes == {
        "UsageError": 2,
        "DataError": 2,
        "NotFiniteError": 3,
        "StorageError": 4,
        "Corrupt": 5,
        "MemoryExhausted": 6,
        "Locked": 7,
        "Stalled": 8,
        "Preempted": 143,
    }
    assert not issubclass(DataError, UsageError) and not issubclass(Preempted, UsageError)
