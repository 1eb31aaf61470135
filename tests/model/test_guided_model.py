"""What leads a model where it draws: the formula at every door, and what cannot lead."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from undiffuse.codec.chain import refuse_computing
from undiffuse.codec.tables import fit as codec_fit
from undiffuse.data.source import ArraySource
from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.parameterisation import X0, Eps, Mu, Parameterisation
from undiffuse.diffusion.process import Cosine
from undiffuse.diffusion.reverse import FixedLarge
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.measure.along import x_0_along
from undiffuse.measure.flow import nll_ode
from undiffuse.measure.nll import nll
from undiffuse.measure.sets import said_of_drawing
from undiffuse.model.fit import fit
from undiffuse.model.load import load
from undiffuse.model.model import Model, to_uint8
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.base import NOTHING, Conditioning
from undiffuse.network.unet import UNet
from undiffuse.training.distill import distill
from undiffuse.view import explore

SAYS = (0.1, -0.3, 0.02)  # of class 0, of class 1, and without a class
SAYS_X_0 = X0()


class Tells(nn.Module):
    """x̂_0 is `scale` times a number of the class, everywhere."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.table = nn.Parameter(scale * torch.tensor(SAYS), requires_grad=False)

    def forward(self, x, time, cond=NOTHING):
        label = torch.full((len(x),), 2) if cond.label is None else cond.label
        return self.table[label.to(x.device)].reshape(-1, 1, 1, 1).expand_as(x)


def telling(
    scale: float = 1.0, unlabelled: bool = True, says: Parameterisation = SAYS_X_0, other="dog", counts=(5, 5)
) -> Model:
    names, network = ("cat", other), UNet(8, (1,), 1, ())
    config = ModelConfig((1, 8, 8), Cosine(20), says, FixedLarge(), network, classes=len(names))
    denoiser = Denoiser(Tells(scale), config.process, config.parameterisation, config.variance).eval()
    meta = {"classes": {"names": list(names), "counts": list(counts), "unlabelled": unlabelled}}
    return Model(config, denoiser, meta)


def plain_model(says: Parameterisation = SAYS_X_0) -> Model:
    config = ModelConfig((1, 8, 8), Cosine(20), says, FixedLarge(), UNet(8, (1,), 1, ()))
    return Model(config, Denoiser(Tells(), config.process, config.parameterisation, config.variance).eval(), {})


def grey(value: float) -> torch.Tensor:
    """An image of that alone."""
    return to_uint8(torch.full((1, 1, 8, 8), value))[0]


@pytest.mark.parametrize("scale", [0, 1, 2.0, 4.5])
@pytest.mark.parametrize("label, own", [("cat", SAYS[0]), (1, SAYS[1])])
def test_a_sample_is_led_away_from_the_answer_without_a_class(scale, label, own):
    led = telling().variant(guidance=scale)
    expected = grey(SAYS[2] + scale * (own - SAYS[2])).expand(3, 1, 8, 8)
    assert torch.equal(led.sample(3, 5, label=label), expected)
    assert torch.equal(led.sample(3, 5, "ancestral", label=label), expected)
    assert (led.guide is None) == (scale == 1)


def test_a_sample_is_led_away_from_what_a_worse_model_says_of_its_class():
    led = telling().variant(guidance=3, guide=telling(-0.5))
    found = led.sample(2, 5, label=[0, 1])
    for image, own in zip(found, SAYS, strict=False):
        assert torch.equal(image, grey(-0.5 * own + 3 * 1.5 * own))
    without = telling().variant(guidance=2, guide=plain_model())  # one that knows no classes
    assert torch.equal(without.sample(1, 5, label=0)[0], grey(2 * SAYS[0] - SAYS[2]))


def test_x_0_on_the_way_and_every_figure_are_led_too():
    led, value = telling().variant(guidance=2), grey(2 * SAYS[1] - SAYS[2])
    for images in (
        explore.progressive(led, 2, steps=4, slots=2, label="dog")[0],
        explore.shared(led, 2, at=(0.5,), steps=4, label="dog", solver="ancestral")[0],
        explore.interpolate(led, value, value, [0.5], [0.0, 1.0], steps=4, solver="ddim", label="dog"),
    ):
        assert bool((images == value).all())
    dog = Conditioning(torch.ones(1, dtype=torch.int64))
    assert bool((x_0_along(led, Key(0).rows(1), led.times(4), led.sampler("ddim"), [1], dog) == value).all())


def test_where_a_chain_begins_is_the_mean_of_what_is_led():
    led = telling().variant(guidance=3)
    assert float(led.mean(0).mean()) == pytest.approx(SAYS[2] + 3 * (SAYS[0] - SAYS[2]), abs=1e-6)
    assert float(telling().mean(0).mean()) == pytest.approx(SAYS[0], abs=1e-6)


def test_a_protocol_says_it_and_counts_both():
    model = telling()
    led = model.variant(guidance=2)
    times, solver = model.times(5, "karras-few"), model.sampler("unipc-2")
    said = said_of_drawing(led, times, solver, 0, "all")
    assert (said["guidance"], said["guide"], said["evaluations"]) == (2.0, "no class", 10)
    assert {**said, "evaluations": 5}.items() >= said_of_drawing(model, times, solver, 0, "all").items()
    by = said_of_drawing(model.variant(guidance=2, guide=telling(0.5)), times, solver, 0, "all")
    assert by["guide"] == telling(0.5).digest()[:12]
    said = led.walk(5).said
    assert "5 evaluations of unipc-2 on the karras-few grid (`undiffuse fit` finds a better one), each with one" in said


