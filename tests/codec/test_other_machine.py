"""Files are read where arithmetic differs: in other batches, on other threads, by other convolutions, or by a network
whose answers differ. A lossy picture moves by far less than a level; a lossless one is right or is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import undiffuse
from undiffuse.codec import chain, stream, tables, tail
from undiffuse.codec.stream import Codec
from undiffuse.codec.tail import Differs
from undiffuse.data.source import open_source
from undiffuse.errors import Corrupt
from undiffuse.network.unet import UNetModule

LIMIT = 0.05  # grey levels, RMS of a picture: docs/codec.md


@pytest.fixture(scope="module")
def codec() -> Codec:
    model = undiffuse.load("fashion-mnist", "cpu")
    return Codec(model, tables.of(model))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return open_source("fashion-mnist-sample").images[:3]


@pytest.fixture(scope="module")
def files(codec, images) -> dict[bool, bytes]:
    """With loss and without, in groups of two that are decoded together."""
    return {lossless: codec.encode(images, group=2, lossless=lossless) for lossless in (False, True)}


@pytest.fixture(scope="module")
def usual(codec, files) -> Tensor:
    return codec.decode(files[False]).estimate()


@contextmanager
def other_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def without_onednn() -> Iterator[None]:
    """By torch's own convolutions, which add up in another order."""
    before = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before[0])


@contextmanager
def small_batches() -> Iterator[None]:
    """The network is asked about a group at once, not about all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BATCH", 1)
        yield


@contextmanager
def other_answers(size: float) -> Iterator[None]:
    """The network's are that much larger, relatively."""
    own = UNetModule.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNetModule, "forward", lambda *given: own(*given) * (1 + size))
        yield


CONDITIONS = {
    "other threads": other_threads,
    "smaller batches": small_batches,
    "without oneDNN": without_onednn,
    "answers that differ in the last bits": lambda: other_answers(1e-6),
}


def apart(found: Tensor, usual: Tensor) -> Tensor:
    """Grey levels, RMS, of each picture."""
    return 127.5 * (found.double() - usual.double()).square().flatten(1).mean(1).sqrt()


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_lossy_picture_is_the_same_within_the_limit(condition, codec, files, usual):
    with CONDITIONS[condition]():
        found = codec.decode(files[False]).estimate()
    assert float(apart(found, usual).max()) < LIMIT
    assert condition != "answers that differ in the last bits" or not torch.equal(found, usual)


def test_bf16_would_not_be_within_the_limit(codec, images, monkeypatch):
    """So that it is refused."""
    monkeypatch.setattr(chain, "refuse_computing", lambda _: None)
    data, half = codec.encode(images[:1], 20), Codec(codec.model.variant(precision="bf16"), codec.plan)
    assert float(apart(half.decode(data).estimate(), codec.decode(data).estimate())) > 2 * LIMIT


def lossless(codec: Codec, data: bytes) -> Tensor | None:
    """The pictures, or None where this machine says that it does not come to them."""
    try:
        return codec.decode(data).lossless()
    except Differs:
        return None


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_lossless_picture_is_right_or_refused_elsewhere(condition, codec, files, images):
    with CONDITIONS[condition]():
        found = lossless(codec, files[True])
    assert found is None or torch.equal(found, images)


def test_last_bits_that_differ_are_what_the_guards_are_for(codec, files, images):
    """Values that may round to the other side are named in the file, and so nothing is refused."""
    with other_answers(1e-7):
        found = lossless(codec, files[True])
    assert found is not None and torch.equal(found, images)


@pytest.mark.parametrize("checked", [True, False])
def test_answers_further_off_are_refused_and_never_lead_to_another_picture(checked, codec, images, monkeypatch):
    """By the check of the whole numbers, or by that of the values if the first one lets them pass, one time in 256."""
    if not checked:
        monkeypatch.setattr(tail, "_check", lambda _: 0)
    data, refused = codec.encode(images[:2], lossless=True), list[str]()
    for size in (1e-5, 1e-4, 1e-3, 1e-2, 0.1):
        with other_answers(size):
            decoded = codec.decode(data)
            try:
                assert torch.equal(decoded.lossless(), images[:2])
            except Corrupt as error:
                refused.append(str(error))
            assert decoded.parsed.status == "complete" and decoded.mean().shape == images[:2].shape
    assert len(refused) >= 3
    if checked:
        assert set(refused) == {"this machine does not come to the numbers that the file was made with"}
    else:
        assert "this machine comes to other values than those that the file was made of" in refused
