"""Commands about files rather than pictures: inspect, verify, import, export; and about the machine."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.strict import to_json

if TYPE_CHECKING:
    from undiffuse.model.average import Snapshot
    from undiffuse.model.model import Model

JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output")]


def show(result: dict[str, Any], as_json: bool) -> None:
    """The result as JSON on standard output, or as a line each for people."""
    if as_json:
        typer.echo(to_json(result, default=str))
        return
    for name, value in result.items():
        if value is not None and not isinstance(value, list):
            typer.echo(f"{name.replace('_', ' '):>20}  {value}")


def sampling(path: Path, model: "Model") -> str:
    """The command that draws from a model into a new folder, quoted so that it can be pasted."""
    names = ["samples", *(f"samples-{n}" for n in range(2, 1000))]
    out = next((name for name in names if not Path(name).exists()), names[-1])
    many = ["-n", "64"] if model.classes is None else ["--label", "all", "-n", "8"]
    return shlex.join(["undiffuse", "sample", str(path), *many, "--out", out])


def inspect(
    what: Annotated[
        str,
        typer.Argument(metavar="MODEL|PRESET", help="A run folder, a checkpoint, a file, a shipped model, or a preset"),
    ],
    as_json: JsonOpt = False,
) -> None:
    """Print the settings of a model or preset as TOML.

    For a model, also its number of parameters and how long it was trained.

    Examples:

    \b
    - `undiffuse inspect fashion-mnist`
    - `undiffuse inspect cifar10 --json`
    """
    from undiffuse.config import plain, to_toml
    from undiffuse.errors import unknown
    from undiffuse.model.load import load, shipped
    from undiffuse.model.recipe import load_recipe, presets

    if not Path(what).exists() and what not in shipped() and what in presets():
        recipe = load_recipe(what)
        typer.echo(to_json(plain(recipe)) if as_json else to_toml(recipe).rstrip())
        return
    if not Path(what).exists() and what not in shipped() and Path(what).name == what and not Path(what).suffix:
        raise unknown("model or preset", what, (*shipped(), *presets()))
    model = load(what)
    result = {"parameters": model.parameters(), "model": plain(model.config)}
    kept = ("classes", "step", "images", "images_before", "environment")
    result |= {key: model.meta[key] for key in kept if key in model.meta}
    typer.echo(to_json(result) if as_json else to_toml(result).rstrip())


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder")],
    as_json: JsonOpt = False,
) -> None:
    """Check the files of a run against their checksums.

    Every checkpoint, every EMA snapshot and the average at the lowest held-out loss is read. The exit code is 5 if one
    is damaged.

    Example:

    \b
    - `undiffuse verify runs/photos`
    """
    from undiffuse.errors import Corrupt, UsageError
    from undiffuse.machine import store
    from undiffuse.model.average import snapshots
    from undiffuse.model.load import BEST, read_weights

    folder = store.Run(run)
    if not folder.steps():
        raise UsageError(f"{run} has no checkpoints; give the --out folder of a training run")
    damaged: dict[int | str, str] = {}
    for step in folder.steps():
        try:
            folder.verify(step)
        except Corrupt as error:
            damaged[step] = str(error)
    good = {"good": len(folder.steps()) - len(damaged)}
    if kept := snapshots(run):
        spoilt = {each.path.name: str(error) for each in kept if (error := _damage(each))}
        good, damaged = good | {"ema_snapshots": len(kept) - len(spoilt)}, damaged | spoilt
    if (run / BEST).exists():
        try:
            read_weights(run / BEST)
        except Corrupt as error:
            damaged[BEST] = str(error)
        good |= {"best": int(BEST not in damaged)}
    show({**good, "damaged": damaged or "none"}, as_json)
    if damaged:
        raise typer.Exit(Corrupt.exit_code)


def _damage(snapshot: "Snapshot") -> str | None:
    from undiffuse.errors import Corrupt

    try:
        snapshot.read()
    except Corrupt as error:
        return str(error)
    return None


def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that has EMA snapshots")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write; use it as a MODEL")],
    sigma_rel: Annotated[float, typer.Option("--sigma-rel", help="Width of the average, as a share of the run")],
    step: Annotated[int | None, typer.Option("--step", help="Average up to this step; the last unless given")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Make an average of another EMA length after training.

    The average is built from EMA snapshots; train with `--set 'train.ema_profiles=[0.05,0.1]'` to have them. The
    printed `profile error` is how far the result is from the average that was asked for: 0 is exact, 0.1 is rough.

    Examples:

    \b
    - `undiffuse average runs/photos --sigma-rel 0.08 --out wide.safetensors`
    - `undiffuse average runs/photos --sigma-rel 0.03 --step 20000 --out narrow.safetensors`
    """
    from undiffuse.errors import UsageError
    from undiffuse.model.load import averaged, save

    if out.exists():
        raise UsageError(f"{out} exists; give the name of a new file")
    model = averaged(run, sigma_rel, step)
    save(model, out)
    made = model.meta["average"]
    show({"written": out, "sigma_rel": sigma_rel, "step": made["step"], "snapshots": made["snapshots"],
          "profile_error": made["error"], "next": sampling(out, model)}, as_json)  # fmt: skip


