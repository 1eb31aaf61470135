"""The whole pipeline against the truth: trained on data of known entropy, its bits/dim must come down to it."""

import pytest

from undiffuse import evaluate
from undiffuse.config import parse
from undiffuse.data.procedural import ImageMixture, PixelMixture
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
        "steps": 3000, "batch": 256, "lr": 2e-3, "warmup": 100, "decay": "cosine", "ema": 0.995, "ema_ramp": True,
        "save_every": 3000, "sample_every": 3000, "held_out": 0,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "law", [PixelMixture(shape=(1, 4, 4)), ImageMixture(shape=(1, 4, 4))], ids=["pixels", "images"]
)
def test_training_reaches_the_entropy_of_the_256_levels(tmp_path, law):
    data = law.source(16384, Key(1).fold("train data"))
    model = train(parse(Recipe, RECIPE, "test"), data, tmp_path, say=lambda text: None, show_progress=False)
    terms = evaluate.nll(model, law.source(4096, Key(2).fold("test data")), evaluate.Nll(draws=50, batch=1024))
    measured = terms.summary()
    assert measured["standard_error"] < 0.01
    assert measured["bits_per_dim"] == pytest.approx(law.entropy_bits_per_dim(), abs=0.03)
