"""`evaluate`: its numbers by hand from the samples, what a protocol says, what a stop leaves, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import undiffuse
from tests import waves
from undiffuse.data.source import open_source
from undiffuse.errors import Corrupt, DataError, NotFiniteError, UsageError
from undiffuse.machine import disk
from undiffuse.measure.evaluate import Query, evaluate
from undiffuse.quality.metric.frechet import frechet_distance

WAVES = "tests.waves:Waves"
FRECHET = Query((WAVES,), ("frechet",))
N = 24


def pool(images: torch.Tensor) -> torch.Tensor:
    return waves.features(images.repeat(1, 3, 1, 1) if images.shape[1] == 1 else images).pool.double()


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return frechet_distance(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))


def value(found, key="fd", of="value"):
    return next(row[of] for row in found.rows if row["key"] == key)


@pytest.fixture(scope="session")
def digits():
    return open_source("digits").images


@pytest.fixture(scope="session")
def test_digits():
    return open_source("digits", split="test").images


@pytest.fixture(scope="session")
def drawn(model):
    return model.sample(N, steps=4, seed=7)


@pytest.fixture
def folder(tmp_path, drawn):
    path = tmp_path / "pictures"
    path.mkdir()
    for i, image in enumerate(drawn):
        Image.fromarray(image[0].numpy()).save(path / f"{i:03d}.png")
    return path


def run(samples, query=FRECHET, data="digits", **more):
    return evaluate(samples, data, query, device="cpu", **more)


@pytest.mark.parametrize("batch", [5, 64])
def test_the_samples_are_those_of_sample(model, drawn, digits, batch):
    found = run(model, n=N, steps=4, seed=7, batch=batch)
    assert value(found) == pytest.approx(distance(pool(drawn), pool(digits)), rel=1e-6)
    other = distance(pool(model.sample(N, steps=4, seed=8)), pool(digits))
    assert value(found) != pytest.approx(other, rel=1e-3)


def test_several_seeds_give_mean_and_spread_of_the_single_ones(model):
    each = [value(run(model, n=N, steps=4, seed=seed)) for seed in (7, 8, 9)]
    found = run(model, n=N, steps=4, seed=7, seeds=3)
    assert value(found, of="each") == pytest.approx(each, rel=1e-12)
    assert value(found) == pytest.approx(np.mean(each), rel=1e-12)
    assert value(found, of="sd") == pytest.approx(np.std(each, ddof=1), rel=1e-9)
    assert found.protocol["samples"]["seed"] == [7, 8, 9] and "± (3 seeds)" in found.table()[0]


def test_samples_are_taken_from_everywhere_alike(model, drawn, folder, tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    np.savez(tmp_path / "a.npz", arr_0=drawn.permute(0, 2, 3, 1).numpy())
    wanted = value(run(model, n=N, steps=4, seed=7))
    for samples in (folder, str(folder), tmp_path / "a.zip", tmp_path / "a.npz", drawn):
        assert value(run(samples)) == pytest.approx(wanted, rel=1e-9)


def test_of_pictures_the_first_n_are_taken(drawn, digits):
    assert value(run(drawn, n=10)) == pytest.approx(distance(pool(drawn[:10]), pool(digits)), rel=1e-6)


def test_a_label_is_told(digits, tmp_path):
    from undiffuse.diffusion.parameterisation import Eps
    from undiffuse.diffusion.process import Linear
    from undiffuse.diffusion.reverse import FixedLarge
    from undiffuse.model.model import Model
    from undiffuse.model.recipe import ModelConfig
    from undiffuse.network.unet import UNet

    config = ModelConfig((1, 8, 8), Linear(12, 1e-3, 0.5), Eps(), FixedLarge(), UNet(8, (1, 1), 1, ()), classes=2)
    torch.manual_seed(0)
    denoiser = config.build(clip=True).eval().requires_grad_(False)
    for weight in denoiser.network.parameters():
        weight.copy_(weight + 0.3 * torch.randn_like(weight))
    model = Model(config, denoiser, {"classes": {"names": ["cat", "dog"], "counts": [3, 1], "unlabelled": True}})
    values = {}
    for label in ("cat", "dog", "all", "random"):
        n = 2 * N if label == "all" else N
        found = run(model, n=N, steps=4, label=label)
        images = model.sample(N, steps=4, label=label)
        assert len(images) == n == found.protocol["n"]
        values[label] = value(found)
        assert values[label] == pytest.approx(distance(pool(images), pool(digits)), rel=1e-6)
    assert len({f"{each:.6g}" for each in values.values()}) == 4
    assert value(run(model, n=N, steps=4)) == pytest.approx(values["random"], rel=1e-12)  # as often as in training


def test_the_floor_is_of_the_other_split(drawn, digits, test_digits):
    found = run(drawn)
    index = [i * len(test_digits) // N for i in range(N)]
    wanted = distance(pool(test_digits[index]), pool(digits))
    assert value(found, of="real") == pytest.approx(wanted, rel=1e-6) and value(found, of="real_n") == N
    assert found.protocol["floor"] == "24 images of the test split"
    found = run(drawn, Query((WAVES,), ("frechet",), split="test"))
    assert value(found) == pytest.approx(distance(pool(drawn), pool(test_digits)), rel=1e-6)
    assert found.protocol["floor"] == "24 images of the train split"


def test_real_images_as_samples_score_like_the_floor(test_digits, drawn):
    index = [i * len(test_digits) // N for i in range(N)]
    found = run(test_digits[index])
    assert value(found) == pytest.approx(value(found, of="real"), rel=1e-9)
    assert value(found) < value(run(drawn)) / 3


def test_a_set_without_splits_is_divided(drawn, digits, tmp_path):
    """n real images against the rest of them, and the first n samples against the same rest."""
    np.savez(tmp_path / "one.npz", images=digits[:40].permute(0, 2, 3, 1).numpy())
    found = run(drawn, data=tmp_path / "one.npz")
    assert found.protocol["floor"] == "20 images of the set, apart from the other 20"
    from undiffuse.key import Key

    order = torch.argsort(Key(0).fold("floor").uniform(40))
    apart, rest = digits[:40][order[:20].sort().values], digits[:40][order[20:]]
    assert value(found, of="real") == pytest.approx(distance(pool(apart), pool(rest)), rel=1e-6)
    assert value(found, of="value_at_real_n") == pytest.approx(distance(pool(drawn[:20]), pool(rest)), rel=1e-6)
    assert value(found) == pytest.approx(distance(pool(drawn), pool(digits[:40])), rel=1e-6)
    assert "20 real" in found.table()[0] and "20 samples" in found.table()[0]


def test_too_few_images_to_divide_have_no_floor(drawn, digits, tmp_path):
    np.savez(tmp_path / "few.npz", images=digits[:3].permute(0, 2, 3, 1).numpy())
    found = run(drawn, data=tmp_path / "few.npz")
    assert found.protocol["floor"] == "none: no images apart from the reference"
    assert "real" not in found.rows[0]


@pytest.mark.parametrize("solver, steps, evaluations", [("heun", 5, 9), ("ancestral", None, 12), ("ddim", 4, 4)])
def test_the_protocol_says_what_was_chosen(model, solver, steps, evaluations, digits):
    found = run(model, n=N, steps=steps, solver=solver, seed=3)
    said = json.loads(json.dumps(found.plain(), allow_nan=False))["protocol"]
    assert said["n"] == N and said["images"] == "8×8 grey, uint8"
    assert said["samples"]["solver"] == solver and said["samples"]["seed"] == 3
    assert said["samples"]["evaluations"] == evaluations and said["samples"]["grid"] == "even"
    assert said["samples"]["steps"] == (steps or 12) and said["samples"]["clip"] is True
    assert said["model"]["precision"] == "float32" and len(said["model"]["sha256"]) == 64
    assert said["reference"] == {
        "data": "digits", "split": "train", "images": 1500, "fingerprint": open_source("digits").fingerprint()
    }  # fmt: skip
    features = said["features"][0]
    assert (features["extractor"], features["sha256"], features["resize"]) == (WAVES, "0" * 64, "none")
    assert features["note"] == "grey repeated to 3 channels" and features["metrics"] == {"frechet": {}}
    assert said["versions"]["torch"] == torch.__version__ and said["floor"] == "24 images of the test split"
    if solver == "ancestral":
        assert said["samples"]["variance"] == {"name": "fixed-large"}


def test_times_that_no_grid_gives_are_in_the_protocol_themselves(model):
    said = run(model, n=2, steps=[1, 0.75, 0.25]).protocol["samples"]
    assert said["times"] == [1, 0.75, 0.25] and "grid" not in said


def test_a_stopped_evaluation_goes_on(model, tmp_path, monkeypatch):
    whole = run(model, n=N, steps=4, batch=5, out=tmp_path / "whole")
    monkeypatch.setattr(waves, "seen", [])
    monkeypatch.setitem(waves.trouble, "fail after", 3)
    with pytest.raises(KeyboardInterrupt):
        run(model, n=N, steps=4, batch=5, out=tmp_path / "out")
    assert not (tmp_path / "out" / "summary.json").exists()
    monkeypatch.setitem(waves.trouble, "fail after", 100)
    said = []
    found = run(model, n=N, steps=4, batch=5, out=tmp_path / "out", say=said.append)
    assert waves.seen == [5, 5, 5, 5, 4] and found.rows == whole.rows
    assert any("9 samples (15 are there), 36 evaluations of the network" in text for text in said)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "out")]
    assert summaries[0] == summaries[1] and summaries[0]["scores"] == json.loads(json.dumps(found.rows))
    run(model, n=N, steps=4, batch=5, out=tmp_path / "out")
    assert len(waves.seen) == 5


OTHERS = {
    "samples": {"seed": 1},
    "samples, n": {"n": 10},
    "features": {"query": Query((WAVES,), ("kernel",))},
    "reference": {"query": Query((WAVES,), ("frechet",), split="test")},
    "keep_images": {"keep_images": True},
    "batch": {"batch": 7},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_question_in_the_same_folder_is_refused(model, tmp_path, what):
    run(model, n=N, steps=4, out=tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=f"holds another measurement .other .*{what.split(', ')[-1]}.*; give the same"):
        run(model, **({"n": N, "steps": 4, "out": tmp_path / "out"} | OTHERS[what]))
    assert {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }.items() <= before.items()


def test_features_of_a_reference_are_kept_by_what_decides_them(drawn, monkeypatch, cache):
    run(drawn)
    both = len(waves.seen)
    assert sum(waves.seen) == N + 1500 + N
    run(drawn)
    assert waves.seen[both:] == [N]  # the samples alone
    monkeypatch.setitem(waves.trouble, "sha256", "3" * 64)
    run(drawn)
    assert sum(waves.seen) == 2 * (N + 1500 + N) + N
    for part in cache.rglob("part-00000000.npz"):
        part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(Corrupt, match="part-00000000.npz is damaged; delete it, and the same command makes it again"):
        run(drawn)


def test_images_are_kept_as_sample_gives_them(model, drawn, tmp_path):
    found = run(model, n=N, steps=4, seed=7, batch=5, out=tmp_path / "out", keep_images=True)
    with np.load(tmp_path / "out" / "samples-7.npz") as arrays:
        assert torch.equal(torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2), drawn)
    assert value(run(tmp_path / "out" / "samples-7.npz")) == pytest.approx(value(found), rel=1e-9)


def test_statistics_of_a_reference_stand_for_it(drawn, tmp_path):
    every = Query((WAVES,))
    found = run(drawn, every, save_statistics=tmp_path / "a.npz")
    other = run(drawn, every, data=tmp_path / "a.npz")
    for key in ("fd", "sfd"):
        assert value(other, key) == pytest.approx(value(found, key), rel=1e-9)
    said = other.protocol["reference"]["statistics"]
    assert said["extractor"] == WAVES and said["data"] == "digits, train" and said["images"] == "8×8 grey"
    assert said["fingerprint"] == open_source("digits").fingerprint()
    assert any("kernel on tests.waves:Waves is left out: the reference is statistics" in note for note in other.notes)
    larger = torch.nn.functional.interpolate(drawn, scale_factor=2)
    assert any("a.npz was made of images of 8×8 grey, and these samples are 16×16 grey" in note
               for note in run(larger, data=tmp_path / "a.npz").notes)  # fmt: skip


def test_statistics_of_other_tools_are_for_fid_alone(drawn, digits, tmp_path):
    x = pool(digits).numpy()
    np.savez(tmp_path / "ttur.npz", mu=x.mean(0), sigma=np.cov(x.T))
    found = run(drawn, Query(("tests.waves:Fid",)), data=tmp_path / "ttur.npz")
    assert found.rows[0]["score"] == "FID"
    assert value(found) == pytest.approx(distance(pool(drawn), pool(digits)), rel=1e-6)
    with pytest.raises(UsageError, match="are taken for those of FID's Inception"):
        run(drawn, data=tmp_path / "ttur.npz")


def test_infinity_is_not_left_out_where_statistics_say_no_number(model, digits, tmp_path):
    x = pool(digits).numpy()
    np.savez(tmp_path / "ttur.npz", mu=x.mean(0), sigma=np.cov(x.T))
    found = run(model, Query(("tests.waves:Fid",)), data=tmp_path / "ttur.npz", n=60, steps=2)
    assert "FID∞" in [row["score"] for row in found.rows]


def test_of_a_reference_batch_of_adm_the_moments_count_and_its_images_serve_the_others(drawn, digits, tmp_path):
    x, few = pool(digits).numpy(), digits[:30]
    np.savez(tmp_path / "adm.npz", arr_0=few.permute(0, 2, 3, 1).numpy(), mu=x.mean(0), sigma=np.cov(x.T))
    query = Query(("tests.waves:Fid",), ("frechet", "kernel"))
    found = run(drawn, query, data=tmp_path / "adm.npz")
    assert value(found) == pytest.approx(distance(pool(drawn), pool(digits)), rel=1e-6)
    np.savez(tmp_path / "images.npz", arr_0=few.permute(0, 2, 3, 1).numpy())
    assert value(found, "kd") == value(run(drawn, query, data=tmp_path / "images.npz"), "kd")


def test_sizes_and_colours(drawn, digits, folder):
    larger = torch.nn.functional.interpolate(drawn, scale_factor=2)
    assert value(run(larger, Query((WAVES,), ("frechet",), size=8))) > 0
    with pytest.raises(DataError, match="the samples are RGB and digits is grey, .*; give --set data.channels=1"):
        run(drawn.repeat(1, 3, 1, 1))
    from undiffuse.data.picture import Reading

    for channels in (1, 3):
        query = Query((WAVES,), ("frechet",), reading=Reading(channels=channels))
        assert value(run(drawn.repeat(1, 3, 1, 1), query)) == pytest.approx(value(run(drawn)), rel=1e-4)
    Image.new("L", (9, 9)).save(folder / "z.png")
    with pytest.raises(DataError, match="samples: images differ in size: 000.png is 8x8, z.png is 9x9 .* --size 8"):
        run(folder)
    assert run(folder, Query((WAVES,), ("frechet",), size=8)).protocol["n"] == N + 1


def test_what_is_not_finite_ends_it_and_nothing_of_it_is_kept(drawn, tmp_path, monkeypatch, cache):
    monkeypatch.setitem(waves.trouble, "nan after", 2)
    with pytest.raises(NotFiniteError, match="the pool features of image 11 are not finite"):
        run(drawn, batch=5, out=tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("part-*.npz"))) == 2 and not cache.exists()
    assert not (tmp_path / "out" / "summary.json").exists()


def test_too_few_are_refused_if_the_metric_is_named_and_else_noted(drawn):
    found = run(drawn, Query((WAVES,)))
    assert "fd_infinity" not in [row["key"] for row in found.rows]
    assert any("frechet-infinity on tests.waves:Waves is left out: 24 samples are too few" in x for x in found.notes)
    waves.seen.clear()
    with pytest.raises(UsageError, match="24 samples are too few for frechet-infinity, which needs 50; give more"):
        run(drawn, Query((WAVES,), ("frechet-infinity",)))
    assert waves.seen == []  # before any work


def test_the_reference_as_samples_is_told(digits, tmp_path):
    np.savez(tmp_path / "a.npz", images=digits[:40].permute(0, 2, 3, 1).numpy())
    found = run(tmp_path / "a.npz", data=tmp_path / "a.npz")
    assert any("the samples are the images of" in note and "say nothing" in note for note in found.notes)
    assert not any("say nothing" in note for note in run(digits[:30], data=tmp_path / "a.npz").notes)


def test_two_extractors_of_one_name_are_refused_and_one_named_twice_is_one(drawn):
    with pytest.raises(UsageError, match="two extractors are called tests.waves:Waves"):
        run(drawn, Query((WAVES, "tests.waves:Twin")))
    assert len(run(drawn, Query((WAVES, WAVES), ("frechet", "frechet"))).rows) == 1


def test_it_is_public_and_reads_well(drawn):
    found = undiffuse.evaluate(drawn, "digits", WAVES, device="cpu")
    assert str(found).splitlines()[0].split() == ["score", "samples", "±", "(one", "set)", "24", "real"]
    assert str(found).splitlines()[1].split() == ["FD-waves", f"{value(found):.5g}", f"{value(found, of='real'):.5g}"]
    html = found._repr_html_()
    head = "<tr><th>score</th><th>samples</th><th>± (one set)</th><th>24 real</th></tr>"
    assert html.startswith(f"<table>{head}<tr><th>FD-waves</th><td>")
    disk.to_json(found.plain())


BAD = {
    "float pictures": (lambda x: run(x.float()), "images of float32 .24, 1, 8, 8. cannot be judged; give uint8"),
    "none": (lambda x: run(x[:0]), "images of uint8 .0, 1, 8, 8. cannot be judged"),
    "one": (lambda x: run(x[:1]), "images from Python has 1 image, and a distance needs 2 or more"),
    "more than there are": (lambda x: run(x, n=25), "images from Python has 24 images, and -n 25 is more"),
    "steps": (lambda x: run(x, steps=3), "steps is for a model that draws, and the images is no model"),
    "solver": (lambda x: run(x, solver="ddim"), "solver is for a model"),
    "seed": (lambda x: run(x, seed=1), "seed is for a model"),
    "keep": (lambda x: run(x, keep_images=True), "the images that are kept have no place; give --out"),
    "n": (lambda x: run(x, n=1), "n = 1 is not possible; give 2 or more"),
    "seeds": (lambda x: run(x, seeds=0), "seeds = 0 is not possible"),
    "batch": (lambda x: run(x, batch=0), "batch = 0 is not possible"),
    "features": (lambda x: run(x, "inceptoin"), 'features "inceptoin" is not known. Did you mean "inception"'),
    "metric": (lambda x: run(x, Query((WAVES,), ("kernl",))), 'metric "kernl" is not known. Did you mean "kernel"'),
    "split": (lambda x: run(x, Query((WAVES,), split="val")), 'split "val" is not known; expected train or test'),
    "weights": (lambda x: run(x, Query((WAVES,), resize="pil")), "features tests.waves:Waves have no option resize"),
    "samples": (lambda x: run("fashion-mnst"), 'samples fashion-mnst are neither a model nor pictures.*mean "f'),
    "statistics": (
        lambda x: run(x, Query((WAVES, "tests.waves:Fid")), save_statistics="x.npz"),
        "x.npz can hold the statistics of one extractor's features",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_one_line(drawn, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, text = BAD[name]
    with pytest.raises(UsageError, match=text) as error:
        call(drawn)
    assert "\n" not in str(error.value) and waves.seen == [] and list(tmp_path.iterdir()) == []
