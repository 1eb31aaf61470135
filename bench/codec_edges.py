"""What the codec does beside its figures on test images: windows, other machines, and photographs it does not know.

    python bench/codec_edges.py fashion-mnist --data fashion-mnist --photos FOLDER

- seams: photographs, halved until their longer side is at most 128, in windows; the mean square of the error's
  difference between neighbours, across the borders of windows over that inside them, at the end of some layers;
- other machines: an archive of 32 test images, written with oneDNN's convolutions on one thread in batches of 16, is
  decoded with two threads, in batches of one, and with torch's own convolutions, which add up in another order as other
  devices do: the RMS difference of x̂_0 in grey levels, of the image where it is largest;
- photographs in tiles of the model's size: bytes of single files and archives, lossless, and what PNG, WebP and JPEG XL
  take.

The folder has pictures without loss, such as those that come with scikit-image. Writes `bench/codec_edges-NAME.json`
and the table `codec-edges-NAME` of docs/codec.md.
"""

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bits import RIVALS
from jaxtyping import Float, UInt8
from machine import TABLES, asking, keep, machine, made_of, publish, shipped_codec
from PIL import Image
from torch import Tensor, nn

from undiffuse.codec import ledger
from undiffuse.codec.stream import Codec
from undiffuse.diffusion.windows import places
from undiffuse.network.base import Conditioning

HERE, SIDE, TILES, IMAGES = Path(__file__).parent, 128, 8, 32
STEPS = (8, 16, 32)
Row = dict[str, Any]
Images = UInt8[Tensor, "n c h w"]


def opened(folder: Path, channels: int) -> dict[str, UInt8[Tensor, "c h w"]]:
    """Each halved, by the mean of four pixels, until it is small."""
    found, every = {}, folder.iterdir() if folder.is_dir() else ()
    for path in sorted(each for each in every if each.suffix in (".png", ".jpg", ".tif")):
        with Image.open(path) as picture:
            small = picture.convert("L" if channels == 1 else "RGB")
            while max(small.size) > SIDE:
                small = small.reduce(2)
        array = np.asarray(small).reshape(small.height, small.width, -1)
        found[path.name] = torch.from_numpy(array.transpose(2, 0, 1).copy())
    if not found:
        raise SystemExit(f"{folder} has no .png, .jpg or .tif; give a folder of photographs")
    return found


def seams(codec: Codec, photos: dict[str, UInt8[Tensor, "c h w"]]) -> list[Row]:
    """Over all photographs: the error's jump at columns and rows where a window begins or ends, over that elsewhere."""
    rows = []
    for steps in STEPS:
        at, inside, square = list[float](), list[float](), list[float]()
        for photo in photos.values():
            found = codec.write(photo[None], steps).shown
            error = found[0].double() - photo.double()
            square.append(float(error.square().mean()))
            for axis, side in ((1, codec.model.image_shape[1]), (2, codec.model.image_shape[2])):
                begins = places(photo.shape[axis], side)
                edges = {place for begin in begins for place in (begin, begin + side)} - {0, photo.shape[axis]}
                jumps = error.diff(dim=axis).square().mean(tuple({0, 1, 2} - {axis}))
                for i, jump in enumerate(jumps.tolist(), 1):
                    (at if i in edges else inside).append(jump)
        rows.append(
            {"steps": steps, "rmse": float(np.mean(square) ** 0.5), "ratio": float(np.mean(at) / np.mean(inside))}
        )
        print(rows[-1], flush=True)
    return rows


