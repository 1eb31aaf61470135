"""Images to coded files and back."""

from math import log10, prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.options import (
    DeviceOpt,
    ModelArg,
    OverwriteOpt,
    ReadOpt,
    TestSplitOpt,
    WeightsOpt,
    open_like,
    open_model,
    refuse_below_file,
    ticking,
    writable,
    writable_file,
)
from undiffuse.cli.tools import JsonOpt, show
from undiffuse.errors import Corrupt, Mixed, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from undiffuse.codec.container import Parsed
    from undiffuse.codec.stream import Codec, Decoded
    from undiffuse.model.model import Model

FileArg = Annotated[Path, typer.Argument(metavar="FILE", help="A file that `undiffuse encode` wrote")]
ModelOpt = Annotated[
    str | None, typer.Option("--model", help="The model that made the file; a shipped one is found by itself")
]
ClassOpt = Annotated[
    str | None,
    typer.Option("--label", help="The class of the images, by name or number, kept in the file; none unless given"),
]
ReplaceOpt = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the file, or the pictures of such a file in a folder"),
]
NoiseOpt = Annotated[int, typer.Option("--seed", help="Of the noise that a file begins with; its reader needs none")]
OFF = 0.05  # grey levels, RMS of a picture, that another process may decode otherwise
DRAWINGS = {"flow": ("unipc-2", 10), "ancestral": ("ancestral", 50)}


def encode(
    model: ModelArg,
    source: Annotated[str, typer.Argument(metavar="IMAGE|DATA", help="A picture, or a data set for one file of many")],
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, such as cat.udf")],
    n: Annotated[
        int | None, typer.Option("--images", "-n", help="The first images of a data set; all unless given")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Fewer steps make a smaller and coarser file; all unless given"),
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Keep every value: after fewer steps, the rest is coded as it is")
    ] = False,
    resize: Annotated[
        bool, typer.Option("--resize", help="Crop and resize to the size of the model's images; else windows are used")
    ] = False,
    label: ClassOpt = None,
    split: TestSplitOpt = None,
    reading: ReadOpt = None,
    seed: NoiseOpt = 0,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Decode the file in another process before it is kept")
    ] = True,
    overwrite: OverwriteOpt = False,
    weights: WeightsOpt = None,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Write an image as a coded file that can be read from any of its first bytes on.

    The model is the knowledge that file and reader share: in a file are only the bits that tell this image from what
    the model would draw. Images like those of its training take the fewest. A picture of another size is coded in
    windows; a data set becomes one file, of which the first part holds all images at lower quality.

    Examples:

    \b
    - `undiffuse encode fashion-mnist shirt.png shirt.udf`
    - `undiffuse encode fashion-mnist fashion-mnist -n 64 test.udf`
    - `undiffuse encode runs/photos cat.png cat.udf --lossless`
    """
    from undiffuse.codec import tables
    from undiffuse.codec.stream import GROUP, Codec
    from undiffuse.machine import disk

    _refuse_file(out, source, overwrite)
    loaded = open_model(model, device, weights=weights)
    codec, images = Codec(loaded, tables.of(loaded)), _images(loaded, source, split, n, resize, reading)
    number = class_of(loaded, label)
    with ticking(codec.turns(len(images), codec.plan.tail.step if lossless else steps), "encoding", as_json) as tick:
        written = codec.write(images, steps, GROUP, seed, number, lossless, tick)
    data, found = written.data, written.shown
    result, png = _result(data, found, images), _png_bytes(images)
    _warn(codec, images, data, png)
    if check:
        _check(out.name, data, found, model, device, weights)
    disk.write_atomic(out, data)
    show(result | {"as_png": png, "out": out}, as_json)


def decode(
    file: FileArg,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .png; for a file of many a folder, or a .npz")],
    model: ModelOpt = None,
    how: Annotated[
        str,
        typer.Option(
            "--as",
            help="mean: the least error; flow or ancestral: drawn on from the bits, which looks more like a picture",
        ),
    ] = "mean",
    realism: Annotated[
        float | None,
        typer.Option("--realism", help="With --as flow or ancestral: 0 is the mean, 1 what is drawn, as unless given"),
    ] = None,
    size: Annotated[int | None, typer.Option("--bytes", help="Read only the first bytes, as of a file cut off")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Decode what is good of a file that is cut off or damaged")
    ] = False,
    overwrite: ReplaceOpt = False,
    weights: WeightsOpt = None,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Read a coded file, whole or as far as it is there.

    A file that is cut off is read with --partial; one that is damaged up to where it is. Without it both are refused
    with exit code 5.

    Examples:

    \b
    - `undiffuse decode shirt.udf shirt.png`
    - `undiffuse decode shirt.udf early.png --bytes 60 --as flow`
    - `undiffuse decode cat.udf cat.png --model runs/photos`
    """
    from undiffuse.codec.tail import Differs
    from undiffuse.machine import dist, log

    _refuse_drawing(how, realism)
    codec, data = reader(file, model, device, weights, size)
    parsed = parsed_of(file, codec, data)
    _refuse_place(out, parsed.header.count, overwrite)
    if parsed.status != "complete" and not (partial or (size is not None and parsed.status == "partial")):
        raise Corrupt(f"{file}: {parsed.why}; give --partial to decode what is good of it")
    turns = codec.turns(parsed.header.count, parsed.header.steps, parsed.header.group)
    with ticking(turns, "decoding", as_json) as tick:
        found = codec.decode(data, tick)
    differs = ""
    try:
        images = _shown(found, how, 1.0 if realism is None else realism)
    except Corrupt as error:  # of a file whose CRC is right: this machine does not come to the numbers of the other
        images, differs = found.mean(), f"{file}: {error}; {out} is what can be decoded, and is not lossless"
    written = _written(images, out)
    if differs:
        raise Differs(differs)
    if parsed.status != "complete" and dist.is_first():
        lossy = ", and is not lossless" if parsed.header.lossless and not parsed.ends else ""
        log.warn(f"{file}: {parsed.why}; what is before that is decoded{lossy}")
    show({"images": len(images), "status": parsed.status, "bytes": len(data), **written}, as_json)


