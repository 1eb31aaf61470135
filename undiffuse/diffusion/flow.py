"""The likelihood of the probability-flow ODE: a second opinion on the bound, from the same network.

With y = x_t/√(alpha² + sigma²) and w = −arsinh(alpha/sigma) the ODE of Song et al. 2021 (Eq. 38) is
dy/dw = −tanh(w) y − x̂_0, in which nothing is infinite: near the data w is ln(sigma/alpha) but for a constant, and where
alpha = 0 it is 0. The log-density gains the divergence on the way to the prior (Eq. 39; Chen et al. 2018), whose trace
is estimated with probes of ±1 (Eq. 40; Hutchinson). Images of 256 levels are spread by truncated normal noise
(Zheng et al. 2023, "i-DODE").
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.gaussian import LN2
from undiffuse.diffusion.numbers import F64, per_image
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.reverse import Prediction
from undiffuse.errors import NotFiniteError, UsageError
from undiffuse.key import Keys
from undiffuse.network.base import NOTHING, Conditioning
from undiffuse.strict import extra, whole

HALF_BIN = 1 / 255  # levels k/127.5 − 1 stand 2/255 apart
TAU = 3.0  # the most standard deviations that half a bin is wide where the ODE ends
FINEST = 1e-7  # what float32 can still tell apart
MOST = 5_000  # evaluations

# All that the ODE knows of a model: (x_t, t) -> Prediction, x̂_0 not clipped.
Denoise = Callable[[Float[Tensor, "b *x"], Float[Tensor, "b"]], Prediction]


@dataclass(frozen=True)
class Solver:
    """dopri5, with an error of at most `tolerance` of each image in each step: in y, and in nats/dim.

    `probes` vectors of ±1 an image estimate the trace; None takes the exact one, for tiny images.
    """

    tolerance: float = 1e-5
    probes: int | None = 1

    def __post_init__(self) -> None:
        if not FINEST <= self.tolerance <= 0.1:
            raise UsageError(f"tolerance = {self.tolerance:g} is not possible; give {FINEST:g} to 0.1")
        if self.probes is not None:
            whole("probes", self.probes, 1)


@dataclass(frozen=True, eq=False)
class FlowTerms:
    """Bits/dim of n images, and on how many evaluations of the network each."""

    bits: Float[np.ndarray, "n"]
    evaluations: Int[np.ndarray, "n"]

    def summary(self) -> dict[str, float | int | None]:
        """Means over the images; the standard error is None for one image."""
        n = len(self.bits)
        return {
            "images": n,
            "bits_per_dim": float(self.bits.mean()),
            "standard_error": float(self.bits.std(ddof=1) / n**0.5) if n > 1 else None,
            "evaluations": float(self.evaluations.mean()),
        }


def start(process: Process) -> float:
    """The t at which the ODE ends and images are spread: where half a bin is `TAU` standard deviations, or t_min.

    Below that a level is certain, so that there is nothing to gain, and few networks are trained there.
    """
    logsnr = torch.tensor(2 * math.log(TAU / HALF_BIN), dtype=F64, device="cpu")
    return max(process.t_min, float(process.time(logsnr)))


def truncated_entropy(tau: float) -> float:
    """The entropy in nats of a standard normal held within ±tau: ln(√(2πe) Z) − tau φ(tau)/Z, Z = erf(tau/√2)."""
    mass = math.erf(tau / math.sqrt(2))
    density = math.exp(-(tau**2) / 2) / math.sqrt(2 * math.pi)
    return 0.5 * math.log(2 * math.pi * math.e) + math.log(mass) - tau * density / mass


def truncated_normal(keys: Keys, tau: float, shape: tuple[int, ...]) -> Float[Tensor, "b *shape"]:
    """Standard normal noise held within ±tau, float64 on the CPU."""
    centred = 2 * keys.uniform(*shape) - (1 - 2**-53)  # (−1, 1), as often below 0 as above
    return math.sqrt(2) * torch.special.erfinv(math.erf(tau / math.sqrt(2)) * centred)


def flow_bits(
    denoiser: Denoiser,
    x_0: Float[Tensor, "b c h w"],
    keys: Keys,
    solver: Solver | None = None,
    cond: Conditioning = NOTHING,
) -> FlowTerms:
    """An upper bound on the bits/dim of images on the grid k/127.5 − 1, with one draw of the noise that spreads each.

    −log2 P(x) ≤ −(E log p(z) + H(z))/ln 2 with z = alpha x_0 + sigma · (normal within ±tau), tau = alpha/(255 sigma),
    at `start`. Images of a batch share their steps, so that a number depends, within the tolerance, on the others.
    Raises UsageError for a denoiser that clips or is in training mode; NotFiniteError where the network fails.
    """
    if denoiser.clip or denoiser.training:
        raise UsageError("the ODE needs a smooth denoiser; give it clip=False and .eval()")
    process = denoiser.process
    denoiser.parameterisation.check(process)
    t = torch.tensor(start(process), dtype=F64, device="cpu")
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    tau = HALF_BIN * alpha / sigma
    noise = truncated_normal(keys.fold("dequantise"), tau, tuple(x_0.shape[1:]))
    z = alpha * x_0.cpu().double() + sigma * noise
    nats, evaluations = log_density(
        lambda x, t: denoiser(x, t, cond), process, z, float(t), keys.to(x_0.device), solver, x_0.dtype
    )
    entropy = truncated_entropy(tau) + math.log(sigma)
    values = math.prod(x_0.shape[1:])
    bits = -(nats / values + entropy) / LN2
    return FlowTerms(bits.numpy(), np.full(len(x_0), evaluations, np.int64))


@torch.no_grad()
def log_density(
    denoise: Denoise,
    process: Process,
    x: Float[Tensor, "b *x"],
    t: float,
    keys: Keys,
    solver: Solver | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "b"], int]:
    """log p_t(x) in nats, float64 on the CPU, of the ODE that ends in N(0, prior_std²) at t = 1; and its evaluations.

    The network sees `dtype` on the device of `keys`; the integral is float64 on the CPU.
    """
    odeint, solver = extra("torchdiffeq", "ode", "the ODE").odeint, solver or Solver()
    times = torch.tensor([t, 1.0], dtype=F64, device="cpu")
    w = -torch.asinh(torch.exp(process.logsnr(times) / 2))
    alpha, sigma = process.alpha(times), process.sigma(times)
    first, last = (alpha.square() + sigma.square()).sqrt().tolist()
    flow = _Flow(denoise, process, keys, solver, dtype, w)
    y = x.cpu().double() / first
    ys, gains = odeint(
        flow,
        (y, torch.zeros(len(x), dtype=F64, device="cpu")),
        w,
        rtol=0,
        atol=solver.tolerance,
        method="dopri5",
        options={"norm": _worst, "step_t": w[1:]},  # a step ends at w[1]; by itself it would go beyond t = 1
    )
    values = math.prod(x.shape[1:])
    square = (last / process.prior_std * ys[-1]).square().flatten(1).mean(1)
    prior = -0.5 * (square + math.log(2 * math.pi)) - math.log(process.prior_std)
    return values * (prior + gains[-1] + math.log(last / first)), flow.evaluations


def _worst(state: tuple[Float[Tensor, "b *x"], Float[Tensor, "b"]]) -> Float[Tensor, ""]:
    """The root mean square of an image's values, or its integral, whichever is greatest of all."""
    y, gain = state
    return torch.maximum(y.flatten(1).square().mean(1).sqrt().max(), gain.abs().max())


