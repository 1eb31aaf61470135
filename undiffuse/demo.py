"""The main job end to end on data inside the package: train, sample, explore, measure, and one page that shows it."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse import evaluate, explore, likelihood, log, store
from undiffuse.data.loader import Loader
from undiffuse.data.source import ArraySource, open_source
from undiffuse.figure import grid, line_plot, png
from undiffuse.key import Key
from undiffuse.model import Model, load, to_float
from undiffuse.recipe import load_recipe
from undiffuse.report import Figure, Section, Table, write_report
from undiffuse.train import Budget, train

SURE = 0.9


@dataclass(frozen=True)
class Size:
    """How much of everything: `FULL` for the demo, `QUICK` only to see that it runs."""

    digits_steps: int
    digits: int
    digits_chain: int
    classifier_steps: int
    samples: int
    chain: int
    images: int
    draws: int


FULL = Size(1200, 200, 200, 700, 64, 100, 16, 16)
QUICK = Size(2, 4, 4, 20, 4, 8, 2, 2)


def run_demo(out: Path, quick: bool = False) -> Path:
    """Everything into the folder `out`; returns the path of the page, and prints it.

    `quick` makes every part tiny: it shows that the demo runs, and its pictures are noise.
    """
    started, size = time.monotonic(), QUICK if quick else FULL
    sections = [digits(out, size), *fashion(out, size)]
    lead = (
        f"Made by `undiffuse demo{' --quick' if quick else ''}` in {log.duration(time.monotonic() - started)} on "
        f"{torch.get_num_threads()} threads. The figures here are abbreviated, and each says how; those that count are "
        "in docs/benchmarks.md."
    )
    page = out / "report.html"
    write_report(page, sections, "undiffuse demo", lead)
    print(f"The report is {page.resolve()}")
    return page


def digits(out: Path, size: Size) -> Section:
    """Trains on the 1,500 training digits from nothing, and asks a classifier what the samples are."""
    recipe = load_recipe("digits", [f"train.steps={size.digits_steps}"])
    source, held = open_source("digits"), open_source("digits", split="test")
    started = time.monotonic()
    model = train(recipe, source, out / "digits", held, budget=Budget(), say=lambda text: None)
    trained = log.duration(time.monotonic() - started)
    with log.progress(size.digits_chain, "sampling digits", True) as bar:
        samples = model.sample(size.digits, size.digits_chain, batch=size.digits, progress=bar.advance)
    store.write_atomic(out / "digits.png", png(grid(samples, columns=20, scale=4)))
    verdict = judge(samples, source, held, size.classifier_steps)
    rows = [row for row in log.read_rows(out / "digits" / "log.jsonl") if "loss" in row]
    curve = line_plot(
        [("training loss", [row["step"] for row in rows], [row["loss"] for row in rows])],
        x="step", y="loss", title="L_simple", log_y=True,
    )  # fmt: skip
    text = (
        f"A small U-Net of {model.parameters():,} parameters, trained from nothing on {len(source):,} digits of 8×8 "
        f"pixels for {size.digits_steps:,} steps of 128. Abbreviated: {size.digits} samples, {size.digits_chain} of the "
        f"1,000 steps. A classifier that is right on {100 * verdict.accuracy:.1f} % of the {len(held)} held-out digits "
        "looks at them."
    )
    facts = (
        ("training time", trained),
        (f"of {size.digits} samples it is at least {SURE:.0%} sure", f"{100 * verdict.sure:.0f} %"),
        ("classes that occur", f"{verdict.classes} of 10"),
        ("samples nearer to a training image than 1 % of held-out ones are", f"{verdict.too_near} of {size.digits}"),
    )
    figures = (
        Figure(grid(samples, columns=20), "Samples, none left out."),
        Figure(curve, "The loss of each batch, averaged over 20."),
    )
    return Section("Trained here: digits", text, facts, figures)


@dataclass(frozen=True)
class Verdict:
    """What a classifier and a search for copies say of samples; `nearest` is the least distance, RMSE on [0, 255]."""

    accuracy: float
    sure: float
    classes: int
    too_near: int
    nearest: float
    threshold: float


def judge(
    samples: UInt8[Tensor, "n c h w"], source: ArraySource, held: ArraySource, steps: int = 700, seed: int = 0
) -> Verdict:
    """Are these digits, all ten, and none a copy?

    "Too near" is nearer to a training image than the closest 1 % of the held-out images are.
    """
    classifier = train_classifier(source, steps, seed)
    accuracy = float((probabilities(classifier, held.images).argmax(1) == held.labels).float().mean())
    sure, label = probabilities(classifier, samples).max(1)
    near = explore.neighbours(samples, source).distance[:, 0]
    threshold = float(explore.neighbours(held.images, source).distance[:, 0].quantile(0.01))
    classes = len(label[sure >= SURE].unique())
    share, copies = float((sure >= SURE).float().mean()), int((near < threshold).sum())
    return Verdict(accuracy, share, classes, copies, float(near.min()), threshold)


def train_classifier(source: ArraySource, steps: int, seed: int = 0) -> nn.Module:
    """A small convolutional network on digits moved by up to a pixel and made noisy."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10),
        )  # fmt: skip
        optimiser, loader = torch.optim.Adam(network.parameters(), lr=2e-3), Loader(source, 64, seed)
        decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
        with log.progress(steps, "training a classifier", True) as bar:
            for step in range(steps):
                batch, keys = loader.batch(step), Key(seed).fold("classifier", step).rows(64)
                x = moved(to_float(batch.image), keys.fold("down").integers(3), keys.fold("right").integers(3))
                assert batch.label is not None
                loss = F.cross_entropy(network(x + 0.2 * keys.fold("noise").normal(1, 8, 8)), batch.label)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                decay.step()
                bar.advance()
        return network.eval()


