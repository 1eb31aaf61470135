"""The mean of the data as a network has it: where a chain that does not begin at pure noise begins."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.diffusion.sampler.base import Denoise
from undiffuse.key import Key
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.base import Conditioning

DRAWS = 8  # of x̂_0 at t = 1
MOST_OUT = 4.0  # what an error of the network may be multiplied by in that


@torch.no_grad()
def mean_of(
    asked: Callable[[Tensor, Tensor, Conditioning], Denoise],
    config: ModelConfig,
    label: int | None,
    at: Float[Tensor, "1"],
    draws: int,
    device: torch.device,
) -> Float[Tensor, "c h w"]:
    """x̂_0 of a class over so many draws of noise at that time, on the CPU; 0 where it cannot be read off.

    `asked` is `Model.denoise`.
    """
    if not abs(float(config.parameterisation.coefficients(config.process, at).out)) <= MOST_OUT:
        return torch.zeros(config.image, dtype=torch.float32, device="cpu")
    noise = Key(0).fold("mean").rows(draws).to(device).normal(*config.image)
    told = None if label is None else torch.full((draws,), label, dtype=torch.int64, device="cpu")
    x_t = float(config.process.sigma(at)) * noise
    return asked(at, x_t, Conditioning(told))(x_t, at.expand(draws)).x_0.mean(0).cpu()
