"""C4 as a data source: the usual calibration set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stages.data.hub_text import HubText
from stages.data.text_source import Use


@dataclass(frozen=True)
class C4(HubText):
    """The first files of C4 (English), sampled as SparseGPT's code does: one crop of one random document each."""

    kind = "c4"
    title = "C4"
    help = "The first file of C4 (English web pages) from the hub, or a local copy of its rows."
    default_sampling = "random"
    repo = "allenai/c4"
    column = "text"
    joint = " "
    has_documents = True
    max_documents = 1100
    max_windows = 256
    files: ClassVar[Mapping[Use, str] | None] = {
        "calibration": "hf://datasets/allenai/c4/en/c4-train.00000-of-01024.json.gz",
        "evaluation": "hf://datasets/allenai/c4/en/c4-validation.00000-of-00008.json.gz",
    }
