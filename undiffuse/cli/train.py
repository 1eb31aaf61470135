"""`undiffuse train`: a model from pictures."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.options import DataArg, DeviceOpt, SizeOpt, SkipBadOpt, parse_sides
from undiffuse.cli.tools import JsonOpt, sampling, show

if TYPE_CHECKING:
    from undiffuse.model.model import Model

RunOpt = Annotated[Path, typer.Option("--out", "-o", help="The run folder to make or to go on with")]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting, such as train.lr=1e-4; may be repeated")
]
PresetOpt = Annotated[
    str,
    typer.Option(
        "--preset", "-p", help="auto (chosen from the pictures and the device), the name of a preset, or a TOML file"
    ),
]


StepsOpt = Annotated[int | None, typer.Option("--steps", help="Stop at this step, counted from the start of the run")]
ImagesOpt = Annotated[
    int | None, typer.Option("--images", help="Stop after this many images, counted from the start of the run")
]
MinutesOpt = Annotated[float | None, typer.Option("--minutes", help="Stop after this many minutes of this command")]
InitOpt = Annotated[str | None, typer.Option("--init", help="Fine-tune: start from the weights of this model")]
LogsOpt = Annotated[list[str] | None, typer.Option("--log", help="Also log to tensorboard or wandb; may be repeated")]
AcceptOpt = Annotated[bool, typer.Option("--accept-data", help="Go on with a run although its data has changed")]
ProfileOpt = Annotated[
    bool, typer.Option("--profile", help="Run 25 steps, or up to 80 if compiled, and show where time and memory go")
]
PackOpt = Annotated[
    bool | None,
    typer.Option(
        "--pack/--no-pack",
        help="Decode once into a cache on disk, $UNDIFFUSE_CACHE; unless given, only if the data is large",
    ),
]


def train(
    data: DataArg,
    out: RunOpt,
    preset: PresetOpt = "auto",
    steps: StepsOpt = None,
    images: ImagesOpt = None,
    minutes: MinutesOpt = None,
    init: InitOpt = None,
    settings: SetOpt = None,
    size: SizeOpt = None,
    logs: LogsOpt = None,
    skip_bad: SkipBadOpt = False,
    accept_data: AcceptOpt = False,
    profile: ProfileOpt = False,
    use_cache: PackOpt = None,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Train a model, or go on with a run that was stopped.

    Without a preset the image size, network, batch, precision and length are chosen from the pictures and the device.
    Ctrl-C saves and stops; the same command again goes on from there.

    Examples:

    \b
    - `undiffuse train photos/ --out runs/photos`
    - `undiffuse train photos/ --out runs/photos --size 64 --minutes 60`
    - `undiffuse train 'photos/*.jpg' more/ --out runs/all`
    - `undiffuse train fashion-mnist -p fashion-mnist -o runs/fm --minutes 30 --set train.lr=5e-4`
    """
    from undiffuse.machine import dist
    from undiffuse.training.start import train

    given = [*(settings or []), *([f"data.size={size_value(size)}"] if size is not None else [])]
    model = train(
        data,
        out,
        preset,
        steps=steps,
        images=images,
        minutes=minutes,
        settings=given,
        init=init,
        device=device,
        skip_bad=skip_bad,
        accept_data=accept_data,
        use_cache=use_cache,
        logs=logs or (),
        profile=profile,
        say=(lambda text: None) if as_json else (lambda text: typer.echo(text, err=True)),
        show_progress=not as_json,
    )
    if dist.is_first():
        show(ended(model, out, profile), as_json)


def ended(model: "Model", out: Path, profile: bool) -> dict[str, Any]:
    """Where everything is, and what to run next."""
    others = {"averages": out / "ema", "tensorboard": out / "tensorboard", "previews": out / "samples"}
    profiled = {"profile": out / "profile.json"} if profile else {}
    return {
        "run": out,
        "step": model.meta["step"],
        "images_seen": model.meta["images"],
        "parameters": model.parameters(),
        "log": out / "log.jsonl",
        **profiled,
        **{name: folder for name, folder in others.items() if folder.is_dir()},
        "more": more(model),
        "next": sampling(out, model),
    }


def more(model: "Model", steps: str = "--steps") -> str:
    """The command that goes on with a finished run: as long again, or past the end that its held-out loss set.

    `steps` is the option of the command for how many there are.
    """
    if model.meta.get("ended") == "minutes":
        return again({}, without=("--init",))
    itself = {"--set train.patience": "0"} if model.meta.get("ended") == "held-out loss" else {}
    return again({steps: str(2 * model.meta["step"]), **itself}, without=("--images", "--init"))


def again(options: dict[str, str], without: tuple[str, ...] = ()) -> str:
    """This command line with other values of some options, quoted so that it can be pasted."""
    words = [word for word in sys.argv[1:] if word != "--profile"]
    at = words.index("--") if "--" in words else len(words)
    words, data = words[:at], words[at:]
    dropped, kept = {*options, *without}, list[str]()
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name.startswith("-o") and len(name) > 2:  # -oDIR
            name, equals, value = "-o", "=", word[2:]
        name = {"-o": "--out", "-p": "--preset"}.get(name, name)
        if name == "--set" and f"--set {(value or words[0]).partition('=')[0]}" in dropped:
            words = words if equals else words[1:]
        elif name in dropped:
            words = words if equals else words[1:]
        else:
            kept.append(word)
    added = [part for name, value in options.items() for part in _option(name, value)]
    return shlex.join(["undiffuse", *kept, *added, *data])


def _option(name: str, value: str) -> list[str]:
    """`--steps 9`; `--set train.lr` and a value are one setting."""
    first, _, setting = name.partition(" ")
    return [first, f"{setting}={value}" if setting else value]


def size_value(text: str) -> str:
    """The value of `data.size` that --size means, as TOML."""
    sides = parse_sides("--size", text)
    return str(sides[0] if len(sides) == 1 else list(sides))


def register(app: typer.Typer) -> None:
    """Adds this command to the application."""
    app.command()(train)
