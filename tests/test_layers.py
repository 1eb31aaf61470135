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

# A folder imports from rows above its own; within a folder a module imports from its left. `name/` is a folder inside.
ROWS = tuple(
    (place, tuple(names.split()))
    for place, names in (
        ("", "errors strict timing kernel key config figure"),
        ("machine", "disk log lock tensorfile arrayfile store sink dist watch device"),
        ("network", "base block attention resample unet"),
        (
            "diffusion",
            "numbers process grid density gaussian lattice parameterisation reverse denoiser windows sampler/ guide "
            "objective trajectory importance likelihood flow fit",
        ),
        (
            "data",
            "levels deep colour picture made listing passed arrange labelfile source single remark order subset loader "
            "format/ workers pack inspect",
        ),
        ("interop", "torchfile diffusers_files diffusers_fields diffusers_network diffusers_chain diffusers original"),
        ("quality", "metric/ feature/ gather statistics nearest nearer"),
        ("model", "recipe average classes weights fitted facts distilled walk mean guide model load fit"),
        (
            "training",
            "plan optimizer need layout tune scale trainer memory look health auto resume profile proxy track loop "
            "start distill",
        ),
        ("measure", "claim parts nll flow sets passes memorise scores evaluate along"),
        ("codec", "coder tail plan trellis container chain stream tailfit tables ledger exact"),
        ("view", "report explore draw pieces results ranking subject report_run compare_runs demo"),
        ("cli", "options chain tools train sample figures fit distill measure evaluate encode codec report data main"),
    )
)
# Inside these every module may import every other one, without a circle: their files are added, not ordered.
TABLES = ("diffusion.sampler", "data.format", "quality.metric", "quality.feature")

# Closed lists, for what is to know less than its row allows.
ONLY = {
    "network.*": {"undiffuse.errors", "undiffuse.config", "undiffuse.network", "torch", "jaxtyping"},
    "diffusion.*": {"undiffuse.errors", "undiffuse.strict", "undiffuse.config", "undiffuse.key", "undiffuse.diffusion",
                    "undiffuse.network.base", "torch", "numpy", "jaxtyping"},
    "errors": set(),
}  # fmt: skip
BASE = {"torch", "numpy", "PIL", "safetensors", "jaxtyping", "typer", "rich", "tomli_w"}
BASE |= {"pydantic", "pydantic_core", "annotated_types"}  # one distribution and the two that it is made of
EXTRA = {"resvg_py", "wandb", "transformers", "torchdiffeq", "triton"}  # inside functions only
PLATFORM = {"fcntl", "msvcrt", "termios", "resource", "pwd", "grp"}  # inside functions only

PICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "yaml.load"}
EXEMPT = {"interop.torchfile": {"torch.load"}, "data.format.cifar": {"pickle"}}
# What torch makes of its default type on its default device, which a user may have set, unless both are said.
MADE = {"arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones",
        "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices",
        "zeros"}  # fmt: skip
LEGACY = {"torch.Tensor", "torch.FloatTensor", "torch.DoubleTensor", "torch.LongTensor", "torch.set_default_device"}

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
        here = ".".join(package)  # a table looks below itself for what is added to it
        others = [text for text in texts if text.startswith("undiffuse.") and not f"{text}.".startswith(f"{here}.")]
        yield from (Import(node.lineno, text, lazy=True) for text in others)
    only_for_types = isinstance(node, ast.If) and full_name(node.test).endswith("TYPE_CHECKING")
    lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Try))
    for child in node.orelse if only_for_types else ast.iter_child_nodes(node):
        yield from imports(child, package, lazy)


def position(module: str) -> tuple[int, int] | None:
    """(row, column) of a module, `process` of `diffusion.process`; `__main__` stands at the very end."""
    if module == "__main__":
        return len(ROWS), 0
    folder, _, rest = module.rpartition(".") if "." in module else ("", "", module)
    top, _, inner = folder.partition(".")
    name = f"{inner}/" if inner else rest
    for row, (place, names) in enumerate(ROWS):
        if place == top and name in names:
            return row, names.index(name)
    return None


def table_of(module: str) -> str | None:
    return next((table for table in TABLES if module.startswith(f"{table}.")), None)


def may_import(module: str, target: str) -> bool:
    if table_of(module) is not None and table_of(module) == table_of(target):
        return True
    return position(target) < position(module)


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
    return f"imports {wrong[0]}, which stands right of it or below" if wrong else None


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


