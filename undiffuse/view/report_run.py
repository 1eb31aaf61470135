"""`undiffuse report`: a run, or any model, on one page: what it draws, what was measured of it, what it cost."""

import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from undiffuse import __version__
from undiffuse.config import plain
from undiffuse.data.made import channels
from undiffuse.errors import NotFiniteError, UsageError
from undiffuse.machine import log
from undiffuse.machine.device import name_of
from undiffuse.measure import nll
from undiffuse.model.facts import all_seen, images_seen
from undiffuse.model.model import Model
from undiffuse.view import explore, pieces, results
from undiffuse.view.report import Figure, Listing, Section, write_report
from undiffuse.view.subject import OTHER, Data, Drawing, Subject, some

AT, MIXTURES, STRIPS, SLOTS = (0.0, 0.25, 0.5, 0.75, 1.0), 9, 6, 12
BITS_IMAGES, DRAWS = 64, 50  # of the estimate where nothing was measured
COMPARED = 4e8  # values of a training set that samples are compared with
ROWS = 20  # classes that have a row each
CLASS_ROW = 8


@dataclass(frozen=True, eq=False)
class Page:
    """A page in the making: its subject, what is drawn for it, and what is told of the work that is done."""

    about: Subject
    data: Data | None
    how: Drawing
    command: str
    tick: Callable[[int], None] = lambda count: None

    def __post_init__(self) -> None:
        self.how.check(self.model)

    @property
    def model(self) -> Model:
        return self.about.model

    def classes(self) -> list[int]:
        """The classes that have a row of samples each; none where there are no classes, or too many."""
        classes = self.model.classes
        return [] if classes is None or len(classes.trained) > ROWS else classes.trained

    def per_row(self) -> int:
        each = self.how.count(self.model) // len(self.classes())
        return max(1, each if self.how.n is not None else min(CLASS_ROW, each))

    def label(self) -> str | None:
        return None if self.model.classes is None else "random"

    def one_label(self) -> int | None:
        """The class of images that belong together, where one must be said."""
        classes = self.model.classes
        return None if classes is None or classes.unlabelled else classes.trained[0]

    def work(self) -> int:
        """Evaluations of the network, all together."""
        length, model = self.how.length(self.model), self.model
        n = self.per_row() * len(self.classes()) if self.classes() else self.how.count(model)
        found = n * length + STRIPS * length
        if model.config.bounds is not None:
            return found
        with suppress(UsageError):  # the page says then why there is none
            found += MIXTURES * explore.interpolation_steps(model, AT, length, self.how.named(model))
        if self.data is None or self.about.bound is not None:
            return found
        return found + nll.evaluations(model, self.data.shown, self.query())

    def query(self) -> nll.Nll:
        """The estimate of the bound where nothing was measured."""
        total = len(nll.Nll().times(self.model.process)) - 1
        return nll.Nll(images=BITS_IMAGES, draws=min(DRAWS, total), seed=self.how.seed)


def write(page: Page, out: Path, tick: Callable[[int], None]) -> None:
    """Makes the page and writes it, whole or not at all; `tick(n)` is told of every n of its `work`.

    Raises UsageError, DataError and StorageError.
    """
    page, started = replace(page, tick=tick), time.monotonic()
    samples, drawn = _samples(page)
    body = [
        drawn,
        *_guarded("Progressive generation", _progressive, page),
        *_guarded("Between two pictures", lambda page: _interpolation(page, samples), page),
        *_scores(page),
        *_memorisation(page, samples),
        *_guarded("Bits per dimension", _bits, page),
        *_training(page),
        _cost(page),
        _settings(page),
    ]
    took = log.duration(time.monotonic() - started)
    title = f"{Path(page.about.spec).resolve().name if page.about.run else page.about.spec}"
    write_report(out, [_glance(page), *body, _made(page, took)], title, _lead(page))


def _guarded(title: str, make: Callable[[Page], Section], page: Page) -> list[Section]:
    """The section, or why there is none: weights that cannot be sampled are no reason to have no page."""
    try:
        return [make(page)]
    except (UsageError, NotFiniteError) as error:
        return [Section(title, f"None can be made: {error}.")]


# What is seen first


