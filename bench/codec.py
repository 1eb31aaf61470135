"""The codec of shipped models in whole files: against the model's own bound, and against other formats.

    python bench/codec.py fashion-mnist --data fashion-mnist

The first 96 test images, as one archive and as files of their own, with loss and without. Their size stands beside
the model's bound for the same distortion, from x̂_0 at 128 times: of 1,000 steps, and in continuous time. Other formats
(Pillow, with the extra `pictures`) are asked for many qualities, and their size at equal PSNR is read off: as single
files, less a flat image of that size, and as one mosaic. A table says which aims are met.
Prefixes are those of the single files. Times are medians, of one image and with one thread. What is there for the same
weights is not measured again. Writes `bench/codec-NAME.json`, and table `codec-NAME`, plot and strip of docs/codec.md.
"""

import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bits import MOSAIC, rivals
from jaxtyping import UInt8
from machine import TABLES, asking, keep, kept, machine, made_of, publish, shipped_codec
from torch import Tensor

from undiffuse.codec import ledger, tables
from undiffuse.codec.container import Header, pack
from undiffuse.codec.stream import GROUP, Codec
from undiffuse.figure import line_plot, picture
from undiffuse.machine import disk
from undiffuse.model.model import to_uint8

HERE = Path(__file__).parent
NODES = 128  # at which x̂_0 is measured
PREFIXES = (20, 30, 40, 50, 80, 120, 200)
PSNRS = (25, 30, 35, 40, 45)
SINGLE, MANY, LESS = "single files", "together", "less a flat image"
FINITE = "the bound of 1,000 steps"
AIMED_AT = ("WebP", "JXL")
LOSSY: dict[str, list[dict[str, Any]]] = {
    "JPEG": [{"quality": q, "optimize": True} for q in range(1, 101, 6)],
    "WebP": [{"quality": q, "method": 6} for q in range(0, 101, 7)],
    "AVIF": [{"quality": q, "speed": 4} for q in range(0, 101, 10)],
    "JPEG2000": [{"quality_mode": "dB", "quality_layers": [q], "no_jp2": True} for q in range(18, 56, 4)],
    "JXL": [{"quality": q, "effort": 9} for q in range(0, 101, 7)],
}
# In colour at full resolution, where they can: with half of it their pictures come no nearer than 30 dB.
COLOUR: dict[str, dict[str, Any]] = {"JPEG": {"subsampling": 0}, "AVIF": {"subsampling": "4:4:4"}}
Row = dict[str, Any]
Images = UInt8[Tensor, "n c h w"]


def off(found: Images, images: Images) -> float:
    """Root mean square, in grey levels."""
    return float((found.double() - images.double()).square().mean().sqrt())


def psnr(rmse: float) -> float:
    return float(20 * np.log10(255 / max(rmse, 1e-9)))


def coded(codec: Codec, images: Images) -> Row:
    """Whole files, with loss and without."""
    found: Row = {}
    for name, lossless in (("lossy", False), ("lossless", True)):
        archive, singles = codec.encode(images, lossless=lossless), files(codec, images, lossless)
        again = codec.decode(archive)
        got = again.lossless() if lossless else again.mean()
        assert got is not None
        row = {"archive": len(archive) / len(images), "single": float(np.mean([len(file) for file in singles]))}
        found[name] = row | {"rmse": off(got, images), "bits": bits(codec, archive)}
    return found


def files(codec: Codec, images: Images, lossless: bool = False) -> list[bytes]:
    return [codec.encode(image[None], lossless=lossless) for image in images]


def bits(codec: Codec, archive: bytes) -> float:
    """Of the paths and scales of an image, without header, checks and lossless end."""
    parsed = codec.decode(archive).parsed
    count = sum(len(path) for group in parsed.groups for path in group.paths)
    count += sum(3 * len(row) for group in parsed.groups for row in group.scales[1:])
    return count / parsed.header.count


