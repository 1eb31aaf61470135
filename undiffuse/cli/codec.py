"""The commands about coded images: what is in a file, what it shows at each size, and the tables of a model."""

from math import log10
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.encode import ClassOpt, FileArg, ModelOpt, class_of, parsed_of, reader
from undiffuse.cli.options import (
    DataArg,
    DeviceOpt,
    ModelArg,
    OutOpt,
    OverwriteOpt,
    ReadOpt,
    SkipBadOpt,
    SplitOpt,
    TestSplitOpt,
    WeightsOpt,
    open_like,
    open_model,
    ticking,
    writable,
)
from undiffuse.cli.tools import JsonOpt, show
from undiffuse.errors import Corrupt, UsageError, counted

if TYPE_CHECKING:
    from torch import Tensor

FileStepsOpt = Annotated[
    int | None, typer.Option("--steps", help="Steps of a file: evaluations to write or to read it; 32 unless given")
]
MemoryOpt = Annotated[
    int | None,
    typer.Option(
        "--memory",
        help="Bits that a value depends on: 10, 12, 14 or 16; 2 more take 4 times the search; 14 unless given",
    ),
]

app = typer.Typer(
    help="Coded images: what a file holds, its quality at every size, and the tables of a model.", no_args_is_help=True
)


@app.command()
def info(
    file: FileArg,
    model: ModelOpt = None,
    weights: WeightsOpt = None,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Say what a coded file holds: its images, layers and bytes, and whether it is whole.

    Beside each layer is the PSNR that images like the model's have after it, as the model's tables know it.

    Example:

    \b
    - `undiffuse codec info shirt.udf`
    """
    codec, data = reader(file, model, device, weights)
    parsed = parsed_of(file, codec, data)
    header, plan = parsed.header, codec.plan
    h, w = header.size or codec.model.image_shape[1:]
    layers = list[dict[str, Any]]()
    for number, first in ((number, first) for first, number in plan.starts().items() if first < header.steps):
        last = min(first + plan.layers[number], header.steps)
        whole = sum(done > number for done in parsed.layers)
        bits = sum(len(path) for group in parsed.groups for path in group.paths[first:last])
        rmse = 127.5 * plan.square[last] ** 0.5
        row = {"layer": number + 1, "steps": last - first, "bytes": round(bits / 8, 1), "groups": whole}
        layers.append(row | {"rmse": round(rmse, 3), "psnr": round(20 * log10(255 / rmse), 2)})
    every = len(parsed.layers)
    result = {"images": header.count, "size": f"{w}x{h}", "bytes": len(data), "status": parsed.status}
    result |= {"groups": every, "lossless": header.lossless, "lossless_bytes": sum(map(len, parsed.ends)) or None}
    result |= {"why": parsed.why or None, "tables": header.ident.hex(), "seed": header.seed, "label": header.label}
    if not as_json:
        for each in layers:
            off = f", then {each['psnr']:.1f} dB, {each['rmse']:.1f} grey levels off in images like the model's"
            off = off if each["groups"] else ""
            if each["groups"] < every:
                off += f"; whole in {each['groups']} of {every} groups" if every > 1 else ", not whole"
            result[f"layer {each['layer']}"] = f"{counted(each['steps'], 'step')}, {each['bytes']} bytes{off}"
    show(result | {"layers": layers}, as_json)


@app.command()
def fit(
    model: ModelArg,
    data: DataArg,
    images: Annotated[int, typer.Option("--images", "-n", help="How many are looked at, 64 evaluations each")] = 256,
    steps: FileStepsOpt = None,
    memory: MemoryOpt = None,
    split: SplitOpt = "train",
    skip_bad: SkipBadOpt = False,
    reading: ReadOpt = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make them anew where there are some")] = False,
    weights: WeightsOpt = None,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Make the tables that `undiffuse encode` needs of a model, once.

    Images like those of its training tell how far off the model is at every time; one pass finds the steps of a file
    and how many bits each gets. The tables are kept as fitted grids are, and go with `undiffuse export` to a file. A
    file can be read only with the tables that it was made with.

    Example:

    \b
    - `undiffuse codec fit runs/photos photos/`
    """
    from undiffuse.codec import tables
    from undiffuse.codec.plan import MEMORY
    from undiffuse.machine import log
    from undiffuse.model import fitted
    from undiffuse.model.classes import told_of
    from undiffuse.network.base import NOTHING

    loaded = open_model(model, device, weights=weights)
    count, state = tables.STEPS if steps is None else steps, MEMORY if memory is None else memory
    tables.refuse(loaded, count, state)
    place = fitted.found(loaded.run, loaded.digest(), fitted.CODEC) or (model if loaded.meta.get("codec") else None)
    if place and not overwrite:
        before = tables.of(loaded)
        _refuse_other("--steps", steps, before.steps)
        _refuse_other("--memory", memory, before.memory)
        show({"tables": place, "ident": before.ident.hex(), "made": "before"}, as_json)
        return
    source = open_like(loaded, data, split, skip_bad, reading)
    index = _first(len(source), images)
    some, classes = source.gather(index)[0], loaded.classes
    always = classes is not None and not classes.unlabelled  # then files of it are told a class
    if always and source.every_label() is None:
        raise UsageError(f"{', '.join(data)} has no classes, and this model was never trained without; give other data")
    cond = told_of(classes, source, index).conditioning if always else NOTHING
    if not as_json:
        log.say(tables.cost(len(some)))
    with ticking(tables.turns(len(some), count), "fitting", as_json) as tick:
        plan = tables.fit(loaded, some, count, state, tick, cond)
    bits = sum(plan.bits[step][len(plan.bits[step]) // 2] for step in range(plan.steps))
    kept = {"ident": plan.ident.hex(), "steps": plan.steps, "bits_an_image": bits, "usual": plan.usual, "made": "now"}
    show({"tables": tables.keep(plan, loaded), **kept}, as_json)
    if loaded.meta.get("codec") and not as_json:
        log.say("files that are made from now on are read with these tables alone; `undiffuse export` sends them along")


def _refuse_other(option: str, asked: int | None, made: int) -> None:
    if asked not in (None, made):
        raise UsageError(
            f"{option} {asked} is not what the tables of this model were made with ({made}); give --overwrite to make "
            "others, with which older files cannot be read"
        )


@app.command()
def strip(
    file: FileArg,
    out: OutOpt,
    model: ModelOpt = None,
    sizes: Annotated[
        str, typer.Option("--bytes", help="After how many bytes to look")
    ] = "20,30,50,80,120,200,400,800,1600",
    image: Annotated[int, typer.Option("--image", help="Which image of a file of many")] = 0,
    overwrite: OverwriteOpt = False,
    weights: WeightsOpt = None,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Draw what a file shows after so many bytes: the mean above, a picture drawn on from it below.

    Example:

    \b
    - `undiffuse codec strip shirt.udf --out strip.png`
    """
    import torch

    from undiffuse.figure import encoded, enlarged, grid
    from undiffuse.machine import disk, log

    writable(out, overwrite)
    codec, data = reader(file, model, device, weights)
    parsed = parsed_of(file, codec, data)
    try:
        wanted = sorted({int(part) for part in sizes.split(",")})
    except ValueError as error:
        raise UsageError(f'--bytes "{sizes}" is no list of numbers; give for example 20,50,100') from error
    if wanted[0] < 1:
        raise UsageError(f"--bytes {wanted[0]} is not possible; give 1 or more")
    if not 0 <= image < parsed.header.count:
        raise UsageError(f"image {image} is not there; the file has 0 to {parsed.header.count - 1}")
    if parsed.status != "complete":
        log.warn(f"{file}: {parsed.why}; what is before that is drawn")
    shown, columns = list[int](), list[Any]()
    for size in [*(each for each in wanted if each < len(data)), len(data)]:
        try:
            found = codec.decode(data[:size])
        except Corrupt:
            if size == len(data):
                raise
            continue  # nothing is in so few bytes
        shown.append(size)
        columns.append((found.mean()[image], found.drawn()[image]))
    pictures = torch.stack([each[row] for row in (0, 1) for each in columns])
    disk.write_atomic(out, encoded(grid(pictures, len(columns), enlarged(pictures.shape[-1])), out))
    show({"bytes": ", ".join(map(str, shown)), "out": out}, as_json)


@app.command()
def bench(
    model: ModelArg,
    data: DataArg,
    images: Annotated[int, typer.Option("--images", "-n", help="How many are coded, with means over them")] = 32,
    label: ClassOpt = None,
    split: TestSplitOpt = None,
    skip_bad: SkipBadOpt = False,
    reading: ReadOpt = None,
    weights: WeightsOpt = None,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Measure a model's codec on images: bytes of whole files beside the model's own bound, PNG and WebP.

    The bound is that of Section 4.3 of DDPM at the distortion of the files: of the chain of all steps, and in
    continuous time. Lossless sizes are in bits a value, of files of one image but for the archive.
    Seconds are those of one image on this device. With --label all images are told that class, so give those of it.

    Example:

    \b
    - `undiffuse codec bench fashion-mnist fashion-mnist`
    """
    from undiffuse.codec import ledger, tables
    from undiffuse.codec.stream import Codec

    loaded = open_model(model, device, weights=weights)
    codec = Codec(loaded, tables.of(loaded))
    number, source = class_of(loaded, label), open_like(loaded, data, split, skip_bad, reading)
    some = source.gather(_first(len(source), images))[0]
    with ticking(ledger.turns(codec, len(some)), "measuring", as_json) as tick:
        found = ledger.compared(codec, some, tick, number)
    if not as_json:
        found = {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}
    show(found, as_json)


def _first(there: int, wanted: int) -> "Tensor":
    """Indices spread over a data set, so that its order does not matter."""
    import torch

    if wanted < 1:
        raise UsageError(f"--images {wanted} is not possible; give 1 or more")
    count = min(there, wanted)
    return torch.arange(count, dtype=torch.int64, device="cpu") * there // count
