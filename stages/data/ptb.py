"""The Penn Treebank as a data source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stages.data.hub_text import HubText
from stages.data.text_source import Use

_PARQUET = "hf://datasets/ptb-text-only/ptb_text_only@refs/convert/parquet/penn_treebank"


@dataclass(frozen=True)
class PennTreebank(HubText):
    """The Penn Treebank, text only."""

    kind = "ptb"
    title = "PTB"
    help = "The Penn Treebank (text only) from the hub, or a local copy of its rows."
    repo = "ptb-text-only/ptb_text_only"
    column = "sentence"
    joint = " "
    # The data set's own loader is a script, which `datasets` no longer runs; its conversion to Parquet is data.
    files: ClassVar[Mapping[Use, str] | None] = {
        "calibration": f"{_PARQUET}/train/*.parquet",
        "evaluation": f"{_PARQUET}/test/*.parquet",
    }

    @classmethod
    def from_line(cls, line: str) -> str:
        """A row has no spaces at its ends."""
        return line.strip()