def machines(codec: Codec, images: Images) -> Row:
    data = codec.encode(images)

    def decoded() -> Float[Tensor, "n c h w"]:
        return codec.decode(data).estimate()

    before = decoded()

    def apart(other: Float[Tensor, "n c h w"]) -> float:
        return float((127.5 * (other.double() - before.double())).square().flatten(1).mean(1).sqrt().max())

    torch.set_num_threads(2)
    found = {"two threads": apart(decoded())}
    torch.set_num_threads(1)
    with torch.backends.mkldnn.flags(enabled=False):
        found["torch's own convolutions"] = apart(decoded())
    denoiser, inner = codec.model.denoiser, codec.model.denoiser.network
    denoiser.network = OneByOne(inner)
    found["batches of one"] = apart(decoded())
    denoiser.network = inner
    return found


class OneByOne(nn.Module):
    """A network that sees each row of a batch alone."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        rows = (slice(i, i + 1) for i in range(len(x)))
        return torch.cat([self.network(x[row], time[row], cond.at(row)) for row in rows])


def unknown(codec: Codec, photos: dict[str, UInt8[Tensor, "c h w"]]) -> Row:
    """Tiles from the middle of each photograph."""
    _, h, w = codec.model.image_shape
    tiles = []
    for photo in photos.values():
        down, across = photo.shape[1] // h, photo.shape[2] // w
        every = [photo[:, i * h : i * h + h, j * w : j * w + w] for i in range(down) for j in range(across)]
        start = max(0, (len(every) - TILES) // 2)
        tiles += every[start : start + TILES]
    images = torch.stack(tiles)
    archive, single = ledger.files(codec, images), [ledger.files(codec, image[None], 1) for image in images]
    found: Row = {"tiles": len(images), "rmse": archive["rmse"], "usual": codec.plan.usual / 8}
    for name in ("bytes", "lossless"):
        found[name] = {"archive": archive[name], "single": float(np.mean([each[name] for each in single]))}
    found["others"] = {
        kind: float(np.mean([ledger.size(image, kind, RIVALS[kind]) for image in images])) for kind in RIVALS
    }
    return found


def table(result: Row) -> str:
    lines = [
        "| photographs in windows | RMSE | jump of the error at borders, over elsewhere |",
        "|---|---|---|",
    ]
    lines += [f"| {row['steps']} steps | {row['rmse']:.1f} | {row['ratio']:.3f} |" for row in result["seams"]]
    lines += ["", "| decoded with | grey levels apart, RMS, the worst image |", "|---|---|"]
    lines += [f"| {name} | {off:.1g} |" for name, off in result["machines"].items()]
    found = result["photographs"]
    lines += ["", "| bytes of a tile of a photograph | archive | single |", "|---|---|---|"]
    lossy, exact = found["bytes"], found["lossless"]
    lines.append(f"| with loss, {found['rmse']:.2f} grey levels off | {lossy['archive']:.0f} | {lossy['single']:.0f} |")
    lines.append(f"| lossless | {exact['archive']:.0f} | {exact['single']:.0f} |")
    lines += [f"| {kind}, lossless | | {each:.0f} |" for kind, each in found["others"].items()]
    said = (
        f"{found['tiles']} tiles; 99 of 100 images like the model's take at most {found['usual']:.0f} bytes with loss."
    )
    return "\n".join([*lines, "", f"{said} {result['machine']['processor']}, {result['date']}; `{result['command']}`."])


def main() -> None:
    parser = asking(__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of photographs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    codec, images = shipped_codec(given.name, given.data, IMAGES)
    photos = opened(given.photos, codec.model.image_shape[0])
    result: Row = {"seams": seams(codec, photos), "machines": machines(codec, images)}
    result |= {
        "photographs": unknown(codec, photos),
        "photos": sorted(photos),
        "made_of": made_of(given.name, TABLES + given.name),
    }
    result |= {"machine": machine(), "seed": 0, "date": date.today().isoformat()}
    result["command"] = f"python bench/codec_edges.py {given.name} --data {given.data} --photos {given.photos}"
    path = HERE / f"codec_edges-{given.name}.json"
    keep(path, result)
    publish("codec.md", f"codec-edges-{given.name}", table(result))


if __name__ == "__main__":
    main()
