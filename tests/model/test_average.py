"""The averages of the weights against their closed forms, and any width rebuilt from snapshots of two."""

import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from undiffuse.errors import Corrupt, UsageError
from undiffuse.machine import tensorfile
from undiffuse.model.average import WIDEST, Ema, Profiles, exponent, fit, reconstruct, snapshots, width


def weights(*values: float) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((2, 3), value)) for value in values]


def move(parameters: list[nn.Parameter], *values: float) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.fill_(value)


def test_it_starts_as_a_copy_of_its_own():
    given = weights(1.0, -2.0)
    ema = Ema(given, 0.9)
    move(given, 7.0, 7.0)
    assert [shadow.unique().tolist() for shadow in ema.shadow] == [[1.0], [-2.0]]
    assert not any(shadow.requires_grad for shadow in ema.shadow)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_it_is_the_weighted_sum_of_all_that_was_seen(decay):
    """decay^n w_0 + (1 − decay) Σ decay^(n−k) w_k."""
    given, history = weights(1.0, -2.0), [(1.0, -2.0)]
    ema = Ema(given, decay)
    for step in range(20):
        history.append((float(step % 7), -3.0 + step))
        move(given, *history[-1])
        ema.update(given, step)
    for i, shadow in enumerate(ema.shadow):
        seen = [values[i] for values in history]
        rest = sum(decay ** (20 - k) * seen[k] for k in range(1, 21))
        expected = decay**20 * seen[0] + (1 - decay) * rest
        torch.testing.assert_close(shadow, torch.full((2, 3), expected), rtol=1e-6, atol=1e-6)


def test_the_first_weights_are_forgotten_at_the_decay_s_own_pace():
    """As in the authors' code there is no debiasing: 0.9999^5000 = 0.61 of the start is left after 5000 steps."""
    given = weights(1.0)
    ema = Ema(given, 0.9999)
    move(given, 0.0)
    for step in range(5000):
        ema.update(given, step)
    assert ema.shadow[0][0, 0].item() == pytest.approx(0.9999**5000, rel=1e-4)


