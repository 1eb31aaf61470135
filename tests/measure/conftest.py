"""What the tests of evaluations share: a cache of their own, extractors that count, and a model."""

import pytest

from tests import waves
from tests.cli.toy import save
from undiffuse.model.load import load


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache; what `waves` has seen begins anew, and nothing goes wrong."""
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(waves, "seen", [])
    for name, value in waves.trouble.items():
        monkeypatch.setitem(waves.trouble, name, value)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return load(save(tmp_path_factory.mktemp("model") / "MODEL.safetensors"), "cpu")
