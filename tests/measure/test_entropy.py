"""The whole pipeline against the truth: trained on data of known entropy, its bits/dim must come down to it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from undiffuse.config import parse
from undiffuse.data.format.procedural import LEVEL, Gaussian, ImageMixture, Law, level_probabilities
from undiffuse.data.source import ArraySource
from undiffuse.key import Key
from undiffuse.measure import nll
from undiffuse.model.recipe import Recipe
from undiffuse.training.loop import train

RECIPE = {
    "process": {"name": "cosine"},
    "parameterisation": {"name": "v"},
    "variance": {"name": "learned-range"},
    "network": {"name": "unet", "channels": 32, "multipliers": [1], "blocks": 1, "attention": []},
    "objective": {"name": "hybrid"},
    "train": {
        "batch": 64, "lr": 2e-3, "warmup": 100, "decay": "cosine", "ema": 0.995, "ema_ramp": True,
        "save_every": 4000, "sample_every": 0, "held_out": 0,
    },
}  # fmt: skip


def cost_of_a_mixture(law: ImageMixture, images: torch.Tensor) -> torch.Tensor:
    """−log2 p of each image over its values: a sum over the two kinds, of a product over the values."""
    levels = images.long()
    kinds = [
        level_probabilities(mean, std).log()[levels].flatten(1).sum(1) + math.log(weight)
        for weight, mean, std in zip(law.weights, law.means, law.stds, strict=True)
    ]
    return -torch.stack(kinds).logsumexp(0) / math.log(2) / levels[0].numel()


def cost_of_a_gaussian(law: Gaussian, images: torch.Tensor) -> torch.Tensor:
    """The density at the level times its width, with rounding as a twelfth of a squared level more of variance."""
    x = (images.double() / 127.5 - 1).flatten(1)
    d = x.shape[1]
    own = (law.std**2 * (1 - law.correlation) + LEVEL**2 / 12) * torch.eye(d, dtype=torch.float64)
    covariance = own + law.std**2 * law.correlation
    mean = torch.full((d,), law.mean, dtype=torch.float64)
    density = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
    return -density / math.log(2) / d - math.log2(LEVEL)


def true_cost(law: Law, images: torch.Tensor) -> np.ndarray:
    """What each image costs under the law itself, in bits/dim: its mean is the entropy."""
    return (cost_of_a_gaussian if isinstance(law, Gaussian) else cost_of_a_mixture)(law, images).numpy()


LAWS = [pytest.param(ImageMixture(), 1500, id="image-mixture"), pytest.param(Gaussian(), 1000, id="gaussian")]


def draw(law: Law, count: int, name: str) -> ArraySource:
    return law.source(count, Key(0).fold(name))


@pytest.mark.parametrize("law, steps", LAWS)
def test_the_true_cost_is_the_entropy_on_average(law, steps):
    cost = true_cost(law, draw(law, 20_000, "many").images)
    assert cost.mean() == pytest.approx(law.entropy_bits_per_dim(), abs=4 * cost.std() / 20_000**0.5)


def gap(law: Law, out: Path, count: int, draws: int, channels: int = 32, **changes) -> np.ndarray:
    """What each of `count` images costs a model trained on the law beyond its true cost, in bits/dim.

    The luck of the draw is in both, and cancels.
    """
    network, settings = RECIPE["network"] | {"channels": channels}, RECIPE["train"] | changes
    recipe = parse(Recipe, RECIPE | {"network": network, "train": settings}, "test")
    data, test = law.source(8192, Key(1).fold("train data")), law.source(count, Key(2).fold("test data"))
    model = train(recipe, data, out, say=lambda text: None, show_progress=False)
    true = true_cost(law, test.images)
    assert true.mean() == pytest.approx(law.entropy_bits_per_dim(), abs=4 * true.std() / count**0.5)
    return nll.terms_of(model, test, nll.Nll(draws=draws, batch=256)).totals() - true


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("law, steps", LAWS)
def test_training_reaches_the_entropy_of_the_256_levels(law, steps, tmp_path):
    beyond = gap(law, tmp_path, 1024, 100, steps=steps)
    error = beyond.std() / len(beyond) ** 0.5
    assert error < 0.006
    assert -3 * error < beyond.mean() < 0.03, f"{beyond.mean():.4f} +- {error:.4f} bits/dim above the entropy"


@pytest.mark.slow
def test_a_short_training_comes_close_to_the_entropy_and_not_below(tmp_path):
    """Of a smaller law. One who knew all of it but the correlation of the pixels would be 0.37 bits/dim above."""
    law = Gaussian(shape=(1, 4, 4))
    alone = 0.5 * math.log2(2 * math.pi * math.e * (law.std**2 + LEVEL**2 / 12)) - math.log2(LEVEL)
    assert alone - law.entropy_bits_per_dim() == pytest.approx(0.37, abs=0.01)
    beyond = gap(law, tmp_path, 512, 40, channels=16, steps=200, warmup=20, lr=4e-3)
    error = beyond.std() / len(beyond) ** 0.5
    assert error < 0.02
    assert -3 * error < beyond.mean() < 0.2, f"{beyond.mean():.4f} +- {error:.4f} bits/dim above the entropy"