def bad_makers(tree: ast.AST, found: list[Import]) -> Found:
    """Tensors whose type or device would be torch's global default."""
    made = {f"torch.{name}" for name in MADE}
    yield from ((each.line, f"imports {each.target}; write it out") for each in found if each.target in made)
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, said = full_name(node.func), {word.arg for word in node.keywords}
        if name in LEGACY:
            yield node.lineno, f"calls {name}"
        elif name in made and not {"dtype", "device"} <= said:
            yield node.lineno, f"calls {name} without dtype= and device=, so torch's global defaults change it"


def bad_devices(tree: ast.AST, module: str) -> Found:
    """The equations run wherever their tensors are; schedules are float64, which lives on the CPU."""
    for node in ast.walk(tree) if module.startswith(("diffusion.", "network.")) else ():
        if isinstance(node, ast.Constant) and str(node.value).partition(":")[0] in ("cuda", "mps", "xpu"):
            yield node.lineno, f"names the device {node.value}"


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
        checks = [*bad_calls(tree, found, module), *bad_makers(tree, found), *bad_devices(tree, module)]
        checks += too_long(tree, text)
        if path.name == "__init__.py":
            checks += bad_init(found, is_root=len(path.parts) == 1)
        elif module in homeless:
            checks.append((1, "stands in no row; give it a place in ROWS of this test and in docs/architecture.md"))
        else:
            checks += bad_imports(found, module, modules - homeless)
            direct = {each.target for each in found if each.target.startswith("undiffuse.")}
            near = {name for target in direct for name in owners(target, modules) if table_of(name) is not None}
            graph[module] = {name for name in near if table_of(name) == table_of(module)} - {module}
        broken += [f"{path.as_posix()}:{line}: {message}" for line, message in checks]
    return broken + circle(graph)


def test_the_package_keeps_its_rules():
    assert "\n".join(violations(PACKAGE)) == ""


def test_the_rules_were_applied_to_every_file():
    named = {(PACKAGE / place / name).with_suffix(".py") for place, names in ROWS for name in names if name[-1] != "/"}
    tables = {path for table in TABLES for path in (PACKAGE / table.replace(".", "/")).glob("[!_]*.py")}
    assert named | tables == {path for path in PACKAGE.rglob("[!_]*.py")}