def test_a_variant_of_a_guided_model_stays_guided():
    led = telling().variant(guidance=2, guide=telling(0.5))
    half = led.variant(precision="bf16")
    assert half.guide is not None and half.guide.weak is not None and half.guide.scale == 2
    assert half.guide.weak.computing is half.denoiser.computing is not led.denoiser.computing
    assert led.variant(guidance=1).guide is None
    model = load("emoji-32")
    plain, same = model.sample(2, 4, label=0), model.variant(guidance=2.5, guide=model).sample(2, 4, label=0)
    assert torch.equal(plain, same)  # led away from itself


@pytest.mark.parametrize(
    "model, given, text",
    [
        (telling(), {"guidance": -1}, "guidance = -1 is not possible; give a number of 0 or more, of which 1 is no"),
        (telling(), {"guidance": math.nan}, "guidance = nan is not possible"),
        (telling(), {"guidance": True}, "guidance = True is not possible"),
        (telling(), {"guide": telling()}, "a guide says what to lead away from, and not how much; give guidance too"),
        (plain_model(), {"guidance": 2}, "this model was trained without labels; give a guide too"),
        (telling(unlabelled=False), {"guidance": 2}, r"never trained \(train.drop_label = 0\); give a guide too"),
        (telling(), {"guidance": 2, "guide": load("fashion-mnist")}, r"image of the guide is \(1, 28, 28\)"),
        (telling(), {"guidance": 2, "guide": telling(says=Eps())}, r"parameterisation of the guide is Eps"),
        (
            telling(),
            {"guidance": 2, "guide": telling(other="cow")},
            "other classes .0 cat, 1 cow.. This model",
        ),
        (plain_model(), {"guidance": 2, "guide": telling(unlabelled=False)}, "the guide wants a class, of which this"),
        (plain_model(Mu()), {"guidance": 2, "guide": plain_model(Mu())}, "this model predicts mu"),
    ],
)
def test_what_cannot_lead_is_refused(model, given, text):
    with pytest.raises(UsageError, match=text):
        model.variant(**given)


def test_a_distilled_model_neither_leads_nor_is_led():
    model = telling()
    distilled = replace(model, config=replace(model.config, bounds=(0.5, 80.0)))
    with pytest.raises(UsageError, match="guidance is not possible: this model is distilled to 2 steps"):
        distilled.variant(guidance=2)
    with pytest.raises(UsageError, match="guiding is not possible: this model is distilled to 2 steps"):
        model.variant(guidance=2, guide=distilled)


def test_a_class_is_needed_to_lead_towards():
    led = telling().variant(guidance=2)
    with pytest.raises(UsageError, match="guidance = 2 leads towards a class, and none is asked for; give a label"):
        led.sample(2, 5)
    assert telling().variant(guidance=2, guide=telling(0.5)).sample(2, 5).shape == (2, 1, 8, 8)


def test_one_is_no_guidance_for_any_model():
    """Which is what those say to give that refuse a guided one."""
    led = plain_model().variant(guidance=2, guide=plain_model())
    distilled = replace(telling(), config=replace(telling().config, bounds=(0.5, 80.0)))
    for model in (led, plain_model(Mu()), distilled, telling(unlabelled=False)):
        assert model.variant(guidance=1).guide is None


def test_another_scale_keeps_the_guide():
    led = telling().variant(guidance=2, guide=telling(0.5)).variant(guidance=np.float32(3))
    worth = 0.5 * SAYS[0] + 3 * (SAYS[0] - 0.5 * SAYS[0])
    assert torch.equal(led.sample(1, 5, label=0), to_uint8(torch.full((1, 1, 8, 8), worth)))


@pytest.mark.parametrize(
    "guide, label, text",
    [
        (telling(unlabelled=False), None, "the guide was never trained on images without a class, for which it is"),
        (telling(counts=(0, 5)), "cat", "the guide was never trained on cat, for which it is asked; give another"),
        (telling(counts=(0, 5)), "all", "the guide was never trained on cat, for which"),
    ],
)
def test_a_guide_is_asked_for_nothing_that_it_never_saw(guide, label, text):
    led = telling().variant(guidance=2, guide=guide)
    with pytest.raises(UsageError, match=text):
        led.sample(2, 5, label=label)
    assert led.sample(1, 5, label="dog").shape == (1, 1, 8, 8)


def test_what_is_measured_or_made_of_the_weights_is_of_the_model_alone(tmp_path):
    led, data = telling().variant(guidance=2), ArraySource(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    for what, call in (
        ("a codec", lambda: refuse_computing(led)),
        ("a codec", lambda: codec_fit(led, data.images)),
        ("a bound", lambda: nll(led, data)),
        ("the likelihood of its flow", lambda: nll_ode(led, data)),
        ("a grid", lambda: fit(led)),
        ("a guide", lambda: telling().variant(guidance=2, guide=led)),
        ("a distillation", lambda: distill(led, data, tmp_path / "out", 2)),
    ):
        with pytest.raises(UsageError, match=rf"{what} is of a model without guidance; give variant\(guidance=1\)"):
            call()
    assert not (tmp_path / "out").exists()
