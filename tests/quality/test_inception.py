"""FID's network against torch-fidelity's with the same random weights, and the file that it is read from."""

import hashlib

import pytest
import torch

from tests.quality.fidelity import pictures, random_inception
from undiffuse.errors import Corrupt, UsageError
from undiffuse.quality.feature import inception
from undiffuse.quality.feature.base import open_features
from undiffuse.quality.feature.inception import AVERAGE, BLOCKS, FILES, MAXIMUM, POOLS, SHA256, InceptionNetwork
from undiffuse.quality.feature.resize import tf1
from undiffuse.quality.feature.weights import in_cache, ready, weights_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights():
    return random_inception().state_dict()


@pytest.fixture(scope="module")
@torch.no_grad()
def wanted():
    """pool, logits without and with their bias, and all of the block that ADM looks into, before it is joined."""
    inside = []
    hook = random_inception().Mixed_6d.branch1x1.register_forward_hook(lambda layer, given, made: inside.append(made))
    made = random_inception()(pictures())
    hook.remove()
    return *made, inside[0]


@torch.no_grad()
def ours(weights, count=2):
    network = InceptionNetwork()
    network.take(weights)
    return ready(network, CPU)((tf1(pictures()[:count], (299, 299)) - 128) / 128)


def apart(one, other):
    return float((one - other).abs().max())


def test_the_network_is_torch_fidelitys(weights, wanted):
    pool, logits, biased, _ = wanted
    made = ours(weights, 4)
    assert made.pool.shape == (4, 2048) and made.logits.shape == (4, 1008)
    assert apart(made.pool, pool) < 1e-5 and apart(made.logits, logits) < 1e-5
    assert apart(made.logits, biased) > 0.1
    # The weights are such that this says something: features are of the order of one, and each image has its own.
    assert 0.5 < pool.std() < 2 and 0.5 < logits.std() < 2
    assert pool.std(0).mean() > 0.02 and logits.std(0).mean() > 0.02


def test_spatial_features_are_the_seven_first_channels_of_mixed_6_conv(weights, wanted):
    """ADM takes mixed_6/conv:0 [..., :7] of [b, 17, 17, 192]; in that graph mixed_6 is what is called Mixed_6d here."""
    made, inside = ours(weights, 4).spatial, wanted[3]
    assert inside.shape == (4, 192, 17, 17) and made.shape == (4, 17 * 17 * 7)
    assert apart(made, inside.permute(0, 2, 3, 1)[..., :7].reshape(4, -1)) < 1e-5
    assert float(made[2, (5 * 17 + 11) * 7 + 3]) == pytest.approx(float(inside[2, 3, 5, 11]), abs=1e-5)
    assert inside[:, :7].std() > 0.3


def test_averages_that_count_the_padding_would_be_seen(weights, wanted, monkeypatch):
    monkeypatch.setitem(POOLS, AVERAGE, torch.nn.AvgPool2d(3, 1, 1))
    assert apart(ours(weights).pool, wanted[0][:2]) > 1e-2


@pytest.mark.parametrize("block, pool", [("Mixed_7b", MAXIMUM), ("Mixed_7c", AVERAGE)])
def test_the_other_pool_in_a_last_block_would_be_seen(weights, wanted, monkeypatch, block, pool):
    monkeypatch.setitem(BLOCKS, block, inception._e(pool))
    assert apart(ours(weights).pool, wanted[0][:2]) > 1e-2


def test_branches_in_another_order_would_be_seen(weights, wanted, monkeypatch):
    monkeypatch.setitem(BLOCKS, "Mixed_7c", BLOCKS["Mixed_7c"][::-1])
    assert apart(ours(weights).pool, wanted[0][:2]) > 1e-2


def test_all_tensors_of_the_file_are_used(weights):
    names = {f"{name}.{part}" for name in InceptionNetwork().units() for part in ("conv", "bn")}
    assert {name.rpartition(".")[0] for name in weights} == names | {"fc"}


@pytest.fixture
def pinned(weights, monkeypatch):
    """Writes the random weights to a path and lets them stand for the published ones."""

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(weights, path)
        monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return path

    return write


def test_the_whole_way_from_a_file_in_the_cache(pinned, wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path))
    path = pinned(weights_folder() / FILES[1])
    assert path == tmp_path / "weights" / FILES[1]
    extractor, another = open_features("inception"), open_features("inception", weights=path, resize="torch")
    made = extractor(pictures()[:2])
    assert apart(made.pool, wanted[0][:2]) < 1e-5 and apart(made.logits, wanted[1][:2]) < 1e-5
    assert apart(another(pictures()[:2]).pool, made.pool) > 1e-3
    assert extractor.title == "FID" and extractor.named("{is}") == "IS" and extractor.named("{sfd}") == "sFID"
    assert extractor.identity == {"extractor": "inception", "sha256": inception.SHA256, "resize": "tf1 299x299"}
    assert another.resize == "torch 299x299"


@pytest.mark.parametrize("name", FILES)
def test_both_known_names_are_looked_for(tmp_path, monkeypatch, name):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path))
    assert in_cache(FILES) is None
    weights_folder().mkdir()
    (weights_folder() / name).touch()
    assert in_cache(FILES) == tmp_path / "weights" / name


def test_what_is_pinned_is_the_published_file():
    """The hub of torch gives a file the first eight digits of its sha256 as a part of its name."""
    assert len(SHA256) == 64 and all(name.endswith(f"-{SHA256[:8]}.pth") for name in FILES)


def test_a_missing_file_says_what_and_where(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path))
    with pytest.raises(UsageError) as error:
        open_features("inception")
    assert str(error.value) == (
        f"the weights of FID's Inception are missing: put {FILES[0]} or {FILES[1]}, sha256 {SHA256}, into "
        f"{tmp_path / 'weights'}, or give the file with --feature-weights"
    )


@pytest.mark.parametrize("make, what", [(lambda path: None, "is missing"), (lambda path: path.mkdir(), "is a folder")])
def test_no_file_where_one_is_given(tmp_path, make, what):
    path = tmp_path / FILES[0]
    make(path)
    with pytest.raises(UsageError, match=f"^{path} {what}; give the file with the weights of FID's Inception, sha256"):
        open_features("inception", weights=path)


def test_another_file_is_refused_and_not_read(tmp_path, monkeypatch):
    path = tmp_path / FILES[0]
    path.write_bytes(b"something else")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(Corrupt) as error:
        open_features("inception", weights=path)
    assert str(error.value) == (
        f"{path} has sha256 {found}, and the weights of FID's Inception have {SHA256}; it is damaged or another file; "
        "get it anew"
    )


def test_half_a_file_is_refused(pinned, tmp_path):
    path = pinned(tmp_path / "whole.pth")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(Corrupt, match="it is damaged or another file; get it anew"):
        open_features("inception", weights=path)
