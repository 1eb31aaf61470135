"""The declared order of every sampler: on Gaussian data all that a chain does is linear, and its law is exact."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

from tests.contract.test_sampler import CASES, F64, MANY, SMOOTH, exact, law, logsnr_grid, truth
from undiffuse.diffusion.process import PROCESSES, Process, Straight
from undiffuse.diffusion.sampler.base import Sampler, sample
from undiffuse.diffusion.sampler.ddim import DDIM
from undiffuse.diffusion.sampler.heun import Heun
from undiffuse.key import Key, Keys


@dataclass(frozen=True, eq=False)
class Impulses(Keys):
    """n + 2 rows for n steps: 0 and 1 see no noise, row 1 + k sees 1 in the step with which k steps are left."""

    left: int = 0

    def fold(self, *names: str | int) -> "Impulses":
        return replace(self, left=int(names[-1]))

    def normal(self, *shape: int) -> torch.Tensor:
        return (self.rows == 1 + self.left).to(F64).reshape(-1, *(1,) * len(shape)).expand(-1, *shape)


def law_of_chain(
    sampler: Sampler, process: Process, times: torch.Tensor, mean: float, std: float
) -> tuple[float, float]:
    """The exact mean and standard deviation at the end, for any sampler: on Gaussian data all it does is linear."""
    keys = Impulses(Key(0), torch.arange(len(times) + 1), torch.device("cpu"))
    start = torch.zeros(len(keys.rows), 1, dtype=F64)
    start[1] = 1
    ends = sample(sampler, exact(process), process, keys, (1,), times, None, start)[:, 0]
    moved = ends[1:] - ends[0]
    return float(ends[0] + moved[0] * mean), float(torch.cat([moved[:1] * std, moved[1:]]).norm())


def grid_of(count: int, even: bool) -> torch.Tensor:
    """Log-SNRs from −4 to 4 in equal or in short and long steps, after two so short that their order does not count.

    The second is 40 times the first, so that none is so short beside the next that it is not used.
    """
    lengths = torch.ones(count, dtype=F64) if even else torch.tensor([0.5, 1.5], dtype=F64).repeat(count // 2)
    grid = -4 + 8 * torch.cat([torch.zeros(1, dtype=F64), lengths.cumsum(0)]) / lengths.sum()
    short = (8 / count) ** 3
    return torch.cat([grid[:1] - 41 * short, grid[:1] - 40 * short, grid])


@pytest.mark.parametrize("even", [True, False], ids=["smooth", "uneven"])
@pytest.mark.parametrize("process", ["edm", "vdm"])
@pytest.mark.parametrize("case", ["heun churn", *MANY])
def test_a_solver_of_many_steps_converges_as_it_says(case, process, even):
    sampler, process, error = CASES[case], PROCESSES.classes[process](), []
    for count in (160, 320):
        times = process.time(grid_of(count, even))
        (mean, std), (mean_end, std_end) = truth(process, times[0]), truth(process, times[-1])
        mean, std = law_of_chain(sampler, process, times, float(mean), float(std))
        assert mean == pytest.approx(float(mean_end), rel=1e-9)
        error.append(abs(std / float(std_end) - 1))
    measured = math.log2(error[0] / error[1])
    assert measured == pytest.approx(sampler.converges()[0 if even else 1], abs=0.25), error


def random_grid(count: int, seed: int) -> torch.Tensor:
    """The same in steps of ½ to 1½ of their mean, each drawn by itself, after two short ones.

    A first step of order 1 and length h² errs by h⁴, a second of order 2 and length h^1.5 by h^4.5.
    """
    lengths = 0.5 + torch.rand(count, dtype=F64, generator=torch.Generator().manual_seed(seed))
    grid, h = -4 + 8 * torch.cat([torch.zeros(1, dtype=F64), lengths.cumsum(0)]) / lengths.sum(), 8 / count
    return torch.cat([grid[:1] - h**2 - h**1.5, grid[:1] - h**1.5, grid])


@pytest.mark.parametrize("case", ["heun churn", "heun", "ddim", *MANY])
def test_a_solver_has_the_order_that_it_declares_on_random_grids(case):
    """By the root mean square over eight grids: on single ones errors of either sign may cancel."""
    sampler, process, counts, error = CASES[case], PROCESSES.classes["edm"](), (60, 240), []
    for count in counts:
        found = []
        for seed in range(8):
            times = process.time(random_grid(count, seed))
            (mean, std), (_, end) = truth(process, times[0]), truth(process, times[-1])
            found.append(law_of_chain(sampler, process, times, float(mean), float(std))[1] / float(end) - 1)
        error.append(math.hypot(*found))
    slope = math.log2(error[0] / error[1]) / 2
    smooth, declared = sampler.converges()
    assert slope > declared - 0.4, error
    if declared < smooth:  # it is lost, and not only unlucky
        assert slope < declared + 0.4, error


# --- samplers whose steps know of no other ---


def errors(sampler: Sampler, process: Process, grids: list[torch.Tensor]) -> list[float]:
    """How far the standard deviation at the end of each grid is from the truth, started from the truth."""
    found = []
    for times in grids:
        (mean, std), (mean_end, std_end) = truth(process, times[0]), truth(process, times[-1])
        mean, std = law(sampler, process, times, float(mean), float(std))
        assert mean == pytest.approx(float(mean_end), rel=1e-9)
        found.append(abs(std / float(std_end) - 1))
    return found


@pytest.mark.parametrize("grid", ["uniform in t", "uniform in logsnr"])
@pytest.mark.parametrize("process", sorted(SMOOTH))
@pytest.mark.parametrize("case", ["ancestral", "ancestral small", "ddim", "heun"])
def test_the_order_of_convergence_is_the_declared_one(case, process, grid):
    sampler, process = CASES[case], PROCESSES.classes[process]()
    counts = (40, 80, 160)
    if grid == "uniform in t":
        edges = process.time(torch.tensor([-4.0, 4.0], dtype=F64))
        grids = [torch.linspace(*edges.tolist(), count + 1, dtype=F64) for count in counts]
    else:
        grids = [process.time(logsnr_grid(count, -4.0, 4.0)) for count in counts]
    error = errors(sampler, process, grids)
    measured = [math.log2(coarse / fine) for coarse, fine in pairwise(error)]
    assert measured[-1] == pytest.approx(sampler.order, abs=0.15), (measured, error)
    assert abs(measured[1] - sampler.order) < abs(measured[0] - sampler.order) + 0.02


def test_heun_is_nearer_than_ddim_for_the_same_number_of_evaluations():
    process = Straight()
    ddim, heun = (
        errors(sampler, process, [process.time(logsnr_grid(steps))])[0]
        for sampler, steps in ((DDIM(), 40), (Heun(), 20))
    )
    assert heun < ddim / 3
