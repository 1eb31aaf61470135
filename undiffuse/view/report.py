"""One self-contained HTML page: pictures inline, no script, no request, readable on a phone and in the dark."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from undiffuse import __version__
from undiffuse.figure import COLOURS, png
from undiffuse.machine import disk

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5d6672; --page: #f6f7f9; --card: #fff; --edge: #dfe3e8 }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e7eaee; --soft: #9aa4b1; --page: #14171b; --card: #1d2126; --edge: #31373f }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 58rem; margin: 0 auto; padding: 2.5rem 1rem 3rem }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; overflow-wrap: anywhere }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.75rem 0 .5rem; scroll-margin-top: 1rem; overflow-wrap: anywhere }
h3 { font-size: .95rem; margin: 0 0 .5rem }
p { margin: .5rem 0; max-width: 44rem; overflow-wrap: anywhere }
.lead, figcaption, caption, footer { color: var(--soft) }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; margin: 1.25rem 0 0; font-size: .9rem }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: .2em }
code { font: .9em ui-monospace, monospace; background: var(--edge); border-radius: .25rem; padding: .05em .3em }
pre { margin: .75rem 0; padding: .7rem 1rem; border: 1px solid var(--edge); border-radius: .6rem; overflow-x: auto }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, monospace; max-width: 44rem }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1.25rem 0 }
.facts div { display: flex; flex-direction: column-reverse; justify-content: flex-end }
.facts div, figure, .table, .list { background: var(--card); border: 1px solid var(--edge); border-radius: .6rem }
.facts div, figure, .table, .list { padding: .75rem 1rem }
dt { color: var(--soft); font-size: .82rem; line-height: 1.35 }
dd { margin: 0; overflow-wrap: anywhere }
.facts dd { font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums }
.lists { columns: 18rem; column-gap: .75rem; margin: 1rem 0 }
.list { break-inside: avoid; margin: 0 0 .75rem }
.list dl { display: grid; grid-template-columns: minmax(7.8rem, 2fr) minmax(0, 3fr); gap: .15rem .75rem; margin: 0 }
.list dt, .list dd { font-size: .85rem; line-height: 1.45; overflow-wrap: anywhere }
figure, .table { margin: 1rem 0 }
figcaption { font-size: .88rem; margin-top: .6rem; max-width: 44rem; overflow-wrap: anywhere }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least)), 1fr)); gap: .75rem }
.gallery { margin: 1rem 0 } .gallery figure { margin: 0; min-width: 0 }
svg { display: block; width: 100%; height: auto; max-width: 42rem; overflow: visible }
.gallery svg text { font-size: 16px }
@media (max-width: 34rem) {
  svg text { font-size: 16px } .gallery figure { padding: .5rem } table { font-size: .85rem }
  th, td { padding-right: .6rem }
}
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .4rem 0 0; padding: 0; list-style: none }
.legend li { font-size: .85rem; overflow-wrap: anywhere }
.legend i { display: inline-block; width: 1.1em; height: .25em; margin-right: .45em; vertical-align: .25em }
.legend i { border-radius: .1em; print-color-adjust: exact; -webkit-print-color-adjust: exact }
.sheet { display: grid; grid-template-columns: auto minmax(0, var(--width)); row-gap: .3rem; justify-content: start }
.sheet img { grid-column: 2; width: 100%; height: auto; display: block; image-rendering: pixelated }
.columns { grid-column: 2; display: flex } .rows { grid-column: 1; display: flex; flex-direction: column }
.columns span, .rows span { flex: 1 1 0; display: flex; align-items: center; justify-content: center }
.columns span, .rows span { color: var(--soft); font-size: clamp(.55rem, 1.9vw, .78rem); white-space: nowrap }
.columns span { min-width: 0 } .rows span { justify-content: flex-end; padding-right: .5rem }
.frames { display: grid; grid-template-columns: repeat(var(--count), minmax(0, 1fr)); row-gap: .2rem }
.frames input, .frames label { grid-column: var(--at); justify-self: center }
.frames .frame { display: contents } .frames input { grid-row: 1; margin: 0; cursor: pointer; accent-color: #3f78d8 }
.frames::before { content: ""; grid-row: 1; grid-column: 1 / -1; align-self: center; width: 100%; height: 2px }
.frames::before { background: var(--edge); z-index: 0 } .frames input { z-index: 1; align-self: center }
.frames label { grid-row: 2; color: var(--soft); font-size: clamp(.55rem, 1.9vw, .82rem); cursor: pointer }
.frames input:checked + label { color: var(--ink); font-weight: 600 }
.frames .sheet { grid-row: 3; grid-column: 1 / -1; display: none; width: 100%; margin-top: .6rem }
.frames input:checked ~ .sheet { display: grid }
.frames figcaption { grid-row: 4; grid-column: 1 / -1 }
.table { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } caption { text-align: left; font-size: .88rem }
caption { margin-bottom: .3rem }
th, td { text-align: right; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--edge); white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7rem }
.words th, .words td { text-align: left; vertical-align: top; white-space: normal }
th { color: var(--soft); font-weight: 600; font-size: .85rem }
tr:last-child td { border-bottom: 0 }
footer { margin-top: 3rem; font-size: .85rem }
@page { margin: 15mm }
@media print {
  :root { --ink: #000; --soft: #333; --page: #fff; --card: #fff; --edge: #bbb; color-scheme: light }
  body { font-size: 10.5pt } main { max-width: none; padding: 0 } nav { display: none }
  h2 { margin-top: 1.6rem; break-after: avoid } section > p { break-after: avoid; break-inside: avoid }
  p, figcaption { orphans: 3; widows: 3 }
  figure, .facts div, .list, pre, tr { break-inside: avoid } thead { display: table-header-group }
  .frames { grid-template-columns: repeat(3, minmax(0, 1fr)) } .frames::before, .frames input { display: none }
  .frames .frame { display: block; width: 100% } .frames .sheet { display: grid }
  .table { overflow: visible } table { font-size: .9em } td, th { white-space: normal }
  .gallery { grid-template-columns: repeat(2, minmax(0, 1fr)) } .gallery svg text { font-size: 20px }
  code { background: #eee } img { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""

# Those of figure.py, for lines, the names beside them, and the legends of a page; lighter in the dark.
LIGHTER = ("#82a8f5", "#f0935f", "#62c79a", "#bd92ea", "#ee88b8", "#cdbb55", "#6cc5db", "#c9a08a")

MANY = 5  # sections from which on there is a list of them

# The policy makes "no request" more than a promise: a browser would refuse one.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True, eq=False)
class Figure:
    """A picture, or the text of an SVG. `columns` and `rows` are written along the top and the side of a picture.

    `legend` names the lines of a plot, below it: where names are long, or the screen is small. `alt` says what a
    picture without a caption shows.
    """

    content: Image.Image | str
    caption: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    legend: tuple[str, ...] = ()
    alt: str = ""


@dataclass(frozen=True, eq=False)
class Frames:
    """Pictures of which one is seen, chosen along a row of buttons, by arrow keys too; on paper all of them are."""

    pictures: tuple[tuple[str, Image.Image, tuple[str, ...]], ...]  # label, picture, names of its rows
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Every cell is text, as it is to be read, `code` in backticks. `strong` are cells, as (row, column).

    Cells are numbers, on the right, but for those of the first column, unless they are words.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    strong: frozenset[tuple[int, int]] = frozenset()
    words: bool = False


@dataclass(frozen=True)
class Listing:
    """Names with values, small, in a card; several share the width of the page."""

    rows: tuple[tuple[str, str], ...]
    title: str = ""


@dataclass(frozen=True)
class Section:
    """`text` is paragraphs with a blank line between, `code` in backticks; `facts` are (name, value), shown large.

    The figures of the `gallery` stand beside each other, each at least `least` wide. `commands` are lines to paste.
    """

    title: str
    text: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    gallery: tuple[Figure, ...] = ()
    listings: tuple[Listing, ...] = ()
    commands: tuple[str, ...] = ()
    least: str = "18rem"
    frames: tuple[Frames, ...] = ()


def write_report(path: Path, sections: Sequence[Section], title: str = "undiffuse", lead: str = "") -> None:
    """Writes the page, whole or not at all; `lead` stands under the title. Raises StorageError."""
    disk.write_atomic(path, render(sections, title, lead).encode())


def render(sections: Sequence[Section], title: str = "undiffuse", lead: str = "") -> str:
    """The page as text; the same sections give the same text."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}{_colours()}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<div class="lead">{_paragraphs(lead)}</div>
{_contents(sections)}</header>
{"".join(_section(i, section) for i, section in enumerate(sections))}<footer>undiffuse {__version__}</footer>
</main>
</body>
</html>
"""


def _colours() -> str:
    def rules(colours: Sequence[str]) -> str:
        return "".join(
            f".line-{i} {{ stroke: {colour} }} .name-{i} {{ fill: {colour} }} .key-{i} {{ background: {colour} }}\n"
            for i, colour in enumerate(colours, 1)
        )

    return f"{rules(COLOURS)}@media screen and (prefers-color-scheme: dark) {{\n{rules(LIGHTER)}}}\n"


def _contents(sections: Sequence[Section]) -> str:
    """Links to the sections, where they are many."""
    links = [f'<a href="#s{i}">{escape(section.title)}</a>' for i, section in enumerate(sections)]
    return f"<nav>{' '.join(links)}</nav>\n" if len(links) >= MANY else ""


def _section(number: int, section: Section) -> str:
    parts = [f'<section id="s{number}">\n<h2>{escape(section.title)}</h2>\n{_paragraphs(section.text)}']
    if section.facts:
        parts.append(f'<dl class="facts">{_pairs(section.facts)}</dl>')
    parts += [f"<pre>{escape(command)}</pre>" for command in section.commands]
    if section.gallery:
        figures = "".join(map(_figure, section.gallery))
        parts.append(f'<div class="gallery" style="--least: {section.least}">{figures}</div>')
    parts += [_figure(figure) for figure in section.figures]
    parts += [_frames(f"s{number}f{i}", frames) for i, frames in enumerate(section.frames)]
    parts += [_table(table) for table in section.tables]
    if section.listings:
        parts.append(f'<div class="lists">{"".join(map(_listing, section.listings))}</div>')
    return "\n".join([*parts, "</section>\n"])


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)


def _listing(listing: Listing) -> str:
    title = f"<h3>{escape(listing.title)}</h3>" if listing.title else ""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in listing.rows)
    return f'<div class="list">{title}<dl>{rows}</dl></div>'


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{_inline(figure.caption)}</figcaption>" if figure.caption else ""
    if isinstance(figure.content, str):
        return f"<figure>{figure.content}{_legend(figure.legend)}{caption}</figure>"
    return f"<figure>{_sheet(figure, figure.content)}{caption}</figure>"


def _sheet(figure: Figure, picture: Image.Image) -> str:
    data = base64.b64encode(png(picture)).decode()
    width, height = picture.size
    alt = escape(figure.caption or figure.alt)
    image = f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{alt}">'
    sides = _labels("columns", figure.columns) + _labels("rows", figure.rows)
    return f'<div class="sheet" style="--width: {width}px">{sides}{image}</div>'


def _frames(name: str, frames: Frames) -> str:
    parts, shown = list[str](), len(frames.pictures) // 2
    for i, (label, picture, rows) in enumerate(frames.pictures):
        sheet = _sheet(Figure(picture, f"{label}: {frames.caption}", rows=rows), picture)
        button = f'<input type="radio" name="{name}" id="{name}-{i}"{" checked" * (i == shown)}>'
        text = f'<label for="{name}-{i}">{escape(label)}</label>'
        parts.append(f'<div class="frame" style="--at: {i + 1}">{button}{text}{sheet}</div>')
    caption = f"<figcaption>{_inline(frames.caption)}</figcaption>" if frames.caption else ""
    role = f'role="radiogroup" aria-label="{escape(frames.caption)}"'
    return f'<figure class="frames" {role} style="--count: {len(parts)}">{"".join(parts)}{caption}</figure>'


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<li><i class="key-{i % len(COLOURS) + 1}"></i>{escape(name)}</li>' for i, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>' if names else ""


def _labels(side: str, labels: tuple[str, ...]) -> str:
    spans = "".join(f"<span>{escape(label)}</span>" for label in labels)
    return f'<div class="{side}">{spans}</div>' if labels else ""


def _table(table: Table) -> str:
    def cell(row: int, column: int, text: str) -> str:
        inside = f"<strong>{_inline(text)}</strong>" if (row, column) in table.strong else _inline(text)
        return f"<td>{inside}</td>"

    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = "".join(
        f"<tr>{''.join(cell(i, j, text) for j, text in enumerate(row))}</tr>\n" for i, row in enumerate(table.rows)
    )
    caption = f"<caption>{_inline(table.caption)}</caption>" if table.caption else ""
    kind = ' class="words"' if table.words else ""
    return (
        f'<div class="table"><table{kind}>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_inline(part)}</p>" for part in re.split(r"\n\s*\n", text.strip()) if part)


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