def _refuse_drawing(how: str, realism: float | None) -> None:
    if how not in ("mean", *DRAWINGS):
        raise UsageError(f"--as {how} is not known; give mean, {' or '.join(DRAWINGS)}")
    if realism is not None and not 0 <= realism <= 1:
        raise UsageError(f"--realism {realism:g} is not possible; give 0 (the mean) to 1")
    if how == "mean" and realism is not None:
        raise UsageError(f"--realism {realism:g} belongs to what is drawn; give --as {' or '.join(DRAWINGS)} too")


def _shown(found: "Decoded", how: str, realism: float) -> "Tensor":
    """What is asked for; for the mean, the images as they were where the file has them. Raises Differs."""
    if how != "mean":
        return found.drawn(*DRAWINGS[how], realism)
    exact = found.lossless()
    return found.mean() if exact is None else exact


def class_of(model: "Model", label: str | None) -> int | None:
    """The one class that a file says; None where it says none. Raises UsageError for what is no class."""
    from undiffuse.model.classes import ALL, NONE, RANDOM

    classes = model.classes
    if classes is None:
        model.told(label, 1)
        return None
    none = label is None or (label == NONE and NONE not in classes.names)
    if (none and not classes.unlabelled) or (label in (ALL, RANDOM) and label not in classes.names):
        raise UsageError(f"a file says one class for all of its images; give --label with one. {classes.known()}")
    return None if none or label is None else classes.number(label)


def _images(
    model: "Model", source: str, split: str | None, n: int | None, resize: bool, settings: list[str] | None
) -> "Tensor":
    """uint8 [n, c, h, w]: a picture at its own size, or a set whose images are of one."""
    import torch

    if n is not None and n < 1:
        raise UsageError(f"--images {n} is not possible; give 1 or more")
    try:
        found = open_like(model, [source], split, skip_bad=False, settings=settings, own_size=not resize, count=n)
    except Mixed as error:
        raise UsageError(f"the images of {source} differ in size; give one at a time, or --resize") from error
    if n is not None and n > len(found):
        raise UsageError(f"{n} images are not possible; {source} has 1 to {len(found)}")
    return found.gather(torch.arange(len(found), dtype=torch.int64, device="cpu"))[0]


def _refuse_file(out: Path, source: str, overwrite: bool) -> None:
    """Before anything is encoded."""
    writable_file(out, overwrite)
    if out.exists() and Path(source).exists() and out.samefile(source):
        raise UsageError(f"{out} is the picture itself, which the file would replace; give another name")


def _refuse_place(out: Path, count: int, overwrite: bool) -> None:
    """Before anything is decoded."""
    from undiffuse.data.listing import is_picture

    if out.suffix.lower() == ".npz":
        return writable(out, overwrite, picture=False)
    if count == 1:
        if out.suffix.lower() != ".png":
            raise UsageError(f"{out} would not keep the image as it is; give the name of a .png or a .npz")
        return writable(out, overwrite)
    if is_picture(out.name) and not out.is_dir():
        raise UsageError(f"{out} is the name of a picture, and the file holds {count} images; give a folder or a .npz")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, and the file holds {count} images; give a new folder or a .npz")
    refuse_below_file(out)
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if other := next((name for name in there if name not in _names(count)), None):
        raise UsageError(f"{out} holds other files ({other}); give a new folder or a .npz")
    if there and not overwrite:
        raise UsageError(f"{out} is there already; give a new folder or a .npz, or --overwrite")


def _names(count: int) -> list[str]:
    return [f"{i:05d}.png" for i in range(count)]


def _written(images: "Tensor", out: Path) -> dict[str, Any]:
    from undiffuse.figure import picture, png
    from undiffuse.machine import arrayfile, disk

    if out.suffix.lower() == ".npz":
        arrayfile.write_arrays(out, {"arr_0": images.permute(0, 2, 3, 1).contiguous().numpy()})
    elif len(images) == 1:
        disk.write_atomic(out, png(picture(images[0])))
    else:
        disk.make_folder(out)
        for name, image in zip(_names(len(images)), images, strict=True):
            disk.write_atomic(out / name, png(picture(image)))
    return {"out": out}


