"""`undiffuse data …`: look at a data set, find what is bad in it, pack it, build one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.options import OverwriteOpt, ReadOpt, reading_of, writable
from undiffuse.strict import to_json

if TYPE_CHECKING:
    from undiffuse.data.inspect import Summary

app = typer.Typer(help="Inspect, check, pack or build a data set.", no_args_is_help=True, rich_markup_mode=None)

PathArg = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH",
        help="Folders of pictures, zip, npz, tar shards, LMDB, …, a quoted pattern, or a named data set",
    ),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output")]
PictureOpt = Annotated[
    str, typer.Option("--picture", help="Which, where each example has several, such as an input and a mask")
]
SplitOpt = Annotated[str, typer.Option("--split", help="train or test, if the data has both")]


@app.command()
def inspect(
    path: PathArg,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="Write 64 of the pictures to this file: .png, .jpg, .webp …")
    ] = None,
    overwrite: OverwriteOpt = False,
    split: SplitOpt = "train",
    settings: ReadOpt = None,
    picture: PictureOpt = "",
    as_json: JsonOpt = False,
) -> None:
    """Count pictures by size, channels and class, and show their values.

    Pictures that cannot be read are listed, what was passed over is counted, and values that look wrong are said.
    `--sheet` also writes a contact sheet.

    Example:

    \b
    - `undiffuse data inspect photos/ --sheet sheet.png`
    """
    from dataclasses import replace

    from undiffuse.data import made
    from undiffuse.data.format.several import join
    from undiffuse.data.inspect import inspect
    from undiffuse.data.listing import refuse_inside
    from undiffuse.data.passed import counts, line
    from undiffuse.data.source import open_raw
    from undiffuse.figure import encoded
    from undiffuse.machine import disk
    from undiffuse.model.recipe import DataConfig

    if sheet is not None:
        refuse_inside(sheet, join(path), "--sheet")
        writable(sheet, overwrite)
    reading = replace(reading_of(settings, DataConfig(picture=picture)), guess=True, least=(1, 1))
    summary = inspect(open_raw(join(path), split, reading), reading)
    if sheet is not None:
        disk.write_atomic(sheet, encoded(summary.sheet, sheet))
    result = _counts(summary)
    found = summary.values
    if as_json:
        values = {"least": found.least, "most": found.most, "mean": found.mean, "type": found.kind}
        done = {what: many for what, many, _ in summary.made}
        more = {"values": values, "made": done, "wrong": summary.wrong, "passed_over": counts(summary.passed)}
        typer.echo(to_json(result | more))
        return
    result |= {"values": f"{found.span}, mean {found.mean:.4g}", "made": made.listed(summary.made) or "nothing"}
    result |= {"wrong": summary.wrong} if summary.wrong else {}
    for name, value in result.items():
        typer.echo(f"{name:>10}  {_brief(value) if isinstance(value, dict) else value}")
    if summary.passed:
        typer.echo(line(summary.passed))


def _counts(summary: "Summary") -> dict[str, Any]:
    """What is in a data set, the most frequent first."""
    return {
        "images": summary.count,
        "sizes": {f"{w}x{h}": count for (h, w), count in summary.sizes.items()},
        "channels": {str(c): count for c, count in summary.channels.items()},
        "labels": summary.labels,
        "mean": round(summary.mean, 4),
        "std": round(summary.std, 4),
        "bad": {bad.path: bad.reason for bad in summary.bad},
    }


def _brief(counts: dict[str, int] | dict[str, str]) -> str:
    """The first ten of a dictionary."""
    shown = ", ".join(f"{name}: {value}" for name, value in list(counts.items())[:10])
    return (shown + (f", and {len(counts) - 10} more" if len(counts) > 10 else "")) or "none"


@app.command()
def check(
    path: PathArg,
    split: SplitOpt = "train",
    picture: PictureOpt = "",
    settings: ReadOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Decode every picture, list the unreadable ones, and count what was passed over.

    The exit code is 2 if there are any, or if the values look so wrong that `train` would refuse them. In a packed
    folder every byte is compared with the checksums instead; the exit code is 5 if one differs.

    Examples:

    \b
    - `undiffuse data check photos/`
    - `undiffuse data check packed/`
    """
    from undiffuse.data.format.several import join
    from undiffuse.data.inspect import check
    from undiffuse.data.passed import counts, line
    from undiffuse.model.recipe import DataConfig

    found = check(join(path), split, not as_json, reading_of(settings, DataConfig(picture=picture)))
    if as_json:
        bad = {item.path: item.reason for item in found.bad}
        typer.echo(to_json({"bad": bad, "passed_over": counts(found.passed), "wrong": found.wrong}))
    else:
        for item in found.bad:
            typer.echo(f"{item.path}: {item.reason}")
        if found.passed:
            typer.echo(line(found.passed))
        said = [f"{len(found.bad)} bad"] * bool(found.bad) + [found.wrong] * bool(found.wrong)
        typer.echo("; ".join(said) or "all good")
    if found.bad or found.refused:
        raise typer.Exit(2)


