"""Commands about files rather than pictures: inspect, verify, import, export; and about the machine."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

JsonOpt = Annotated[bool, typer.Option("--json", help="One JSON object on standard output")]


def show(result: dict[str, Any], as_json: bool) -> None:
    """The result as JSON on standard output, or as a line each for people."""
    if as_json:
        typer.echo(json.dumps(result, default=str))
        return
    for name, value in result.items():
        if not isinstance(value, list):
            typer.echo(f"{name.replace('_', ' '):>20}  {value}")


def inspect(
    what: Annotated[
        str, typer.Argument(metavar="MODEL|PRESET", help="A run, a checkpoint, a shipped model, or a preset")
    ],
    as_json: JsonOpt = False,
) -> None:
    """What a model or preset is: its settings as TOML, its size, how far it was trained.

    Examples: `undiffuse inspect fashion-mnist`, `undiffuse inspect cifar10 --json`
    """
    from undiffuse.config import plain, to_toml
    from undiffuse.model import load, shipped
    from undiffuse.recipe import load_recipe, presets

    if not Path(what).exists() and what not in shipped() and what in presets():
        recipe = load_recipe(what)
        typer.echo(json.dumps(plain(recipe)) if as_json else to_toml(recipe).rstrip())
        return
    model = load(what)
    result = {"parameters": model.parameters(), "model": plain(model.config)}
    result |= {key: model.meta[key] for key in ("step", "images", "environment") if key in model.meta}
    typer.echo(json.dumps(result) if as_json else to_toml(result).rstrip())


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder")],
    as_json: JsonOpt = False,
) -> None:
    """Read every checkpoint of a run and compare it with its checksums; exit code 5 if one is damaged.

    Example: `undiffuse verify runs/photos`
    """
    from undiffuse import store
    from undiffuse.errors import Corrupt, UsageError

    folder = store.Run(run)
    if not folder.steps():
        raise UsageError(f"{run} has no checkpoints; give the --out folder of a training run")
    damaged = {}
    for step in folder.steps():
        try:
            folder.verify(step)
        except Corrupt as error:
            damaged[step] = str(error)
    show({"good": len(folder.steps()) - len(damaged), "damaged": damaged or "none"}, as_json)
    if damaged:
        raise typer.Exit(Corrupt.exit_code)


def import_model(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A diffusers folder, or a pytorch_diffusion file")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder to make")],
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin and .ckpt, as data only")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Turn another project's model into a run, to sample from, measure or fine-tune.

    Example: `undiffuse import ddpm-cifar10-32 runs/ddpm`
    """
    from undiffuse import store
    from undiffuse.errors import UsageError
    from undiffuse.interop import diffusers, original
    from undiffuse.model import parse_model

    if store.Run(run).steps():
        raise UsageError(f"{run} holds checkpoints already; give the name of a new folder")
    tensors, meta = (diffusers.read_folder if source.is_dir() else original.read_file)(source, allow_pickle)
    model = parse_model(tensors, meta, str(source))
    with store.Run(run).lock() as folder:
        folder.save(0, {"ema": tensors}, {"step": 0, "images": 0, "source": source.name, **meta})
    show({"run": run, "parameters": model.parameters(), "next": f"undiffuse sample {run} -n 16 --out samples"}, as_json)


def export_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a checkpoint, a file or a shipped name")],
    out: Annotated[Path, typer.Argument(metavar="DST", help="The folder or file to make")],
    to: Annotated[
        str, typer.Option("--to", help="diffusers, or file: one .safetensors that undiffuse loads")
    ] = "diffusers",
    half: Annotated[bool, typer.Option("--half", help="float16 weights, for --to file")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Write a model for others: a folder that diffusers' DDPMPipeline loads, or one file.

    Example: `undiffuse export runs/photos photos-diffusers --to diffusers`
    """
    import torch

    from undiffuse.config import plain
    from undiffuse.errors import UsageError, unknown
    from undiffuse.interop import diffusers
    from undiffuse.model import load, save

    if to not in ("diffusers", "file"):
        raise unknown("export format", to, ["diffusers", "file"])
    if out.exists():
        raise UsageError(f"{out} exists; give the name of a new {'folder' if to == 'diffusers' else 'file'}")
    loaded = load(model)
    if to == "file":
        save(loaded, out, torch.float16 if half else torch.float32)
    else:
        meta = {**loaded.meta, "model": plain(loaded.config)}
        diffusers.write_folder(out, loaded.denoiser.network.state_dict(), meta)
    show({"written": out, "format": to}, as_json)


def doctor(as_json: JsonOpt = False) -> None:
    """What undiffuse finds on this machine: versions, devices, threads, named data sets.

    Example: `undiffuse doctor`
    """
    import platform
    from importlib.metadata import version

    import torch

    from undiffuse import __version__
    from undiffuse.data.named import FashionMnist
    from undiffuse.data.source import open_raw
    from undiffuse.errors import DataError

    try:
        fashion = f"{len(open_raw(FashionMnist.names[0])):,} training images"
    except DataError as error:
        fashion = str(error)
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {"undiffuse": __version__, "python": platform.python_version(), "torch": torch.__version__}
    found |= {name: version(name) for name in ("numpy", "pillow", "safetensors")}
    show(
        found | {"threads": torch.get_num_threads(), "cuda": ", ".join(cuda) or "none", "fashion_mnist": fashion},
        as_json,
    )


def register(app: typer.Typer) -> None:
    """Adds these commands to the application."""
    for name, command in {
        "inspect": inspect,
        "verify": verify,
        "import": import_model,
        "export": export_model,
        "doctor": doctor,
    }.items():
        app.command(name)(command)
