"""One HTML page that needs nothing but itself: style inline, pictures and tables inside, no script, no network.

Everything that comes from outside (paths, settings, what a model wrote) is text here, never markup.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

GENERATOR = "lampctl report"  # by this a page is known to be ours


@dataclass(frozen=True)
class Paragraph:
    """Some text."""

    text: str


@dataclass(frozen=True)
class Tiles:
    """A few figures in large type: (what, value, a remark)."""

    tiles: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Table:
    """Rows of text. marked: numbers of the rows to set off. is_folded: shown when asked for, under `title`."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_labels: int = 1  # columns that are set to the left; figures go to the right
    marked: frozenset[int] = frozenset()
    is_folded: bool = False
    title: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture, be it a figure or what a model sees; its numbers, if it is drawn from some, as CSV."""

    name: str
    png: bytes
    alt: str
    caption: str = ""
    csv: str | None = None


@dataclass(frozen=True)
class Texts:
    """Texts side by side: a row for each prompt, a column for each model, what the models wrote set off."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


Part = Paragraph | Tiles | Table | Picture | Texts


@dataclass(frozen=True)
class Section:
    """A heading and what is under it. level: 2, or 3 for one inside another."""

    anchor: str
    title: str
    parts: tuple[Part, ...]
    level: int = 2


def page(title: str, subtitle: str, sections: Sequence[Section], footer: str) -> str:
    """The page as HTML."""
    links = "".join(
        f'<li class="level{section.level}"><a href="#{escape(section.anchor)}">{escape(section.title)}</a></li>'
        for section in sections
    )
    body = "\n".join(_section(section) for section in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{GENERATOR}">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<nav><ul>{links}</ul></nav>
<main>
<header><h1>{escape(title)}</h1><p class="subtitle">{escape(subtitle)}</p></header>
{body}
<footer>{escape(footer)}</footer>
</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    heading = f"h{section.level}"
    parts = "\n".join(_part(part) for part in section.parts)
    anchor = escape(section.anchor)
    return f'<section id="{anchor}"><{heading}>{escape(section.title)}</{heading}>\n{parts}\n</section>'


def _part(part: Part) -> str:
    if isinstance(part, Paragraph):
        return f"<p>{escape(part.text)}</p>"
    if isinstance(part, Tiles):
        tiles = "".join(
            f'<div class="tile"><span class="what">{escape(what)}</span><span class="value">{escape(value)}</span>'
            f'<span class="remark">{escape(remark)}</span></div>'
            for what, value, remark in part.tiles
        )
        return f'<div class="tiles">{tiles}</div>'
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Picture):
        return _picture(part)
    return _texts(part)


def _table(table: Table) -> str:
    head = "".join(f"<th{_side(i, table)}>{_lines(name)}</th>" for i, name in enumerate(table.columns))
    rows = []
    for number, row in enumerate(table.rows):
        mark = ' class="marked"' if number in table.marked else ""
        cells = "".join(f"<td{_side(i, table)}>{_lines(cell)}</td>" for i, cell in enumerate(row))
        rows.append(f"<tr{mark}>{cells}</tr>")
    html = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    if not table.is_folded:
        return html
    return f"<details><summary>{escape(table.title)}</summary>{html}</details>"


def _side(column: int, table: Table) -> str:
    return "" if column < table.num_labels else ' class="figure"'


def _lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    link = ""
    if picture.csv is not None:
        numbers = base64.b64encode(picture.csv.encode()).decode()
        name = escape(picture.name)
        link = f' <a download="{name}.csv" href="data:text/csv;base64,{numbers}">{name}.csv</a>'
    return (
        f'<figure id="figure-{escape(picture.name)}"><img alt="{escape(picture.alt)}" '
        f'src="data:image/png;base64,{data}"><figcaption>{escape(picture.caption)}{link}</figcaption></figure>'
    )


def _texts(texts: Texts) -> str:
    head = "".join(f"<th>{_lines(name)}</th>" for name in texts.columns)
    rows = []
    for prompt, written in texts.rows:
        cells = "".join(f'<td><span class="prompt">{escape(prompt)}</span>{escape(text)}</td>' for text in written)
        rows.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="wide"><table class="texts"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


_CSS = """
:root { color-scheme: light; --ink: #24292f; --soft: #667085; --line: #e3e6eb; --accent: #0072b2; --mark: #fff6e0; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; color: var(--ink); background: #fff; line-height: 1.5;
  font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", "DejaVu Sans", Arial, sans-serif; }
nav { position: fixed; inset: 0 auto 0 0; width: 15rem; overflow: auto; padding: 2.2rem 1.2rem; background: #f7f8fa;
  border-right: 1px solid var(--line); font-size: .875rem; }
nav ul { list-style: none; margin: 0; padding: 0; }
nav li { margin: .3rem 0; overflow-wrap: anywhere; }
nav li.level2 { font-weight: 600; margin-top: .7rem; }
nav li.level3 { padding-left: .9rem; }
nav a { color: inherit; text-decoration: none; }
nav a:hover { color: var(--accent); }
main { margin-left: 15rem; padding: 2.2rem 3rem 4rem; max-width: 78rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.4rem; margin: 3rem 0 .8rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2.2rem 0 .5rem; }
h2, h3 { overflow-wrap: anywhere; }
section:first-of-type h2 { margin-top: 1.6rem; }
.subtitle { color: var(--soft); margin: .4rem 0 0; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 1.6rem; }
.tile { flex: 1 1 11rem; padding: .9rem 1.1rem; border: 1px solid var(--line); border-radius: .6rem; }
.tile span { display: block; }
.what { color: var(--soft); font-size: .85rem; }
.value { font-size: 1.7rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.remark { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem .4rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; color: var(--soft); }
th + th, td + td { padding-left: .9rem; }
.figure { text-align: right; white-space: nowrap; }
tr.marked td { background: var(--mark); }
figure { margin: .6rem 0 1.6rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .875rem; margin-top: .3rem; max-width: 60rem; }
a { color: var(--accent); }
details { margin: 0 0 1.2rem; font-size: .9rem; }
summary { cursor: pointer; color: var(--accent); }
table.texts { table-layout: fixed; width: max-content; min-width: 100%; }
table.texts th { width: 17rem; }
table.texts td { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { font-weight: 650; color: var(--accent); }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .85rem; }
@media (max-width: 60rem) { nav { display: none; } main { margin: 0; padding: 1.2rem; } }
@media print { nav { display: none; } main { margin: 0; padding: 0; max-width: none; }
  figure, tr { break-inside: avoid; } }
"""
