"""How a model draws, as options that are the same in all commands that draw."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.options import ClipOpt, PrecisionOpt, VarianceOpt, WeightsOpt
from undiffuse.errors import UsageError

if TYPE_CHECKING:
    from undiffuse.model.model import Model
    from undiffuse.model.walk import Walk

SOLVERS = "ddim, heun, dpmpp, dpmpp-sde, unipc, deis or ipndm; unipc-2 has order 2, heun,churn=40 sets its churn"
StepsOpt = Annotated[
    int | None,
    typer.Option(
        "--steps", help="Number of sampling steps; few unless given, or with --solver all of the noise schedule"
    ),
]
TimesOpt = Annotated[
    str | None, typer.Option("--times", help="The times t of the steps instead, decreasing: 1,0.5,0.1")
]
GridOpt = Annotated[
    str | None,
    typer.Option(
        "--grid",
        help="How --steps are spread: even (in t), quadratic, log-snr, karras, karras-few or fitted (see `undiffuse "
        "fit`); unless given, fitted or karras-few, or with --solver what suits the process",
    ),
]
SolverOpt = Annotated[
    str | None, typer.Option("--solver", help=f"Sampler, a fast one unless given: ancestral (the paper's), {SOLVERS}")
]
EtaOpt = Annotated[
    float | None, typer.Option("--eta", help="Noise that --solver ddim adds: 0 (none) to 1 (as ancestral)")
]
GuidanceOpt = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        help="Lead away from the answer without a class, or from that of --guide: 1 is none, 1.5 to 3 are usual; asks "
        "twice as often",
    ),
]
GuideOpt = Annotated[
    str | None, typer.Option("--guide", help="A worse model of the same kind, such as an earlier checkpoint")
]
LabelOpt = Annotated[
    str | None,
    typer.Option(
        "--label",
        help="Class to draw, by name or number, for a model trained with labels; or all, random, none. Unless given, "
        "none where the model was trained without labels as well",
    ),
]


@dataclass(frozen=True)
class Chain:
    """What these options say; a command takes one as a parameter (`with_options`)."""

    steps: StepsOpt = None
    times: TimesOpt = None
    grid: GridOpt = None
    solver: SolverOpt = None
    eta: EtaOpt = None
    clip: ClipOpt = None
    variance: VarianceOpt = None
    weights: WeightsOpt = None
    precision: PrecisionOpt = None
    guidance: GuidanceOpt = None
    guide: GuideOpt = None
    label: LabelOpt = None

    def open(self, source: str, device: str) -> "Model":
        """The model, as it is to draw. Raises UsageError for a guide without a guidance."""
        from undiffuse.model.load import load

        if self.guide is not None and self.guidance is None:
            raise UsageError(
                f"--guide {self.guide} says what to lead away from, and not how much; give --guidance 2 too"
            )
        worse = None if self.guide is None else load(self.guide, device)
        loaded = load(source, device, weights=self.weights)
        return loaded.variant(self.clip, self.variance, self.precision, self.guidance, worse)

    def walk(self, model: "Model", noisy: bool = False, below: bool = False) -> "Walk":
        """Times and solver; its `said` tells in a line what nobody named.

        `below`: of its times those below some t alone are walked. Raises UsageError for a --variance that it has not.
        """
        from undiffuse.diffusion.sampler.ancestral import Ancestral

        walk = model.walk(self._steps(), self.solver, self.eta, self.grid, noisy)
        given = f"--variance {self.variance}"
        if self.variance is not None and not isinstance(walk.sampler, Ancestral):
            raise UsageError(f"{given} belongs to Algorithm 2; give --solver ancestral too, or leave it out")
        if self.variance is not None and walk.sampler != Ancestral(model.config.variance):
            raise UsageError(f"{given} and --solver {self.solver} say two variances; give one of them")
        beside = "; of these steps those below t are taken" * below + "; chains also stop at each --at" * noisy
        return walk._replace(said=walk.said and walk.said + beside)

    def _steps(self) -> int | list[float] | None:
        """The times, or their number. Raises UsageError where two options say the same."""
        if self.times is None:
            return self.steps
        for option, value in (("--steps", self.steps), ("--grid", self.grid)):
            if value is not None:
                raise UsageError(f"{option} {value} and --times {self.times} say the same twice; give one of them")
        try:
            return [float(part) for part in self.times.split(",")]
        except ValueError as error:
            raise UsageError(
                f'--times "{self.times}" is not a list of numbers; give for example 1,0.75,0.5,0.25'
            ) from error

    def refuse(self, samples: str) -> None:
        """UsageError where one of them is given, for pictures, which have no chain."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.clip is False:
            given["no-clip"] = given.pop("clip")
        name = next((name for name, value in given.items() if value is not None), None)
        if name is not None:
            raise UsageError(
                f"--{name} is for a model that draws, and {samples} is none; leave it out, or give a model"
            )


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of its parameter `chain`, because Typer knows no groups of options."""
    signature, own = inspect.signature(command), inspect.signature(Chain).parameters
    flat = [one for name, each in signature.parameters.items() for one in (own.values() if name == "chain" else [each])]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        command(chain=Chain(**{name: given.pop(name) for name in own}), **given)

    named = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in flat]
    called.__signature__ = signature.replace(parameters=named)  # pyright: ignore[reportAttributeAccessIssue]
    return called
