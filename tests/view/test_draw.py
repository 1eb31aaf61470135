"""Samples on their way to files: what is there stays, what is missing is made, and nothing is half there."""

import errno
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.view.test_explore import gaussian, model
from undiffuse.errors import Locked, NotFiniteError, StorageError, UsageError
from undiffuse.figure import enlarged, grid
from undiffuse.machine import disk
from undiffuse.model.load import load
from undiffuse.model.model import Model
from undiffuse.view import draw

STEPS = 5


def half(x, t):
    return x / 2


def job(toy: Model, n: int = 7, seed=0, batch: int = 3, solver: str = "ddim") -> draw.Job:
    return draw.Job(toy, n, toy.times(STEPS), toy.sampler(solver), toy.told(None, n, seed), seed, batch)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def array(path) -> torch.Tensor:
    with np.load(path, allow_pickle=False) as arrays:
        return torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)


def test_images_are_written_as_files_a_grid_and_an_array(tmp_path):
    toy = gaussian()
    expected = toy.sample(7, STEPS, "ddim", batch=3)
    places = draw.Places(tmp_path / "out", tmp_path / "a" / "x.npz")
    written = draw.draw(job(toy), places)
    assert written == {"folder": places.folder, "grid": places.folder / "grid.png", "npz": places.npz}
    assert sorted(contents(places.folder)) == [".undiffuse", *(f"{i:04}.png" for i in range(7)), "grid.png"]
    for i, image in enumerate(expected):
        with Image.open(places.folder / f"{i:04}.png") as saved:
            np.testing.assert_array_equal(np.asarray(saved), image[0])
    assert torch.equal(array(places.npz), expected)
    assert sorted(contents(tmp_path / "a")) == ["x.npz"]
    with Image.open(places.folder / "grid.png") as sheet:
        assert sheet.size == ((3 * 17 + 1) * 4, (3 * 17 + 1) * 4)
    said = json.loads((places.folder / ".undiffuse").read_text())
    assert (said["solver"], said["steps"], said["seed"], said["images"]) == ("ddim", STEPS, 0, 7)


@pytest.mark.parametrize("error", [NotFiniteError("lost"), KeyboardInterrupt()], ids=["not finite", "interrupted"])
def test_what_ends_before_the_first_image_leaves_nothing(tmp_path, monkeypatch, error):
    """Else the folder would hold samples of a command that made none, and refuse the next."""

    def lost(*_, **__):
        raise error

    monkeypatch.setattr(Model, "chain", lost)
    with pytest.raises(type(error)):
        draw.draw(job(gaussian()), draw.Places(tmp_path / "out", tmp_path / "x.npz"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["create", "write", "sync", "rename", "unlink", "truncate"])
def test_a_full_disk_at_any_change_and_the_same_again_end_as_if_nothing_had_been(tmp_path, monkeypatch, change):
    """Every change to the disk fails once, one after the other, until one run goes through."""
    whole, again = draw.Places(tmp_path / "w", tmp_path / "w.npz"), draw.Places(tmp_path / "out", tmp_path / "x.npz")
    draw.draw(job(gaussian()), whole)
    failed, counted = 0, [0, 0]  # how many changes there were, and which of them fails

    def full(kind, path, detail=None):
        counted[0] += kind == change
        if kind == change and counted[0] == counted[1]:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "hook", full)
    for failing in range(1, 100):
        counted[:] = 0, failing
        try:
            draw.draw(job(gaussian()), again)
        except (StorageError, OSError) as error:
            assert "No space left on device" in str(error)
            failed += 1
            for path in (tmp_path / "out").glob("[0-9]*.png"):
                with Image.open(path) as picture:
                    picture.load()
        else:
            break
    assert failed >= 1 and contents(again.folder) == contents(whole.folder)
    assert again.npz.read_bytes() == whole.npz.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "w", "w.npz", "x.npz"]


