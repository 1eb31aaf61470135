"""The command line. Each command is a short call into the library; torch is imported only when one runs."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli import data as cli_data
from undiffuse.cli import sample as cli_sample
from undiffuse.cli import tools as cli_tools
from undiffuse.cli.options import (
    BatchOpt,
    ClipOpt,
    DataArg,
    DeviceOpt,
    ModelArg,
    OutOpt,
    SeedOpt,
    SizeOpt,
    SkipBadOpt,
    SplitOpt,
    VarianceOpt,
    check_device,
    open_like,
    open_model,
    parse_sides,
    ticking,
)
from undiffuse.cli.tools import JsonOpt, show
from undiffuse.errors import Error, MemoryExhausted, NotFiniteError, UsageError, is_out_of_memory

if TYPE_CHECKING:
    from undiffuse.model.model import Model
    from undiffuse.model.recipe import Recipe

app = typer.Typer(
    name="undiffuse",
    help="Denoising diffusion for images: train on your own pictures, sample, and measure honestly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(cli_data.app, name="data")
cli_tools.register(app)

SetOpt = Annotated[list[str] | None, typer.Option("--set", help="Any setting of the recipe, a.b=c; may be repeated")]


@app.command()
def train(
    data: DataArg,
    out: OutOpt,
    preset: Annotated[str, typer.Option("--preset", "-p", help="A preset's name, or a TOML file like one")] = "auto",
    steps: Annotated[int | None, typer.Option("--steps", help="Stop at this step")] = None,
    images: Annotated[int | None, typer.Option("--images", help="Stop when this many images have been seen")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Stop after this long")] = None,
    init: Annotated[str | None, typer.Option("--init", help="Fine-tune: begin with this model's weights")] = None,
    settings: SetOpt = None,
    size: SizeOpt = None,
    logs: Annotated[list[str] | None, typer.Option("--log", help="Also tensorboard or wandb; may be repeated")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable pictures out and list them")] = False,
    accept_data: Annotated[bool, typer.Option("--accept-data", help="Go on though the data has changed")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="25 steps, and where their time and memory go")] = False,
    use_cache: Annotated[
        bool | None,
        typer.Option("--pack/--no-pack", help="Decode once into $UNDIFFUSE_CACHE; unless given, if large"),
    ] = None,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Train a model; the same command again goes on where it stopped.

    Examples: `undiffuse train photos/ --preset cifar10 --size 32 --out runs/photos`,
    `undiffuse train fashion-mnist -p fashion-mnist -o runs/fm --minutes 30 --set train.lr=5e-4`,
    `undiffuse train photos/ -p cifar10 --size 32 -o runs/photos --log tensorboard`
    """
    from undiffuse.data.pack import WORKERS, open_data
    from undiffuse.machine import dist, store
    from undiffuse.training import loop as engine

    if preset == "auto":
        from undiffuse.model.recipe import presets

        raise UsageError(f"no preset was given; choose one with --preset. Known: {', '.join(presets())}")
    if not dist.together():  # so that a second writer need not read all data to be told so; the first looks again
        store.Run(out).refuse_second()
    recipe = open_recipe(preset, [*(settings or []), *([f"data.size={size_value(size)}"] if size is not None else [])])
    shape = {"size": recipe.data.size, "channels": recipe.data.channels, "background": recipe.data.background}
    source = open_data(
        data,
        **shape,
        skip_bad=skip_bad,
        use_cache=use_cache,
        workers=WORKERS,
        show_progress=not as_json and dist.is_first(),
    )
    device_ = str(check_device(dist.local_device(device)))
    begin = open_model(init, device) if init else None
    budget = engine.Budget(steps, images, minutes)
    held = engine.held_out_split(data, recipe, source.image_shape, skip_bad)
    silent = as_json or not dist.is_first()
    say = (lambda text: None) if silent else (lambda text: typer.echo(text, err=True))
    left_out = f", {len(source.skipped)} left out" if source.skipped else ""
    say(f"{len(source):,} images of {'×'.join(map(str, source.image_shape))} from {data}{left_out}; preset {preset}")
    model = engine.train(
        recipe, source, out, held, begin, budget, device_, say, not as_json, accept_data, logs or (), profile
    )
    if dist.is_first():
        show(ended(model, out, profile), as_json)


def ended(model: "Model", out: Path, profile: bool) -> dict[str, Any]:
    """Where everything is, and what to run next."""
    others = {"averages": out / "ema", "tensorboard": out / "tensorboard"}
    return {
        "run": out,
        "step": model.meta["step"],
        "images_seen": model.meta["images"],
        "parameters": model.parameters(),
        "log": out / "log.jsonl",
        **({"profile": out / "profile.json"} if profile else {"previews": out / "samples"}),
        **{name: folder for name, folder in others.items() if folder.is_dir()},
        "next": f"undiffuse sample {out} -n 64 --out samples",
    }


def size_value(text: str) -> str:
    """The value of `data.size` that --size means, as TOML."""
    sides = parse_sides("--size", text)
    return str(sides[0] if len(sides) == 1 else list(sides))


