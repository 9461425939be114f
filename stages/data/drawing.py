"""Which calibration samples are drawn from a data source."""

from __future__ import annotations

from dataclasses import dataclass

from stages.data.chat import ChatTemplate
from stages.data.text_source import Bos


@dataclass(frozen=True)
class Drawing:
    """Which samples are drawn."""

    num_samples: int
    tokens: int  # of a sample
    sampling: str | None  # "contiguous", "random"; None: contiguous
    skip: int = 0  # samples to leave out first
    seed: int = 0
    bos: Bos = "stream"  # where BOS stands; it is one of the tokens of a sample
    chat_template: ChatTemplate = "auto"  # how conversations become text
    flag: str = "--num-samples"  # the setting that says how many: errors name it