def test_only_what_is_missing_is_made(tmp_path, monkeypatch):
    toy, place = gaussian(), draw.Places(tmp_path / "out")
    draw.draw(job(toy), place)
    before = contents(place.folder)
    for name in ("0001.png", "0004.png", "0005.png", "grid.png"):
        (place.folder / name).unlink()
    old, chains = {name: (place.folder / name).stat().st_mtime_ns for name in contents(place.folder)}, []
    real = Model.chain

    def chain(self, keys, *given, **more):
        chains.append(len(keys.rows))
        return real(self, keys, *given, **more)

    monkeypatch.setattr(Model, "chain", chain)
    ticks = []
    draw.draw(job(toy), place, progress=ticks.append)
    assert contents(place.folder) == before and chains == [3, 3]  # two batches of three, whole so that bits are kept
    assert {name: (place.folder / name).stat().st_mtime_ns for name in old} == old
    assert sum(ticks) == toy.sampling_steps(7, STEPS, 3)
    draw.draw(job(toy), place)
    assert chains == [3, 3] and contents(place.folder) == before


def test_memory_stays_flat(tmp_path, monkeypatch):
    """When a batch is written, that before it is gone; it is a batch that is held, and not a part of all."""
    seen, real = [], draw.Pictures.put

    def put(self, first, images):
        assert all(each() is None for each in seen) and images.untyped_storage().nbytes() == 4 * 16 * 16
        seen.append(weakref.ref(images))
        real(self, first, images)

    monkeypatch.setattr(draw.Pictures, "put", put)
    draw.draw(job(gaussian(), n=20, batch=4), draw.Places(tmp_path / "out", tmp_path / "x.npz"))
    assert len(seen) == 5


def test_the_grid_of_large_images_is_of_few(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "PIXELS", 3 * 16 * 16)
    draw.draw(job(gaussian()), draw.Places(tmp_path / "out"))
    with Image.open(tmp_path / "out" / "grid.png") as sheet:
        assert sheet.size == ((2 * 17 + 1) * 4, (2 * 17 + 1) * 4)


def test_what_was_written_last_is_not_trusted(tmp_path):
    """A power cut may leave zeros where rows were to be: the last batch is made again, whatever its size was."""
    whole = draw.Places(None, tmp_path / "w.npz")
    draw.draw(job(gaussian(), n=9, batch=4), whole)
    head = disk.to_json(job(gaussian(), n=9).asked | {"batch": 4}).replace(b"\n", b"") + b"\n"
    rows = array(whole.npz).permute(0, 2, 3, 1).numpy().tobytes()
    row = 16 * 16
    for good, there in ((4, 8), (8, 9), (0, 3)):
        part = tmp_path / "x.npz.partial"
        part.write_bytes(head + rows[: good * row] + bytes((there - good) * row))
        draw.draw(job(gaussian(), n=9, batch=2), draw.Places(None, tmp_path / "x.npz"))
        assert torch.equal(array(tmp_path / "x.npz"), array(whole.npz)) and not part.exists()


def test_the_grid_shows_the_first_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "SHOWN", 4)
    draw.draw(job(gaussian()), draw.Places(tmp_path / "out"))
    with Image.open(tmp_path / "out" / "grid.png") as sheet:
        assert sheet.size == ((2 * 17 + 1) * 4, (2 * 17 + 1) * 4)


def test_each_seed_makes_its_own_image(tmp_path):
    toy, seeds = gaussian(), [5, 123456, 17]
    draw.draw(job(toy, 3, seeds, 2, "ancestral"), draw.Places(tmp_path / "out"))
    names = sorted(path.name for path in (tmp_path / "out").glob("[0-9]*.png"))
    assert names == ["000005.png", "000017.png", "123456.png"]
    for seed in seeds:
        with Image.open(tmp_path / "out" / f"{seed:06}.png") as saved:
            np.testing.assert_array_equal(np.asarray(saved), toy.sample(1, STEPS, "ancestral", seed=seed)[0, 0])


def test_what_is_of_another_command_is_refused(tmp_path):
    toy, place = gaussian(), draw.Places(tmp_path / "out", tmp_path / "x.npz")
    draw.draw(job(toy), draw.Places(place.folder))
    (tmp_path / "x.npz.partial").write_bytes(b"{}\n")
    before = contents(place.folder)
    for other, words in (
        (job(toy, seed=1), r"other seed\)"),
        (job(toy.variant(precision="bf16")), r"other precision\)"),
        (job(toy, n=8), r"other images\)"),
        (job(toy, solver="heun"), r"other solver\)"),
        (job(gaussian(40)), r"other .*model\)"),
    ):
        with pytest.raises(
            UsageError, match=rf"out holds samples of another command \({words}.*give the same settings"
        ):
            draw.draw(other, draw.Places(place.folder))
    with pytest.raises(UsageError, match=r"x.npz.partial is of another command; remove it, or give another --npz"):
        draw.draw(job(toy), draw.Places(None, place.npz))
    assert contents(place.folder) == before


