"""Solvers of many steps beside diffusers, from the same noise at the same times; and the formula that is ours."""

import diffusers
import pytest
import torch

from undiffuse.diffusion.denoiser import Denoiser
from undiffuse.diffusion.parameterisation import Eps
from undiffuse.diffusion.process import ContinuousCosine, Cosine, Linear, Straight, TableProcess
from undiffuse.diffusion.reverse import FixedLarge
from undiffuse.diffusion.sampler.base import Sampler, sample
from undiffuse.diffusion.sampler.ddim import DDIM
from undiffuse.diffusion.sampler.deis import BASHFORTH, Deis, Ipndm
from undiffuse.diffusion.sampler.dpmpp import Dpmpp, DpmppSde
from undiffuse.diffusion.sampler.multistep import Chain, integrals, lagrange
from undiffuse.diffusion.sampler.unipc import Unipc
from undiffuse.key import Key

pytestmark = pytest.mark.filterwarnings("ignore:__array_")  # of diffusers with numpy 2

F64, T = torch.float64, 1000
PROCESS = Linear(T)
DPM, UNI, DEIS = (
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.DEISMultistepScheduler,
)


class Curved(torch.nn.Module):
    """ε̂ far from a straight line, so that each order has another answer."""

    def forward(self, x, time, cond=None):
        return torch.sin(1.3 * x) + 0.1 * x + 0.1


