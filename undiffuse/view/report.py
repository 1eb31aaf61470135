"""One self-contained HTML page: pictures inline, no script, no request, readable on a phone and in the dark."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from undiffuse import __version__
from undiffuse.figure import png
from undiffuse.machine import disk

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5d6672; --page: #f6f7f9; --card: #fff; --edge: #dfe3e8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaee; --soft: #9aa4b1; --page: #14171b; --card: #1d2126; --edge: #31373f }
  .line-1 { stroke: #82a8f5 } .line-2 { stroke: #f0935f } .line-3 { stroke: #62c79a } .line-4 { stroke: #bd92ea }
  .name-1 { fill: #82a8f5 } .name-2 { fill: #f0935f } .name-3 { fill: #62c79a } .name-4 { fill: #bd92ea }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 58rem; margin: 0 auto; padding: 2.5rem 1rem 3rem }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.75rem 0 .5rem }
p { margin: .5rem 0; max-width: 44rem; overflow-wrap: anywhere }
.lead, figcaption, caption, footer { color: var(--soft) }
code { font: .9em ui-monospace, monospace; background: var(--edge); border-radius: .25rem; padding: .05em .3em }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0 }
dl div { display: flex; flex-direction: column-reverse; justify-content: flex-end }
dl div, figure, .table { background: var(--card); border: 1px solid var(--edge); border-radius: .6rem }
dl div, figure, .table { padding: .75rem 1rem }
dt { color: var(--soft); font-size: .82rem; line-height: 1.35 }
dd { margin: 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums }
figure, .table { margin: 1rem 0 }
figcaption { font-size: .88rem; margin-top: .6rem; max-width: 44rem }
svg { display: block; width: 100%; height: auto; max-width: 42rem }
@media (max-width: 34rem) { svg text { font-size: 17px } }
.sheet { display: grid; grid-template-columns: auto minmax(0, var(--width)); row-gap: .3rem; justify-content: start }
.sheet img { grid-column: 2; width: 100%; height: auto; display: block; image-rendering: pixelated }
.columns { grid-column: 2; display: flex } .rows { grid-column: 1; display: flex; flex-direction: column }
.columns span, .rows span { flex: 1 1 0; display: flex; align-items: center; justify-content: center }
.columns span, .rows span { color: var(--soft); font-size: clamp(.55rem, 1.9vw, .78rem); white-space: nowrap }
.columns span { min-width: 0 } .rows span { justify-content: flex-end; padding-right: .5rem }
.table { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } caption { text-align: left; font-size: .88rem }
th, td { text-align: right; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--edge); white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal }
th { color: var(--soft); font-weight: 600; font-size: .85rem }
tr:last-child td { border-bottom: 0 }
footer { margin-top: 3rem; font-size: .85rem }
"""

# The policy makes "no request" more than a promise: a browser would refuse one.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True, eq=False)
class Figure:
    """A picture, or the text of an SVG. `columns` and `rows` are written along the top and the side of a picture."""

    content: Image.Image | str
    caption: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Every cell is text, as it is to be read, `code` in backticks."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """`text` is paragraphs with a blank line between, `code` in backticks; `facts` are (name, value), shown large."""

    title: str
    text: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


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
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<div class="lead">{_paragraphs(lead)}</div>
</header>
{"".join(_section(section) for section in sections)}<footer>undiffuse {__version__}</footer>
</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{escape(section.title)}</h2>\n{_paragraphs(section.text)}"]
    if section.facts:
        tiles = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in section.facts)
        parts.append(f"<dl>{''.join(tiles)}</dl>")
    parts += [_figure(figure) for figure in section.figures]
    parts += [_table(table) for table in section.tables]
    return "\n".join([*parts, "</section>\n"])


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{_inline(figure.caption)}</figcaption>" if figure.caption else ""
    if isinstance(figure.content, str):
        return f"<figure>{figure.content}{caption}</figure>"
    data = base64.b64encode(png(figure.content)).decode()
    width, height = figure.content.size
    image = f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{escape(figure.caption)}">'
    sides = _labels("columns", figure.columns) + _labels("rows", figure.rows)
    return f'<figure><div class="sheet" style="--width: {width}px">{sides}{image}</div>{caption}</figure>'


def _labels(side: str, labels: tuple[str, ...]) -> str:
    spans = "".join(f"<span>{escape(label)}</span>" for label in labels)
    return f'<div class="{side}">{spans}</div>' if labels else ""


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>\n" for row in table.rows)
    caption = f"<caption>{_inline(table.caption)}</caption>" if table.caption else ""
    return f'<div class="table"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_inline(part)}</p>" for part in re.split(r"\n\s*\n", text.strip()) if part)


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
