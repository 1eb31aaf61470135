"""The whole pipeline against the truth: trained on data of known entropy, its bits/dim must come down to it."""

import math

import numpy as np
import pytest
import torch

from undiffuse.config import parse
from undiffuse.data.format.procedural import LEVEL, Gaussian, ImageMixture, Law, level_probabilities
from undiffuse.data.source import ArraySource
from undiffuse.key import Key
from undiffuse.measure import evaluate
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
        "save_every": 4000, "sample_every": 4000, "held_out": 0,
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


@pytest.mark.slow
@pytest.mark.parametrize("law, steps", LAWS)
def test_training_reaches_the_entropy_of_the_256_levels(law, steps, tmp_path):
    """The gap is that of each image to its true cost, so that the luck of the draw is in both and cancels."""
    recipe = parse(Recipe, RECIPE | {"train": RECIPE["train"] | {"steps": steps}}, "test")
    data, test = law.source(8192, Key(1).fold("train data")), law.source(1024, Key(2).fold("test data"))
    model = train(recipe, data, tmp_path, say=lambda text: None, show_progress=False)
    true = true_cost(law, test.images)
    assert true.mean() == pytest.approx(law.entropy_bits_per_dim(), abs=4 * true.std() / len(true) ** 0.5)
    gap = evaluate.nll(model, test, evaluate.Nll(draws=100, batch=256)).totals() - true
    error = gap.std() / len(gap) ** 0.5
    assert error < 0.006
    assert -3 * error < gap.mean() < 0.03, f"{gap.mean():.4f} +- {error:.4f} bits/dim above the entropy"
