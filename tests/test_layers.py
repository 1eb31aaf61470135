"""The architecture as data: who may import whom, what may not occur at all, and how long things may be.

Syntax trees are walked whole, function bodies included; only `if TYPE_CHECKING:` is exempt. The walker is itself
tested, on small trees that each break one rule.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "undiffuse"

# A module imports from rows above its own, and from its own package. The first match counts.
LAYERS = (
    ("errors", "key", "config", "dist", "watch", "disk", "log", "sink"),
    ("process", "gaussian", "store", "codec.container", "codec.coder", "data.order"),
    ("denoiser", "network.*", "data.*", "metric.*"),
    ("likelihood", "objective", "sampler.*", "guide"),
    ("codec.*", "average", "figure", "interop.*"),
    ("recipe", "model", "trainer", "profile", "resume", "train", "evaluate", "explore", "distill"),
    ("report", "demo", "cli_*", "cli"),
)
LEFT_TO_RIGHT = (0, 5, 6)  # in these rows also from the left

# Closed lists, for modules that are to know less than their row allows.
ONLY = {
    "network.*": {"undiffuse.errors", "undiffuse.config", "undiffuse.network", "torch", "jaxtyping"},
    "errors": set(),
    "codec.container": {"undiffuse.errors"},
}
BASE = {"torch", "numpy", "PIL", "safetensors", "jaxtyping", "typer", "rich", "tomli_w"}
BASE |= {"pydantic", "pydantic_core", "annotated_types"}  # one distribution and the two that it is made of
EXTRA = {"resvg_py", "wandb"}  # inside functions only
PLATFORM = {"fcntl", "msvcrt", "termios", "resource", "pwd", "grp"}  # inside functions only

PICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "yaml.load"}
EXEMPT = {"interop.torchfile": {"torch.load"}, "data.cifar": {"pickle"}}

FILE_LINES, FUNCTION_LINES = 400, 60


@dataclass(frozen=True)
class Import:
    """`target` in full (`undiffuse.key.Key`); lazy: inside a function or a try block."""

    line: int
    target: str
    lazy: bool

    @property
    def root(self) -> str:
        return self.target.split(".")[0]


Found = Iterator[tuple[int, str]]  # the line, and what is wrong there


def full_name(node: ast.expr) -> str:
    """`torch.load` of the expression torch.load; empty for anything that is not a dotted name."""
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imports(node: ast.AST, package: list[str], lazy: bool = False) -> Iterator[Import]:
    """Every import under `node`, and every module that a `Table` or `import_module` names by a string."""
    if isinstance(node, ast.Import):
        yield from (Import(node.lineno, alias.name, lazy) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        above = package[: len(package) + 1 - node.level] if node.level else []
        origin = ".".join([*above, *filter(None, [node.module])])
        yield from (Import(node.lineno, f"{origin}.{alias.name}", lazy) for alias in node.names)
    if isinstance(node, ast.Call) and full_name(node.func).split(".")[-1] in ("Table", "import_module", "__import__"):
        texts = [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
        others = [text for text in texts if text.startswith("undiffuse.") and text != ".".join(package)]
        yield from (Import(node.lineno, text, lazy=True) for text in others)
    only_for_types = isinstance(node, ast.If) and full_name(node.test).endswith("TYPE_CHECKING")
    lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Try))
    for child in node.orelse if only_for_types else ast.iter_child_nodes(node):
        yield from imports(child, package, lazy)


def position(module: str) -> tuple[int, int] | None:
    places = ((row, column) for row, names in enumerate(LAYERS) for column in range(len(names)))
    return next((place for place in places if fnmatch(module, LAYERS[place[0]][place[1]])), None)


def same_package(module: str, target: str) -> bool:
    return "." in module and module.split(".")[0] == target.split(".")[0]


def may_import(module: str, target: str) -> bool:
    (row, column), (target_row, target_column) = position(module), position(target)
    beside = same_package(module, target) or (row in LEFT_TO_RIGHT and target_column <= column)
    return target_row < row or (target_row == row and beside)


def owners(target: str, modules: set[str]) -> set[str]:
    """The module that `undiffuse.a.b` or `undiffuse.a.b.Name` stands in; of a package's name, each of its modules."""
    inside = target.removeprefix("undiffuse.")
    exact = {name for name in (inside, inside.rpartition(".")[0]) if name in modules}
    return exact or {name for name in modules if name.startswith(f"{inside}.")}


def bad_inside(found: Import, module: str, modules: set[str]) -> str | None:
    """What is wrong with an import of the package's own, if anything."""
    targets = owners(found.target, modules)
    if not targets and found.target != "undiffuse.__version__":
        return f"imports {found.target}, which is no module; name the module that it stands in"
    wrong = sorted(target for target in targets - {module} if not may_import(module, target))
    return f"imports {wrong[0]}, which stands beside or below it" if wrong else None


