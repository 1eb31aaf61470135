"""The command line. Each command is a short call into the library; torch is imported only when one runs."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse import cli_data, cli_tools
from undiffuse.cli_tools import JsonOpt, show
from undiffuse.errors import Error, UsageError

if TYPE_CHECKING:
    import torch

    from undiffuse.data.source import ArraySource
    from undiffuse.model import Model
    from undiffuse.recipe import Recipe

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

ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run folder, a checkpoint in it, a file or a shipped name")
]
DataArg = Annotated[str, typer.Argument(metavar="DATA", help="A folder, zip, npz, tar shards, lmdb, …, or a named set")]
OutOpt = Annotated[Path, typer.Option("--out", "-o", help="Where the results go")]
SeedOpt = Annotated[int, typer.Option("--seed", help="The same seed gives the same pictures")]
StepsOpt = Annotated[int | None, typer.Option("--steps", help="Network evaluations; all of the table unless given")]
SolverOpt = Annotated[str, typer.Option("--solver", help="ancestral, ddim, …")]
DeviceOpt = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps")]
SizeOpt = Annotated[int | None, typer.Option("--size", help="Crop to a square and resize to this side")]
SplitOpt = Annotated[str, typer.Option("--split", help="train or test, where the data has both")]
BatchOpt = Annotated[int, typer.Option("--batch", help="Images at a time; the results hardly depend on it")]
SetOpt = Annotated[list[str] | None, typer.Option("--set", help="Any setting of the recipe, a.b=c; may be repeated")]


@contextmanager
def ticking(total: int, what: str, as_json: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error that counts network evaluations."""
    from undiffuse import log

    with log.progress(total, what, not as_json) as bar:
        yield bar.advance


def open_model(source: str, device: str) -> "Model":
    from undiffuse.model import load

    return load(source, device=check_device(device))


