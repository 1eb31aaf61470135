"""`undiffuse eval`: how near samples are to real images."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.chain import Chain, with_options
from undiffuse.cli.options import (
    BatchOpt,
    DataArg,
    DeviceOpt,
    FeatureWeightsOpt,
    OverwriteOpt,
    ReadOpt,
    SkipBadOpt,
    pair,
    reading_of,
    ticking,
    writable,
)
from undiffuse.cli.tools import JsonOpt, show
from undiffuse.errors import UsageError

if TYPE_CHECKING:
    from undiffuse.data.picture import Reading
    from undiffuse.measure.along import Along
    from undiffuse.measure.evaluate import Query
    from undiffuse.measure.scores import Result
    from undiffuse.model.model import Model

SamplesArg = Annotated[
    str, typer.Argument(metavar="MODEL|SAMPLES", help="A model; or a folder, zip or npz of pictures, however made")
]
CountOpt = Annotated[
    int | None, typer.Option("-n", help="Samples to draw, 10,000 unless given; or the first n of SAMPLES")
]
FeaturesOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--features",
        help="Extractor: inception (the only FID), dinov2, efflite0, classifier-28, classifier-emoji, or your own "
        "my_module:MyExtractor; may be repeated. Unless given, the first of them that is there",
    ),
]
MetricOpt = Annotated[
    list[str] | None,
    typer.Option("--metric", help="Only this metric, such as frechet or kernel; may be repeated. All unless given"),
]
ResizeOpt = Annotated[
    str | None,
    typer.Option("--resize", help="How images get the size that the extractor wants: tf1, pil, pil-uint8 or torch"),
]
SplitOpt = Annotated[str, typer.Option("--split", help="Compare with the training images (train) or the others (test)")]
SeedOpt = Annotated[int | None, typer.Option("--seed", help="The first seed, 0 unless given, as that of `sample`")]
SizeOpt = Annotated[
    str | None,
    typer.Option("--size", help="Crop and resize SAMPLES and DATA to this many pixels: a side, or HEIGHTxWIDTH"),
]
SeedsOpt = Annotated[int, typer.Option("--seeds", help="Draw with so many seeds, and give mean and spread")]
OutOpt = Annotated[
    Path | None, typer.Option("--out", "-o", help="A folder for the result; a stopped evaluation then continues")
]
KeepOpt = Annotated[
    bool, typer.Option("--keep-images", help="Write the samples to the folder of --out as well, as samples-SEED.npz")
]
SaveOpt = Annotated[
    Path | None,
    typer.Option("--save-statistics", help="Write mean and covariance of the reference to this .npz, to be DATA"),
]
MemorisationOpt = Annotated[
    bool | None,
    typer.Option(
        "--memorisation/--no-memorisation", help="Whether training images were copied; the worst pairs are in --out"
    ),
]

ProgressiveOpt = Annotated[
    int | None,
    typer.Option(
        "--progressive",
        help="Score the predicted x_0 at so many points of the chain instead (Fig. 10 of DDPM): "
        "a table, and with --out progressive.tsv and plots",
    ),
]


def evaluate(
    samples: SamplesArg,
    data: DataArg,
    n: CountOpt = None,
    features: FeaturesOpt = None,
    metrics: MetricOpt = None,
    feature_weights: FeatureWeightsOpt = None,
    resize: ResizeOpt = None,
    split: SplitOpt = "train",
    *,
    chain: Chain,
    seeds: SeedsOpt = 1,
    progressive: ProgressiveOpt = None,
    out: OutOpt = None,
    keep_images: KeepOpt = False,
    save_statistics: SaveOpt = None,
    size: SizeOpt = None,
    memorisation: MemorisationOpt = None,
    settings: ReadOpt = None,
    skip_bad: SkipBadOpt = False,
    overwrite: OverwriteOpt = False,
    batch: BatchOpt = 64,
    seed: SeedOpt = None,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Measure how near samples are to real images: FID and its kin, with the protocol.

    A model draws, or pictures that are there already are judged. Each score stands beside that of real images, which is
    the least that can be reached, and with all that it depends on. DATA may be an .npz of statistics (mu and sigma).

    Examples:

    \b
    - `undiffuse eval fashion-mnist fashion-mnist -n 2000 --steps 50 --solver ddim --features classifier-28 --seeds 3`
    - `undiffuse eval samples.zip photos/ --features inception --feature-weights pt_inception-2015-12-05-6726825d.pth`
    - `undiffuse eval fashion-mnist fashion-mnist -n 2000 --steps 50 --progressive 10 --out along`
    """
    writable(save_statistics, overwrite, picture=False)
    model, walk, told = _model(samples, chain, device)
    query = _query(features, metrics, feature_weights, resize, split, pair(size), _reading(settings, model), skip_bad)
    whole = {"keep_images": keep_images, "save_statistics": save_statistics, "memorisation": memorisation}
    found = _together(
        _how(samples, progressive, whole, drawn=model is not None), model or samples, data, query, n=n, **walk,
        label=chain.label, seed=seed, seeds=seeds, batch=batch, out=out, named=samples, device=device,
        ticking=lambda what, n: ticking(n, what, as_json, told), say=_say(as_json),
    )  # fmt: skip
    _show(found, out, as_json)


