"""The pages under docs/ are run: what concepts.md prints, every example of extending.md, and the generated pages."""

import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import undiffuse
from undiffuse.config import plain
from undiffuse.data.format.procedural import PROCEDURAL
from undiffuse.data.source import open_source
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.density import DENSITIES
from undiffuse.diffusion.grid import GRIDS
from undiffuse.diffusion.numbers import F64, per_image, ready
from undiffuse.diffusion.objective import OBJECTIVES, Simple
from undiffuse.diffusion.parameterisation import PARAMETERISATIONS, X0
from undiffuse.diffusion.process import PROCESSES, Cosine, Edm, Linear, Straight
from undiffuse.diffusion.reverse import VARIANCES, FixedLarge, FixedSmall, Prediction, Step
from undiffuse.diffusion.sampler.base import SAMPLERS, sample
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.machine import store
from undiffuse.machine.sink import SINKS
from undiffuse.model.load import load as load_model
from undiffuse.model.recipe import Recipe, load_recipe
from undiffuse.network.base import NETWORKS, NOTHING
from undiffuse.quality.feature.base import FEATURES
from undiffuse.quality.metric.base import METRICS, Features, Gathered, compute
from undiffuse.training import loop

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def printed(code: str, where: str) -> str:
    """What a block prints, in a namespace of its own."""
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, where, "exec"), {"__name__": "__docs__"})
    return out.getvalue()


CONCEPTS = (DOCS / "concepts.md").read_text("utf-8")
PAIRS = list(zip(blocks(CONCEPTS, "python"), blocks(CONCEPTS, "text"), strict=True))


@pytest.mark.parametrize("code, text", PAIRS, ids=["score matching and Langevin", "eq-16", "autoregressive"])
def test_concepts_prints_what_it_says(code, text):
    assert printed(code, "docs/concepts.md") == text


PYTHON = (DOCS / "python.md").read_text("utf-8")
SURFACE = list(zip(blocks(PYTHON, "python"), blocks(PYTHON, "text"), strict=True))