def _lead(page: Page) -> str:
    model, (c, h, w) = page.model, page.model.image_shape
    found = f"A denoising diffusion model of {w}×{h} images, {channels(c)}"
    about = model.meta.get("recipe", {}).get("about") if isinstance(model.meta.get("recipe"), dict) else None
    return found + "." + (f" {about}." if about else "")


def _glance(page: Page) -> Section:
    """The numbers that one asks for first."""
    model, about = page.model, page.about
    facts = [("weights", f"{model.parameters():,}")]
    if about.steps is not None:
        facts.append(("training steps", f"{about.steps:,}"))
    if model.meta.get("images"):
        own, seen = model.meta["images"], all_seen(model.meta)
        since = f", {own:,} of them since it began from other weights" if seen > own else ""
        facts.append((f"images seen in training{since}", f"{seen:,}"))
    if about.log:
        facts.append(("training time", log.duration(pieces.seconds(about.log))))
    if about.bound is not None:
        facts.append(("bits/dim", f"{about.bound.summary['bits_per_dim']:.3f}"))
    for found in about.evaluations:
        where = f", {found.path.name}" if len(about.evaluations) > 1 else ""
        facts += [(row["score"] + where, results.number(row["value"])) for row in found.scores[:1]]
    return Section("At a glance", facts=tuple(facts))


# What it draws


def _samples(page: Page) -> tuple[UInt8[Tensor, "n c h w"] | None, Section]:
    model, rows, began = page.model, page.classes(), time.monotonic()
    n = page.per_row() if rows else page.how.count(model)
    batch = min(64, model.count(n, "all" if rows else None))
    try:
        images = model.sample(
            n, page.how.length(model), page.how.named(model), page.how.seed, batch, "all" if rows else page.label(),
            lambda steps: page.tick(steps * batch),
        )  # fmt: skip
    except (UsageError, NotFiniteError) as error:
        return None, Section("Samples", f"None can be drawn: {error}.")
    took, columns = time.monotonic() - began, n if rows else None
    caption = f"{len(images)} samples, not selected: {page.how.said(model)}, {took:.1f} s on {name_of(model.device)}."
    figure, beside = pieces.samples(images, caption, columns), tuple[Figure, ...]()
    if page.data is not None:
        real = some(page.data.shown, len(images))
        words = f"As many {page.data.words} of {page.data.spec}, spread evenly over it."
        beside = (pieces.samples(real, words, columns),)
    if rows and model.classes is not None:
        figure = replace(figure, rows=tuple(model.classes.names[i] for i in rows))
        return images, Section("Samples", "A row for each class.", figures=(figure, *beside))
    return images, Section("Samples", gallery=(figure, *beside), least="20rem")


def _progressive(page: Page) -> Section:
    length = page.how.length(page.model)
    images, times = explore.progressive(
        page.model, STRIPS, page.how.seed, length, min(SLOTS, length), lambda steps: page.tick(steps * STRIPS),
        page.how.named(page.model), page.label(),
    )  # fmt: skip
    return pieces.progressive(images, times)


def _interpolation(page: Page, samples: UInt8[Tensor, "n c h w"] | None) -> Section:
    if page.data is not None and len(page.data.shown) > 1:
        (a, b), what = some(page.data.shown, 2), f"Two {page.data.words}, the first and the last column at t = 0"
    elif samples is not None and len(samples) > 1:
        (a, b), what = (samples[0], samples[-1]), "The first and the last of the samples above"
    else:
        raise UsageError("there are no two pictures to mix; give DATA too")
    lambdas = tuple(i / (MIXTURES - 1) for i in range(MIXTURES))
    images = explore.interpolate(
        page.model, a, b, AT, lambdas, page.how.seed, page.how.length(page.model),
        lambda steps: page.tick(steps * MIXTURES), page.how.named(page.model), page.one_label(),
    )  # fmt: skip
    return pieces.interpolation(images, what, AT, lambdas)


# What was measured


def _place(page: Page, name: str) -> str:
    """Where a measurement would be found without being named."""
    return str(Path(page.about.spec) / name) if page.about.run is not None else name


def _given(page: Page) -> str:
    return page.data.spec if page.data is not None and "\n" not in page.data.spec else "DATA"


