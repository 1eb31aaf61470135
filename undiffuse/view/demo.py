"""The main job end to end on data inside the package: train, sample, measure, report; under five minutes on two cores.

(a) A small model learns the 8×8 digits from nothing, and a classifier and a search for copies judge what it draws.
(b) The shipped Fashion-MNIST model is sampled, looked into and measured. (c) One HTML page shows it all.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.codec import tables
from undiffuse.codec.stream import Codec, Decoded
from undiffuse.data.format.named import GARMENTS
from undiffuse.data.loader import Loader
from undiffuse.data.source import ArraySource, open_source
from undiffuse.diffusion.likelihood import Terms
from undiffuse.errors import UsageError, counted
from undiffuse.figure import enlarged, grid, picture, png
from undiffuse.key import Key
from undiffuse.machine import disk, log
from undiffuse.machine.device import making_float32
from undiffuse.machine.log import Say
from undiffuse.measure import nll
from undiffuse.model.facts import images_seen
from undiffuse.model.load import load, shipped
from undiffuse.model.model import Model, to_float
from undiffuse.model.recipe import load_recipe
from undiffuse.training.loop import Budget, train
from undiffuse.view import draw, explore, pieces
from undiffuse.view.report import Figure, Frames, Section, Table, write_report

SURE = 0.9  # the probability from which a digit counts as recognised


@dataclass(frozen=True)
class Scale:
    """How much of everything. The report says what is abbreviated."""

    training_steps: int | None = None  # None: as many as the preset says
    classifier_steps: int = 1500
    digits: int = 200
    digit_chain: int = 20
    samples: int = 64
    chain: int = 10
    strips: int = 8
    slots: int = 10
    at: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    mixtures: int = 9
    bits_images: int = 64
    draws: int = 50
    coded: int = 5
    bytes: tuple[int, ...] = (12, 20, 30, 50, 80, 120, 200)
    curve_images: int = 16
    curve_chain: int | None = None  # None: all steps, as in the paper


ALL = "--solver ancestral"  # steps, as in the paper
FULL = Scale()
QUICK = Scale(
    training_steps=3,
    classifier_steps=3,
    digits=20,
    digit_chain=4,
    samples=4,
    chain=4,
    strips=2,
    slots=4,
    at=(0.0, 0.5),
    mixtures=3,
    bits_images=4,
    draws=2,
    coded=1,
    bytes=(20,),
    curve_images=2,
    curve_chain=10,
)


def run_demo(out: Path, quick: bool = False, model: Model | None = None, say: Say = print) -> Path:
    """Runs everything, writes pictures and `report.html` into `out`, and returns the path of the report.

    `quick` makes everything tiny, only to see that it runs. `model` stands in for the shipped one. The same command
    again goes on with the training that is in `out`.
    """
    started, scale = time.monotonic(), QUICK if quick else FULL
    model = load("fashion-mnist") if model is None else model  # first: if it is missing, say so before training
    emoji = load("emoji-32") if "emoji-32" in shipped() else None  # NOTICE: its file may have been left out
    held_out = open_source("fashion-mnist-sample", split="test")
    sections = [
        _digits(out, scale, say),
        _samples(out, model, scale),
        _emoji(out, emoji, scale),
        _progressive(out, model, scale),
        _interpolation(out, model, held_out, scale),
        _bits(out, model, held_out, scale),
        _coded(out, model, held_out, scale),
        _abbreviated(out, model, scale),
    ]
    took, threads = log.duration(time.monotonic() - started), torch.get_num_threads()
    lead = (
        f"Made in {took} on {counted(threads, 'thread')} of a CPU, from data inside the package. First a "
        "model is trained from nothing on tiny digits; then a trained one draws clothes and is measured."
    )
    draw.mark(out)
    write_report(out / "report.html", sections, "undiffuse demo", f"{lead}\n\n{_warning(quick)}")
    say(f"done in {took}; the report is {out / 'report.html'}")
    return out / "report.html"


def _warning(quick: bool) -> str:
    return (
        "This was a quick run, only to see that it works: no number or picture in it means anything." if quick else ""
    )


@contextmanager
def _ticking(total: int, what: str) -> Iterator[Callable[[int], None]]:
    with log.progress(total, what, True) as bar:
        yield bar.advance


def _keep(out: Path, name: str, figure: Figure) -> Figure:
    """A figure of the report that is also a file of its own."""
    content = figure.content
    disk.write_atomic(out / name, content.encode() if isinstance(content, str) else png(content))
    return figure


def _kept(out: Path, name: str, section: Section) -> Section:
    """The same for a section of one figure."""
    _keep(out, name, section.figures[0])
    return section


# (a) The digits.


@dataclass(frozen=True)
class Verdict:
    """What a classifier and a search for copies say of samples. Distances are RMSE of values in [0, 255]."""

    accuracy: float  # of the classifier, on held-out digits
    recognised: float  # the share of samples that it gives a probability of at least `SURE`
    classes: Int[Tensor, "10"]  # how many samples it takes for each digit
    threshold: float  # the closest 1 % of held-out digits are nearer than this to a training image
    nearest: float  # the least distance of a sample to a training image
    copies: int  # how many samples are nearer than the threshold

    def checks(self) -> dict[str, bool]:
        """What "these are digits" means, claim by claim."""
        return {
            "the classifier names 97 % of held-out digits": self.accuracy >= 0.97,
            f"it gives 80 % of the samples a probability of {SURE} or more": self.recognised >= 0.8,
            "all ten digits occur": bool((self.classes > 0).all()),
            "no sample is nearer to a training image than the closest 1 % of held-out ones": self.copies == 0,
        }


def judge(samples: UInt8[Tensor, "n 1 8 8"], data: ArraySource, test: ArraySource, steps: int) -> Verdict:
    """Are these digits, all of them, and new? `steps` are those of the classifier's training."""
    with _ticking(steps, "a classifier to judge them") as tick:
        network = classifier(data, steps, tick)
    with torch.no_grad():
        named = network(to_float(test.images)).argmax(1)
        probability, digit = network(to_float(samples)).softmax(1).max(1)
    held_out = explore.neighbours(test.images, data).distance[:, 0]
    distance = explore.neighbours(samples, data).distance[:, 0]
    threshold = held_out.quantile(0.01)
    return Verdict(
        accuracy=float((named == test.labels).double().mean()),
        recognised=float((probability >= SURE).double().mean()),
        classes=digit.bincount(minlength=10),
        threshold=float(threshold),
        nearest=float(distance.min()),
        copies=int((distance < threshold).sum()),
    )