def import_model(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A diffusers folder, or a pytorch_diffusion file")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder to make")],
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .bin and .ckpt files; no code in them is run")
    ] = False,
    variant: Annotated[
        str | None, typer.Option("--variant", help="Of several kinds of weights in a diffusers folder, such as fp16")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Import a model from diffusers or pytorch_diffusion.

    The result is a run folder, to sample from, measure or fine-tune. A diffusers folder is a pipeline, its `unet`, or a
    checkpoint of a training. What is assumed about the model is printed.

    Examples:

    \b
    - `undiffuse import ddpm-cifar10-32 runs/ddpm`
    - `undiffuse import ddpm-out/checkpoint-500 runs/ddpm`
    """
    from undiffuse.errors import UsageError
    from undiffuse.interop import diffusers, original
    from undiffuse.interop.diffusers_files import absent
    from undiffuse.machine import store
    from undiffuse.model.load import parse_model, tell_assumed

    if store.Run(run).steps():
        raise UsageError(f"{run} holds checkpoints already; give the name of a new folder")
    path = Path(source)
    if not path.exists():
        raise UsageError(
            f"{source} is not there; {absent(source) or 'give a diffusers folder, or a .safetensors file'}"
        )
    if path.is_dir():
        tensors, meta = diffusers.read_folder(path, allow_pickle, variant)
    elif variant is not None:
        raise UsageError(f"{source} is one file; --variant chooses among those of a diffusers folder")
    else:
        tensors, meta = original.read_file(path, allow_pickle)
    model = parse_model(tensors, meta, source)
    tell_assumed(meta, source)
    with store.Run(run).lock() as folder:
        folder.save(0, {"ema": tensors}, {"step": 0, "images": 0, "source": path.name, **meta})
    assumed = {"assumed": meta["imported"]["assumed"]}
    show({"run": run, "parameters": model.parameters(), **assumed, "next": sampling(run, model)}, as_json)


def export_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A run folder, a checkpoint in it, an exported folder or file, or a shipped model's name",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="DST", help="The folder or file to write")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="diffusers, or file (one .safetensors file for undiffuse); unless given, file if DST ends so",
        ),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Write float16 weights")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Export a model to diffusers, or to one file.

    diffusers loads the folder with DDPMPipeline. It has no network on 2×2 patches; a model to be exported to it is
    trained with `--set network.patch=1`, or with a preset of the paper.

    Examples:

    \b
    - `undiffuse export runs/photos photos-diffusers --to diffusers`
    - `undiffuse export runs/photos photos.safetensors --half`
    """
    import torch

    from undiffuse.config import plain
    from undiffuse.errors import UsageError, unknown
    from undiffuse.interop import diffusers
    from undiffuse.model.load import as_written, load, save

    is_file = out.suffix == ".safetensors"
    to = to or ("file" if is_file else "diffusers")
    if to == "diffusers" and is_file:
        raise UsageError(f"{out} is the name of a file, and --to diffusers makes a folder; give the name of a folder")
    if to not in ("diffusers", "file"):
        raise unknown("export format", to, ["diffusers", "file"])
    if out.exists():
        raise UsageError(f"{out} exists; give the name of a new {'folder' if to == 'diffusers' else 'file'}")
    loaded, dtype, notes = load(model), torch.float16 if half else torch.float32, []
    if to == "diffusers":
        loaded.refuse_distilled("an export to diffusers")
    if to == "file":
        save(loaded, out, dtype)
    else:
        meta = {**loaded.meta, "model": plain(loaded.config)}
        notes = diffusers.write_folder(out, as_written(loaded, dtype), meta)
    show({"written": out, "format": to, **({"note": "; ".join(notes)} if notes else {})}, as_json)


def doctor(as_json: JsonOpt = False) -> None:
    """Show versions, devices and data sets on this machine.

    `device` is what `--device auto` uses here, and `noise` what draws normal noise on it: a Triton kernel, or torch,
    which draws the same bits; on a card with the reason.

    Example:

    \b
    - `undiffuse doctor`
    """
    import platform
    from importlib.metadata import version

    import torch

    from undiffuse import __version__
    from undiffuse.data.format.named import FashionMnist
    from undiffuse.data.source import open_raw
    from undiffuse.errors import DataError
    from undiffuse.key import drawn_by
    from undiffuse.machine.device import choose

    try:
        fashion = f"{len(open_raw(FashionMnist.names[0])):,} training images"
    except DataError as error:
        fashion = str(error)
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {"undiffuse": __version__, "python": platform.python_version(), "torch": torch.__version__}
    found |= {name: version(name) for name in ("numpy", "pillow", "safetensors")}
    device = choose()
    show(
        found
        | {
            "device": str(device),
            "noise": drawn_by(device)[1],
            "threads": torch.get_num_threads(),
            "cuda": ", ".join(cuda) or "none",
            "fashion_mnist": fashion,
        },
        as_json,
    )


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Very small runs, only to see that it works")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Train, sample and measure on shipped data.

    It takes under five minutes on two CPU cores and ends with an HTML report.

    Examples:

    \b
    - `undiffuse demo`
    - `undiffuse demo --quick --out demo-quick`
    """
    from undiffuse.view.demo import run_demo

    report = run_demo(out, quick, say=lambda text: typer.echo(text, err=as_json))
    if as_json:
        show({"report": report}, as_json)


def presets(as_json: JsonOpt = False) -> None:
    """List the presets, with published or measured results.

    Examples:

    \b
    - `undiffuse presets`
    - `undiffuse presets --json`
    """
    from undiffuse.model.recipe import load_recipe
    from undiffuse.model.recipe import presets as names

    recipes = {name: load_recipe(name) for name in names()}
    if as_json:
        typer.echo(to_json({name: {"about": r.about, "expected": r.expected} for name, r in recipes.items()}))
        return
    width = max(map(len, recipes)) + 2
    for name, recipe in recipes.items():
        typer.echo(f"{name:<{width}}{recipe.about}")
        if recipe.expected:
            typer.echo(f"{'':<{width}}{results(recipe.expected)}")


def results(expected: dict[str, Any]) -> str:
    """`fid train 3.17, bits per dim test 3.75 (Ho, Jain & Abbeel 2020, Table 1)`."""
    sources = {name: value for name, value in expected.items() if name in ("source", "measured_in", "measured_by")}
    errors = {name: value for name, value in expected.items() if name.endswith("_error")}
    shown = [
        f"{name.replace('_', ' ')} {f'{value:,}' if isinstance(value, int) and value is not True else value}"
        + (f" ± {errors[f'{name}_error']}" if f"{name}_error" in errors else "")
        for name, value in expected.items()
        if name not in sources and name not in errors and name != "curve"
    ]
    return ", ".join(shown) + "".join(f" ({value})" for value in sources.values())


def register(app: typer.Typer) -> None:
    """Adds these commands to the application."""
    for name, command in {
        "inspect": inspect,
        "verify": verify,
        "average": average,
        "import": import_model,
        "export": export_model,
        "doctor": doctor,
        "presets": presets,
        "demo": demo,
    }.items():
        app.command(name)(command)