def _command(page: Page, *words: str) -> str:
    return shlex.join(["undiffuse", words[0], page.about.spec, _given(page), *words[1:]])


def _nll_command(page: Page) -> str:
    """Of the whole chain, on the images that there are."""
    split = () if page.data is None or page.data.held_out is not None else ("--split", "train")
    return _command(page, "nll", *split, "-n", "100", "--out", _place(page, "nll"))


def _eval_command(page: Page) -> str:
    place = _place(page, "eval")
    how = () if page.model.config.bounds is not None else ("--steps", "50", "--solver", "ddim")
    return _command(page, "eval", "-n", "2000", *how, "--out", place)


def _option(page: Page, name: str) -> str:
    """What makes the page see a measurement that is not in the folder of a run."""
    return "" if page.about.run is not None else f", with `--{name} {_place(page, name)}`"


def _scores(page: Page) -> list[Section]:
    found = page.about.evaluations
    unfinished = page.about.unfinished_scores
    if not found:
        text = "Not measured. This command measures FID and its kin, with the protocol beside the number; "
        text += f"the same `undiffuse report` then shows it{_option(page, 'eval')}."
        return [Section("Scores", "\n\n".join([*unfinished, text]), commands=(_eval_command(page),))]
    sections = []
    for each in found:
        title = "Scores" if len(found) == 1 else f"Scores: {each.path.name}"
        stale = [f"These scores are {OTHER}"] if page.about.is_stale(each) else []
        sections.append(results.scores(each, title, "\n\n".join([*unfinished, *stale])))
        sections += [section for section in [results.along(each)] if section is not None]
    return sections


def _memorisation(page: Page, samples: UInt8[Tensor, "n c h w"] | None) -> list[Section]:
    """What evaluations say of copies; where there is none, the samples that are nearest to a training image."""
    measured = [section for found in page.about.evaluations if (section := results.memorisation(found)) is not None]
    if measured:
        return measured
    figures, text = tuple[Figure, ...](), ""
    train = None if page.data is None else page.data.train
    if train is not None and samples is not None:
        c, h, w = page.model.image_shape
        if len(train) * c * h * w <= COMPARED:
            figures = (pieces.closest(samples, train),)
        else:
            text = "The training set is large, so the samples were not compared with it."
    plain = "A plain picture is near to everything, so a small distance alone does not prove a copy." if figures else ""
    steps = () if page.model.config.bounds is not None else ("--steps", "50")
    tells = "The first command tells how many samples are copies; the second shows samples beside training images."
    commands = (_eval_command(page), _command(page, "neighbours", *steps, "--out", "neighbours.png"))
    words = " ".join(filter(None, [text or ("" if figures else "Not measured."), plain, tells]))
    return [Section("Memorisation", words, figures=figures, commands=commands)]


def _bits(page: Page) -> Section:
    about, process = page.about, page.model.process
    if page.model.config.bounds is not None:
        return Section("Bits per dimension", "A distilled model has no bound; that of which it was made has one.")
    notes = about.unfinished_bound
    if about.bound is not None:
        bound = about.bound
        how = f"Measured by `undiffuse nll`, from {bound.path}."
        if about.is_stale(bound):
            how += f" It is {OTHER}"
        found = results.bits(bound.terms, bound.summary, bound.query, process, how)
        return (
            found if bound.whole else _with(found, page, f"\n\nRate-distortion needs every term of the chain: {notes}")
        )
    if page.data is None:
        text = "Not measured. This command measures the bound on 100 held-out images, with all terms of the chain; "
        text += f"the same `undiffuse report` then shows it, with loss by t and rate-distortion{_option(page, 'nll')}."
        return Section("Bits per dimension", f"{notes}\n\n{text}", commands=(_nll_command(page),))
    query, source = page.query(), page.data.shown
    terms = nll.terms_of(page.model, source, query, tick=page.tick)
    how = (
        f"An estimate for this page: the variational bound on {query.count(source)} {page.data.words} of "
        f"{page.data.spec}, with {query.draws} stratified times each. The command below measures every term on 100 "
        f"images, which also gives rate-distortion; the same `undiffuse report` then shows it{_option(page, 'nll')}."
    )
    said = {"draws": query.draws, "seed": query.seed}
    return _with(results.bits(terms, terms.summary(), said, process, how), page, notes)


