"""The one callable that all the rest sees: what a network is told, and what its answer means."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from undiffuse.diffusion.lattice import FINE, level_noise
from undiffuse.diffusion.numbers import added, combined, ready
from undiffuse.diffusion.parameterisation import Mu, Parameterisation, Time
from undiffuse.diffusion.process import PROCESSES, Process
from undiffuse.diffusion.reverse import Prediction, Variance
from undiffuse.errors import UsageError
from undiffuse.network.base import NOTHING, Conditioning


def network_time(kind: Literal["index", "logsnr", "sigma"], process: Process, t: Time) -> Time:
    """What a network is told about t, in float64: `index` = T t − 1, `logsnr`, or `sigma` = ln(sigma/alpha)/4.

    logsnr is held within ±20, which a network cannot tell from the infinite one that some processes end at.
    """
    if kind == "index":
        if process.steps is None:
            where = PROCESSES.name_of(process)
            raise UsageError(f'time = "index" needs a β-table, and {where} has none; give --set network.time=logsnr')
        return t * process.steps - 1
    logsnr = process.logsnr(t).clamp(-20, 20)
    return logsnr if kind == "logsnr" else -logsnr / 8


class Moment(NamedTuple):
    """What a denoiser knows of t before it is asked: float64 [b], or `ready` to multiply images."""

    alpha: Time
    sigma: Time
    skip: Time
    out: Time
    input: Time | None  # None for 1
    on_x_0: Time
    on_eps: Time
    time: Time  # as the network is told it
    spread: Time | None = None  # for `Lattice`: sigma/alpha, at most FINE
    on_noise: Time | None = None  # what eps_g counts in F; 0 where sigma/alpha is above FINE
    fine: Bool[Tensor, "*b"] | None = None  # whether it is not

    def noised(self, x_0: Float[Tensor, "b *x"], eps: Float[Tensor, "b *x"]) -> Float[Tensor, "b *x"]:
        """A draw of q(x_t | x_0) from the noise given (Eq. 4)."""
        return combined(self.alpha, x_0, self.sigma, eps)

    def target(self, x_0: Float[Tensor, "b *x"], eps: Float[Tensor, "b *x"]) -> Float[Tensor, "b *x"]:
        """What the network should say."""
        return combined(self.on_x_0, x_0, self.on_eps, eps)


Computing = Callable[[], AbstractContextManager[Any]]


class Denoiser(nn.Module):
    """Network + process + parameterisation: `denoiser(x_t, t) -> Prediction`.

    `clip` limits x̂_0 to [−1, 1], as the authors' code does when it samples and measures; never in training. The network
    is called inside a `computing()`, which says in what precision; what is made of its answer is in that of x_t.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        parameterisation: Parameterisation,
        variance: Variance,
        time: Literal["index", "logsnr", "sigma"] = "index",
        clip: bool = True,
        computing: Computing = nullcontext,
    ):
        super().__init__()
        self.network, self.process, self.parameterisation, self.variance = network, process, parameterisation, variance
        self.time: Literal["index", "logsnr", "sigma"] = time
        self.clip, self.computing = clip, computing

    def but(
        self, clip: bool | None = None, variance: Variance | None = None, computing: Computing | None = None
    ) -> "Denoiser":
        """One of the same network that differs in these."""
        clip = self.clip if clip is None else clip
        variance, computing = variance or self.variance, computing or self.computing
        return Denoiser(self.network, self.process, self.parameterisation, variance, self.time, clip, computing).eval()

    def at(self, t: Float[Tensor, "*b"]) -> Moment:
        """All that the network, the process and the parameterisation say of t alone, float64 on the CPU."""
        t = t.cpu()
        skip, out, scale, on_x_0, on_eps = self.parameterisation.coefficients(self.process, t)
        time = network_time(self.time, self.process, t)
        told = None if bool((scale == 1).all()) else scale
        moment = Moment(*self.process.alpha_sigma(t), skip, out, told, on_x_0, on_eps, time)
        if not self.parameterisation.lattice:
            return moment
        # x̂_0 = (x_t − sigma eps)/alpha falls by sigma/alpha with each unit of eps, and F changes it by `out`.
        spread = self.process.spread(t)
        fine = spread <= FINE
        return moment._replace(spread=spread.clamp(max=FINE), on_noise=torch.where(fine, -spread / out, 0), fine=fine)

    def forward(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, "b"] | Moment, cond: Conditioning = NOTHING
    ) -> Prediction:
        """x_t in float32 or float64, t in float64 within [t_min, 1], on any device each; or what is `ready` of t."""
        moment: Moment = t if isinstance(t, Moment) else ready(x_t, self.at(t))
        output, raw_variance = self.output(x_t, moment, cond)
        return self.read(x_t, moment, output, raw_variance)

    def output(
        self, x_t: Float[Tensor, "b c h w"], moment: Moment, cond: Conditioning = NOTHING
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"] | None]:
        """F, and what it says of the variance where that is learned."""
        time = moment.time.to(torch.float32).reshape(-1).expand(len(x_t))
        asked = x_t if moment.input is None else moment.input * x_t
        noise = self.known_noise(x_t, moment)
        weight = next(self.network.parameters(), x_t)  # float32, where x_t may be float64
        asked = (asked if noise is None else torch.cat([asked, noise], 1)).to(weight.dtype)
        with self.computing():
            output = self.network(asked, time, cond).to(x_t.dtype)
        output, raw_variance = output.chunk(2, dim=1) if self.variance.learned else (output, None)
        if noise is not None and moment.on_noise is not None:
            output = added(output, moment.on_noise, noise)
        return output, raw_variance

    def known_noise(self, x_t: Float[Tensor, "b c h w"], moment: Moment) -> Float[Tensor, "b c h w"] | None:
        """eps_g where sigma/alpha is at most FINE, elsewhere 0; None unless the parameterisation is a `Lattice`."""
        if moment.spread is None or moment.fine is None:
            return None
        if not moment.fine.any():
            return torch.zeros_like(x_t)
        return torch.where(moment.on_noise != 0, level_noise(x_t / moment.alpha, moment.spread), 0)

    def read(
        self,
        x_t: Float[Tensor, "b c h w"],
        moment: Moment,
        output: Float[Tensor, "b c h w"],
        raw_variance: Float[Tensor, "b c h w"] | None,
    ) -> Prediction:
        """What F means."""
        x_0 = combined(moment.skip, x_t, moment.out, output)
        mean = output if isinstance(self.parameterisation, Mu) else None
        return Prediction(x_0.clamp(-1, 1) if self.clip else x_0, output, raw_variance, mean)

    def score(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, "b"], cond: Conditioning = NOTHING
    ) -> Float[Tensor, "b c h w"]:
        """∇ log q(x_t) = (alpha x̂_0 − x_t)/sigma², the link to score matching and Langevin dynamics (DDPM, §3.2)."""
        moment = ready(x_t, self.at(t))
        return (moment.alpha * self(x_t, moment, cond).x_0 - x_t) / moment.sigma.square()