def check_device(name: str) -> "torch.device":
    """The device of that name; one that this machine lacks is a UsageError."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f'device "{name}" cannot be used here ({reason}); try --device cpu') from error
    return device


def open_like(model: "Model", data: str, split: str) -> "ArraySource":
    """A data set in the shape that the model was trained on."""
    from undiffuse.data.source import open_source

    c, h, w = model.image_shape
    return open_source(data, size=(h, w), channels=c, split=split)


def read_picture(path: Path, model: "Model") -> Any:
    """One picture file as uint8 [c, h, w] in the model's shape."""
    import torch

    from undiffuse.data import picture
    from undiffuse.errors import DataError

    c, h, w = model.image_shape
    try:
        pixels = picture.decode(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return torch.from_numpy(picture.fit(pixels, (h, w), c).copy()).permute(2, 0, 1)


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
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable pictures out and list them")] = False,
    use_cache: Annotated[
        bool | None,
        typer.Option("--pack/--no-pack", help="Decode once into $UNDIFFUSE_CACHE; unless given, if over 1 GB"),
    ] = None,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Train a model; the same command again goes on where it stopped.

    Examples: `undiffuse train photos/ --preset cifar10 --size 32 --out runs/photos`,
    `undiffuse train fashion-mnist -p fashion-mnist -o runs/fm --minutes 30 --set train.lr=5e-4`
    """
    from undiffuse import train as engine
    from undiffuse.data.pack import WORKERS, open_data

    if preset == "auto":
        from undiffuse.recipe import presets

        raise UsageError(f"no preset was given; choose one with --preset. Known: {', '.join(presets())}")
    recipe = open_recipe(preset, [*(settings or []), *([f"data.size={size}"] if size else [])])
    shape = {"size": recipe.data.size, "channels": recipe.data.channels, "background": recipe.data.background}
    source = open_data(
        data, **shape, skip_bad=skip_bad, use_cache=use_cache, workers=WORKERS, show_progress=not as_json
    )
    device_ = str(check_device(device))
    begin = open_model(init, device) if init else None
    budget = engine.Budget(steps, images, minutes)
    held = engine.held_out_split(data, recipe)
    say = (lambda text: None) if as_json else (lambda text: typer.echo(text, err=True))
    left_out = f", {len(source.skipped)} left out" if source.skipped else ""
    say(f"{len(source):,} images of {'×'.join(map(str, source.image_shape))} from {data}{left_out}; preset {preset}")
    model = engine.train(recipe, source, out, held, begin, budget, device_, say, not as_json)
    show({"run": out, "step": model.meta["step"], "images_seen": model.meta["images"], "parameters": model.parameters(),
            "next": f"undiffuse sample {out} -n 64 --out samples"}, as_json)  # fmt: skip


def open_recipe(preset: str, settings: list[str]) -> "Recipe":
    from undiffuse.recipe import load_recipe

    return load_recipe(preset, settings)


@app.command()
def sample(
    model: ModelArg,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for PNGs and a grid")] = None,
    n: Annotated[int, typer.Option("-n", help="How many images")] = 64,
    steps: StepsOpt = None,
    solver: SolverOpt = "ancestral",
    npz: Annotated[Path | None, typer.Option("--npz", help="One uint8 array arr_0 [n, h, w, c] in this file")] = None,
    label: Annotated[int | None, typer.Option("--label", help="A class, for a model trained with labels")] = None,
    batch: BatchOpt = 64,
    seed: SeedOpt = 0,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Draw images: PNG files and a grid, or one array.

    Examples: `undiffuse sample fashion-mnist -n 16 --out samples`,
    `undiffuse sample runs/fm -n 5000 --steps 50 --solver ddim --npz samples.npz`
    """
    from undiffuse import explore

    if out is None and npz is None:
        raise UsageError("nowhere to write; give --out FOLDER for PNGs, or --npz FILE for one array")
    loaded = open_model(model, device)
    evaluations = max(0, -(-n // batch)) * (len(loaded.times(steps)) - 1)
    with ticking(evaluations, "sampling", as_json) as tick:
        images = loaded.sample(n, steps, solver, seed, batch, label, tick)
    written = explore.write_images(images, out, npz)
    show({"images": n, "steps": len(loaded.times(steps)) - 1, "solver": solver, "seed": seed, **written}, as_json)


@app.command()
def progressive(
    model: ModelArg,
    out: OutOpt,
    n: Annotated[int, typer.Option("-n", help="How many images")] = 8,
    slots: Annotated[int | None, typer.Option("--slots", help="Pictures along the chain; 20 unless given")] = None,
    steps: StepsOpt = None,
    seed: SeedOpt = 0,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """The estimate of x_0 along the reverse chain, a row an image (Fig. 6): large features first.

    Example: `undiffuse progressive fashion-mnist --steps 100 --out progressive.png`
    """
    from undiffuse import explore

    loaded = open_model(model, device)
    total = len(loaded.times(steps)) - 1
    with ticking(total, "progressive", as_json) as tick:
        images, times = explore.progressive(loaded, n, seed, steps, slots or min(20, total), progress=tick)
    explore.write_grid(images, out)
    show({"picture": out, "t": [float(t) for t in times]}, as_json)


@app.command()
def shared(
    model: ModelArg,
    out: OutOpt,
    n: Annotated[int, typer.Option("-n", help="How many images share each latent")] = 8,
    at: Annotated[
        list[float] | None, typer.Option("--at", help="t of the shared latent, 0 to 1; may be repeated")
    ] = None,
    steps: StepsOpt = None,
    seed: SeedOpt = 0,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Samples that share x_t and then go their own ways, a row for each t (Fig. 7).

    Example: `undiffuse shared fashion-mnist --at 1 --at 0.75 --at 0.5 --at 0.25 --out shared.png`
    """
    from undiffuse import explore

    loaded = open_model(model, device)
    images, times = explore.shared(loaded, n, seed, tuple(at or (1.0, 0.75, 0.5, 0.25)), steps)
    explore.write_grid(images, out)
    show({"picture": out, "t": [float(t) for t in times]}, as_json)


@app.command()
def interpolate(
    model: ModelArg,
    first: Annotated[Path, typer.Argument(metavar="A.png", help="One picture, in any format and size")],
    second: Annotated[Path, typer.Argument(metavar="B.png", help="Another")],
    out: OutOpt,
    t: Annotated[list[float] | None, typer.Option("--t", help="How far to noise, 0 to 1; a row each")] = None,
    count: Annotated[int, typer.Option("--count", help="How many mixtures, from A to B")] = 11,
    steps: StepsOpt = None,
    seed: SeedOpt = 0,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Mix two pictures in the latent space at t and denoise the mixtures (Figs. 8 and 9).

    Example: `undiffuse interpolate fashion-mnist a.png b.png --t 0.25 --t 0.5 --t 0.75 --out mix.png`
    """
    from undiffuse import explore

    loaded = open_model(model, device)
    pictures = read_picture(first, loaded), read_picture(second, loaded)
    if count < 2:
        raise UsageError(f"--count {count} is not possible; give 2 or more, the pictures themselves included")
    lambdas = tuple(i / (count - 1) for i in range(count))
    images = explore.interpolate(loaded, *pictures, tuple(t or (0.5,)), lambdas, seed, steps)
    explore.write_grid(images, out)
    show({"picture": out, "t": list(t or (0.5,)), "lambda": list(lambdas)}, as_json)


@app.command()
def neighbours(
    model: ModelArg,
    data: DataArg,
    out: OutOpt,
    n: Annotated[int, typer.Option("-n", help="How many samples")] = 8,
    k: Annotated[int, typer.Option("-k", help="How many neighbours of each")] = 8,
    steps: StepsOpt = None,
    solver: SolverOpt = "ancestral",
    seed: SeedOpt = 0,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Samples and their nearest training images, pixel by pixel: has the model copied? (Figs. 12 and 15)

    Example: `undiffuse neighbours fashion-mnist fashion-mnist --steps 100 --out neighbours.png`
    """
    import torch

    from undiffuse import explore

    loaded = open_model(model, device)
    source = open_like(loaded, data, "train")
    with ticking(len(loaded.times(steps)) - 1, "sampling", as_json) as tick:
        samples = loaded.sample(n, steps, solver, seed, progress=tick)
    near = explore.neighbours(samples, source, k)
    rows = torch.stack([torch.cat([s[None], source.images[i]]) for s, i in zip(samples, near.indices, strict=True)])
    explore.write_grid(rows, out)
    show({"picture": out, "rmse_of_nearest": near.distance[:, 0].tolist(), "index": near.indices.tolist()}, as_json)


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
    batch: BatchOpt = 50,
    seed: SeedOpt = 0,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Bits/dim with its terms: the whole chain on n images, or stratified t on whole data sets.

    Examples: `undiffuse nll fashion-mnist fashion-mnist -n 100 --rate-distortion --out nll`,
    `undiffuse nll fashion-mnist fashion-mnist --draws 8`
    """
    from undiffuse import evaluate

    loaded = open_model(model, device)
    source = open_like(loaded, data, split)
    query = evaluate.Nll(n, draws, steps, seed, batch)
    with ticking(evaluate.evaluations(loaded, source, query), "bits/dim", as_json) as tick:
        terms = evaluate.nll(loaded, source, query, out, tick)
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
) -> None:
    """The main job end to end on data inside the package, in under five minutes; ends with an HTML report."""
    from undiffuse.demo import run_demo

    run_demo(out, quick)


@app.command()
def presets(as_json: JsonOpt = False) -> None:
    """The presets, and what is published or measured of each."""
    from undiffuse.recipe import load_recipe
    from undiffuse.recipe import presets as names

    recipes = {name: load_recipe(name) for name in names()}
    if as_json:
        typer.echo(json.dumps({name: {"about": r.about, "expected": r.expected} for name, r in recipes.items()}))
        return
    for name, recipe in recipes.items():
        typer.echo(f"{name:<22}{recipe.about}")


def main() -> None:
    """The entry point: an error is one line on standard error and the exit code of its kind."""
    try:
        code = app(standalone_mode=False)
    except Error as error:
        code = _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        code = _fail(error.format_message(), 2)
    except (typer.Abort, KeyboardInterrupt):
        code = _fail("interrupted", 130)
    except MemoryError:
        code = _fail("out of memory; use a smaller --batch, or --set train.micro_batch=8", 6)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> int:
    typer.echo(f"undiffuse: {' '.join(message.split())}", err=True)
    return code


if __name__ == "__main__":
    main()
