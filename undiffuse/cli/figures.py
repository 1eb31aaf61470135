"""The figures of the paper that a model is looked into with, each a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.chain import Chain, with_options
from undiffuse.cli.options import (
    DataArg,
    DeviceOpt,
    FeatureWeightsOpt,
    ModelArg,
    OutOpt,
    OverwriteOpt,
    ReadOpt,
    SeedOpt,
    SkipBadOpt,
    open_like,
    open_pair,
    parse_sides,
    said,
    ticking,
    writable,
)
from undiffuse.cli.tools import JsonOpt, show
from undiffuse.errors import UsageError
from undiffuse.strict import whole

if TYPE_CHECKING:
    from torch import Tensor

    from undiffuse.data.source import Source
    from undiffuse.model.model import Model
    from undiffuse.quality.feature.base import Extractor
    from undiffuse.view.explore import Crop, Neighbours

CropOpt = Annotated[
    str | None,
    typer.Option("--crop", help="Compare only a part, in pixels: the middle HEIGHTxWIDTH, or TOP,LEFT,HEIGHT,WIDTH"),
]
NeighbourFeaturesOpt = Annotated[
    str | None,
    typer.Option(
        "--features",
        help="Compare in the features of an extractor of `undiffuse eval`, such as inception, not in pixels",
    ),
]


def progressive(
    model: ModelArg,
    out: OutOpt,
    n: Annotated[int, typer.Option("-n", help="Number of images")] = 8,
    slots: Annotated[int | None, typer.Option("--slots", help="Number of columns; 20 unless given")] = None,
    *,
    chain: Chain,
    overwrite: OverwriteOpt = False,
    seed: SeedOpt = 0,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Draw the predicted x_0 at stages of sampling.

    Each row is one image, from noise to the sample (Fig. 6 of the paper). Large features appear first.

    Example:

    \b
    - `undiffuse progressive fashion-mnist --steps 100 --out progressive.png`
    """
    from undiffuse.view import explore

    writable(out, overwrite)
    loaded = chain.open(model, device)
    walk = chain.walk(loaded)
    total = len(walk.times) - 1
    with ticking(total, "progressive", as_json, [walk.said]) as tick:
        images, at = explore.progressive(loaded, n, seed, walk.times, slots, tick, walk.sampler, chain.label)
    explore.write_grid(images, out)
    show(
        {"picture": out, "t": [float(t) for t in at], **said(loaded.told(chain.label, len(images), seed), loaded)},
        as_json,
    )


