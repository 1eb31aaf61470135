"""A sampler is one step from t to s; `sample` walks a grid of times with it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsFloat

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.config import Table
from undiffuse.diffusion.denoiser import Denoiser, Moment
from undiffuse.diffusion.numbers import combined, per_image, ready, row
from undiffuse.diffusion.process import Process
from undiffuse.diffusion.reverse import Prediction
from undiffuse.errors import UsageError
from undiffuse.key import Keys
from undiffuse.network.base import Conditioning
from undiffuse.strict import real

# All that a sampler knows of a model: (x_t, t) -> Prediction.
Denoise = Callable[[Float[Tensor, "b *x"], Float[Tensor, "b"]], Prediction]
# What may watch a chain: (steps that remain, x, t) before each step.
Callback = Callable[[int, Tensor, Tensor], None]


class Nothing(NamedTuple):
    """The coefficients of a sampler that has none."""


class Turn(NamedTuple):
    """A step of a chain, from t to s < t: what is known of the model, of the times, and of the steps before.

    `c` are the coefficients of the step, `ready` to multiply x. `state` is what the step before gave back; None at the
    first, and where the chain has been noised again. `keys` are those of the noise of this step.
    """

    denoise: Denoise
    process: Process
    c: Any
    t: Float[Tensor, "b"]
    s: Float[Tensor, "b"]
    state: Any
    keys: Keys


class Sampler(ABC):
    """`order` is what the literature calls it by; `converges` says how fast."""

    order: int = 1

    @property
    def noisy(self) -> bool:
        """Whether steps add noise, so that two chains from one x_t end in two images."""
        return False

    @property
    def strays(self) -> bool:
        """Whether the network is asked at times that are not of the grid."""
        return False

    def within(self, steps: int) -> "Sampler":
        """Itself, as it is in a chain of so many steps, of which it may walk the last ones alone."""
        return self

    def converges(self) -> tuple[int, int]:
        """The order of the error of its deterministic part: on grids whose steps change smoothly, and on any."""
        return self.order, self.order

    def coefficients(self, process: Process, t: Float[Tensor, "*n"], s: Float[Tensor, "*n"]) -> Any:
        """A named tuple of numbers that the steps t → s of a chain need, in its order; see `numbers.ready`.

        They are computed once for a chain; what `step` asks of the process itself costs a copy to the device each time.
        """
        return Nothing()

    @abstractmethod
    def step(self, x: Float[Tensor, "b *x"], at: Turn) -> tuple[Float[Tensor, "b *x"], Any]:
        """x at s, and what the next step is given as its state."""


SAMPLERS: Table[Sampler] = Table("sampler", Sampler, "undiffuse.diffusion.sampler")


def named(solver: str, eta: SupportsFloat | None = None) -> Sampler:
    """A solver by name, with its order, `unipc-2`, or its fields, `heun,churn=40`; `eta` is that of DDIM."""
    head, comma, fields = solver.partition(",")
    eta = None if eta is None else real("eta", eta)
    if eta is not None and head != "ddim":
        raise UsageError(f"eta = {eta:g} belongs to the sampler ddim, not to {solver}; choose ddim, or leave it out")
    if eta is not None and fields:
        raise UsageError(f"eta = {eta:g} is given beside the fields of {solver}; say it there, or leave them out")
    name, _, order = head.rpartition("-")
    if name and ":" not in head and order.isdecimal():
        if "order=" in fields.replace(" ", ""):
            raise UsageError(f"solver {solver} says its order twice; say it once")
        solver = f"{name},order={order}{comma}{fields}"
    return SAMPLERS.build(solver if eta is None else {"name": solver, "eta": eta}, trusted=True)


def renoise(
    process: Process, x: Float[Tensor, "b *x"], t: Float[Tensor, "b"], s: Float[Tensor, "b"], keys: Keys
) -> Float[Tensor, "b *x"]:
    """A draw of q(x_s | x_t) for s > t."""
    alpha, sigma = process.alpha_sigma(s)
    # sigma_s² − (alpha_s/alpha_t)² sigma_t², without its cancellation.
    std = sigma * (-torch.expm1(process.logsnr(s) - process.logsnr(t))).sqrt()
    return combined(per_image(alpha / process.alpha(t), x), x, per_image(std, x), keys.normal(*x.shape[1:]))


class Along:
    """`denoise(x_t, t)` for the times of a chain, of which all that can be known is computed and moved at once.

    `like` says the type and the device of x_t. Other times may be asked too; they cost what they cost a denoiser.
    """

    def __init__(
        self, denoiser: Denoiser, times: Float[Tensor, "times"], like: Float[Tensor, "b *x"], cond: Conditioning
    ):
        self.denoiser, self.cond = denoiser, cond
        asked = times[times > 0]
        self._place = {t: i for i, t in enumerate(asked.tolist())}
        self._moments: Moment = ready(like, denoiser.at(asked[:, None]))

    def __call__(self, x_t: Float[Tensor, "b *x"], t: Float[Tensor, "b"]) -> Prediction:
        place = self._place.get(float(t[0])) if t.stride(0) == 0 or len(t) == 1 else None  # one t for all images
        return self.denoiser(x_t, t if place is None else row(self._moments, place), self.cond)


@torch.no_grad()
def sample(
    sampler: Sampler,
    denoise: Denoise,
    process: Process,
    keys: Keys,
    shape: tuple[int, ...],
    times: Float[Tensor, "times"],
    callback: Callback | None = None,
    start: Float[Tensor, "b *x"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b *x"]:
    """x at the last of `times`, from noise at the first of them, in `dtype`, or from `start`.

    The noise of a step is keyed by the number of steps that remain, so that a chain entered half-way sees the noise
    that the whole chain sees there. `callback(remaining, x, t)` is called before each step. Where the grid rises, x is
    noised again.
    """
    count = len(keys.rows)
    x = process.prior_std * keys.fold("x_T").normal(*shape).to(dtype) if start is None else start
    if len(times) < 2:
        return x
    sampler = sampler.within(len(times) - 1)
    state, taken = None, ready(x, sampler.coefficients(process, times[:-1, None], times[1:, None]))
    for i in range(len(times) - 1):
        remaining = len(times) - 1 - i
        t, s = times[i].expand(count), times[i + 1].expand(count)
        if callback is not None:
            callback(remaining, x, t)
        step_keys = keys.fold("step", remaining)
        if times[i + 1] > times[i]:
            x, state = renoise(process, x, t, s, step_keys), None
        else:
            x, state = sampler.step(x, Turn(denoise, process, row(taken, i), t, s, state, step_keys))
    return x
