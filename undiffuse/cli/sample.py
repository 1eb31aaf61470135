"""The command that draws samples."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.chain import Chain, with_options
from undiffuse.cli.options import (
    BatchOpt,
    DeviceOpt,
    ModelArg,
    OverwriteOpt,
    SeedOpt,
    SeedsOpt,
    parse_seeds,
    refuse_below_file,
    said,
    ticking,
    writable,
)
from undiffuse.cli.tools import JsonOpt, show
from undiffuse.errors import UsageError
from undiffuse.strict import whole

if TYPE_CHECKING:
    from undiffuse.key import Seed
    from undiffuse.model.classes import Told
    from undiffuse.model.model import Model
    from undiffuse.view.draw import Job


def sample(
    model: ModelArg,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for one PNG per image and a grid of all")
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", help="Number of images; 64 unless given, or 8 of each class with --label all")
    ] = None,
    *,
    chain: Chain,
    npz: Annotated[
        Path | None, typer.Option("--npz", help="Write one uint8 array, arr_0 [n, h, w, c], to this file")
    ] = None,
    overwrite: OverwriteOpt = False,
    batch: BatchOpt = 64,
    seed: SeedOpt = 0,
    seeds: SeedsOpt = None,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Sample images, as PNG files and a grid or as one array.

    Image i depends only on the seed, on i and on its label; with --seeds each depends on its own seed, and its PNG is
    named after it. The same command goes on where it was ended and makes only the files that are missing; a folder
    with samples of another command is refused.

    Examples:

    \b
    - `undiffuse sample fashion-mnist -n 16 --out samples`
    - `undiffuse sample runs/photos -n 64 --steps 50 --solver ddim --out samples`
    - `undiffuse sample runs/pets --label all -n 8 --out pets` (a row for each class)
    - `undiffuse sample runs/fm -n 5000 --steps 50 --solver ddim --eta 0.5 --npz samples.npz`
    - `undiffuse sample emoji-32 --label all -n 8 --guidance 2 --out emoji`
    - `undiffuse sample fashion-mnist --seeds 5,17,40-99 --out chosen`
    """
    from undiffuse.machine import dist
    from undiffuse.view import draw

    _refuse_places(out, npz, overwrite)
    loaded = chain.open(model, device)
    numbers, batch = _seed(seed, seeds, n), whole("batch", batch, 1)
    total, told, rows = _asked(loaded, n, numbers, chain.label)
    walk = chain.walk(loaded)
    job = draw.Job(loaded, total, *walk[:2], told, numbers, batch)
    with dist.joined(dist.LONG), ticking(job.turns, "sampling", as_json, [walk.said]) as tick:
        written = draw.draw(job, draw.Places(out, npz), rows, tick)
    if dist.is_first():
        taken = {"steps": len(job.times) - 1, "solver": chain.solver or _name(job)} | _kind(job, chain.precision)
        show({"images": job.n, **taken, **said(job.told, loaded), **written, **_channels(out, loaded)}, as_json)


def _kind(job: "Job", precision: str | None) -> dict[str, Any]:
    """What else was asked for."""
    found: dict[str, Any] = {"seed": job.seed, **({} if precision is None else {"precision": job.model.precision})}
    return found | ({} if job.model.guide is None else job.model.guide.said)


def _name(job: "Job") -> str:
    """Of its solver, with the order, without which a name may mean another."""
    from undiffuse.config import plain
    from undiffuse.diffusion.sampler.base import SAMPLERS

    order = plain(job.solver).get("order")
    return SAMPLERS.name_of(job.solver) + (f"-{order}" if order else "")


def _seed(seed: int, seeds: str | None, n: int | None) -> "Seed":
    """The seed of all, or of each. Raises UsageError where two options say the same."""
    if seeds is None:
        return seed
    if n is not None:
        raise UsageError(f"--seeds {seeds} says how many images, and -n {n} too; give one of them")
    if seed:
        raise UsageError(f"--seeds {seeds} and --seed {seed} say the same twice; give one of them")
    return parse_seeds(seeds)


def _asked(model: "Model", n: int | None, seed: "Seed", label: str | None) -> "tuple[int, Told, int | None]":
    """How many images, and their labels; and the columns of the grid where each class has a row."""
    rows = model.count(1, label) > 1
    if isinstance(seed, list):
        if rows:
            raise UsageError(f"--seeds names single images, and --label {label} rows of them; give one class")
        n = len(seed)
    n = whole("n", (8 if rows else 64) if n is None else n, 1)
    total = model.count(n, label)
    return total, model.told(label, total, seed), n if rows else None


def _refuse_places(out: Path | None, npz: Path | None, overwrite: bool) -> None:
    """Raises UsageError unless there is a place to write to, and all are free."""
    from undiffuse.view import draw

    if out is None and npz is None:
        raise UsageError("nowhere to write; give --out FOLDER for PNGs, or --npz FILE for one array")
    if out is not None:
        refuse_below_file(out)
        draw.refuse(out)
    writable(npz, overwrite or (npz is not None and draw.partial_of(npz).exists()), picture=False)


def _channels(out: Path | None, model: "Model") -> dict[str, str]:
    """How the PNGs hold the channels, where that has to be said."""
    from undiffuse.figure import written

    told = written(model.image_shape[0])
    return {"channels": told} if out is not None and told else {}


def register(app: typer.Typer) -> None:
    app.command("sample")(with_options(sample))