def shared(
    model: ModelArg,
    out: OutOpt,
    n: Annotated[int, typer.Option("-n", help="Number of images that share each latent")] = 8,
    at: Annotated[
        list[float] | None, typer.Option("--at", help="Time t of a shared latent, 0 to 1; may be repeated")
    ] = None,
    *,
    chain: Chain,
    overwrite: OverwriteOpt = False,
    seed: SeedOpt = 0,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Draw samples that share one latent x_t.

    Each row is one time t (Fig. 7 of the paper). Its samples share the chain from noise down to x_t and differ after
    it, by the noise that the solver adds: ancestral, dpmpp-sde, heun with churn or ddim with --eta.

    Example:

    \b
    - `undiffuse shared fashion-mnist --at 1 --at 0.75 --at 0.5 --at 0.25 --out shared.png`
    """
    from undiffuse.machine import log
    from undiffuse.view import explore

    writable(out, overwrite)
    loaded = chain.open(model, device)
    walk = chain.walk(loaded, noisy=True)
    at = at or [1.0, 0.75, 0.5, 0.25]
    with ticking(explore.shared_steps(loaded, at, *walk[:2]), "shared latents", as_json, [walk.said]) as tick:
        images, branches = explore.shared(loaded, n, seed, at, walk.times, tick, walk.sampler, chain.label)
    explore.write_grid(images, out)
    same = [f"{float(t):g}" for t, row in zip(branches, images, strict=True) if n > 1 and bool((row == row[0]).all())]
    if same:
        log.warn(f"at t = {', '.join(same)} all images are the same: no step below adds noise; give more --steps")
    show(
        {"picture": out, "t": [float(t) for t in branches], **said(loaded.told(chain.label, 1, seed), loaded)}, as_json
    )


def interpolate(
    model: ModelArg,
    first: Annotated[
        Path, typer.Argument(metavar="A.png", help="The first picture, of any size and format that Pillow reads")
    ],
    second: Annotated[Path, typer.Argument(metavar="B.png", help="The second picture")],
    out: OutOpt,
    t: Annotated[
        list[float] | None, typer.Option("--t", help="Time t to add noise up to, 0 to 1; may be repeated, a row each")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", help="Number of mixtures from A to B; 11 unless given")
    ] = None,
    mix: Annotated[
        list[float] | None,
        typer.Option("--lambda", help="Share of B, 0 to 1 or beyond, instead of --count; may be repeated"),
    ] = None,
    settings: ReadOpt = None,
    *,
    chain: Chain,
    overwrite: OverwriteOpt = False,
    seed: SeedOpt = 0,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Interpolate between two pictures.

    Noise is added to both up to time t, the noisy pictures are mixed, and the mixtures are denoised (Figs. 8 and 9 of
    the paper).

    Examples:

    \b
    - `undiffuse interpolate fashion-mnist a.png b.png --t 0.25 --t 0.5 --t 0.75 --out mix.png`
    - `undiffuse interpolate fashion-mnist a.png b.png --lambda 0.1 --lambda 0.9 --out mix.png`
    """
    from undiffuse.view import explore

    writable(out, overwrite)
    loaded = chain.open(model, device)
    walk = chain.walk(loaded, below=True)
    pictures = open_pair(loaded, first, second, settings)
    if mix and count is not None:
        raise UsageError(f"--count {count} and --lambda both say which mixtures; give one of them")
    if count is not None and count < 2:
        raise UsageError(f"--count {count} is not possible; give 2 or more, the pictures themselves included")
    at, lambdas = t or [0.5], mix or [i / ((count or 11) - 1) for i in range(count or 11)]
    with ticking(explore.interpolation_steps(loaded, at, *walk[:2]), "interpolation", as_json, [walk.said]) as tick:
        images = explore.interpolate(loaded, *pictures, at, lambdas, seed, walk.times, tick, walk.sampler, chain.label)
    explore.write_grid(images, out)
    show({"picture": out, "t": at, "lambda": lambdas, **said(loaded.told(chain.label, 1, seed), loaded)}, as_json)


def neighbours(
    model: ModelArg,
    data: DataArg,
    out: OutOpt,
    n: Annotated[int, typer.Option("-n", help="Number of samples")] = 8,
    k: Annotated[int, typer.Option("-k", help="Number of neighbours of each sample")] = 8,
    crop: CropOpt = None,
    features: NeighbourFeaturesOpt = None,
    feature_weights: FeatureWeightsOpt = None,
    settings: ReadOpt = None,
    *,
    chain: Chain,
    skip_bad: SkipBadOpt = False,
    overwrite: OverwriteOpt = False,
    seed: SeedOpt = 0,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Find the training images nearest to samples.

    This shows whether the model has copied its training data (Figs. 12 and 15 of the paper). Each row is one sample
    and its nearest training images, compared pixel by pixel or in features. `undiffuse eval` tells how many are copies.

    Examples:

    \b
    - `undiffuse neighbours fashion-mnist fashion-mnist --steps 100 --out neighbours.png`
    - `undiffuse neighbours runs/faces faces/ --crop 100x100 --out neighbours.png`
    - `undiffuse neighbours fashion-mnist fashion-mnist --features classifier-28 --steps 100 --out neighbours.png`
    """
    import torch

    from undiffuse.model.classes import drawn
    from undiffuse.view import explore

    writable(out, overwrite)
    _refuse_inside(out, data)
    _refuse_both(crop, features, feature_weights)
    loaded = chain.open(model, device)
    walk = chain.walk(loaded)
    source, box = open_like(loaded, data, "train", skip_bad, settings), None if crop is None else parse_crop(crop)
    explore.comparable(loaded.image_shape, source, k, box)
    extractor, total = _extractor(features, feature_weights, loaded), loaded.count(whole("n", n, 1), chain.label)
    told = drawn(loaded.classes, total, seed) if chain.label is None else loaded.told(chain.label, total, seed)
    with ticking(loaded.sampling_steps(total, walk.times), "sampling", as_json, [walk.said]) as tick:
        samples = loaded.sample(total, walk.times, walk.sampler, seed, label=told.label, progress=tick)
    near, seen = _nearest(extractor, samples, source, k, box, as_json)
    rows = torch.stack([torch.cat([s[None], source.gather(i)[0]]) for s, i in zip(samples, near.indices, strict=True)])
    explore.write_grid(rows, out)
    show({"picture": out, **said(told, loaded), **seen, "index": near.indices.tolist()}, as_json)


def _refuse_inside(out: Path, data: list[str]) -> None:
    """UsageError for a picture among those of the data."""
    from undiffuse.data.format.several import join
    from undiffuse.data.listing import refuse_inside

    refuse_inside(out, join(data), "--out")


def _refuse_both(crop: str | None, features: str | None, weights: Path | None) -> None:
    """UsageError for a part of features, and for weights of none."""
    if features is not None and crop is not None:
        raise UsageError(f"--crop {crop} is for pixels, and --features {features} see whole images; give one of them")
    if weights is not None and features is None:
        raise UsageError("--feature-weights is for --features, which is not given; give it too, or leave both out")


def _nearest(
    extractor: "Extractor | None", samples: "Tensor", source: "Source", k: int, crop: "Crop | None", as_json: bool
) -> "tuple[Neighbours, dict[str, Any]]":
    """Also what is shown of them."""
    from undiffuse.view import explore

    if extractor is None:
        near = explore.neighbours(samples, source, k, crop)
        return near, {"rmse_of_nearest": near.distance[:, 0].tolist()}
    near = explore.neighbours_in(extractor, samples, source, k, lambda what, total: ticking(total, what, as_json))
    return near, {"features": extractor.name, "distance_of_nearest": near.distance[:, 0].tolist()}


def _extractor(name: str | None, weights: Path | None, model: "Model") -> "Extractor | None":
    """With its weights, before anything is drawn. Raises UsageError for images that it cannot see."""
    from undiffuse.quality.feature.base import open_features

    if name is None:
        return None
    found = open_features(name, model.device, weights, shape=model.image_shape)
    found.check(model.image_shape)
    return found


def parse_crop(text: str) -> "Crop":
    """(height, width) of `100x100` or `100`, (top, left, height, width) of four numbers with commas."""
    parts = text.split(",")
    if len(parts) == 4 and all(part.isdecimal() for part in parts):
        top, left, height, width = map(int, parts)
        return top, left, height, width
    if "," in text:
        raise UsageError(f'--crop "{text}" is not TOP,LEFT,HEIGHT,WIDTH; give four numbers, or 100x100 for the middle')
    sides = parse_sides("--crop", text)
    return sides[0], sides[-1]


def register(app: typer.Typer) -> None:
    """Adds these commands to the application."""
    for command in (progressive, shared, interpolate, neighbours):
        app.command()(with_options(command))