def both(
    ours: Sampler, cls: type, n: int, last: int | None, process: TableProcess = PROCESS, **fields: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends of the two chains: at t = 0, or at index `last` of the table."""
    end = {} if cls is DEIS else {"final_sigmas_type": "zero" if last is None else "sigma_min"}
    betas = process.betas().numpy()
    theirs = cls(T, trained_betas=betas, timestep_spacing="trailing", lower_order_final=last is None, **end, **fields)
    alpha_bar = torch.cumprod(1 - process.betas(), 0)
    theirs.set_timesteps(n)
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    final = torch.zeros(1, dtype=F64) if last is None else sigma[last : last + 1]
    theirs.sigmas = torch.cat([sigma[theirs.timesteps.long()], final])  # float64, as ours
    keys = Key(0).rows(4)
    x = start = keys.normal(1, 2, 2).double()
    for i in theirs.timesteps:
        x = theirs.step(Curved()(x, i), i, x, return_dict=False)[0]
    end_time = torch.tensor([0.0 if last is None else (last + 1) / T], dtype=F64)
    times = torch.cat([(theirs.timesteps.double() + 1) / T, end_time])
    denoiser = Denoiser(Curved(), process, Eps(), FixedLarge(), clip=False)
    return sample(ours, denoiser, process, keys, (1, 2, 2), times, start=start), x


@pytest.mark.parametrize(
    "ours, cls, fields, digits",
    [
        (Dpmpp(1), DPM, {"solver_order": 1}, 1e-6),  # their x is float32 in part
        (Dpmpp(2), DPM, {"solver_order": 2}, 1e-6),
        (Unipc(1), UNI, {"solver_order": 1}, 1e-12),
        (Unipc(2), UNI, {"solver_order": 2}, 1e-12),
        (Unipc(3), UNI, {"solver_order": 3}, 1e-12),
        (Unipc(2, "bh1"), UNI, {"solver_order": 2, "solver_type": "bh1"}, 1e-12),
        (Unipc(3, "bh1"), UNI, {"solver_order": 3, "solver_type": "bh1"}, 1e-12),
        (Deis(1), DEIS, {"solver_order": 1}, 1e-12),
        (Deis(2), DEIS, {"solver_order": 2}, 1e-12),
        (Deis(3), DEIS, {"solver_order": 3}, 1e-12),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [20, 33])
def test_the_chain_is_that_of_diffusers(ours, cls, fields, digits, n):
    one, other = both(ours, cls, n, last=0, **fields)
    assert (one - other).abs().max() < digits * other.abs().max()


@pytest.mark.parametrize(
    "ours, cls, order, digits",
    [(Dpmpp(2), DPM, 2, 1e-6), (Unipc(2), UNI, 2, 1e-12), (Unipc(3), UNI, 3, 1e-12)],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2, 5, 14])
def test_the_order_falls_towards_0_as_theirs_does(ours, cls, order, digits, n):
    one, other = both(ours, cls, n, last=None, solver_order=order)
    assert (one - other).abs().max() < digits * other.abs().max()


@pytest.mark.parametrize(
    "ours, cls, order, digits",
    [(Dpmpp(2), DPM, 2, 1e-6), (Unipc(1), UNI, 1, 1e-12), (Unipc(2), UNI, 2, 1e-12), (Unipc(3), UNI, 3, 1e-12)],
    ids=str,
)
@pytest.mark.parametrize("n", [2, 5, 10])
def test_a_chain_from_pure_noise_is_theirs(ours, cls, order, digits, n):
    """sigma/alpha is 20,000 where the cosine table ends: the step from there is corrected, and its answer used."""
    one, other = both(ours, cls, n, None, Cosine(T), solver_order=order)
    assert (one - other).abs().max() < digits * other.abs().max()


def test_bh1_does_not_correct_a_step_by_more_than_the_whole_answer():
    """h is 9 from the end of the cosine table: half of that would be 4.5 times x̂_0."""
    process, chain = Cosine(T), torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=F64)
    at, to = chain[:-1], chain[1:]
    corrects = {variant: Unipc(2, variant).coefficients(process, at, to).corrects for variant in ("bh1", "bh2")}
    assert corrects["bh2"].flatten().tolist() == [False, True, True]
    assert corrects["bh1"].flatten().tolist() == [False, False, True]


def test_an_answer_at_no_data_at_all_tells_no_slope():
    """alpha(1) is 0, or a rounding of it, and the step from there as good as infinite: it is DDIM's for all."""
    at, to = (torch.tensor(each, dtype=F64) for each in ([1.0, 0.6], [0.6, 0.3]))
    for process in (Straight(), ContinuousCosine()):
        assert Chain.of(process, at, to).known.tolist() == [1, 1]
        assert not Unipc(3).coefficients(process, at, to).corrects.any()
        for solver in (Dpmpp(2), Deis(3), Unipc(3)):  # the second field is the weight of x̂_0
            of_x_0 = solver.coefficients(process, at, to)[1][:, 0]
            torch.testing.assert_close(of_x_0, DDIM().coefficients(process, at, to).on_x_0, rtol=1e-12, atol=1e-15)


def test_the_third_order_is_not_that_of_diffusers_which_has_half_of_a_term():
    """With the whole of the second difference theirs is ours (docs/concepts.md)."""
    one, other = both(Dpmpp(3), DPM, 20, last=0, solver_order=3)
    assert (one - other).abs().max() > 0.01 * other.abs().max()
    nodes = torch.tensor([0.2, -0.5, -1.0], dtype=F64)
    first, last = nodes[0], torch.tensor(0.9, dtype=F64)
    h = last - first
    r_0, r_1 = (nodes[0] - nodes[1]) / h, (nodes[1] - nodes[2]) / h
    phi_1, phi_2, phi_3 = 1 - torch.exp(-h), (torch.exp(-h) - 1) / h + 1, (torch.exp(-h) - 1 + h) / h**2 - 0.5
    m = torch.tensor([0.3, -1.0, 2.0], dtype=F64)
    d_0, d_1 = (m[0] - m[1]) / r_0, (m[1] - m[2]) / r_1
    slope, bend = d_0 + r_0 / (r_0 + r_1) * (d_0 - d_1), (d_0 - d_1) / (r_0 + r_1)
    assert float((integrals(nodes, first, last, 1) * m).sum()) == pytest.approx(
        float(phi_1 * m[0] + phi_2 * slope - 2 * phi_3 * bend), rel=1e-12
    )


@pytest.mark.parametrize("rate", [1, -1])
@pytest.mark.parametrize("h", [1e-6, 0.3, 5.0, 30.0])
def test_integrals_are_those_of_polynomials(h, rate):
    """Σ_k p(λ_k) ∫ e^(rate (λ − b)) ℓ_k dλ is the integral of p: of 1 and of λ, in closed form."""
    a, b = torch.tensor(-0.7, dtype=F64), torch.tensor(-0.7 + h, dtype=F64)
    nodes = torch.stack([a, a - 0.4 * h, a - 1.5 * h])
    found, step = integrals(nodes, a, b, rate), float(b - a)
    whole = -torch.expm1(torch.tensor(-rate * step, dtype=F64)) / rate
    assert float(found.sum()) == pytest.approx(float(whole), rel=1e-12)
    # ∫ e^(rate (λ − b)) (λ − a) dλ = (h − whole)/rate, by parts
    exact = (step - float(whole)) / rate
    assert float((found * (nodes - a)).sum()) == pytest.approx(exact, rel=1e-9 if h > 1e-3 else 1e-4)
    assert torch.equal(lagrange(nodes, nodes), torch.eye(3, dtype=F64))


def test_adams_bashforth_is_exact_for_polynomials_on_even_steps():
    """What iPNDM takes for ε̂: of order k it integrates a polynomial of degree k − 1 over the next step."""
    for weights in BASHFORTH:
        at = -torch.arange(len(weights), dtype=F64)
        for degree in range(len(weights)):
            assert float((torch.tensor(weights, dtype=F64) * at**degree).sum()) == pytest.approx(1 / (degree + 1))


def test_the_first_step_with_noise_is_the_ancestral_one():
    keys, start = Key(1).rows(3), Key(2).rows(3).normal(1, 2, 2).double()
    times = torch.tensor([0.8, 0.6], dtype=F64)
    denoiser = Denoiser(Curved(), PROCESS, Eps(), FixedLarge(), clip=False)
    ours = sample(DpmppSde(), denoiser, PROCESS, keys, (1, 2, 2), times, start=start)
    b, c = PROCESS.posterior_coefficients(times[0], times[1])
    x_0 = denoiser(start, times[:1].expand(3)).x_0
    noise = keys.fold("step", 1).normal(1, 2, 2)
    expected = b * start + c * x_0 + PROCESS.small_variance(times[0], times[1]).sqrt() * noise
    torch.testing.assert_close(ours, expected.double(), rtol=1e-6, atol=1e-6)


def test_ipndm_is_adams_bashforth_in_sigma():
    """In σ/α with even steps, beside Euler steps for the first three."""
    sigma = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], dtype=F64)
    times = PROCESS.time(-2 * sigma.log())
    denoiser = Denoiser(Curved(), PROCESS, Eps(), FixedLarge(), clip=False)
    start = Key(3).rows(2).normal(1, 5, 1).double()
    ours = sample(Ipndm(), denoiser, PROCESS, Key(0).rows(2), (1, 5, 1), times, start=start)
    x, seen = start / PROCESS.alpha(times[:1]), []
    for i in range(5):
        t = times[i : i + 1].expand(2)
        at = x * PROCESS.alpha(times[i])
        seen.insert(0, (at - PROCESS.alpha(times[i]) * denoiser(at, t).x_0) / PROCESS.sigma(times[i]))
        weights = {1: (1,), 2: (1.5, -0.5), 3: (23 / 12, -16 / 12, 5 / 12)}.get(
            len(seen), (55 / 24, -59 / 24, 37 / 24, -9 / 24)
        )
        x = x + (sigma[i + 1] - sigma[i]) * sum(w * e for w, e in zip(weights, seen, strict=False))
    torch.testing.assert_close(ours, x * PROCESS.alpha(times[-1]), rtol=1e-9, atol=1e-9)