def reader(
    file: Path, model: str | None, device: str, weights: str | None = None, size: int | None = None
) -> "tuple[Codec, bytes]":
    """What reads a file, and its first bytes."""
    from undiffuse.codec import tables
    from undiffuse.codec.container import SHORTEST
    from undiffuse.machine.disk import reading

    if file.is_dir():
        raise UsageError(f"{file} is a folder; give the name of a file")
    if size is not None and size < SHORTEST:
        raise UsageError(f"--bytes {size} is less than the header of a file; give {SHORTEST} or more")
    with reading(file) as opened:
        data = opened.read() if size is None else opened.read(size)
    if model is None and weights is not None:
        raise UsageError(f"--weights {weights} is of a run; give --model too")
    given = None if model is None else open_model(model, device, weights=weights)
    try:
        return tables.for_file(data, given, device), data
    except Corrupt as error:
        raise Corrupt(f"{file}: {error}") from error


def parsed_of(file: Path, codec: "Codec", data: bytes) -> "Parsed":
    """What a file says. Raises Corrupt, with its name."""
    from undiffuse.codec.container import parse

    try:
        return parse(data, codec.plan, codec.model.image_shape)
    except Corrupt as error:
        raise Corrupt(f"{file}: {error}") from error


def _result(data: bytes, found: "Tensor", images: "Tensor") -> dict[str, Any]:
    """What a file takes, and how far its picture is off."""
    each = {"bytes_an_image": round(len(data) / len(images), 1)} if len(images) > 1 else {}
    return {"images": len(images), "bytes": len(data)} | each | _distance(found, images)


def _distance(found: "Tensor", images: "Tensor") -> dict[str, float]:
    """Root mean square error in grey levels, and PSNR in dB."""
    square = float((found.double() - images.double()).square().mean())
    return {"rmse": round(square**0.5, 3)} | ({"psnr": round(float(-10 * log10(square / 255**2)), 2)} if square else {})


def _png_bytes(images: "Tensor") -> int:
    from undiffuse.figure import picture, png

    return sum(len(png(picture(image))) for image in images)


def _warn(codec: "Codec", images: "Tensor", data: bytes, png: int) -> None:
    """Of images that the model was not made for, by the bits of their steps: a lossless end is more in any case.

    Of many, where more than one in ten is above what one in a hundred should be.
    """
    from undiffuse.codec.container import canvas, parse
    from undiffuse.codec.plan import EXTRA
    from undiffuse.machine import log

    plan, shape = codec.plan, codec.model.image_shape
    values, parsed = prod(canvas((images.shape[2], images.shape[3]), shape)), parse(data, codec.plan, shape)
    usual, bits = plan.usual_of(parsed.header.steps), list[float]()
    for group in parsed.groups:
        first, *others = codec.bits(group, values)
        bits += [n * plan.values / values for n in (first - EXTRA * len(group.paths), *others)]
    above = [n for n in bits if n > usual]
    if 10 * len(above) > len(bits):
        who = f"{len(above)} of {len(bits)} images take up to " if len(bits) > 1 else ""
        log.warn(
            f"{who}{max(above):.0f} bits for each {plan.values} values, and 99 of 100 images like the model's take at "
            f"most {usual:.0f}: it does not know such images; a PNG takes {png:,} bytes, and this file {len(data):,}"
        )


def _check(name: str, data: bytes, images: "Tensor", model: str, device: str, weights: str | None) -> None:
    """Decodes the bytes in a fresh process. Raises Corrupt where that does not lead to the same pictures.

    Each may be off by OFF, or in one value that is rounded the other way.
    """
    import subprocess
    import sys
    import tempfile

    import numpy as np

    from undiffuse.machine import disk

    why = "could not decode it (no word)"
    with disk.writing(Path(tempfile.gettempdir()), len(data)), tempfile.TemporaryDirectory() as folder:
        file, place = Path(folder) / "file.udf", Path(folder) / "images.npz"
        file.write_bytes(data)
        command = [sys.executable, "-m", "undiffuse", "decode", str(file), str(place), "--model", model]
        command += ["--device", device, "--json", *([] if weights is None else ["--weights", weights])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            with np.load(place) as found:
                apart = found["arr_0"].astype(int) - images.permute(0, 2, 3, 1).numpy()
            square, values = np.square(apart).sum((1, 2, 3)), images[0].numel()
            worst = int(square.argmax())
            of = f"image {worst} " if len(square) > 1 else "it "
            off = f"decoded {of}{(square[worst] / values) ** 0.5:.2f} grey levels off"
            why = off if square[worst] > max(1, OFF**2 * values) else ""
        elif done.stderr.strip():
            why = f"could not decode it ({done.stderr.strip().splitlines()[-1].removeprefix('undiffuse: ')})"
    if why:
        raise Corrupt(f"{name} is not kept: another process {why}")


def register(app: typer.Typer) -> None:
    """Adds these commands to the application."""
    app.command()(encode)
    app.command()(decode)
