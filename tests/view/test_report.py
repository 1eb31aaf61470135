"""The page is parsed, not trusted: well-formed, escaped, complete in itself."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import torch
from PIL import Image

from undiffuse.figure import grid, line_plot
from undiffuse.view.report import MANY, POLICY, Figure, Frames, Listing, Section, Table, render, write_report

VOID = {"meta", "img", "input"}
SHEET = grid(torch.arange(6 * 3 * 4, dtype=torch.uint8).reshape(6, 1, 3, 4), columns=3)
PLOT = line_plot([("", [0, 1], [1, 0])], "rate", "RMSE", "Curve")
SECTIONS = (
    Section(
        "Digits <8×8>",
        "First & `code <x>`.\n\nSecond.",
        facts=(("images seen", "204,800"), ("recognised", "93 %")),
        figures=(Figure(SHEET, 'a "caption"', columns=("0.1", "0.2", "0.3"), rows=("one", "two")), Figure(PLOT)),
        tables=(Table(("step", "rate"), (("1000", "1.78"), ("900", "<0.2"))),),
    ),
    Section("Empty"),
)


class Page(HTMLParser):
    """Tags with their attributes, the text inside each kind of tag; fails on a tag that is closed out of order."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)


def test_everything_given_is_on_the_page_and_escaped():
    page = Page(render(SECTIONS, "A <demo>", "All of it."))
    assert page.texts["h1"] == page.texts["title"] == ["A <demo>"]
    assert page.texts["h2"] == ["Digits <8×8>", "Empty"]
    assert page.texts["p"] == ["All of it.", "First & ", ".", "Second."]
    assert page.texts["code"] == ["code <x>"]
    assert list(zip(page.texts["dt"], page.texts["dd"], strict=True)) == list(SECTIONS[0].facts)
    assert page.texts["figcaption"] == ['a "caption"']
    assert page.texts["span"] == ["0.1", "0.2", "0.3", "one", "two"]
    assert (page.texts["th"], page.texts["td"]) == (["step", "rate"], ["1000", "1.78", "900", "<0.2"])


def test_pictures_are_inline_to_the_pixel_and_plots_are_svg():
    page = Page(render(SECTIONS))
    (image,) = (attributes for tag, attributes in page.tags if tag == "img")
    data = base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,"))
    assert (np.asarray(Image.open(io.BytesIO(data))) == np.asarray(SHEET)).all()
    assert (image["width"], image["height"], image["alt"]) == (str(SHEET.width), str(SHEET.height), 'a "caption"')
    assert len([tag for tag, _ in page.tags if tag == "polyline"]) == 1


def test_nothing_is_fetched_from_anywhere():
    html = render(SECTIONS)
    page = Page(html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(str(link).startswith(("data:", "#")) for link in links)
    assert re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", html) == []
    assert {"http-equiv": "Content-Security-Policy", "content": POLICY} in [attributes for _, attributes in page.tags]


def test_the_same_sections_give_the_same_bytes_in_a_new_folder(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(path, SECTIONS, "Demo")
    assert path.read_bytes() == render(SECTIONS, "Demo").encode()
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_many_sections_have_links_and_each_leads_to_its_section():
    sections = [Section(f"Part {i}") for i in range(MANY)]
    page = Page(render(sections))
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == [f"#{attributes['id']}" for tag, attributes in page.tags if tag == "section"]
    assert page.texts["a"] == [section.title for section in sections]
    assert "a" not in {tag for tag, _ in Page(render(sections[1:])).tags}


def test_listings_commands_a_gallery_and_strong_cells():
    section = Section(
        "All",
        gallery=(Figure(PLOT, legend=("a <b>", "c")), Figure(SHEET)),
        listings=(Listing((("lr", "<1>"), ("seed", "0")), "train"),),
        commands=("undiffuse eval 'a b' <DATA>",),
        tables=(Table(("", "A", "B"), (("FD", "1", "2"), ("KD", "4", "3")), strong=frozenset({(0, 1), (1, 2)})),),
    )
    page = Page(render([section]))
    assert page.texts["pre"] == ["undiffuse eval 'a b' <DATA>"]
    assert (page.texts["h3"], page.texts["dt"], page.texts["dd"]) == (["train"], ["lr", "seed"], ["<1>", "0"])
    assert page.texts["li"] == ["a <b>", "c"]
    assert [attributes["class"] for tag, attributes in page.tags if tag == "i"] == ["key-1", "key-2"]
    assert (page.texts["strong"], page.texts["td"]) == (["1", "3"], ["FD", "2", "KD", "4"])


def test_of_frames_one_is_chosen_without_a_script():
    frames = Frames(tuple((f"<{size}>", SHEET, ("one", "two")) for size in (20, 50, 80)), "after `n` bytes")
    html = render([Section("Files", frames=(frames, frames))])
    page = Page(html)
    buttons = [attributes for tag, attributes in page.tags if tag == "input"]
    assert [button["name"] for button in buttons] == ["s0f0"] * 3 + ["s0f1"] * 3  # two rows, each with its own choice
    assert ["checked" in button for button in buttons] == [False, True, False] * 2
    labels = [attributes["for"] for tag, attributes in page.tags if tag == "label"]
    assert labels == [button["id"] for button in buttons] and len(set(labels)) == 6
    assert page.texts["label"] == ["<20>", "<50>", "<80>"] * 2 and page.texts["figcaption"] == ["after ", " bytes"] * 2
    said = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert said == [f"<{size}>: after `n` bytes" for size in (20, 50, 80)] * 2 and "<script" not in html
    groups = [attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "radiogroup"]
    assert groups == ["after `n` bytes"] * 2
    assert ".frames input:checked ~ .sheet { display: grid }" in html


def test_paper_is_never_dark():
    html = render(SECTIONS)
    assert html.count("prefers-color-scheme: dark") == html.count("@media screen and (prefers-color-scheme: dark)") == 2
    assert html.count("break-inside: avoid") > 1
