"""One pass over images: each batch once, kept whole or not at all, and read back as it was."""

import numpy as np
import pytest
import torch

from tests import waves
from undiffuse.errors import Corrupt, NotFiniteError, UsageError
from undiffuse.quality.gather import Kept, gather, on_cpu

IMAGES = torch.randint(0, 256, (23, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.setattr(waves, "seen", [])
    for name, value in waves.trouble.items():
        monkeypatch.setitem(waves.trouble, name, value)


def run(kept: Kept | None = None, extractors=(waves.Waves,), images=IMAGES, batch=5):
    """Features by the extractor's name and numbers, and what was told."""
    found, ticks, times = {}, [], []

    def take(name, features, index):
        for i, number in enumerate(index.tolist()):
            assert found.setdefault((name, number), tuple(features[part][i] for part in features.parts())) is not None

    opened = [each().open(torch.device("cpu")) for each in extractors]
    gather(lambda index: images[index], len(images), opened, take, batch, kept, ticks.append, times.append)
    return found, ticks, times


def test_each_image_is_seen_once_and_the_numbers_are_its_own():
    found, ticks, times = run()
    direct = waves.features(IMAGES.repeat(1, 3, 1, 1))
    assert set(found) == {("tests.waves:Waves", i) for i in range(23)}
    for i in range(23):
        for mine, theirs in zip(
            found["tests.waves:Waves", i], (direct.pool, direct.logits, direct.spatial), strict=True
        ):
            torch.testing.assert_close(mine, theirs[i])
    assert waves.seen == ticks == [5, 5, 5, 5, 3] and len(times) == 1 and times[0] > 0


def test_what_is_kept_is_not_made_again_and_is_the_same_to_the_bit(tmp_path):
    kept = Kept(tmp_path / "parts", images=len(IMAGES))
    before, _, _ = run(kept)
    after, ticks, times = run(kept)
    assert waves.seen == [5, 5, 5, 5, 3] and ticks == [5, 5, 5, 5, 3] and times == []
    assert all(all(map(torch.equal, before[key], after[key])) for key in before) and before.keys() == after.keys()
    assert torch.equal(torch.cat([kept.read_images(first) for first in range(0, 23, 5)]), IMAGES)


def test_a_batch_without_images_or_of_other_extractors_or_of_another_length_is_made_anew(tmp_path):
    run(Kept(tmp_path))
    run(Kept(tmp_path, images=len(IMAGES)))
    assert len(waves.seen) == 10
    run(Kept(tmp_path), (waves.Waves, waves.Fid))
    assert len(waves.seen) == 20
    run(Kept(tmp_path), images=IMAGES[:22])
    assert waves.seen[20:] == [
        2,
    ]


def test_a_stop_leaves_whole_batches(tmp_path, monkeypatch):
    monkeypatch.setitem(waves.trouble, "fail after", 2)
    with pytest.raises(KeyboardInterrupt):
        run(Kept(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-00000000.npz", "part-00000005.npz"]
    monkeypatch.setitem(waves.trouble, "fail after", 100)
    assert len(run(Kept(tmp_path))[0]) == 23 and waves.seen == [5, 5, 5, 5, 3]


def test_features_that_are_not_finite_are_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(waves.trouble, "nan after", 2)
    with pytest.raises(NotFiniteError, match="the pool features of image 11 are not finite"):
        run(Kept(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-00000000.npz", "part-00000005.npz"]


def damage(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "text":
        path.write_text("mine")
    elif how == "no format":
        np.savez(path, images=np.zeros(3))
    elif how == "format":
        np.savez(path, format=np.array(99))
    elif how == "pickle":
        np.savez(path, format=np.array({"a": 1}, object))
    else:
        place = data.index(b".pool.npy") + 200  # among the numbers
        path.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])


@pytest.mark.parametrize("how", ["cut", "text", "no format", "pickle", "bit"])
def test_a_damaged_part_is_named(tmp_path, how):
    run(Kept(tmp_path))
    damage(tmp_path / "part-00000010.npz", how)
    with pytest.raises(Corrupt, match=r"part-00000010.npz is damaged; delete it, and the same command makes it again"):
        run(Kept(tmp_path))
    (tmp_path / "part-00000010.npz").unlink()
    assert len(run(Kept(tmp_path))[0]) == 23


def test_a_newer_format_is_refused(tmp_path):
    run(Kept(tmp_path))
    damage(tmp_path / "part-00000010.npz", "format")
    with pytest.raises(UsageError, match=r"part-00000010.npz has format 99, and this undiffuse reads up to 1; upgrade"):
        run(Kept(tmp_path))


def test_on_cpu_keeps_what_is_there():
    found = on_cpu(waves.features(IMAGES))
    assert found.parts() == ("pool", "logits", "spatial") and found.pool.dtype == torch.float32