class _Flow:
    """(w, (y, ∫)) -> their derivatives, the second being the divergence of the first, in nats/dim."""

    def __init__(
        self,
        denoise: Denoise,
        process: Process,
        keys: Keys,
        solver: Solver,
        dtype: torch.dtype,
        ends: Float[Tensor, "2"],
    ):
        self.denoise, self.process, self.keys, self.solver, self.dtype = denoise, process, keys, solver, dtype
        self.low, self.high = ends.tolist()
        self.evaluations = 0

    def __call__(
        self, w: Float[Tensor, ""], state: tuple[Float[Tensor, "b *x"], Float[Tensor, "b"]]
    ) -> tuple[Float[Tensor, "b *x"], Float[Tensor, "b"]]:
        self.evaluations += 1
        if self.evaluations > MOST:
            raise UsageError(
                f"the ODE took more than {MOST:,} evaluations to a tolerance of {self.solver.tolerance:g}; give a "
                "larger one"
            )
        y, w = state[0], w.clamp(self.low, self.high)  # the solver's first guess of a step may lie beyond the end
        t = self.process.time(2 * torch.log(torch.sinh(-w))).clamp(self.process.t_min, 1).expand(len(y))
        scale = (self.process.alpha(t).square() + self.process.sigma(t).square()).sqrt()
        with torch.enable_grad():
            x = (per_image(scale, y) * y).to(self.dtype).to(self.keys.device).requires_grad_()
            x_0 = self.denoise(x, t).x_0
            trace = scale * self._mean_slope(x_0, x)
        x_0 = x_0.detach().cpu().double()
        if not (x_0.isfinite().all() and trace.isfinite().all()):
            raise NotFiniteError(
                f"the network's answer at t = {float(t[0]):g} is not finite, so there is no number to give: the "
                "weights are at fault; `undiffuse verify` checks a run, an older checkpoint is another to try"
            )
        return -torch.tanh(w) * y - x_0, -torch.tanh(w) - trace

    def _mean_slope(self, x_0: Float[Tensor, "b *x"], x: Float[Tensor, "b *x"]) -> Float[Tensor, "b"]:
        """The trace of ∂x_0/∂x of each image over the number of its values, exact or estimated."""
        values, probes = math.prod(x.shape[1:]), self.solver.probes
        count = values if probes is None else probes
        total = torch.zeros(len(x), dtype=F64, device="cpu")
        for k in range(count):
            probe = self._unit(k, x) if probes is None else self._signs(k, x)
            (pulled,) = torch.autograd.grad(x_0, x, probe, retain_graph=k < count - 1)
            total += (probe * pulled).flatten(1).sum(1).cpu().double()
        return total / values if probes is None else total / (values * count)

    def _unit(self, k: int, x: Float[Tensor, "b *x"]) -> Float[Tensor, "b *x"]:
        probe = torch.zeros_like(x).flatten(1)
        probe[:, k] = 1
        return probe.view_as(x)

    def _signs(self, k: int, x: Float[Tensor, "b *x"]) -> Float[Tensor, "b *x"]:
        """±1 of each value, the same at every w: the right-hand side of an ODE is one function."""
        values = math.prod(x.shape[1:])
        words = self.keys.fold("probe", k).bits(values)[:, :values]
        return (1 - 2 * (words & 1)).to(x.dtype).view_as(x)
