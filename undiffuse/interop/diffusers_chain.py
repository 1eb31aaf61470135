"""diffusers' schedulers and our processes: what a scheduler says of the training, and ours as a `DDPMScheduler`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from undiffuse.config import Count, Fraction
from undiffuse.diffusion.process import PROCESSES, Cosine
from undiffuse.errors import UsageError
from undiffuse.interop.diffusers_fields import Findings, read_fields


@dataclass(frozen=True)
class DDPMScheduler:
    """The fields and defaults of diffusers' class of this name."""

    num_train_timesteps: Count = 1000
    beta_start: Fraction = 1e-4
    beta_end: Fraction = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    variance_type: str | None = "fixed_small"
    clip_sample: bool = True
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995  # this and sample_max_value: read by thresholding only
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"  # this and steps_offset: how fewer steps are spread, which our samplers decide
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False


# Other schedulers, which walk the same process: the defaults in which they differ from the first.
STABLE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
CHAINS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDIMInverseScheduler": {},
    "DDIMParallelScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverSDEScheduler": STABLE,
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": STABLE,
    "KDPM2AncestralDiscreteScheduler": STABLE,
    "KDPM2DiscreteScheduler": STABLE,
    "LCMScheduler": {**STABLE, "beta_schedule": "scaled_linear"},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "RePaintScheduler": {},
    "SASolverScheduler": {},
    "TCDScheduler": {**STABLE, "beta_schedule": "scaled_linear"},
    "UniPCMultistepScheduler": {},
}
TRAINED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
           "rescale_betas_zero_snr", "variance_type")  # fmt: skip

SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# Not "learned": diffusers takes the output for σ², the authors and we for log σ².
VARIANCES = {"fixed_small": "fixed-small", "fixed_large": "fixed-large", "learned_range": "learned-range"}
LOGS = {"fixed_small_log": "fixed_small", "fixed_large_log": "fixed_large"}  # the same variances, otherwise computed
OLD = {"tensor_format", "timestep_values", "predict_epsilon"}  # of the first releases; the last one is read


def read_chain(content: Mapping[str, Any], file: Path, found: Findings) -> DDPMScheduler:
    """What any of diffusers' schedulers says of the training; with reasons, where it is not that of ours."""
    name = content.get("_class_name")
    if not isinstance(name, str) or name not in CHAINS:
        found.need(file, "_class_name", name, tuple(CHAINS))
        return DDPMScheduler()
    content = {"prediction_type": "epsilon" if content.get("predict_epsilon", True) else "sample", **content}
    if not name.startswith("DDPM"):
        found.need(file, "use_flow_sigmas", content.get("use_flow_sigmas", False), (False,))
        content = {
            **CHAINS[name],
            "variance_type": None,
            **{each: content[each] for each in TRAINED if each in content},
        }
    chain = read_fields(DDPMScheduler, content, file, found, OLD)
    for each, values in {
        "beta_schedule": tuple(SCHEDULES),
        "trained_betas": (None,),
        "variance_type": (*VARIANCES, *LOGS) if name.startswith("DDPM") else (*VARIANCES, *LOGS, None),
        "prediction_type": tuple(PREDICTIONS),
        "rescale_betas_zero_snr": (False,),
    }.items():
        found.need(file, each, getattr(chain, each), values)
    if not name.startswith("DDPM"):
        found.assumed.append(f"{name} says how the network was trained; how it samples is not taken over")
    elif chain.thresholding:
        found.assumed.append("it samples with dynamic thresholding there, and with x_0 clipped to [-1, 1] here")
    elif not chain.clip_sample or chain.clip_sample_range != 1:
        there = f"to ±{chain.clip_sample_range:g}" if chain.clip_sample else "not at all"
        found.assumed.append(f"x_0 is clipped {there} there, and to [-1, 1] here unless --no-clip is given")
    return chain


def our_variance(chain: DDPMScheduler, channels: int, outputs: int, file: Path, found: Findings) -> str:
    """By the scheduler, or, where that says nothing, by the number of the network's outputs."""
    said = chain.variance_type
    if said is None:
        said = "learned_range" if outputs == 2 * channels else "fixed_small"
        found.assumed.append(f"the variance is assumed to be {VARIANCES[said]}, because nothing says it")
    variance = VARIANCES.get(LOGS.get(said, said), "fixed-small")
    found.need(file, "out_channels", outputs, (channels * (2 if variance == "learned-range" else 1),))
    return variance


def our_process(chain: DDPMScheduler) -> dict[str, Any]:
    process = {"name": SCHEDULES[chain.beta_schedule], "steps": chain.num_train_timesteps}
    ends = {"beta_start": chain.beta_start, "beta_end": chain.beta_end}
    return process if process["name"] == "cosine" else {**process, **ends}


def their_chain(model: Mapping[str, Any]) -> DDPMScheduler:
    """Fewer steps than all are spread there as our samplers spread them. Raises UsageError."""

    def theirs(section: str, table: Mapping[str, str]) -> str:
        name, names = model[section]["name"], {ours: theirs for theirs, ours in table.items()}
        if name not in names:
            raise UsageError(f'diffusers has no {section} "{name}"; supported: {", ".join(names)}')
        return names[name]

    schedule = theirs("process", SCHEDULES)
    process = PROCESSES.build(model["process"])
    if isinstance(process, Cosine) and process != Cosine(process.steps):
        raise UsageError("diffusers' cosine schedule has offset 0.008 and beta_max 0.999; this model's has others")
    ends = {name: getattr(process, name) for name in ("beta_start", "beta_end") if hasattr(process, name)}
    assert process.steps is not None
    return DDPMScheduler(
        num_train_timesteps=process.steps,
        beta_schedule=schedule,
        variance_type=theirs("variance", VARIANCES),
        prediction_type=theirs("parameterisation", PREDICTIONS),
        timestep_spacing="trailing",
        **ends,
    )