def _together(call: "Callable[..., Result | Along]", *given: Any, **named: Any) -> "Result | Along":
    """What it returns, called by all processes of the run."""
    from undiffuse.machine import dist

    with dist.joined(dist.LONG):
        return call(*given, **named)


def _say(as_json: bool) -> "Callable[[str], None]":
    from undiffuse.machine import dist, log

    return log.say if dist.is_first() and not as_json else log.silent


def _query(features: list[str] | None, metrics: list[str] | None, *rest: Any) -> "Query":
    from undiffuse.measure.evaluate import Query

    return Query(tuple(features or ("auto",)), tuple(metrics or ()), *rest)


def _reading(settings: list[str] | None, model: "Model | None") -> "Reading":
    """How DATA is read, as --set says; a model knows the rest, and its channels."""
    return reading_of(settings, model.data if model else None, fixed=("channels",) if model else ())


def _how(samples: str, progressive: int | None, whole: dict[str, Any], drawn: bool) -> "Callable[..., Result | Along]":
    """The evaluation that is asked for. Raises UsageError for what one along the chain has not."""
    from undiffuse.measure.along import evaluate_along
    from undiffuse.measure.evaluate import evaluate

    if progressive is None:
        return partial(evaluate, **whole | {"memorisation": whole["memorisation"] is not False})
    if not drawn:
        raise UsageError(f"--progressive follows the chain of a model, and {samples} is none; give a model")
    other = next((name for name, value in whole.items() if value), None)
    if other is not None:
        raise UsageError(
            f"--{other.replace('_', '-')} and --progressive are not possible together; leave one of them out"
        )
    return partial(evaluate_along, points=progressive)


def _model(samples: str, chain: Chain, device: str) -> "tuple[Model | None, dict[str, Any], list[str]]":
    """The model that is named, its chain, and what is to be said of it; None for pictures, which have no chain."""
    from undiffuse.measure.evaluate import refuse_unknown
    from undiffuse.model.load import holds_model

    if holds_model(samples):
        model = chain.open(samples, device)
        walk = chain.walk(model)
        return model, {"steps": walk.times, "solver": walk.sampler}, [walk.said]
    refuse_unknown(samples)
    chain.refuse(samples)
    return None, {}, []


def _show(found: "Result | Along", out: Path | None, as_json: bool) -> None:
    """A table of the scores, then the protocol; or all of it as JSON. One process of a run speaks."""
    from undiffuse.machine import dist, log

    if not dist.is_first():
        return
    if not as_json:
        for line in found.lines():
            typer.echo(line)
        for note in found.notes:
            log.warn(note)
        typer.echo("protocol:")
    plain = found.plain()
    where = {} if out is None else {"out": out}
    show(plain | where if as_json else _flat(plain["protocol"]) | where, as_json)


def _flat(said: dict[str, Any]) -> dict[str, str]:
    """One line for each entry, whatever is in it."""
    return {name: _words(value) for name, value in said.items()}


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(each)}".rstrip() for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ("; " if any(isinstance(each, dict) for each in value) else " ").join(map(_words, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def register(app: typer.Typer) -> None:
    """Adds this command to the application."""
    app.command("eval")(with_options(evaluate))
