"""Chains of fewer steps than the table: which times they visit, beside diffusers and guided-diffusion; how they end.

What docs/concepts.md says under "Chains of fewer steps".
"""

import diffusers
import numpy as np
import pytest
import torch

from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.grid import Even
from undiffuse.diffusion.likelihood import chain
from undiffuse.diffusion.numbers import ready
from undiffuse.diffusion.parameterisation import Eps
from undiffuse.diffusion.process import Linear
from undiffuse.diffusion.reverse import FixedLarge, FixedSmall, LearnedRange, Prediction, Step
from undiffuse.diffusion.sampler.base import sample
from undiffuse.diffusion.sampler.ddim import DDIM
from undiffuse.key import Key

T = 1000
every_count = pytest.mark.parametrize("n", [50, 30, 7, 1, T])


def visited(n: int) -> list[int]:
    """The authors' indices i = Tt − 1 at which the network is asked."""
    times = Even().times(Linear(T), n)
    assert times[-1] == 0
    return [round(float(t) * T) - 1 for t in times[:-1]]


def trailing(n: int) -> list[int]:
    return [int(i) for i in np.round(np.arange(T, 0, -T / n)) - 1]


def space_timesteps(n: int) -> list[int]:
    """guided-diffusion's, for one section."""
    stride, at, taken = (T - 1) / max(n - 1, 1), 0.0, []
    for _ in range(n):
        taken.append(round(at))
        at += stride
    return taken[::-1]


def beta_tilde(i: int) -> float:
    """β̃ of the authors' index i, from their recurrence."""
    betas = np.linspace(1e-4, 0.02, T)
    alpha_bar = np.cumprod(1 - betas)
    return float(betas[i] * (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]))


@every_count
def test_the_times_are_those_of_trailing_spacing(n):
    assert visited(n) == trailing(n)
    for scheduler in (diffusers.DDPMScheduler, diffusers.DDIMScheduler):
        theirs = scheduler(T, timestep_spacing="trailing")
        theirs.set_timesteps(n)
        assert visited(n) == theirs.timesteps.tolist()


@pytest.mark.parametrize("n", [50, 30, 7])
def test_and_not_those_of_guided_diffusion_or_of_leading_spacing(n):
    assert len(space_timesteps(n)) == n
    assert (visited(n)[0], space_timesteps(n)[0]) == (T - 1, T - 1)
    assert visited(n)[-1] == round(T / n) - 1
    assert space_timesteps(n)[-1] == 0
    leading = diffusers.DDPMScheduler(T, timestep_spacing="leading")
    leading.set_timesteps(n)
    assert visited(n) != space_timesteps(n)
    assert visited(n) != leading.timesteps.tolist()


def test_the_indices_as_the_page_has_them():
    assert [*visited(50)[:3], visited(50)[-1]] == [999, 979, 959, 19]
    assert [*space_timesteps(50)[:3], *space_timesteps(50)[-2:]] == [999, 979, 958, 20, 0]


@pytest.mark.parametrize("n", [None, 50, 7])
@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge(), LearnedRange()])
def test_the_decoder_has_the_variance_of_the_training_table_on_every_chain(n, variance):
    """That of a chain respaced as guided-diffusion does it would be its own β̃, which is larger."""
    process = Linear(T)
    times = chain(process, n)
    assert (float(times[0]), float(times[1])) == (0.0, 1 / T)
    t, x = times[1:2], torch.zeros(1, 1, 1, 1)
    step = ready(x, Step.between(process, t, times[:1]))
    log_variance = variance.log_variance(step, Prediction(x, x, raw_variance=x - 1))
    assert float(log_variance) == pytest.approx(np.log(beta_tilde(1)), abs=1e-5)
    if n is not None:
        respaced = process.small_variance(times[3:4], times[2:3])
        assert float(respaced) > 10 * beta_tilde(1)


class Loud(torch.nn.Module):
    """Says more noise than there is, so that x̂_0 leaves [−1, 1] and clipping matters at each step."""

    def forward(self, x, time, cond=None):
        return 1.3 * x + 0.1


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("n", [50, 20])
def test_ddim_reads_the_noise_off_the_clipped_x_0(clip, n):
    """diffusers' `use_clipped_model_output`: by default it keeps the network's ε, which is another chain."""
    process, keys = Linear(T), Key(0).rows(4)
    denoiser = Denoiser(Loud(), process, Eps(), FixedLarge(), clip=clip)
    start = keys.normal(1, 2, 2)
    ours = sample(DDIM(), denoiser, process, keys, (1, 2, 2), Even().times(process, n), start=start)
    theirs = []
    for read_off in (True, False):
        scheduler = diffusers.DDIMScheduler(T, clip_sample=clip, timestep_spacing="trailing")
        scheduler.alphas_cumprod = torch.cumprod(1 - process.betas(), 0)  # float64, as ours
        scheduler.set_timesteps(n)
        x = start.double()
        for i in scheduler.timesteps:
            x = scheduler.step(Loud()(x, i), int(i), x, use_clipped_model_output=read_off, return_dict=False)[0]
        theirs.append(x.float())
    largest = theirs[0].abs().max()
    assert (ours - theirs[0]).abs().max() <= 1e-4 * largest
    if clip:
        assert (ours - theirs[1]).abs().max() > 0.1
    else:
        assert torch.allclose(theirs[0], theirs[1], rtol=1e-5)
