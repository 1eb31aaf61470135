"""The whole pipeline against the truth: trained on data of known entropy, its bits/dim must come down to it."""

import pytest

from undiffuse import evaluate
from undiffuse.config import parse
from undiffuse.data.procedural import PixelMixture
from undiffuse.key import Key
from undiffuse.recipe import Recipe
from undiffuse.train import train

RECIPE = {
    "process": {"name": "cosine"},
    "parameterisation": {"name": "v"},
    "variance": {"name": "learned-range"},
    "network": {"name": "unet", "channels": 32, "multipliers": [1], "blocks": 1, "attention": []},
    "objective": {"name": "hybrid"},
    "train": {
        "steps": 4000, "batch": 256, "lr": 2e-3, "warmup": 100, "decay": "cosine", "ema": 0.995, "ema_ramp": True,
        "save_every": 4000, "sample_every": 4000, "held_out": 0,
    },
}  # fmt: skip


@pytest.mark.slow
def test_training_reaches_the_entropy_of_the_256_levels(tmp_path):
    law = PixelMixture(shape=(1, 4, 4))
    data = law.source(16384, Key(1).fold("train data"))
    model = train(parse(Recipe, RECIPE, "test"), data, tmp_path, say=lambda text: None, show_progress=False)
    test = law.source(2048, Key(2).fold("test data"))
    terms = evaluate.nll(model, test, evaluate.Nll(draws=100, batch=1024))
    # What each test image truly costs, so that the luck of the draw is in both and cancels in the difference.
    true = -law.probabilities().log2()[test.images.long()].flatten(1).mean(1).numpy()
    assert true.mean() == pytest.approx(law.entropy_bits_per_dim(), abs=4 * true.std() / 2048**0.5)
    gap = terms.totals() - true
    error = gap.std() / 2048**0.5
    assert error < 0.01
    assert -3 * error < gap.mean() < 0.03, f"{gap.mean():.4f} +- {error:.4f} bits/dim above the entropy"