def test_no_test_file_is_too_long():
    lines = {path.name: len(path.read_text("utf-8").splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > FILE_LINES} == {}


GOOD = {
    "__init__.py": "from typing import Any\n\ndef __getattr__(name):\n    import importlib\n",
    "__main__.py": "from undiffuse.cli.main import main\n",
    "errors.py": "import difflib\n",
    "config.py": "import pydantic\nfrom undiffuse.errors import UsageError\n",
    "machine/store.py": "def lock():\n    import fcntl\n",
    "diffusion/process.py": "import torch\nTABLE = Table('process', 'undiffuse.diffusion.process')\n",
    "diffusion/denoiser.py": "if TYPE_CHECKING:\n    from undiffuse.model.model import Model\n",
    "diffusion/sampler/base.py": "from undiffuse.diffusion.denoiser import Prediction\n",
    "diffusion/sampler/ddim.py": "from undiffuse.diffusion.sampler.base import Sampler\n",
    "network/__init__.py": "",
    "network/block.py": "from undiffuse.config import Table\nNETWORKS = Table('network', 'undiffuse.network')\n",
    "network/unet.py": "import math, torch\nfrom undiffuse.network.block import ResBlock\n",
    "data/source.py": "from undiffuse.config import Table\nTABLE = Table('format', 'undiffuse.data.format')\n",
    "data/format/emoji.py": "from undiffuse.data.source import Source\ndef draw():\n    import resvg_py\n",
    "data/format/cifar.py": "import pickle\nfrom undiffuse.data.format.emoji import draw\n",
    "interop/torchfile.py": "import torch\ntorch.load(path, weights_only=True)\n",
    "model/model.py": "from undiffuse.network import unet\nnetwork.eval()\ntorch.eye(2, dtype=F64, device='cpu')\n",
    "training/loop.py": "from undiffuse.model.model import Model\n",
    "cli/data.py": "from undiffuse.training.loop import train\n",
    "cli/main.py": "import undiffuse.cli.data\n",
}
LONG = "def f():\n" + "    x = 1\n" * 60
PROCESS, MODEL = "diffusion/process.py", "model/model.py"
BAD = {
    "upwards": (PROCESS, "from undiffuse.diffusion.denoiser import Denoiser",
                "imports diffusion.denoiser, which stands right of it or below"),
    "in a body": (PROCESS, "def f():\n    import undiffuse.model.model", "imports model.model"),
    "relative": ("network/unet.py", "from ..model.model import Model", "imports model.model"),
    "beside": ("model/model.py", "from undiffuse.training.loop import train", "imports training.loop"),
    "to the right": ("cli/data.py", "import undiffuse.cli.main", "imports cli.main"),
    "into a table": ("diffusion/denoiser.py", "from undiffuse.diffusion.sampler.ddim import DDIM",
                     "imports diffusion.sampler.ddim"),
    "first row": ("errors.py", "from undiffuse import config", "imports config"),
    "else": (PROCESS, "if TYPE_CHECKING:\n    pass\nelse:\n    import undiffuse.model.model", "imports model.model"),
    "table": (PROCESS, "Table('format', 'undiffuse.data.format')", "imports data.format."),
    "by name": (PROCESS, "importlib.import_module('undiffuse.model.model')", "imports model.model"),
    "front": ("cli/main.py", "from undiffuse import load", "imports undiffuse.load, which is no module"),
    "whole": ("cli/main.py", "import undiffuse", "imports undiffuse, which is no module"),
    "circle": ("data/format/emoji.py", "from undiffuse.data.format import cifar", "imports in a circle"),
    "homeless": ("helpers.py", "", "stands in no row"),
    "homeless folder": ("attic/helpers.py", "", "stands in no row"),
    "closed list": ("network/block.py", "from undiffuse.machine import store", "may know only"),
    "a file in diffusion": (PROCESS, "from undiffuse.machine import store", "may know only"),
    "device": (PROCESS, "x = x.to('cuda:0')", "names the device cuda:0"),
    "undeclared": (MODEL, "import click", "imports click, which the base install does not hold"),
    "extra": ("data/format/emoji.py", "import resvg_py", "imports resvg_py"),
    "torchvision": ("data/format/emoji.py", "def f():\n    import torchvision", "imports torchvision"),
    "platform": ("machine/store.py", "import fcntl", "needs fcntl at import"),
    "init": ("network/__init__.py", "from undiffuse.network.unet import UNet", "an __init__ file imports nothing"),
    "root init": ("__init__.py", "def f():\n    import torch", "an __init__ file imports nothing"),
    "pickle": ("machine/store.py", "def f():\n    import pickle", "imports pickle"),
    "from pickle": ("machine/store.py", "from pickle import loads", "imports pickle.loads"),
    "cifar": ("data/format/cifar.py", "import marshal", "imports marshal"),
    "torch.load": (MODEL, "torch.load(path, weights_only=True)", "calls torch.load"),
    "from torch": (MODEL, "from torch import load", "imports torch.load"),
    "torch.save": (MODEL, "torch.save(x, path)", "calls torch.save"),
    "weights": ("interop/torchfile.py", "torch.load(path)", "without weights_only=True"),
    "eval": (MODEL, "eval('1')", "calls eval"),
    "exec": (MODEL, "exec('1')", "calls exec"),
    "yaml": (MODEL, "yaml.load(text)", "calls yaml.load"),
    "numpy": (MODEL, "np.load(path, allow_pickle=True)", "says allow_pickle"),
    "default type": (MODEL, "torch.arange(3, device=x.device)", "calls torch.arange without dtype= and device="),
    "default device": (PROCESS, "torch.zeros(3, dtype=F64)", "calls torch.zeros without dtype= and device="),
    "maker by name": (MODEL, "from torch import arange", "imports torch.arange"),
    "legacy maker": (MODEL, "torch.Tensor([1])", "calls torch.Tensor"),
    "long file": (MODEL, "x = 1\n" * 401, "has 401 lines; 400 are allowed"),
    "long function": (MODEL, LONG, "f has 61 lines; 60 are allowed"),
}  # fmt: skip


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


@pytest.mark.parametrize("arguments", [["-c", "import undiffuse"], ["-m", "undiffuse", "--help"]])
def test_torch_is_not_imported(arguments):
    """By way of Python's own list of imports, which misses nothing."""
    result = subprocess.run([sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr.splitlines()[-1]
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "undiffuse" in imported
    assert "torch" not in imported