def bound(codec: Codec, images: Images) -> Row:
    """Bits an image and RMSE of x̂_0, of a chain of 1,000 steps and in continuous time, and totals of shorter lists.

    Totals go to where the tables end, as `ends` of both bounds do, and of the chain with fitted variances.
    """
    process, values = codec.model.process, codec.plan.values
    nodes = tables.measured(codec.model, images, count=NODES)
    curve = ledger.Curve.of(nodes, process, values)
    both = {"1000 steps": curve.stepped(process, 1000), "continuous": curve.continuous()}
    end = 127.5 * nodes[tables.ending(nodes)].square ** 0.5
    return {
        "rows": [
            {"of": of, "bits": float(each.bits[i]), "rmse": float(each.rmse[i])}
            for of, each in both.items()
            for n in (len(each.bits),)
            for i in sorted({*range(0, n, max(1, n // 100)), *range(max(0, n - 60), n)})
        ],
        "totals": ledger.totals(nodes, process, values, (16, 24, 25, 32, 50, 100)),
        "ends": {of: each.at(end) for of, each in both.items()}
        | {"fitted": curve.stepped(process, 1000, fitted=True).at(end), "rmse": end},
    }


def bits_at(rows: list[Row], of: str, rmse: float) -> float:
    """Of the bound, at a distortion; the last one where it does not come so near."""
    chosen = [row for row in rows if row["of"] == of]
    found = (np.array([row[key] for row in chosen]) for key in ("bits", "rmse"))
    return ledger.Bound(*found).at(rmse)


def prefixes(codec: Codec, images: Images) -> list[Row]:
    """What single files show after so many bytes."""
    rows, whole = [], files(codec, images)
    for size in PREFIXES:
        some = [(codec.decode(file[:size]), image) for file, image in zip(whole, images, strict=True)]
        mean, drawn = (
            torch.cat([make(found) for found, _ in some]) for make in (lambda d: d.mean(), lambda d: d.drawn())
        )
        rows.append({"bytes": size, "rmse": off(mean, images), "drawn": off(drawn, images)})
    return rows


def other(images: Images, kind: str) -> list[Row]:
    """Bytes an image by PSNR: single files, and one mosaic."""
    columns, lines = MOSAIC
    n, c, h, w = images.shape
    sheet = images.reshape(lines, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(1, c, lines * h, columns * w)
    flat = torch.full_like(images[:1], 128)
    rows, more = [], COLOUR.get(kind, {}) if c == 3 else {}
    for options in (each | more for each in LOSSY[kind]):
        found = [saved(image, kind, options) for image in images]
        tiles = {"bytes": float(np.mean([size for size, _ in found])), "flat": saved(flat[0], kind, options)[0]}
        tiles["psnr"] = psnr(off(torch.stack([image for _, image in found]), images))
        size, whole = saved(sheet[0], kind, options)
        rows.append(tiles | {"mosaic": size / n, "mosaic_psnr": psnr(off(whole[None], sheet))})
    return rows


def saved(image: UInt8[Tensor, "c h w"], kind: str, options: dict[str, Any]) -> tuple[int, UInt8[Tensor, "c h w"]]:
    buffer = io.BytesIO()
    original = picture(image)
    original.save(buffer, kind, **options)
    from PIL import Image

    with Image.open(buffer) as opened:
        pixels = np.asarray(opened.convert(original.mode)).reshape(image.shape[1], image.shape[2], -1)
    return len(buffer.getvalue()), torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def equal(rows: list[Row], at: float, size: str, quality: str) -> float | None:
    """Bytes at a PSNR: the least that reaches it, by the line between its neighbours."""
    points = sorted((row[quality], row[size]) for row in rows)
    best = np.minimum.accumulate([b for _, b in points][::-1])[::-1]
    xs = [q for q, _ in points]
    return float(np.interp(at, xs, best)) if xs[0] <= at <= xs[-1] else None


def ours_at(codec: Codec, images: Images) -> list[Row]:
    """Single files and archives of every number of steps, whose bits are the first ones of all steps."""
    rows = [{"steps": steps} for steps in range(2, codec.plan.steps + 1)]
    singles = [shorter(codec, image[None]) for image in images]
    together = shorter(codec, images)
    for number, row in enumerate(rows):
        size, found = zip(*(each[number] for each in singles), strict=True)
        row |= {"bytes": float(np.mean(size)), "psnr": psnr(off(torch.cat(found), images))}
        size, found = together[number]
        row |= {"mosaic": size / len(images), "mosaic_psnr": psnr(off(found, images))}
    return rows


def shorter(codec: Codec, images: Images) -> list[tuple[int, Images]]:
    """Bytes and the mean of files of two steps to all."""
    plan, seen, rows = codec.plan, list[list[Tensor]](), []
    header = Header(plan.ident, plan.steps, len(images), min(GROUP, len(images)))
    groups = codec.groups(images, header, None, seen)
    for steps in range(2, plan.steps + 1):
        some = [codec.first(group, steps) for group in groups]
        found = torch.cat([estimates[steps] for estimates in seen])
        rows.append((len(pack(replace(header, steps=steps), some, plan)), to_uint8(found)))
    return rows


def seconds(codec: Codec, images: Images) -> Row:
    """One image, medians of nine."""
    torch.set_num_threads(1)
    data = codec.encode(images[:1])
    return {
        "encode": _median(lambda i: codec.encode(images[i : i + 1])),
        "decode": _median(lambda _: codec.decode(data).mean()),
    }


def _median(run: Callable[[int], Any]) -> float:
    times = []
    for i in range(9):
        began = time.perf_counter()
        run(i)
        times.append(time.perf_counter() - began)
    return median(times)


def table(result: Row) -> str:
    coded_, rows = result["coded"], result["bound"]["rows"]
    lossy, exact, values = coded_["lossy"], coded_["lossless"], result["values"]
    lines = ["| bytes an image, whole files | archive of 96 | single files |", "|---|---|---|"]
    lines.append(f"| with loss, {lossy['rmse']:.2f} grey levels off | {lossy['archive']:.0f} | {lossy['single']:.0f} |")
    for of in ("1000 steps", "continuous"):
        ideal = bits_at(rows, of, lossy["rmse_float"]) / 8
        cells = " | ".join(f"{lossy[kind] / ideal:.3f}" for kind in ("archive", "single"))
        lines.append(f"| over the bound of {of.replace('1000', '1,000')}, {ideal:.0f} bytes | {cells} |")
    lines.append(f"| lossless | {exact['archive']:.0f} | {exact['single']:.0f} |")
    lines += ["", "| lossless, bits a value | as files | together |", "|---|---|---|"]
    lines.append(f"| undiffuse | {8 * exact['single'] / values:.2f} | {8 * exact['archive'] / values:.2f} |")
    lines += [f"| {kind} | {row['files']:.2f} | {row['mosaic']:.2f} |" for kind, row in result["rivals"].items()]
    lines += ["", *at_equal_psnr(result)]
    lines += [
        "",
        "| first bytes of a single file | RMSE of the mean | RMSE drawn on | bound of 1,000 steps, bytes | over it |",
        "|---|---|---|---|---|",
    ]
    for row in result["prefixes"]:
        ideal = bits_at(rows, "1000 steps", row["rmse"]) / 8
        lines.append(
            f"| {row['bytes']} | {row['rmse']:.1f} | {row['drawn']:.1f} | {ideal:.0f} | {row['bytes'] / ideal:.2f} |"
        )
    lines += ["", *first_bytes(result), "", *lists(result["bound"]), "", *aims(result)]
    took = result["seconds"]
    lines += ["", f"One image, one thread: encoded in {took['encode']:.2f} s, decoded in {took['decode']:.2f} s."]
    return "\n".join([*lines, "", f"{result['machine']['processor']}, {result['date']}; `{result['command']}`."])


def sizes(result: Row) -> dict[tuple[str, str], list[float | None]]:
    """Bytes at each of PSNRS, of a format in a way; ours have no way less a flat image, and stand as they are."""
    found, formats = {}, {"undiffuse": result["ours"], **result["others"]}
    for way, size, quality in ((SINGLE, "bytes", "psnr"), (MANY, "mosaic", "mosaic_psnr"), (LESS, "less", "psnr")):
        for kind, rows in formats.items():
            rows = [row | {"less": row["bytes"] - row.get("flat", 0)} for row in rows]
            found[kind, way] = [equal(rows, at, size, quality) for at in PSNRS]
    return found


def at_equal_psnr(result: Row) -> list[str]:
    """Bytes, and the ratio of ours to the two formats that aims are set by."""
    lines = [f"| bytes at equal PSNR, dB | {' | '.join(map(str, PSNRS))} |", "|---|" + "---|" * len(PSNRS)]
    for (kind, way), row in sizes(result).items():
        if (kind, way) != ("undiffuse", LESS):
            cells = ["–" if x is None else f"{x:.0f}" for x in row]
            lines.append(f"| {kind}, {way} | {' | '.join(cells)} |")
    for kind in AIMED_AT:
        for way in (SINGLE, MANY, LESS):
            cells = ["–" if x is None else f"{x:.2f}" for x in over(result, kind, way)]
            lines.append(f"| undiffuse over {kind}, {way} | {' | '.join(cells)} |")
    return lines


def over(result: Row, kind: str, way: str) -> list[float | None]:
    """Our bytes over those of a format, at each of PSNRS."""
    found = sizes(result)
    pairs = zip(found["undiffuse", way], found[kind, way], strict=True)
    return [None if ours is None or theirs is None else ours / theirs for ours, theirs in pairs]


def aims(result: Row) -> list[str]:
    """What was to be reached, and what was."""
    lossy, exact, rows = result["coded"]["lossy"], result["coded"]["lossless"], result["bound"]["rows"]
    ideal = {of: bits_at(rows, of, lossy["rmse_float"]) / 8 for of in ("1000 steps", "continuous")}
    found: list[tuple[str, float, float, int]] = []
    for of, most in (("1000 steps", 1.08), ("continuous", 1.18)):
        name = "the bound of continuous time" if of == "continuous" else FINITE
        found.append((f"archive over {name}", most, lossy["archive"] / ideal[of], 3))
        above = lossy["single"] - most * ideal[of]
        found.append((f"single files, bytes above {most} of {name}", 20, above, 1))
    early = [each for size, each in archive_over(result) if 10 <= size <= 50]
    found.append(
        ("first 10 to 50 bytes an image of the archive over the bound of 1,000 steps, at worst", 1.35, max(early), 3)
    )
    for kind in AIMED_AT:
        for way, most in ((SINGLE, 0.35), (LESS, 0.55), (MANY, 0.55)):
            ratios = {at: x for at, x in zip(PSNRS, over(result, kind, way), strict=True) if x is not None}
            low, high = min(ratios), max(ratios)  # where that format comes so near
            where = (
                f"{low} dB, over {kind}, {way}" if low == high else f"{low} to {high} dB, over {kind}, {way}, at worst"
            )
            found.append((where, most, max(ratios.values()), 3))
    ours, theirs = exact["archive"] * 8 / result["values"], result["rivals"]["JXL"]["mosaic"]
    found.append(("lossless, archive over JXL's mosaic", 0.95, ours / theirs, 3))
    took = result["seconds"]
    found += [(f"seconds to {what} one image", 1, took[what], 2) for what in ("encode", "decode")]
    lines = ["| aim | at most | reached | |", "|---|---|---|---|"]
    for name, most, reached, digits in found:
        lines.append(f"| {name} | {most} | {reached:.{digits}f} | {'met' if reached <= most else 'missed'} |")
    return lines


def archive_over(result: Row) -> list[tuple[float, float]]:
    """Bytes an image of first parts of the archive, and those over the bound of 1,000 steps."""
    found = []
    for row in result["ours"]:
        rmse = 255 / 10 ** (row["mosaic_psnr"] / 20)
        found.append((row["mosaic"], 8 * row["mosaic"] / bits_at(result["bound"]["rows"], "1000 steps", rmse)))
    return found


def first_bytes(result: Row) -> list[str]:
    """Of the archive."""
    lines = ["| bytes an image of the archive | RMSE of the mean | over the bound of 1,000 steps |", "|---|---|---|"]
    for row, (size, ratio) in zip(result["ours"], archive_over(result), strict=True):
        if size < 60:
            lines.append(f"| {size:.1f} | {255 / 10 ** (row['mosaic_psnr'] / 20):.1f} | {ratio:.2f} |")
    return lines


def lists(found: Row) -> list[str]:
    """Bits by the formula."""
    ends, heads = found["ends"], "equal variances | fitted | fitted by value"
    lines = [f"| bits by the formula, to {found['ends']['rmse']:.2f} grey levels | {heads} |", "|---|---|---|---|"]
    for row in found["totals"]:
        lines.append(f"| {row['steps']} steps | {row['equal']:.0f} | {row['fitted']:.0f} | {row['by_value']:.0f} |")
    lines.append(f"| the chain of 1,000 steps | {ends['1000 steps']:.0f} | {ends['fitted']:.0f} | |")
    return [*lines, f"| continuous time | {ends['continuous']:.0f} | | |"]


def plot(result: Row) -> str:
    series = [
        ("undiffuse", result["ours"], "bytes", "psnr"),
        ("undiffuse, archive", result["ours"], "mosaic", "mosaic_psnr"),
    ]
    series += [(kind, rows, "bytes", "psnr") for kind, rows in result["others"].items()]
    lines = []
    for name, rows, size, quality in series:
        points = sorted((row[size], row[quality]) for row in rows if row[quality] < 56)
        lines.append((name, [x for x, _ in points], [y for _, y in points]))
    return line_plot(lines, x="bytes an image", y="PSNR", title="Files", log_x=True)


def strip(codec: Codec, image: Images, out: Path) -> None:
    """What the first test image shows after so many bytes, as `undiffuse codec strip` draws it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "one.udf"
        file.write_bytes(codec.encode(image))
        command = [sys.executable, "-m", "undiffuse", "codec", "strip", str(file), "--out", str(out), "--overwrite"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    given = asking(__doc__).parse_args()
    torch.set_num_threads(1)
    codec, images = shipped_codec(given.name, given.data, int(np.prod(MOSAIC)))
    path = HERE / f"codec-{given.name}.json"
    result: Row = kept(path)
    of = made_of(given.name, TABLES + given.name)
    result = result if result.get("made_of") == of else {}

    def with_float() -> Row:
        found = coded(codec, images)
        x_0 = codec.decode(codec.encode(images)).estimate()
        found["lossy"]["rmse_float"] = float((127.5 * (x_0 + 1) - images).square().mean().sqrt())
        return found

    parts: dict[str, Callable[[], Any]] = {
        "coded": with_float,
        "seconds": lambda: seconds(codec, images),
        "prefixes": lambda: prefixes(codec, images),
        "ours": lambda: ours_at(codec, images),
        "others": lambda: {kind: other(images, kind) for kind in LOSSY},
        "rivals": lambda: rivals(images),
        "bound": lambda: bound(codec, images),
    }
    for name, part in parts.items():
        if name not in result:
            result |= {name: part(), "values": codec.plan.values, "machine": machine(), "made_of": of, "seed": 0}
            result |= {
                "command": f"python bench/codec.py {given.name} --data {given.data}",
                "date": date.today().isoformat(),
            }
            keep(path, result)
            print(name, flush=True)
    strip(codec, images[:1], HERE.parent / "docs" / "images" / f"codec-{given.name}-strip.png")
    publish("codec.md", f"codec-{given.name}", table(result))
    disk.write_atomic(HERE.parent / "docs" / "images" / f"codec-{given.name}.svg", plot(result).encode())


if __name__ == "__main__":
    main()