def open_recipe(preset: str, settings: list[str]) -> "Recipe":
    from undiffuse.model.recipe import load_recipe

    return load_recipe(preset, settings)


cli_sample.register(app)


@app.command()
def nll(
    model: ModelArg,
    data: DataArg,
    split: SplitOpt = "test",
    n: Annotated[int | None, typer.Option("-n", help="How many images, from the first; all unless given")] = None,
    draws: Annotated[int | None, typer.Option("--draws", help="Stratified t: this many terms an image")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="The bound of a coarser chain")] = None,
    rate_distortion: Annotated[bool, typer.Option("--rate-distortion", help="Print the table of the curve")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for all terms; makes it resumable")] = None,
    clip: ClipOpt = True,
    variance: VarianceOpt = None,
    skip_bad: SkipBadOpt = False,
    batch: BatchOpt = 50,
    seed: SeedOpt = 0,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Bits/dim with its terms: the whole chain on n images, or stratified t on whole data sets.

    Examples: `undiffuse nll fashion-mnist fashion-mnist -n 100 --rate-distortion --out nll`,
    `undiffuse nll fashion-mnist fashion-mnist --draws 8`
    """
    from undiffuse.machine import dist
    from undiffuse.measure import evaluate

    if rate_distortion and draws is not None:
        raise UsageError(f"--rate-distortion needs every term of the chain; leave out --draws {draws}")
    loaded = open_model(model, device, clip, variance)
    source = open_like(loaded, data, split, skip_bad)
    query = evaluate.Nll(n, draws, steps, seed, batch)
    with dist.joined(dist.LONG), ticking(evaluate.evaluations(loaded, source, query), "bits/dim", as_json) as tick:
        terms = evaluate.nll(loaded, source, query, out, tick)
    if not dist.is_first():
        return
    table = evaluate.table(terms) if rate_distortion else []
    if table and not as_json:
        typer.echo("  reverse step   rate (bits/dim)   RMSE [0, 255]")
        for row in table:
            typer.echo(f"  {row['step']:>12}   {row['rate']:>15.5f}   {row['rmse']:>13.5f}")
    show(terms.summary() | ({"rate_distortion": table} if table else {}) | ({"out": out} if out else {}), as_json)


@app.command()
def demo(
    out: OutOpt = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Everything tiny: only to see that it runs")] = False,
    as_json: JsonOpt = False,
) -> None:
    """The main job end to end on data inside the package, in under five minutes; ends with an HTML report.

    Examples: `undiffuse demo`, `undiffuse demo --quick --out demo-quick`
    """
    from undiffuse.view.demo import run_demo

    report = run_demo(out, quick, say=lambda text: typer.echo(text, err=as_json))
    if as_json:
        show({"report": report}, as_json)


@app.command()
def presets(as_json: JsonOpt = False) -> None:
    """The presets and what each is for; with --json also what is published or measured of it.

    Examples: `undiffuse presets`, `undiffuse presets --json`
    """
    from undiffuse.model.recipe import load_recipe
    from undiffuse.model.recipe import presets as names

    recipes = {name: load_recipe(name) for name in names()}
    if as_json:
        typer.echo(json.dumps({name: {"about": r.about, "expected": r.expected} for name, r in recipes.items()}))
        return
    for name, recipe in recipes.items():
        typer.echo(f"{name:<22}{recipe.about}")
        if recipe.expected:
            typer.echo(f"{'':<22}{results(recipe.expected)}")


def results(expected: dict[str, Any]) -> str:
    """`fid train 3.17, bits per dim test 3.75 (Ho, Jain & Abbeel 2020, Table 1)`."""
    sources = {name: value for name, value in expected.items() if name in ("source", "measured_in", "measured_by")}
    errors = {name: value for name, value in expected.items() if name.endswith("_error")}
    shown = [
        f"{name.replace('_', ' ')} {f'{value:,}' if isinstance(value, int) and value is not True else value}"
        + (f" ± {errors[f'{name}_error']}" if f"{name}_error" in errors else "")
        for name, value in expected.items()
        if name not in sources and name not in errors
    ]
    return ", ".join(shown) + "".join(f" ({value})" for value in sources.values())


def main() -> None:
    """The entry point: an error is one line on standard error and the exit code of its kind."""
    try:
        code = app(standalone_mode=False)
    except NotFiniteError as error:
        code = _fail(f"{error}: undiffuse {shlex.join(sys.argv[1:])}", error.exit_code)
    except Error as error:
        code = _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        code = _fail(error.format_message(), 2)
    except (typer.Abort, KeyboardInterrupt):
        code = _fail("interrupted", 130)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        said = f" ({asked[0].lower()})" if asked else ""
        code = _fail(
            f"out of memory{said}; give a smaller --batch, -n or --set train.micro_batch=8", MemoryExhausted.exit_code
        )
    sys.exit(code or 0)


def _fail(message: str, code: int) -> int:
    typer.echo(f"undiffuse: {' '.join(message.split())}", err=True)
    return code