def _with(section: Section, page: Page, text: str) -> Section:
    """With the command that measures the whole chain."""
    return Section(
        section.title, f"{section.text}\n\n{text}", section.facts, section.figures, section.tables, section.gallery,
        listings=section.listings, least=section.least, commands=(_nll_command(page),),
    )  # fmt: skip


# What it took


KEYS = {"step", "images", "loss", "grad_norm", "lr", "images_per_second", "held_out"} | pieces.QUARTERS


def _training(page: Page) -> list[Section]:
    rows = page.about.log
    if not rows:
        text = (
            "This model comes without the log of its training; `undiffuse report` of the run's folder shows its curves."
        )
        return [Section("Training", text)]
    figures = [pieces.loss(rows), pieces.loss_by_time(rows)]
    held = [(row["held_out"], row["step"]) for row in rows if "held_out" in row]
    text = ""
    if held:
        least, last = min(held), held[-1]
        text = f"The held-out loss ends at {last[0]:.5f}" + (
            ", its lowest." if least[1] == last[1] else f"; its lowest was {least[0]:.5f}, at step {least[1]:,}."
        )
    more = dict.fromkeys(key for row in rows for key in row if key not in KEYS)
    figures += [pieces.plot({"": pieces.line(rows, key)}, "step", key, key.replace("_", " ").capitalize(), "")
                for key in more]  # fmt: skip
    figures += [
        pieces.plot({"": pieces.line(rows, "lr")}, "step", "learning rate", "Learning rate", ""),
        pieces.plot({"": pieces.line(rows, "grad_norm")}, "step", "norm", "Norm of the gradient", "", log_y=True),
    ]
    said = {key: row[key] for row in rows for key in more if isinstance(row.get(key), dict)}
    cards = tuple(Listing(tuple(results.flat(value)), key.capitalize()) for key, value in said.items())
    return [Section("Training", text, gallery=pieces.present(figures), listings=cards, least=pieces.HALF)]


def _cost(page: Page) -> Section:
    meta, rows = page.model.meta, page.about.log
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    lines = [("weights", f"{page.model.parameters():,}")]
    if rows:
        lines.append(("training time, interruptions left out", log.duration(pieces.seconds(rows))))
    if speeds:
        lines.append(("images/s in training (median)", f"{median(speeds):,.0f}"))
    lines += [("steps", f"{meta['step']:,}")] if "step" in meta else []
    lines += [("images seen", images_seen(meta))] if "images" in meta else []
    environment = meta.get("environment")
    cards = [Listing(tuple(lines), "Training")]
    if isinstance(environment, dict):
        cards.append(Listing(tuple(results.flat(environment)), "Machine of the training"))
    return Section("Time and cost", listings=tuple(cards))


def _settings(page: Page) -> Section:
    """All of the recipe, or of the model where that is not known: a card for each section."""
    recipe = page.model.meta.get("recipe")
    is_known = isinstance(recipe, dict)
    said: dict[str, Any] = dict(recipe) if is_known else plain(page.model.config)
    cards, single = list[Listing](), list[tuple[str, str]]()
    for name, value in said.items():
        if isinstance(value, dict) and value:
            cards.append(Listing(tuple(results.flat(value)), name))
        elif value and name != "about":  # which stands under the title
            single.append((name, results.words(value)))
    text = (
        "What `config.toml` in the folder of the run says." if is_known else "How this model was trained is not known."
    )
    return Section("Settings", text, listings=(*cards, *([Listing(tuple(single), "other")] if single else [])))


def _made(page: Page, took: str) -> Section:
    rows = (
        ("model", page.about.spec), ("weights", page.model.meta.get("weights", "as they are in the file")),
        ("sha256", page.about.digest), ("drawn with", page.how.said(page.model)),
        ("device", name_of(page.model.device)), ("threads", str(torch.get_num_threads())), ("took", took),
        ("undiffuse", __version__), ("torch", torch.__version__),
    )  # fmt: skip
    return Section("How this page was made", commands=(page.command,), listings=(Listing(rows),))
