"""The statistics of a block in memory, pass by pass (`stages.runtime.pass_schedule` says which)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from stages.interfaces import Checkpoint
from stages.pruners.base import Statistics
from stages.runtime.expert_statistics import ExpertSums
from stages.runtime.layer_inputs import DistinctInput, LayerInput
from stages.runtime.pass_schedule import PassSchedule

_FP32 = 4


class StatisticsPasses:
    """The statistics of a block, pass by pass.

    Attributes:
        current: The statistics in memory.
        received: Tokens that each expert's input had so far. The first pass counts them.
        num_samples: Samples that `current` holds.
        num_passes: Passes that are complete.
        num_planned: Passes in all; before the first one is complete: if no expert gets too few tokens.
        is_complete: `current` is ready for the pruner.
    """

    def __init__(
        self, inputs: Sequence[DistinctInput], kind: type[Statistics], device: torch.device, room_bytes: int | None
    ) -> None:
        """Plan the passes.

        Args:
            inputs: The distinct inputs of the block, in the order of a forward pass.
            kind: The class of statistics that the pruner needs.
            device: Where the statistics are.
            room_bytes: How many bytes the statistics of one pass may take; None: any number.
        """
        self._inputs, self._kind, self._device = inputs, kind, device
        self._rank = {one: number for number, one in enumerate(inputs)}
        self._by_path = {path: one for one in inputs for path in one.paths}
        sizes = {one.cols: _FP32 * kind.num_numbers(one.cols) for one in inputs}
        self.size_bytes = sum(sizes[one.cols] for one in inputs)  # of the statistics of the whole block
        self._sums = ExpertSums(kind)
        self._schedule = PassSchedule(inputs, sizes, room_bytes, is_pooled=self._sums.is_pooled)
        self.current: list[LayerInput] = []
        self.received = {one: 0 for one in inputs if one.peers}
        self.num_samples = self.num_passes = 0
        self.is_complete = False
        self.num_planned = self._schedule.num_left()

    def begin(self) -> bool:
        """Go on: with the current statistics, or else with the next pass. Returns False if nothing is left."""
        if not self.current and (group := self._schedule.next_group()):
            self.current = [LayerInput(one, self._kind(one.cols, self._device)) for one in group]
            self.num_samples, self.is_complete = 0, False
        return bool(self.current)

    @property
    def to_count(self) -> dict[DistinctInput, int]:
        """`received`, if the current pass counts tokens; empty: an earlier one has."""
        return self.received if not self.num_passes else {}

    @property
    def needs_all_experts(self) -> bool:
        """Whether the current pass needs outputs of all experts, or counts their tokens."""
        first = min((self._rank[one] for one in self.received), default=len(self._inputs))
        others = [found.source for found in self.current if not found.source.peers]
        return not self.num_passes or any(self._rank[source] > first for source in others)

    def complete(self) -> None:
        """End a pass: what is left in `current` is ready for the pruner.

        Raises:
            UsageError: An expert received no token, and statistics of this class cannot be shared.
        """
        if not self.num_passes:
            self._sums.require_tokens(self.received)
            self._schedule.short = self._short
        self._sums.complete(self.current, self._schedule)
        ready = {*self._schedule.end([found.source for found in self.current])}
        # Layers of one pass are pruned forwards: an error then names the layer where its cause is.
        self.current = sorted(
            (found for found in self.current if found.source in ready), key=lambda found: self._rank[found.source]
        )
        self.is_complete = True
        self.num_passes += 1
        self.num_planned = self.num_passes + self._schedule.num_left()

    def finish_first(self) -> None:
        """All layers of the first of the current inputs are pruned: free its statistics."""
        self.current.pop(0)

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens that each layer of an expert received, by its path."""
        return {path: num_tokens for one, num_tokens in self.received.items() for path in one.paths}

    @property
    def _short(self) -> set[DistinctInput]:
        return {one for one, num_tokens in self.received.items() if num_tokens < one.cols}

    def checkpoint(self) -> Checkpoint:
        """Everything that `restore` needs."""
        current = [(found.source, *found.statistics.state()) for found in self.current]
        totals = [(peers, *total.state()) for peers, total in self._sums.totals.items()]
        return Checkpoint(
            {
                **{_tensor_key(number): sums for number, (_, sums, _) in enumerate(current)},
                **{_total_key(number): sums for number, (_, sums, _) in enumerate(totals)},
            },
            {
                "num_samples": self.num_samples,
                "num_passes": self.num_passes,
                "is_complete": self.is_complete,
                "current": [{"path": source.paths[0], "counts": counts} for source, _, counts in current],
                "totals": [{"peers": [*peers], "counts": counts} for peers, _, counts in totals],
                "added": self._first_paths(self._schedule.added),
                "done": self._first_paths(self._schedule.done),
                "received": [*self.received.values()],
            },
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, which may have been made with more or less room."""
        figures, tensors, schedule = checkpoint.figures, checkpoint.tensors, self._schedule
        self.num_samples, self.num_passes = figures["num_samples"], figures["num_passes"]
        self.is_complete = figures["is_complete"]
        self.received = dict(zip(self.received, figures["received"], strict=True))
        schedule.added = {self._by_path[path] for path in figures["added"]}
        schedule.done = {self._by_path[path] for path in figures["done"]}
        schedule.short = self._short if self.num_passes else None
        for number, total in enumerate(figures["totals"]):
            restored = self._restored(tensors[_total_key(number)], total["counts"])
            self._sums.totals[tuple(total["peers"])] = restored
        sources = [self._by_path[found["path"]] for found in figures["current"]]
        num_kept = len(sources) if self.is_complete else schedule.num_fitting(sources)
        for number, source in enumerate(sources[:num_kept]):
            statistics = self._restored(tensors[_tensor_key(number)], figures["current"][number]["counts"])
            self.current.append(LayerInput(source, statistics))
        group = [] if self.is_complete else [found.source for found in self.current]
        self.num_planned = self.num_passes + schedule.num_left(group)

    def _first_paths(self, inputs: Iterable[DistinctInput]) -> list[str]:
        return [one.paths[0] for one in sorted(inputs, key=self._rank.__getitem__)]

    def _restored(self, sums: Tensor, counts: Mapping[str, int]) -> Statistics:
        return self._kind.restored(sums, counts, self._device)


def _tensor_key(number: int) -> str:
    """Key of the sums of input `number` in a checkpoint, whatever the statistics."""
    return f"sums.{number}"


def _total_key(number: int) -> str:
    """Key of the sums over all experts of a place."""
    return f"total.{number}"