def bad_outside(found: Import) -> str | None:
    """What is wrong with an import of another distribution, if anything."""
    if found.root in PLATFORM and not found.lazy:
        return f"needs {found.root} at import, which not every platform has"
    if found.root in sys.stdlib_module_names or found.root in BASE or (found.root in EXTRA and found.lazy):
        return None
    return f"imports {found.root}, which the base install does not hold"


def bad_imports(found: list[Import], module: str, modules: set[str]) -> Found:
    only = next((names for pattern, names in ONLY.items() if fnmatch(module, pattern)), None)
    for each in found:
        message = bad_inside(each, module, modules) if each.root == "undiffuse" else bad_outside(each)
        listed = only is None or any(f"{each.target}.".startswith(f"{name}.") for name in only)
        if message is None and not listed and each.root not in sys.stdlib_module_names:
            message = f"imports {each.target}, and may know only {', '.join(sorted(only)) or 'the standard library'}"
        if message:
            yield each.line, message


def bad_init(found: list[Import], is_root: bool) -> Found:
    """`__init__` files import nothing, so that naming a module loads that module alone."""
    for each in found:
        if not (is_root and (each.root == "typing" or (each.root == "importlib" and each.lazy))):
            yield each.line, f"imports {each.target}; an __init__ file imports nothing"


def bad_calls(tree: ast.AST, found: list[Import], module: str) -> Found:
    """Whatever runs a stranger's code: pickles under each of their names, eval and exec."""
    exempt = EXEMPT.get(module, set())
    for each in found:
        if each.root in PICKLES - exempt or each.target in CALLS - exempt:
            yield each.line, f"imports {each.target}"
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = full_name(node.func)
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in CALLS - exempt:
            yield node.lineno, f"calls {name}"
        elif name == "torch.load" and options.get("weights_only") != "True":
            yield node.lineno, "calls torch.load without weights_only=True"
        if options.get("allow_pickle", "False") != "False":
            yield node.lineno, "says allow_pickle"


def too_long(tree: ast.AST, text: str) -> Found:
    lines = len(text.splitlines())
    if lines > FILE_LINES:
        yield lines, f"has {lines} lines; {FILE_LINES} are allowed"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {length} lines; {FUNCTION_LINES} are allowed"


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"{' -> '.join(error.args[1])}: imports in a circle"]
    return []


def violations(package: Path) -> list[str]:
    """Every broken rule of a tree, as `path:line: what`."""
    files = {path.relative_to(package): path.read_text("utf-8") for path in sorted(package.rglob("*.py"))}
    modules = {".".join(path.with_suffix("").parts) for path in files if path.name != "__init__.py"}
    homeless = {module for module in modules if position(module) is None}
    graph, broken = {}, []
    for path, text in files.items():
        tree, module = ast.parse(text), ".".join(path.with_suffix("").parts)
        found = list(imports(tree, ["undiffuse", *path.parts[:-1]]))
        checks = [*bad_calls(tree, found, module), *too_long(tree, text)]
        if path.name == "__init__.py":
            checks += bad_init(found, is_root=len(path.parts) == 1)
        elif module in homeless:
            checks.append((1, "stands in no layer; give it one in the table of this test and in docs/architecture.md"))
        else:
            checks += bad_imports(found, module, modules - homeless)
            direct = {each.target for each in found if each.target.startswith("undiffuse.")}
            near = {name for target in direct for name in owners(target, modules) if same_package(module, name)}
            graph[module] = near - {module}
        broken += [f"{path.as_posix()}:{line}: {message}" for line, message in checks]
    return broken + circle(graph)


def test_the_package_keeps_its_rules():
    assert "\n".join(violations(PACKAGE)) == ""


def test_the_rules_were_applied_to_every_file():
    assert {"errors.py", "key.py", "config.py", "process.py"} <= {path.name for path in PACKAGE.glob("*.py")}