def moved(x: Float[Tensor, "b c h w"], down: Int[Tensor, "b"], right: Int[Tensor, "b"]) -> Float[Tensor, "b c h w"]:
    """Each image by 0, 1 or 2 less 1 pixels, black coming in."""
    b, c, h, w = x.shape
    padded = F.pad(x, (1, 1, 1, 1), value=-1.0)
    rows, columns = down[:, None] + torch.arange(h), right[:, None] + torch.arange(w)  # (b, h), (b, w)
    return padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


@torch.no_grad()
def probabilities(classifier: nn.Module, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n 10"]:
    return classifier(to_float(images)).softmax(1)


def fashion(out: Path, size: Size) -> list[Section]:
    """What the shipped model makes, and how many bits its bound spends on a few held-out images."""
    model = load("fashion-mnist")
    source = open_source("fashion-mnist-sample", split="test")
    return [pictures(model, source, out, size), bits(model, source, out, size)]


def pictures(model: Model, source: ArraySource, out: Path, size: Size) -> Section:
    """Samples, progressive generation and an interpolation of two held-out images."""
    with log.progress(size.chain, "sampling garments", True) as bar:
        samples = model.sample(size.samples, size.chain, batch=size.samples, progress=bar.advance)
    slots = min(12, size.chain)
    with log.progress(size.chain, "progressive generation", True) as bar:
        steps, times = explore.progressive(model, 6, 1, size.chain, slots, progress=bar.advance)
    at, lambdas = (0.25, 0.5, 0.75), tuple(i / 8 for i in range(9))
    mixed = explore.interpolate(model, source.images[0], source.images[1], at, lambdas, 0, size.chain)
    store.write_atomic(out / "samples.png", png(grid(samples, scale=3)))
    explore.write_grid(steps, out / "progressive.png")
    explore.write_grid(mixed, out / "interpolation.png")
    meta = model.meta
    text = (
        f"The model that is shipped: {model.parameters():,} parameters, {meta['images']:,} images seen in training. "
        f"Abbreviated: {size.chain} of its 1,000 steps."
    )
    figures = (
        Figure(grid(samples, columns=16), f"{size.samples} samples, none left out."),
        Figure(
            grid(steps.flatten(0, 1), slots),
            "Progressive generation (Fig. 6): the estimate of x_0 along the chain, at t as written.",
            tuple(f"{float(t):.2f}" for t in times),
        ),
        Figure(
            grid(mixed.flatten(0, 1), len(lambdas)),
            "Interpolation (Figs. 8 and 9) of two held-out images; each row mixes at another t.",
            tuple(f"λ {value:.2f}" for value in lambdas),
            tuple(f"t {value}" for value in at),
        ),
    )
    return Section("The shipped model: Fashion-MNIST", text, (), figures)


def bits(model: Model, source: ArraySource, out: Path, size: Size) -> Section:
    """Bits/dim by stratified t, and the rate-distortion curve of a strided chain."""
    query = evaluate.Nll(images=size.images, draws=size.draws, batch=size.images)
    with log.progress(evaluate.evaluations(model, source, query), "bits/dim", True) as bar:
        summary = evaluate.nll(model, source, query, tick=bar.advance).summary()
    curve_query = evaluate.Nll(images=size.images, steps=size.chain, batch=size.images)
    with log.progress(evaluate.evaluations(model, source, curve_query), "rate-distortion", True) as bar:
        terms = evaluate.nll(model, source, curve_query, tick=bar.advance)
    store.write_atomic(out / "rate-distortion.svg", (svg := rate_distortion(terms)).encode())
    rows = [(f"{row['step']}", f"{row['rate']:.5f}", f"{row['rmse']:.2f}") for row in evaluate.table(terms)]
    text = (
        f"The variational bound on {size.images} held-out images, {size.draws} stratified terms each instead of 1,000: "
        "unbiased, and its standard error says how rough. The curve is that of "
        f"{terms.bits.shape[1]} steps, so its rate is a little above that of the whole chain."
    )
    facts = (
        ("bits/dim", f"{summary['bits_per_dim']:.2f} ± {summary['standard_error']:.2f}"),
        ("prior", f"{summary['prior']:.5f}"),
        ("rate", f"{summary['rate']:.2f}"),
        ("decoder", f"{summary['decoder']:.2f}"),
    )
    header = ("reverse step", "rate (bits/dim)", "RMSE [0, 255]")
    table = Table(header, tuple(rows), "The form of the paper's Table 4.")
    return Section("Bits per dimension", text, facts, (Figure(svg, "Fig. 5 of the paper, of this model."),), (table,))


def rate_distortion(terms: likelihood.Terms) -> str:
    curve = terms.rate_distortion()
    return line_plot(
        [("", [row["rate"] for row in curve], [row["rmse"] for row in curve])],
        x="rate (bits/dim)", y="RMSE [0, 255]", title="Rate-distortion",
    )  # fmt: skip