@app.command()
def pack(
    data: PathArg,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to make, or one to go on with")],
    size: Annotated[
        int | None, typer.Option("--size", help="Crop to a square and resize to this side, in pixels")
    ] = None,
    channels: Annotated[
        int | None, typer.Option("--channels", help="1 for grey, 3 for RGB, 2 or 4 with transparency")
    ] = None,
    background: Annotated[str, typer.Option("--background", help="Colour behind transparent pixels")] = "white",
    settings: ReadOpt = None,
    picture: PictureOpt = "",
    split: SplitOpt = "train",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable pictures out and list them")] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Number of processes; one per core, up to 16, unless given")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Decode pictures once into a folder of raw pixels.

    If it is stopped, run the same command again and it continues. The packed folder is used like any other data;
    folders named train and test beside each other are its splits.

    Examples:

    \b
    - `undiffuse data pack photos/ --size 64 --out photos-64`
    - `undiffuse data pack fashion-mnist --out both/train`
    - `undiffuse data pack fashion-mnist --split test --out both/test`
    """
    from undiffuse.cli.tools import show
    from undiffuse.data import remark
    from undiffuse.data.format.several import join
    from undiffuse.data.pack import WORKERS, pack
    from undiffuse.data.passed import counts, line
    from undiffuse.model.recipe import DataConfig

    reading = reading_of(settings, DataConfig(background=background, picture=picture))
    count = WORKERS if workers is None else workers
    done = pack(join(data), out, size, channels, reading, split, skip_bad, count, not as_json)
    c, h, w = done.image_shape
    result = {"images": len(done), "size": f"{w}x{h}", "channels": c, "labels": len(done.classes or ())}
    skipped = {"skipped": dict(done.manifest.skipped)} if as_json else {"skipped": remark.left_out(done) or "none"}
    over = {"passed_over": counts(done.passed) if as_json else line(done.passed) or "none"}
    looks = None if reading.range else remark.of(done, join(data), split, reading)
    over |= {"wrong": looks.line} if looks else {}
    show(
        result | {"shards": len(done.images), "fingerprint": done.fingerprint(), **skipped, **over, "out": out}, as_json
    )


@app.command()
def build(
    what: Annotated[str, typer.Argument(help="What to build: emoji")],
    packages: Annotated[
        list[Path], typer.Argument(metavar="PACKAGE", help="The npm packages, unpacked or as .tgz files")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for train.npz, test.npz and ATTRIBUTION.txt")],
    size: Annotated[int, typer.Option("--size", help="Side of the images, in pixels")] = 32,
    labels: Annotated[str, typer.Option("--labels", help="What a class is: style, category or both")] = "style",
    as_json: JsonOpt = False,
) -> None:
    """Build the emoji data set from downloaded npm packages.

    It takes any of four packages. Download them first:

    \b
    `npm pack emoji-datasource-google emoji-datasource-twitter @lobehub/fluent-emoji-3d openmoji`

    Example:

    \b
    - `undiffuse data build emoji *.tgz --out emoji`
    """
    from dataclasses import asdict

    from undiffuse.data.format import emoji
    from undiffuse.errors import unknown

    if what != "emoji":
        raise unknown("data set to build", what, ["emoji"])
    built = asdict(emoji.build(packages, out, size, labels))
    typer.echo(to_json(built) if as_json else "\n".join(f"{name:>10}  {value}" for name, value in built.items()))
