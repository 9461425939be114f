"""WikiText-2 as a data source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stages.data.hub_text import HubText
from stages.data.text_source import Use


@dataclass(frozen=True)
class WikiText2(HubText):
    """WikiText-2, raw: the usual text for perplexity."""

    kind = "wikitext2"
    title = "WikiText-2"
    help = "WikiText-2 (raw) from the hub, or a local copy of its rows."
    repo = "Salesforce/wikitext"
    column = "text"
    config = "wikitext-2-raw-v1"
    split: ClassVar[Mapping[Use, str]] = {"calibration": "train", "evaluation": "test"}

    @classmethod
    def from_line(cls, line: str) -> str:
        """A row keeps its line end; an empty line is an empty row."""
        return f"{line}\n" if line.strip() else ""