def test_what_was_begun_on_another_grid_of_that_name_is_refused(tmp_path):
    toy = gaussian()
    draw.draw(job(toy), draw.Places(tmp_path / "out"))
    mark = tmp_path / "out" / ".undiffuse"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"times": "0" * 64}))
    with pytest.raises(UsageError, match=r"out holds samples of another command \(other times\)"):
        draw.draw(job(toy), draw.Places(tmp_path / "out"))


@pytest.mark.parametrize("name", ["folder", "npz"])
def test_what_is_refused_before_anything_is_drawn_leaves_no_mark(tmp_path, name):
    """So that the same place takes the command as it was meant."""

    def never(x, t):
        raise UsageError("not like this")

    place = draw.Places(**{name: tmp_path / "out" / "x.npz"})
    with pytest.raises(UsageError, match="^not like this$"):
        draw.draw(job(model(never)), place)
    assert not (tmp_path / "out" / "x.npz").exists() and not any((tmp_path / "out").glob("*"))
    written = draw.draw(job(gaussian()), place)
    assert written[name] == place[name == "npz"]


def test_a_run_folder_takes_no_samples(tmp_path):
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "step-000000004").mkdir()
    with pytest.raises(UsageError, match="holds a run; give a new folder for samples"):
        draw.refuse(tmp_path)


def test_a_folder_with_other_pictures_or_an_unknown_mark_is_refused(tmp_path):
    (tmp_path / "mine.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds other pictures \(mine.png\), which samples would mix with"):
        draw.draw(job(gaussian()), draw.Places(tmp_path))
    draw.mark(tmp_path / "demo")
    with pytest.raises(UsageError, match=r"demo holds samples already; give a new folder, or remove it"):
        draw.draw(job(gaussian()), draw.Places(tmp_path / "demo"))
    with pytest.raises(UsageError, match=r"mine.png is a file; give the name of a folder"):
        draw.refuse(tmp_path / "mine.png")
    with pytest.raises(UsageError, match=r"x.png is the name of a picture, and samples are many"):
        draw.refuse(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["folder", "npz"])
def test_a_second_writer_of_a_place_is_told(tmp_path, monkeypatch, name):
    place, real, heard = draw.Places(**{name: tmp_path / "x.npz"}), Model.chain, []

    def chain(self, *given, **more):
        if not heard:
            heard.append("")
            with pytest.raises(Locked, match="x.npz is being written by another process; wait for its end") as found:
                draw.draw(job(gaussian()), place)
            heard.append(str(found.value))
        return real(self, *given, **more)

    monkeypatch.setattr(Model, "chain", chain)
    draw.draw(job(gaussian()), place)
    assert len(heard) == 2 and (tmp_path / "x.npz").exists()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_the_grid_is_the_same_where_a_run_was_ended(tmp_path, channels):
    """PNGs are read back as the grid shows them, whatever the channels."""
    toy = model(half, 50, 8)
    toy = replace(toy, config=replace(toy.config, image=(channels, 8, 8)))
    draw.draw(job(toy), draw.Places(tmp_path / "out"))
    with Image.open(tmp_path / "out" / "grid.png") as sheet:
        expected = grid(toy.sample(7, STEPS, "ddim", batch=3), 3, 1)
        small = sheet.resize(expected.size, Image.Resampling.NEAREST)
        np.testing.assert_array_equal(np.asarray(small), np.asarray(expected))
        assert sheet.width // expected.width in (enlarged(8), enlarged(8 * channels))


def test_a_seed_is_the_same_in_any_batch():
    """Noise to the bit; of 8-bit values at most 1 in 1,000 differs, and none by more than a level."""
    shipped = load("fashion-mnist", "cpu")
    found = [shipped.sample(16, 4, "ddim", batch=batch).int() for batch in (1, 2, 4, 16)]
    for other in found[:3]:
        off = (other - found[3]).abs()
        assert off.max() <= 1 and (off == 0).double().mean() >= 0.999
