"""A small pipeline as diffusers writes it."""

import shutil

import pytest

from tests.interop.theirs import pipeline


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return pipeline(tmp_path_factory.mktemp("made") / "pipe")


@pytest.fixture
def pipe(made, tmp_path):
    return shutil.copytree(made, tmp_path / "pipe")
