"""Samples that are made of other samples."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from stages.interfaces import Samples


class JoinedSamples:
    """`stages.interfaces.Samples`: those of the first set, then those of the next."""

    def __init__(self, sets: Sequence[Samples]) -> None:
        self._sets = sets
        self._ends = list(itertools.accumulate(map(len, sets)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int, /) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        place = bisect.bisect_right(self._ends, index)
        return self._sets[place][index - (self._ends[place - 1] if place else 0)]


class ChosenSamples:
    """`stages.interfaces.Samples`: some of a set, in the order of their numbers."""

    def __init__(self, samples: Samples, numbers: Sequence[int]) -> None:
        self._samples, self._numbers = samples, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int, /) -> Tensor:
        return self._samples[self._numbers[index]]