@pytest.mark.parametrize(
    "code, text", SURFACE, ids=["load", "show", "open_data", "guidance", "train", "nll", "nll_ode", "evaluate"]
)
def test_the_python_page_prints_what_it_says(code, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert printed(code, "docs/python.md") == text


def test_the_python_page_has_every_public_function():
    named = {name for name in undiffuse._LAZY if name[0].islower()}
    assert {name for name in re.findall(r"undiffuse\.(\w+)\(", PYTHON) if name[0].islower()} == named
    assert {*named, "Model", "Key", "Error"} <= set(dir(undiffuse))


def test_a_wrong_number_would_be_seen():
    code, text = PAIRS[1]
    assert printed(code.replace("0.2 / (process", "0.3 / (process"), "changed") != text


EXTENDING = (DOCS / "extending.md").read_text("utf-8")
FILES = {code.split("\n")[0].removeprefix("# "): code for code in blocks(EXTENDING, "python")}
CLASSES = {
    "process": (PROCESSES, "my_schedule:Cubic"),
    "parameterisation": (PARAMETERISATIONS, "my_parameterisation:Residual"),
    "variance": (VARIANCES, "my_variance:Between"),
    "objective": (OBJECTIVES, "my_objective:Huber"),
    "network": (NETWORKS, "my_network:Plain"),
    "sampler": (SAMPLERS, "my_sampler:Midpoint"),
    "grid": (GRIDS, "my_grid:EvenLogsnr"),
    "density": (DENSITIES, "my_density:Power"),
    "metric": (METRICS, "my_metric:MeanShift"),
    "features": (FEATURES, "my_features:Colours"),
}


def test_every_example_is_tried():
    modules = {name.partition(":")[0] + ".py" for _, name in CLASSES.values()}
    assert FILES.keys() == modules | {"undiffuse/data/format/raw.py", "undiffuse/data/format/procedural.py"}
    assert len(blocks(EXTENDING, "toml")) == 1


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The examples as modules of a user; gives what builds one of them."""
    for name, code in FILES.items():
        if name.startswith("my_"):
            (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda kind, **fields: CLASSES[kind][0].build({"name": CLASSES[kind][1], **fields}, trusted=True)
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_of_ones_own_is_refused_unless_trusted(mine, kind):
    table, name = CLASSES[kind]
    with pytest.raises(UsageError, match=f'{table.kind} "{name}" is code outside undiffuse'):
        table.build(name)
    assert table.name_of(mine(kind)) == name


def test_the_schedule(mine):
    process = mine("process", beta_end=0.03)
    betas, t = process.betas(), torch.linspace(0.001, 1, 77, dtype=F64)
    assert torch.allclose(betas[[0, -1]], torch.tensor([1e-4, 0.03], dtype=F64), rtol=1e-12)
    assert (betas ** (1 / 3)).diff().std() < 1e-15
    assert torch.allclose(process.time(process.logsnr(t)), t, rtol=1e-9)
    assert (process.logsnr(t).diff() < 0).all()


def test_the_features(mine):
    extractor = mine("features", levels=4).open(torch.device("cpu"))
    images = torch.tensor([0, 63, 64, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    wanted = torch.tensor([[0.5, 0.25, 0, 0.25]] * 3).view(1, 12)
    assert torch.equal(extractor(images).pool, wanted) and extractor.dimensions == {"pool": 12}
    assert extractor.name == CLASSES["features"][1] and extractor.named("{fd}") == "FD-colours"


@pytest.mark.parametrize("process", [Linear(), Cosine(), Edm(), Straight()])
def test_the_parameterisation(mine, process):
    t, keys = torch.tensor([0.1, 0.5, 0.9], dtype=F64), Key(0).rows(3)
    x_0, eps = keys.fold("x_0").normal(1, 2, 2).double(), keys.fold("eps").normal(1, 2, 2).double()
    c = mine("parameterisation").coefficients(process, t)
    x_t = process.marginal(x_0, eps, t)
    target = per_image(c.on_x_0, x_0) * x_0 + per_image(c.on_eps, x_0) * eps
    assert torch.allclose(per_image(c.skip, x_t) * x_t + per_image(c.out, x_t) * target, x_0, atol=1e-12)
    assert torch.allclose(target, x_0 - x_t, atol=1e-12)


def test_the_variance(mine):
    process, n = Linear(), torch.tensor([1000, 500, 2, 1], dtype=F64)
    t, s = n / 1000, (n - 1) / 1000
    nothing = torch.zeros(4, 1, 2, 2, dtype=F64)
    step = ready(nothing, Step.between(process, t, s))
    small, middle, large = (
        v.log_variance(step, Prediction(nothing, nothing)) for v in (FixedSmall(), mine("variance"), FixedLarge())
    )
    assert torch.allclose(middle, (small + large) / 2)
    assert (small[:3] < middle[:3]).all() and torch.equal(small[3], middle[3])


class Answer(torch.nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, time, cond=None):
        return self.answer(x)


def test_the_objective(mine):
    denoiser = Denoiser(Answer(torch.tanh), Linear(), X0(), FixedSmall(), clip=False)
    x_0, keys = Key(1).rows(4).uniform(1, 4, 4).float(), Key(2).rows(4)
    loss, plain = mine("objective", scale=0.3)(denoiser, x_0, NOTHING, keys), Simple()(denoiser, x_0, NOTHING, keys)
    assert torch.allclose(loss.per_example, (plain.per_example + 0.09).sqrt() - 0.3)
    assert torch.equal(loss.per_example, mine("objective", scale=0.3)(denoiser, x_0, NOTHING, keys).per_example)


def test_the_grid(mine):
    for process in (Edm(), Straight(), Linear()):
        times = mine("grid").times(process, 9)
        logsnr = process.logsnr(times[:-1])[1:]
        assert times[0] == 1 and times[-1] == 0 and (logsnr.diff() / logsnr.diff()[0] - 1).abs().max() < 0.05


def test_the_density(mine):
    keys = Key(3).rows(1000)
    expected = keys.fold("t").uniform().numpy() ** 3
    assert mine("density", power=3.0).t(Straight(), keys).numpy() == pytest.approx(expected.clip(1e-5))


def test_the_metric(mine):
    x = Key(4).rows(50).normal(6)
    sets = []
    for rows, is_reference in ((2 * x + 1, False), (2 * x, True)):
        sets.append(Gathered([mine("metric")], is_reference))
        sets[-1].update(Features(rows), torch.arange(50))
    spread = 2 * x.double().numpy().std(0, ddof=1)
    assert compute(mine("metric"), *sets) == {"shift": pytest.approx((spread**-2).mean() ** 0.5)}


def test_the_network(mine):
    torch.manual_seed(0)
    network = mine("network").build(3, 6)
    x, time = torch.randn(2, 3, 5, 7), torch.tensor([-3.0, 4.0])
    assert torch.equal(network(x, time), torch.zeros(2, 6, 5, 7))
    torch.nn.init.normal_(network.last.weight)
    assert not torch.allclose(network(x, time), network(x, time.flip(0)))


def test_the_sampler_is_of_the_order_that_it_declares(mine):
    """The probability flow of N(0, std²) in closed form: x_s/x_t is the ratio of their standard deviations."""
    process, std = Cosine(), 0.5

    def spread(t):
        return ((process.alpha(t) * std).square() + process.sigma(t).square()).sqrt()

    def denoise(x, t):
        return Prediction(per_image(process.alpha(t) * std**2 / spread(t).square(), x) * x, x)

    start, keys, errors = torch.ones(1, 1, 1, 1, dtype=F64), Key(0).rows(1), []
    logsnr = process.logsnr(torch.tensor([0.9, 0.05], dtype=F64))
    for steps in (20, 40):
        times = process.time(torch.linspace(float(logsnr[0]), float(logsnr[1]), steps + 1, dtype=F64))
        x = sample(mine("sampler"), denoise, process, keys, (1, 1, 1), times, start=start)
        errors.append(abs(float(x) - float(spread(times[-1]) / spread(times[0]))))
    assert errors[0] / errors[1] == pytest.approx(2 ** mine("sampler").order, rel=0.05)


SMALL = ["train.steps=2", "train.batch=4", "train.warmup=1", "train.save_every=2", "train.sample_every=2"]


@pytest.mark.slow
def test_all_of_them_train_a_model_together(mine, tmp_path):
    names = [f"{kind}.name={name}" for kind, (_, name) in CLASSES.items() if kind in plain(Recipe())]
    fields = ["process.steps=6", "process.beta_end=0.5", "network.channels=4", "data.size=8", "data.channels=1"]
    recipe = load_recipe("cifar10", [*names, *fields, *SMALL])
    loop.train(recipe, open_source("digits"), tmp_path / "run", say=lambda text: None, show_progress=False)
    with pytest.raises(UsageError, match="is code outside undiffuse, which a checkpoint may not name"):
        load_model(tmp_path / "run")
    mine_too = load_model(tmp_path / "run", trusted=True)
    times = mine_too.times(3, mine("grid"))
    assert mine_too.sample(2, steps=times, solver=mine("sampler")).shape == (2, 1, 8, 8)
    assert store.Run(tmp_path / "run").load(2)[1]["model"]["network"]["name"] == "my_network:Plain"


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Another process, for which `folder` comes first on Python's path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-W", "error", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_name_works_on_the_command_line(mine, tmp_path):
    settings = [f"process.name={CLASSES['process'][1]}", "process.beta_end=0.03", "process.steps=4", "data.size=8"]
    settings += ["data.channels=1", "network.channels=8", "network.blocks=1", *SMALL]
    words = ["train", "digits", "-p", "cifar10", "-o", "run", *(w for s in settings for w in ("--set", s))]
    done = python(tmp_path, "-m", "undiffuse", *words)
    assert done.returncode == 0, done.stderr
    assert 'name = "my_schedule:Cubic"' in (tmp_path / "run" / "config.toml").read_text()


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the package with the two examples that belong inside it."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "undiffuse", folder / "undiffuse", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (folder / "undiffuse/data/format/raw.py").write_text(FILES["undiffuse/data/format/raw.py"])
    with open(folder / "undiffuse/data/format/procedural.py", "a") as file:
        file.write("\n\n" + FILES["undiffuse/data/format/procedural.py"])
    return folder


@pytest.mark.slow
def test_the_procedural_set(extended):
    code = """
from undiffuse.data.format.procedural import PROCEDURAL
from undiffuse.data.source import open_source
from undiffuse.key import Key
from undiffuse.data.format.procedural import PROCEDURAL
waves = open_source("procedural:stripes", split="test")
rule, key = PROCEDURAL.build("stripes"), Key(3)
assert (rule.draw(key.rows(5))[0][3:] == rule.draw(key.rows(5)[3:])[0]).all()
values = waves.images.float()
print(len(waves), waves.image_shape, int(values.min()) < 9, int(values.max()) > 246, 60 < float(values.std()) < 110)
"""
    done = python(extended, "-c", code)
    assert done.stdout == "1024 (1, 16, 16) True True True\n", done.stderr


@pytest.mark.slow
def test_the_data_format(extended):
    (extended / "cells-3x2x1.raw").write_bytes(bytes(range(12)))
    (extended / "short-3x2x1.raw").write_bytes(bytes(13))
    code = """
from undiffuse.data.format.procedural import PROCEDURAL
from undiffuse.data.source import open_source
print(open_source("cells-3x2x1.raw").images.tolist())
open_source("short-3x2x1.raw")
"""
    done = python(extended, "-c", code)
    assert done.stdout.split("\n")[0] == "[[[[0, 1], [2, 3], [4, 5]]], [[[6, 7], [8, 9], [10, 11]]]]", done.stderr
    assert "DataError: short-3x2x1.raw has 13 bytes; expected a multiple of 3x2x1 = 6" in done.stderr


def test_the_preset(tmp_path):
    (tmp_path / "my_preset.toml").write_text(blocks(EXTENDING, "toml")[0])
    recipe = load_recipe(tmp_path / "my_preset.toml")
    assert recipe.process == Cosine(steps=500) and recipe.network.channels == 64 and recipe.train.lr == 3e-4
    assert recipe.train.ema == 0.9999 and recipe.data.channels == 3  # from the base
    config = recipe.model((3, recipe.data.size, recipe.data.size))
    assert config.build(clip=True).network is not None


def load(path: Path):
    """A Python file that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their names
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made():
    return load(DOCS / "make_cli.py")


def test_the_command_line_page_is_what_make_docs_writes(made, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # the page depends on no terminal
    assert (DOCS / "cli.md").read_text("utf-8") == made.page(), "run `make docs`"


def test_the_command_line_page_has_every_command(made):
    names = [name for name, _ in made.commands(made.typer.main.get_command(made.app), "undiffuse")]
    assert {"undiffuse train", "undiffuse nll", "undiffuse data build", "undiffuse demo"} <= set(names)
    text = (DOCS / "cli.md").read_text("utf-8")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names_of_files_lead_somewhere(page):
    text = page.read_text("utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    paths = [page.parent / link for link in links if link]
    paths += [ROOT / name for name in re.findall(r"`((?:tests|undiffuse|docs|bench)/[\w./-]+)`", text)]
    made = {ROOT / name for name in FILES}  # what an example adds
    assert [str(path) for path in paths if not path.exists() and path not in made] == []


def test_every_picture_is_on_a_page():
    links = re.findall(r"\]\(\S*images/([^)]+)\)", "".join(page.read_text("utf-8") for page in PAGES))
    assert {path.name for path in (DOCS / "images").iterdir()} == set(links)


def test_the_tests_that_are_named_exist():
    """`tests/test_x.py::test_y`, written as `test_y` in the pages that say what shows what."""
    defined = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text("utf-8"))}
    assert len(named) > 20
    assert named - defined == set()


def test_the_picture_of_the_rows_is_the_table_that_is_tested():
    rows = load(ROOT / "tests" / "test_layers.py").ROWS
    (picture,) = blocks((DOCS / "architecture.md").read_text("utf-8"), "rows")
    drawn = [line.split("  ")[0].split() for line in picture.splitlines()]
    wanted = [[f"{place}/" if place else "undiffuse/", *names] for place, names in rows]
    assert drawn == wanted


def test_architecture_counts_what_there_is():
    tables = [PROCESSES, PARAMETERISATIONS, VARIANCES, NETWORKS, GRIDS, DENSITIES, OBJECTIVES, SAMPLERS]
    tables += [PROCEDURAL, SINKS, FEATURES, METRICS]
    text = (DOCS / "architecture.md").read_text("utf-8")
    counted = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", text, re.MULTILINE))
    assert counted == {table.base.__name__: str(len(table.classes)) for table in tables}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_blocks_are_closed(page):
    marks = re.findall(r"<!-- ([\w-]+):(begin|end) -->", page.read_text("utf-8"))
    assert marks[1::2] == [(name, "end") for name, kind in marks[0::2] if kind == "begin"]
    assert page.name != "benchmarks.md" or ("fashion-mnist", "begin") in marks