def test_a_ramp_limits_the_decay():
    """(1 + n)/(10 + n) after n updates: 0.1, 2/11, 3/12, …, until the decay asked for."""
    given = weights(1.0)
    ema, expected = Ema(given, 0.5, ramp=True), 1.0
    move(given, 0.0)
    for step in range(30):
        ema.update(given, step)
        expected *= min(0.5, (1 + step) / (10 + step))
        assert ema.shadow[0][0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_the_weights_stay_as_they_are():
    given = weights(3.0)
    Ema(given, 0.5).update(given, 0)
    assert given[0].requires_grad and given[0].grad is None and given[0].unique().tolist() == [3.0]


WIDTHS = (0.05, 0.10)
STEPS, EVERY = 400, 40


def shares(sigma_rel: float, n: int) -> np.ndarray:
    """How much the weights after each of n updates count, by multiplying the betas out."""
    power, counted = exponent(sigma_rel) + 1, np.zeros(n)
    for t in range(1, n + 1):
        beta = (1 - 1 / t) ** power
        counted[:t] *= beta
        counted[t - 1] += 1 - beta
    return counted


@pytest.mark.parametrize("sigma_rel, gamma", [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_that_the_paper_prints(sigma_rel, gamma):
    assert exponent(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [1e-3, 0.01, 0.05, 0.1, 0.2, 0.28, WIDEST])
def test_exponent_and_width_are_inverse_and_mean_what_they_say(sigma_rel):
    gamma = exponent(sigma_rel)
    assert width(gamma) == pytest.approx(sigma_rel, rel=1e-9)
    tau = (np.arange(10**6) + 0.5) / 10**6
    p = tau**gamma / (tau**gamma).sum()
    assert np.sqrt(p @ tau**2 - (p @ tau) ** 2) == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, float("nan")])
def test_a_width_that_no_profile_has_is_refused(sigma_rel):
    with pytest.raises(UsageError, match=r"sigma_rel = .* is not possible; give more than 0, at most 0.2887"):
        exponent(sigma_rel)


def test_a_profile_is_the_weighted_sum_of_what_it_saw():
    """Each step counts by the integral of τ^gamma over it; what was there before the first step does not count."""
    given, history = weights(1e4), np.random.default_rng(0).normal(size=50)
    profiles = Profiles(given, (0.05, 0.1, WIDEST))
    for step, value in enumerate(history):
        move(given, float(value))
        profiles.update(given, step)
    for sigma_rel, (shadow,) in profiles.shadows.items():
        edges = (np.arange(51) / 50) ** (exponent(sigma_rel) + 1)
        assert np.allclose(np.diff(edges), shares(sigma_rel, 50), rtol=1e-9, atol=1e-15)
        assert shadow.unique().numpy() == pytest.approx(np.diff(edges) @ history, rel=1e-5)
    assert float(profiles.shadows[WIDEST][0][0, 0]) == pytest.approx(history.mean(), rel=1e-5)


def test_the_fit_is_that_of_the_profiles_drawn_point_by_point():
    stored, wanted, n = [(step, s) for step in (250, 500, 1000) for s in WIDTHS], (900, 0.07), 200_000

    def drawn(step, sigma_rel):
        tau, gamma = (np.arange(n) + 0.5) / n * 1000, exponent(sigma_rel)
        return np.where(tau < step, (gamma + 1) / step * (np.minimum(tau, step) / step) ** gamma, 0.0)

    target, basis = drawn(*wanted), np.stack([drawn(*each) for each in stored], 1)
    expected = np.linalg.lstsq(basis, target, rcond=None)[0]
    found = fit(stored, *wanted)
    assert found.shares.dtype == torch.float64
    assert found.shares.numpy() == pytest.approx(expected, rel=1e-3)
    missed = np.linalg.norm(basis @ expected - target) / np.linalg.norm(target)
    assert missed > 0.1  # the end at 900 is no snapshot's: this fit is rough, and says so
    assert found.error == pytest.approx(missed, rel=1e-3)


@pytest.mark.parametrize("number", [2, 20, 400])
def test_a_stored_profile_is_rebuilt_from_itself_alone(number):
    stored = [(step, s) for step in range(1000, 1000 * number + 1, 1000) for s in WIDTHS]
    found = fit(stored, 1000 * number, 0.1)
    expected = torch.zeros(2 * number, dtype=torch.float64)
    expected[-1] = 1
    assert torch.allclose(found.shares, expected, atol=1e-6) and found.error < 1e-6


def test_more_snapshots_fit_better():
    errors = [fit([(i, s) for i in range(1, n + 1) for s in WIDTHS], n, 0.15).error for n in (2, 4, 8, 16, 32)]
    assert all(more < less for less, more in pairwise(errors)) and errors[-1] < 3e-3


def test_the_errors_that_concepts_prints():
    text = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text("utf-8")
    numbers = [int(n) for n in re.findall(r"n = (\d+) \|", text)]
    rows = re.findall(r"^\| sigma_rel = ([\d.]+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 5 and len(numbers) == 3
    for sigma_rel, printed in rows:
        errors = [fit([(i, s) for i in range(1, n + 1) for s in WIDTHS], n, float(sigma_rel)).error for n in numbers]
        assert printed == " | ".join(f"{error:.1g}" for error in errors)


@pytest.fixture(scope="module")
def trajectory() -> np.ndarray:
    """Weights that drift, oscillate and settle: [steps, 6]."""
    tau = np.arange(1, STEPS + 1)[:, None] / STEPS
    return np.hstack([tau, tau**2, np.sin(9 * tau), np.exp(-5 * tau), np.cos(20 * tau), 1 / (1 + 10 * tau)]) - 0.3


@pytest.fixture(scope="module")
def run(tmp_path_factory, trajectory):
    """Its snapshots, as a run leaves them."""
    given, run = [nn.Parameter(torch.zeros(2, 3))], tmp_path_factory.mktemp("runs") / "run"
    profiles = Profiles(given, WIDTHS)
    for step, row in enumerate(trajectory):
        with torch.no_grad():
            given[0].copy_(torch.from_numpy(row.reshape(2, 3)))
        profiles.update(given, step)
        if (step + 1) % EVERY == 0:
            profiles.snapshot(run, step + 1, ["w"], {"step": step + 1, "images": 8 * (step + 1), "model": {}})
    return run


def rebuilt(run, sigma_rel, step=None) -> np.ndarray:
    return reconstruct(snapshots(run), sigma_rel, step)[0]["w"].numpy().flatten()


def test_snapshots_lie_beside_the_checkpoints_in_half_precision(run):
    listed = snapshots(run)
    assert [(each.step, each.sigma_rel) for each in listed] == [(t, s) for t in range(40, 401, 40) for s in WIDTHS]
    assert listed[-1].path == run / "ema" / "step-000000400-0.1.safetensors"
    tensors, meta = listed[-1].read()
    assert tensors["w"].dtype == torch.float16 and meta["average"] == {"sigma_rel": 0.1, "step": 400}


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_inside_the_span_it_is_exact_but_for_half_precision(run, trajectory, sigma_rel):
    for step in (200, 400):
        expected = shares(sigma_rel, step) @ trajectory[:step]
        assert rebuilt(run, sigma_rel, step) == pytest.approx(expected, rel=2**-11, abs=2**-24)


@pytest.mark.parametrize("sigma_rel", [0.07, 0.08, 0.12, 0.15])
def test_a_width_that_was_never_tracked(run, trajectory, sigma_rel):
    """Within half precision and what the fit says that it misses; the nearest stored profile is far from it."""
    expected = shares(sigma_rel, STEPS) @ trajectory
    tensors, meta = reconstruct(snapshots(run), sigma_rel)
    error = np.abs(tensors["w"].numpy().flatten() - expected)
    norm = np.linalg.norm(shares(sigma_rel, STEPS)) * np.linalg.norm(trajectory, axis=0)
    assert (error <= meta["average"]["error"] * norm + 1e-3).all() and error.max() < 4e-3
    nearest = min(WIDTHS, key=lambda each: abs(each - sigma_rel))
    assert np.abs(rebuilt(run, nearest) - expected).max() > 8 * error.max()
    assert meta["step"] == 400 and meta["images"] == 3200 and meta["average"]["snapshots"] == 20


def test_a_step_between_two_snapshots(run, trajectory):
    expected = shares(0.1, 310) @ trajectory[:310]
    tensors, meta = reconstruct(snapshots(run), 0.1, 310)
    assert tensors["w"].numpy().flatten() == pytest.approx(expected, abs=0.03)
    assert (meta["step"], meta["images"]) == (310, 2480) and meta["average"]["error"] > 0.1


def test_wrong_snapshots_do_not_pass_for_right_ones(run, trajectory, tmp_path):
    """The comparison above can fail: one snapshot off by a step's worth of drift is seen in the result."""
    shutil.copytree(run, tmp_path / "run")
    at = next(each for each in snapshots(tmp_path / "run") if (each.step, each.sigma_rel) == (400, 0.05))
    tensors, meta = at.read()
    tensorfile.write_weights(at.path, {"w": tensors["w"] + 0.05}, meta)
    expected = shares(0.07, STEPS) @ trajectory
    assert np.abs(rebuilt(tmp_path / "run", 0.07) - expected).min() > 4e-3


def test_a_renamed_or_damaged_snapshot_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    first, *_, last = snapshots(tmp_path / "run")
    kept = last.path.read_bytes()
    shutil.copy(first.path, last.path)
    with pytest.raises(Corrupt, match=r"000400-0.1.safetensors holds .*'step': 40}, not what its name says"):
        rebuilt(tmp_path / "run", 0.1)
    last.path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(Corrupt, match=r"000400-0.1.safetensors is damaged: its sha256"):
        rebuilt(tmp_path / "run", 0.1)
    last.path.unlink()  # without it the fit is worse, and says so
    assert 0.1 < reconstruct(snapshots(tmp_path / "run"), 0.1, 400)[1]["average"]["error"] < 0.3


def test_a_snapshot_of_another_model_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    last = snapshots(tmp_path / "run")[-1]
    tensors, meta = last.read()
    tensorfile.write_weights(last.path, tensors, {**meta, "model": {"image": [1, 2, 3]}})
    with pytest.raises(Corrupt, match=r"000400-0.1.safetensors is of another model than those before it; move it away"):
        rebuilt(tmp_path / "run", 0.08)


def test_what_cannot_be_rebuilt_is_refused(run, tmp_path):
    with pytest.raises(UsageError, match=r"no EMA snapshots; train with --set 'train.ema_profiles=\[0.05,0.1\]'"):
        reconstruct(snapshots(tmp_path), 0.1)
    for step in (39, 401):
        with pytest.raises(UsageError, match=f"step {step} is outside the EMA snapshots; give 40 to 400"):
            rebuilt(run, 0.1, step)
