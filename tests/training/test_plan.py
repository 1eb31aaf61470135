"""What a run will cost and which settings cannot work together, by numbers."""

import math
from dataclasses import replace

import pytest

from undiffuse.diffusion.objective import Trajectory
from undiffuse.model.recipe import TrainConfig, load_recipe
from undiffuse.training.plan import Budget, conflicts, first_weights_share, forward_flops, plan, shares


@pytest.mark.parametrize(
    "budget, last",
    [
        ({}, 100),
        ({"steps": 7}, 7),
        ({"steps": 700}, 700),  # more than the recipe says
        ({"images": 16}, 2),
        ({"images": 17}, 3),
        ({"images": 10**6}, 100),  # but images never lengthen it
        ({"steps": 9, "images": 24}, 3),
        ({"steps": 2, "images": 24}, 2),
    ],
)
def test_the_last_step_of_a_budget(budget, last):
    assert Budget(**budget).last_step(TrainConfig(steps=100, batch=8)) == last


@pytest.mark.parametrize(
    "fields, parts",
    [
        ({}, (12, 12)),
        ({"micro_batch": 5}, (12, 5)),
        ({"micro_batch": 40}, (12, 12)),
        ({"exact_shards": 3}, (12, 4)),
        ({"exact_shards": 3, "micro_batch": "auto"}, (12, 4)),
    ],
)
def test_how_a_batch_of_twelve_is_divided(fields, parts):
    assert shares(TrainConfig(batch=12, **fields)) == parts


def test_how_much_the_first_weights_count():
    """decay^n; with the ramp 1/10 · 2/11 · 3/12 … until (1 + n)/(10 + n) passes the decay."""
    assert first_weights_share(TrainConfig(ema=0.9), 3) == pytest.approx(0.729)
    ramp = TrainConfig(ema=0.9, ema_ramp=True)
    assert first_weights_share(ramp, 3) == pytest.approx(6 / 1320)
    passed = math.prod((1 + n) / (10 + n) for n in range(80))  # 81/90 = 0.9
    assert first_weights_share(ramp, 90) == pytest.approx(passed * 0.9**10)
    slow = TrainConfig(ema=0.9999, ema_ramp=True)
    expected = sum(math.log(min(0.9999, (1 + n) / (10 + n))) for n in range(1000)) + 2000 * math.log(0.9999)
    assert math.log(first_weights_share(slow, 3000)) == pytest.approx(expected)


CALM = {"ema": 0.5, "warmup": 0, "decay": "constant"}


@pytest.mark.parametrize(
    "fields, last, more, found",
    [
        ({}, 100, {}, None),
        ({"ema": 0.97}, 100, {}, None),  # 0.97^100 is 4.8 %
        ({"ema": 0.98}, 100, {}, "would still be 13% of the average at the end; set train.ema=0.954 or less"),
        ({"ema": 0.98}, 100, {"tuned": True}, None),
        ({"ema": 0.98}, 4, {}, None),
        ({"warmup": 99}, 100, {}, None),
        ({"warmup": 100}, 100, {}, "train.warmup = 100 is not over at the last step, 100, so"),
        ({"decay": "cosine"}, 100, {}, None),
        ({"patience": 0.5}, 100, {}, None),
        ({"patience": 0.5}, 100, {"held": False}, "train.patience = 0.5 ends nothing, because no images are held out"),
        ({"decay": "cosine"}, 100, {"minutes": 5}, "the learning rate falls until step 100, which --minutes may not"),
    ],
)
def test_settings_that_cannot_work_together(fields, last, more, found):
    texts = conflicts(TrainConfig(**{**CALM, **fields}), last, **more)
    assert texts == [] if found is None else len(texts) == 1 and found in texts[0]


def test_the_cost_of_a_run():
    """Three forwards for each image that is seen: one is the forward, and the backward counts as two."""
    recipe = load_recipe("digits", ["train.batch=12", "train.precision=float32"])
    config = recipe.model((1, 8, 8))
    flops = forward_flops(config)
    taught = replace(recipe, objective=Trajectory((1.0, 80.0), substeps=8))
    assert plan(taught, config, 5, 200, 100).endswith(f"the whole run {(2 * 3 + 16) * 1200 * flops:.2g} FLOP")
    text = plan(recipe, config, 5, images=200, last=100)
    assert text == (
        f"batch 12 = 1 process × 3 micro-batches of 5, float32; 100 steps see 1,200 images, 6 epochs. An image "
        f"forward is {flops / 1e9:.3g} GFLOP; the whole run {3 * 1200 * flops:.2g} FLOP"
    )


@pytest.mark.parametrize(
    "process, prediction, said",
    [("straight", "eps", True), ("jsd", "eps", True), ("straight", "v", False), ("linear", "eps", False)],
)
def test_a_model_that_could_never_be_sampled_is_told_before_step_0(process, prediction, said):
    chosen = load_recipe("digits", [f"process.name={process}", f"parameterisation.name={prediction}"])
    found = conflicts(chosen.train, 1000, config=chosen.model((1, 8, 8)))
    assert [text[:63] for text in found] == ["this model will never be sampled: eps says nothing about x_0 at"] * said
    assert all(text.endswith("; set parameterisation.name=v") for text in found)