def classifier(data: ArraySource, steps: int, tick: Callable[[int], None]) -> nn.Module:
    """A convolutional network that names 8×8 digits, trained on shifted and noisy copies lest it trust too much."""
    key, loader = Key(0).fold("classifier"), Loader(data, size=64)
    with torch.random.fork_rng(devices=[]), making_float32():
        torch.manual_seed(key.integer())
        network = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10)),
        )
        adam = torch.optim.Adam(network.parameters(), lr=2e-3)
        decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.01, steps)
        for step in range(steps):
            batch, now = loader.batch(step), key.fold("step", step)
            down, right = now.fold("shift").rows(2).integers(3).tolist()
            x = F.pad(to_float(batch.image), (1, 1, 1, 1), value=-1.0)[:, :, down : down + 8, right : right + 8]
            x = x + 0.1 * now.fold("noise").rows(len(x)).normal(1, 8, 8)
            adam.zero_grad()
            assert batch.label is not None
            F.cross_entropy(network(x), batch.label).backward()
            adam.step()
            decay.step()
            tick(1)
    return network.eval()


def _digits(out: Path, scale: Scale, say: Say) -> Section:
    recipe, data, test = load_recipe("digits"), open_source("digits"), open_source("digits", split="test")
    say(f"training a model on {len(data):,} digits from nothing")
    model = train(recipe, data, out / "digits", test, budget=Budget(scale.training_steps), say=say)
    with _ticking(scale.digit_chain * -(-scale.digits // 200), f"drawing {scale.digits} digits") as tick:
        samples = model.sample(scale.digits, scale.digit_chain, batch=200, progress=tick)
    verdict = judge(samples, data, test, scale.classifier_steps)
    say(", ".join(f"{claim}: {'yes' if held else 'no'}" for claim, held in verdict.checks().items()))
    rows = log.read_rows(out / "digits" / "log.jsonl")
    curve = pieces.loss(rows)
    assert curve is not None
    return Section(
        "Digits, learned from nothing",
        f"A U-Net of {model.parameters():,} weights, trained on {len(data):,} scanned digits of 8×8 pixels and asked "
        f"for {len(samples)} new ones, each in {scale.digit_chain} steps.",
        facts=(
            ("images seen in training", f"{model.meta['images']:,}"),
            ("training time", log.duration(pieces.seconds(rows))),
            ("samples recognised", f"{verdict.recognised:.1%}"),
            ("digits that occur", f"{int((verdict.classes > 0).sum())} of 10"),
            ("nearest to a training image (RMSE)", f"{verdict.nearest:.1f}"),
        ),
        figures=(
            _keep(
                out, "digits.png", Figure(grid(samples[:100], 20, 5), f"{len(samples[:100])} samples, not selected.")
            ),
            _keep(out, "nearest.png", pieces.closest(samples, data)),
            _keep(out, "loss.svg", curve),
        ),
        tables=(_verdict(verdict, len(samples)),),
    )


def _verdict(verdict: Verdict, count: int) -> Table:
    found = (
        f"{verdict.accuracy:.1%}",
        f"{verdict.recognised:.1%}",
        " ".join(map(str, verdict.classes.tolist())),
        f"{verdict.copies} nearer than {verdict.threshold:.1f}",
    )
    rows = tuple(
        (claim[0].upper() + claim[1:], value, "yes" if held else "no")
        for (claim, held), value in zip(verdict.checks().items(), found, strict=True)
    )
    caption = (
        f"Are they digits? Of {count} images as new as held-out ones, {count / 100:g} would fall below the last line's "
        "distance by chance, so it asks for a little more than newness."
    )
    return Table(("claim", "found", "holds"), rows, caption)


# (b) The clothes.


def _samples(out: Path, model: Model, scale: Scale) -> Section:
    with _ticking(scale.chain * -(-scale.samples // 64), f"drawing {scale.samples} clothes") as tick:
        images = model.sample(scale.samples, scale.chain, progress=tick)
    trained = f", trained on {images_seen(model.meta, ' images')}" if "images" in model.meta else ""
    caption = f"{scale.samples} samples, not selected, each in {scale.chain} of {model.process.steps} steps."
    return Section(
        "Clothes, from the shipped model",
        f"A U-Net of {model.parameters():,} weights for Fashion-MNIST{trained}.",
        figures=(_keep(out, "samples.png", Figure(grid(images, scale=3), caption)),),
    )


def _emoji(out: Path, model: Model | None, scale: Scale) -> Section:
    title = "Emoji, told their style"
    if model is None:
        return Section(title, "Left out, because the file of the model `emoji-32` is not in this installation.")
    assert model.classes is not None
    each, trained = max(1, scale.samples // 8), model.classes.trained
    names, told = [model.classes.names[number] for number in trained], [n for n in trained for _ in range(each)]
    with _ticking(scale.chain, f"drawing {len(told)} emoji") as tick:
        images = model.variant(guidance=2).sample(len(told), scale.chain, label=told, progress=tick)
    caption = f"{each} samples of each style, not selected, {scale.chain} of {model.process.steps} steps, guidance 2."
    return Section(
        title,
        f"A U-Net of {model.parameters():,} weights for colour, trained on {images_seen(model.meta, ' images')}: "
        "four sets of emoji, with their style as a class. Styles are plain; most pictures cannot be named, for so "
        "small a network and so many subjects (`docs/benchmarks.md` has its scores).",
        figures=(_keep(out, "emoji.png", Figure(grid(images, columns=each, scale=3), caption, rows=tuple(names))),),
    )


def _progressive(out: Path, model: Model, scale: Scale) -> Section:
    with _ticking(scale.chain, "progressive generation") as tick:
        images, times = explore.progressive(model, scale.strips, steps=scale.chain, slots=scale.slots, progress=tick)
    return _kept(out, "progressive.png", pieces.progressive(images, times))


def _interpolation(out: Path, model: Model, held_out: ArraySource, scale: Scale) -> Section:
    assert held_out.labels is not None
    a, b = (held_out.images[held_out.labels == GARMENTS.index(name)][0] for name in ("dress", "coat"))
    lambdas = tuple(i / (scale.mixtures - 1) for i in range(scale.mixtures))
    with _ticking(explore.interpolation_steps(model, scale.at, scale.chain), "interpolation") as tick:
        images = explore.interpolate(model, a, b, scale.at, lambdas, steps=scale.chain, progress=tick)
    what = "Two held-out images, a dress and a coat"
    return _kept(out, "interpolation.png", pieces.interpolation(images, what, scale.at, lambdas))


def _measure(model: Model, source: ArraySource, query: nll.Nll, what: str) -> Terms:
    with _ticking(nll.evaluations(model, source, query), what) as tick:
        return nll.terms_of(model, source, query, tick=tick)


def _bits(out: Path, model: Model, held_out: ArraySource, scale: Scale) -> Section:
    stratified = nll.Nll(images=scale.bits_images, draws=scale.draws)
    summary = _measure(model, held_out, stratified, "bits/dim").summary()
    whole = nll.Nll(images=scale.curve_images, steps=scale.curve_chain)
    terms = _measure(model, held_out, whole, "rate-distortion")
    curve = terms.rate_distortion()
    caption = f"{scale.curve_images} images at all {len(curve)} steps: what a receiver knows after so many bits."
    return Section(
        "Bits per dimension",
        f"The variational bound on {scale.bits_images} held-out test images, with {scale.draws} stratified draws of t "
        "each: how many bits a value of an image would cost, losslessly. As a progressive code it sends the large "
        "features first.",
        facts=(("bits/dim, at most", f"{summary['bits_per_dim']:.2f}"),),
        figures=(_keep(out, "rate-distortion.svg", pieces.rate_distortion(curve, caption)),),
        tables=(pieces.terms(summary), pieces.table_4(nll.table(terms))),
    )


def _coded(out: Path, model: Model, held_out: ArraySource, scale: Scale) -> Section:
    title = "As files"
    try:
        codec = Codec(model, tables.of(model))
    except UsageError as error:  # a model of one's own, whose tables were not made
        return Section(title, f"None can be made: {error}.")
    images, frames = held_out.images[: scale.coded], list[tuple[str, Image.Image, tuple[str, ...]]]()
    with _ticking(len(images) + len(scale.bytes) + 1, "coded files") as tick:
        files = list[bytes]()
        for image in images:
            files.append(codec.encode(image[None]))
            tick(1)
        for size in (*scale.bytes, None):
            seen = [codec.decode(file[:size]) for file in files]
            mean, drawn = (torch.cat([make(each) for each in seen]) for make in (Decoded.mean, Decoded.drawn))
            sheet = grid(torch.cat([images, mean, drawn]), len(images), 3 * enlarged(images.shape[-1]))
            frames.append(("all" if size is None else f"{size}", sheet, ("image", "mean", "drawn on")))
            tick(1)
    disk.write_atomic(out / "image.udf", files[0])
    each = sum(map(len, files)) / len(files)
    caption = f"{len(images)} held-out images after so many bytes of their files; the first file is `image.udf`."
    return Section(
        title,
        "`undiffuse encode` writes the bits that tell an image from what the model would draw (Algorithms 3 and 4 of "
        "the paper). Any first part of a file is a picture: the estimate of the least error, or one that is drawn on "
        "from the same bits.",
        facts=(
            ("bytes of a file, on average", f"{each:.0f}"),
            ("of a PNG of the same image", f"{sum(len(png(picture(image))) for image in images) / len(images):.0f}"),
        ),
        frames=(Frames(tuple(frames), caption),),
    )


def _abbreviated(out: Path, model: Model, scale: Scale) -> Section:
    whole = model.process.steps
    rows = (
        (
            "digits",
            f"{scale.digit_chain} steps a sample",
            f"`undiffuse sample {out / 'digits'} -n 200 {ALL} --out digits`",
        ),
        ("samples", f"{scale.chain} of {whole} steps", f"`undiffuse sample fashion-mnist -n 64 {ALL} --out samples`"),
        (
            "progressive generation, interpolation",
            f"{scale.chain} of {whole} steps",
            f"`undiffuse progressive` and `undiffuse interpolate`, with {ALL}",
        ),
        (
            "bits/dim",
            f"{scale.bits_images} images, {scale.draws} of {whole} terms each",
            "`undiffuse nll fashion-mnist fashion-mnist -n 500`",
        ),
        (
            "rate-distortion",
            f"{scale.curve_images} images",
            "`undiffuse nll fashion-mnist fashion-mnist -n 500 --rate-distortion`",
        ),
    )
    return Section(
        "What is abbreviated here",
        "Everything above is computed as the full figures are, but of less. The full numbers, with the runs behind "
        "them, are in `docs/benchmarks.md`; the 10,000 test images come with Debian's package `dataset-fashion-mnist`.",
        tables=(Table(("figure", "here", "in full"), rows),),
    )
