"""The ODE's likelihood with a folder: what is kept is what was asked for, and what else is asked is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import undiffuse
from undiffuse.data.source import ArraySource
from undiffuse.diffusion.flow import Solver, flow_bits
from undiffuse.diffusion.parameterisation import V
from undiffuse.diffusion.process import Cosine
from undiffuse.diffusion.reverse import FixedLarge
from undiffuse.errors import Corrupt, NotFiniteError, UsageError
from undiffuse.key import Key
from undiffuse.measure import nll
from undiffuse.measure.flow import Ode, summary, terms_of
from undiffuse.model.model import Model, to_float
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.unet import UNet

LOOSE = Solver(1e-2)


@pytest.fixture(scope="module")
def toy() -> Model:
    """A narrow network that says something else of each image, far outside [-1, 1] at times."""
    config = ModelConfig((1, 8, 8), Cosine(), V(), FixedLarge(), UNet(8, (1, 1), 1, ()))
    torch.manual_seed(0)
    denoiser = config.build(clip=True).eval().requires_grad_(False)
    for weight in denoiser.network.parameters():
        weight.copy_(0.05 * torch.randn_like(weight) + weight)
    return Model(config, denoiser, {"step": 5})


@pytest.fixture(scope="module")
def source() -> ArraySource:
    generator = torch.Generator().manual_seed(0)
    return ArraySource(torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=generator))


def test_the_images_are_measured_without_clipping_each_with_noise_of_its_own(toy, source):
    terms = terms_of(toy, source, Ode(3, LOOSE, seed=4, batch=3))
    rows = torch.arange(3)
    keys, x_0 = Key(4).fold("nll", "ode").rows(rows), to_float(source.images[:3])
    expected = flow_bits(toy.variant(clip=False).denoiser, x_0, keys, LOOSE)
    assert terms.bits == pytest.approx(expected.bits, abs=1e-6)
    same = ArraySource(source.images[:1].expand(3, -1, -1, -1).contiguous())
    assert len(set(terms_of(toy, same, Ode(solver=LOOSE)).bits.round(3))) == 3


def test_a_stopped_measurement_goes_on_and_the_folder_says_what_it_holds(toy, source, tmp_path):
    counted: list[int] = []
    first = terms_of(toy, source, Ode(2, LOOSE, batch=2), tmp_path)
    stamp = (tmp_path / "part-00000000.npz").stat().st_mtime_ns
    query = Ode(solver=LOOSE, batch=2)
    terms = terms_of(toy, source, query, tmp_path, counted.append)
    assert counted == [2, 2, 1] and np.array_equal(terms.bits[:2], first.bits)
    assert (tmp_path / "part-00000000.npz").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "part-00000000.npz", "part-00000002.npz", "part-00000004.npz", "query.json", "summary.json", "terms.npz",
    ]  # fmt: skip
    kept = json.loads((tmp_path / "summary.json").read_text())
    assert kept == {"format": 1, "model": 5} | summary(terms, toy, source, query)
    assert kept["images"] == 5 and kept["tolerance"] == 0.01 and kept["probes"] == 1 and kept["evaluations"] > 10
    (tmp_path / "part-00000002.npz").write_bytes(b"")
    with pytest.raises(Corrupt, match=r"part-00000002.npz is damaged; delete it, and the same command measures"):
        terms_of(toy, source, query, tmp_path)


@pytest.mark.parametrize(
    "other, what",
    [
        (Ode(2, Solver(1e-3)), "ode"),
        (Ode(2, Solver(1e-2, 2)), "ode"),
        (Ode(2, LOOSE, seed=1), "seed"),
        (Ode(2, LOOSE, batch=9), "batch"),
    ],
)
def test_another_question_in_the_same_folder_is_refused(toy, source, tmp_path, other, what):
    terms_of(toy, source, Ode(2, LOOSE), tmp_path)
    with pytest.raises(UsageError, match=rf"holds another measurement \(other {what}\); give the same settings"):
        terms_of(toy, source, other, tmp_path)
    with pytest.raises(UsageError, match="holds another measurement"):
        nll.terms_of(toy, source, nll.Nll(2, draws=1), tmp_path)
    nll.terms_of(toy, source, nll.Nll(2, draws=1), tmp_path / "bound")
    with pytest.raises(UsageError, match=r"holds another measurement \(other ode\)"):
        terms_of(toy, source, Ode(2, LOOSE), tmp_path / "bound")


def test_python_asks_what_it_is_asked(toy, source):
    expected = summary(terms_of(toy, source, query := Ode(2, Solver(1e-2, 2), 4)), toy, source, query)
    found = undiffuse.nll_ode(toy, source, images=2, tolerance=1e-2, probes=np.int32(2), seed=4)
    assert found == pytest.approx(expected) and found["probes"] == 2
    with pytest.raises(UsageError, match="images = 0 is not possible; give 1 or more"):
        undiffuse.nll_ode(toy, source, images=0)


def test_weights_that_fail_leave_nothing(toy, source, tmp_path):
    config = toy.config
    broken = replace(toy, denoiser=config.build(clip=True).eval().requires_grad_(False))
    next(broken.denoiser.network.parameters()).fill_(math.nan)
    with pytest.raises(NotFiniteError, match="is not finite, so there is no number to give: the weights are at fault"):
        terms_of(broken, source, Ode(2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
