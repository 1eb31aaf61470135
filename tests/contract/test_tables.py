"""What the tables hold, by name: a class that is lost, renamed or half-written fails here and nowhere later."""

import pytest

from undiffuse.config import plain
from undiffuse.diffusion.density import DENSITIES
from undiffuse.diffusion.grid import GRIDS
from undiffuse.diffusion.objective import OBJECTIVES
from undiffuse.diffusion.parameterisation import PARAMETERISATIONS
from undiffuse.diffusion.process import PROCESSES
from undiffuse.diffusion.reverse import VARIANCES
from undiffuse.diffusion.sampler.base import SAMPLERS
from undiffuse.network.base import NETWORKS
from undiffuse.quality.feature.base import FEATURES

NAMES = {
    GRIDS: "even karras karras-few log-snr quadratic",
    DENSITIES: "uniform log-normal logit-normal importance alpha-squared",
    PROCESSES: "linear quad const warmup10 warmup50 jsd cosine continuous-cosine sigmoid edm straight vdm",
    PARAMETERISATIONS: "eps x0 v mu edm lattice",
    VARIANCES: "fixed-small fixed-large learned learned-range",
    NETWORKS: "unet",
    OBJECTIVES: "simple vlb hybrid min-snr p2 sigmoid continuous-vlb trajectory",
    SAMPLERS: "ancestral ddim deis dpmpp dpmpp-sde heun ipndm unipc",
    FEATURES: "inception dinov2 efflite0 classifier-28 classifier-emoji",
}
MEMBERS = [pytest.param(table, name, id=f"{table.kind}-{name}") for table in NAMES for name in NAMES[table].split()]


@pytest.mark.parametrize("table", NAMES, ids=lambda table: table.kind)
def test_a_table_holds_exactly_these(table):
    assert set(table.classes) == set(NAMES[table].split())


@pytest.mark.parametrize("table, name", MEMBERS)
def test_a_member_is_built_by_its_name_and_written_back(table, name):
    member = table.build(name)
    assert table.name_of(member) == name
    assert table.build({"name": name, **plain(member)}) == member
