"""The report as one HTML file: styles, pictures and tables inside it, no script, no network.

The markup is in `page.html.jinja`, which escapes every value (paths, settings, generated text).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined

GENERATOR = "lampctl report"  # identifies a page of ours in a folder
FILES = "lampctl-files"  # of the <meta> that names the files beside the page, as JSON


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Tiles:
    """A few numbers in large type: (title, value, remark)."""

    kind: ClassVar[str] = "tiles"
    tiles: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        num_labels: number of left-aligned columns; the others are aligned to the right.
        marked: indices of the highlighted rows.
        is_folded: whether the reader has to open it, under `title`.
    """

    kind: ClassVar[str] = "table"
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_labels: int = 1
    marked: frozenset[int] = frozenset()
    is_folded: bool = False
    title: str = ""


@dataclass(frozen=True)
class Picture:
    """A plot or an image; csv: the numbers of a plot."""

    kind: ClassVar[str] = "picture"
    name: str
    png: bytes
    alt: str
    caption: str = ""
    csv: str | None = None


@dataclass(frozen=True)
class Texts:
    """Generated texts side by side: one row per prompt, one column per model."""

    kind: ClassVar[str] = "texts"
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


Part = Paragraph | Tiles | Table | Picture | Texts


@dataclass(frozen=True)
class Section:
    """A heading and its contents. level: 2, or 3 for a subsection."""

    anchor: str
    title: str
    parts: tuple[Part, ...]
    level: int = 2


def page(title: str, subtitle: str, sections: Sequence[Section], footer: str, files: Sequence[str] = ()) -> str:
    """Render the page as HTML. Every argument is text: markup in it is escaped. files: written beside the page."""
    loader = PackageLoader("lampctl", "report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    css, _, _ = loader.get_source(environment, "page.css")
    values = {
        "title": title,
        "subtitle": subtitle,
        "sections": sections,
        "footer": footer,
        "files": json.dumps(list(files)),
    }
    return environment.get_template("page.html.jinja").render(values, generator=GENERATOR, css=css, files_name=FILES)
