"""`undiffuse distill`: from a model to one of few steps."""

from typing import Annotated

import typer

from undiffuse.cli.options import DataArg, DeviceOpt, ModelArg, SkipBadOpt
from undiffuse.cli.tools import JsonOpt, sampling, show
from undiffuse.cli.train import AcceptOpt, ImagesOpt, LogsOpt, MinutesOpt, PackOpt, RunOpt, SetOpt, more


def distill(
    model: ModelArg,
    data: DataArg,
    out: RunOpt,
    steps: Annotated[int, typer.Option("--steps", help="How many steps the new model samples in: 1 to 8")] = 4,
    images: ImagesOpt = None,
    minutes: MinutesOpt = None,
    settings: SetOpt = None,
    logs: LogsOpt = None,
    skip_bad: SkipBadOpt = False,
    accept_data: AcceptOpt = False,
    use_cache: PackOpt = None,
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Tune a model to sample in 1 to 8 steps.

    The same network is trained on with the same data, so that one evaluation replaces many: each of its steps learns to
    end where several of the model as it was do. The model must predict v, x0 or edm. The result is a run like any
    other, which `undiffuse sample` draws from in its own steps. Ctrl-C saves and stops; the same command again goes on.

    Examples:

    \b
    - `undiffuse distill fashion-mnist fashion-mnist --steps 4 --minutes 90 --out runs/four`
    - `undiffuse distill runs/photos photos/ --steps 2 --out runs/two`
    """
    from undiffuse.data.format.several import join
    from undiffuse.machine import dist
    from undiffuse.training.distill import distill as tune

    found = tune(
        model,
        join(data),
        out,
        steps,
        settings=settings or (),
        device=device,
        say=(lambda text: None) if as_json else (lambda text: typer.echo(text, err=True)),
        images=images,
        minutes=minutes,
        skip_bad=skip_bad,
        accept_data=accept_data,
        use_cache=use_cache,
        logs=logs or (),
        show_progress=not as_json,
    )
    if dist.is_first():
        trained = {"step": found.meta["step"], "images_seen": found.meta["images"]}
        then = {"more": more(found, "--set train.steps"), "next": sampling(out, found)}
        show({"run": out, "sampling_steps": steps, **trained, **then}, as_json)


def register(app: typer.Typer) -> None:
    """Adds this command to the application."""
    app.command()(distill)