def test_no_test_file_is_too_long():
    lines = {path.name: len(path.read_text("utf-8").splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > FILE_LINES} == {}


GOOD = {
    "__init__.py": "from typing import Any\n\ndef __getattr__(name):\n    import importlib\n",
    "errors.py": "import difflib\n",
    "config.py": "import pydantic\nfrom undiffuse.errors import UsageError\n",
    "process.py": "import torch\nfrom undiffuse.config import Table\nTABLE = Table('process', 'undiffuse.process')\n",
    "denoiser.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from undiffuse.model import Model\n",
    "network/__init__.py": "",
    "network/block.py": "from undiffuse.config import Table\nNETWORKS = Table('network', 'undiffuse.network')\n",
    "network/unet.py": "import math, torch\nfrom undiffuse.network.block import ResBlock\n",
    "data/emoji.py": "def draw():\n    import resvg_py\n",
    "store.py": "def lock():\n    import fcntl\n",
    "interop/torchfile.py": "import torch\ntorch.load(path, weights_only=True)\n",
    "data/cifar.py": "import pickle\n",
    "model.py": "from undiffuse import __version__\nfrom undiffuse.network import unet\nnetwork.eval()\n",
    "train.py": "from undiffuse.model import Model\n",
    "cli_data.py": "from undiffuse.train import train\n",
    "cli.py": "import undiffuse.cli_data\n",
}
LONG = "def f():\n" + "    x = 1\n" * 60
BAD = {
    "upwards": (
        "process.py",
        "from undiffuse.denoiser import Denoiser",
        "imports denoiser, which stands beside or below",
    ),
    "in a body": ("process.py", "def f():\n    import undiffuse.model", "imports model"),
    "relative": ("network/unet.py", "from ..model import Model", "imports model"),
    "beside": ("denoiser.py", "from undiffuse.network.unet import UNet", "imports network.unet"),
    "rightwards": ("model.py", "from undiffuse.train import train", "imports train"),
    "first layer": ("errors.py", "from undiffuse import config", "imports config"),
    "else": ("process.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import undiffuse.model", "imports model"),
    "table": ("process.py", "Table('network', 'undiffuse.network')", "imports network."),
    "by name": ("process.py", "importlib.import_module('undiffuse.model')", "imports model"),
    "front": ("cli.py", "from undiffuse import load", "imports undiffuse.load, which is no module"),
    "whole": ("cli.py", "import undiffuse", "imports undiffuse, which is no module"),
    "circle": ("network/block.py", "from undiffuse.network import unet", "imports in a circle"),
    "homeless": ("helpers.py", "", "stands in no layer"),
    "closed list": ("network/block.py", "from undiffuse.process import Process", "may know only"),
    "closed list, outside": ("codec/container.py", "import torch", "may know only undiffuse.errors"),
    "undeclared": ("process.py", "import click", "imports click, which the base install does not hold"),
    "extra": ("data/emoji.py", "import resvg_py", "imports resvg_py"),
    "torchvision": ("data/emoji.py", "def f():\n    import torchvision", "imports torchvision"),
    "platform": ("store.py", "import fcntl", "needs fcntl at import"),
    "init": ("network/__init__.py", "from undiffuse.network.unet import UNet", "an __init__ file imports nothing"),
    "root init": ("__init__.py", "def f():\n    import torch", "an __init__ file imports nothing"),
    "pickle": ("store.py", "def f():\n    import pickle", "imports pickle"),
    "from pickle": ("store.py", "from pickle import loads", "imports pickle.loads"),
    "cifar": ("data/cifar.py", "import marshal", "imports marshal"),
    "torch.load": ("model.py", "torch.load(path, weights_only=True)", "calls torch.load"),
    "from torch": ("model.py", "from torch import load", "imports torch.load"),
    "torch.save": ("model.py", "torch.save(x, path)", "calls torch.save"),
    "weights": ("interop/torchfile.py", "torch.load(path)", "without weights_only=True"),
    "eval": ("model.py", "eval('1')", "calls eval"),
    "exec": ("model.py", "exec('1')", "calls exec"),
    "yaml": ("model.py", "yaml.load(text)", "calls yaml.load"),
    "numpy": ("model.py", "np.load(path, allow_pickle=True)", "says allow_pickle"),
    "long file": ("model.py", "x = 1\n" * 401, "has 401 lines; 400 are allowed"),
    "long function": ("model.py", LONG, "f has 61 lines; 60 are allowed"),
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "undiffuse" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "undiffuse"


def test_a_good_tree_breaks_no_rule(tmp_path):
    assert violations(write(tmp_path, GOOD)) == []


@pytest.mark.parametrize("case", BAD)
def test_a_broken_rule_is_found_and_nothing_else(tmp_path, case):
    name, text, message = BAD[case]
    found = violations(write(tmp_path, {**GOOD, name: text}))
    assert len(found) == 1
    assert message in found[0]
    assert case == "circle" or found[0].startswith(f"{name}:")


@pytest.mark.parametrize("arguments", [["-c", "import undiffuse"], ["-m", "undiffuse.cli", "--help"]])
def test_torch_is_not_imported(arguments):
    """By way of Python's own list of imports, which misses nothing."""
    result = subprocess.run([sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr.splitlines()[-1]
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "undiffuse" in imported
    assert "torch" not in imported
