"""Which statistics of a block each pass over the samples collects: all of them, or those of a group of inputs.

Where the statistics of a block do not fit into memory together, each pass collects those of the next inputs that fit.
The layers of a group are pruned before the next group is collected. Groups go backwards through the block:

    down of experts 0-2  ->  down of 3-5  ->  ...  ->  gate and up of 0-4  ->  ...  ->  out  ->  q, k and v

Each pass then computes its inputs with unpruned layers alone, as a single pass does, and the router decides as before:
what has been pruned comes later in the forward pass. So the statistics have the same bits for every number of passes,
and no second copy of the weights is needed.

An expert with too few tokens needs the sum over all experts (`stages.runtime.expert_statistics`). If later passes
belong to that sum, its own statistics are dropped, and collected again after them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence

from stages.runtime.layer_inputs import DistinctInput

Peers = tuple[str, ...]


class PassSchedule:
    """The passes that are left, without any tensor.

    Attributes:
        added: Experts' inputs that a pass has collected, so that a sum over all experts holds them.
        done: Inputs whose statistics a pass has collected, and completed where they had too few tokens.
        short: Experts' inputs with fewer tokens than channels; None: not known before the first pass ends.
    """

    def __init__(
        self, inputs: Sequence[DistinctInput], sizes: Mapping[int, int], room_bytes: int | None, *, is_pooled: bool
    ) -> None:
        """Plan the passes.

        Args:
            inputs: The distinct inputs of the block, in the order of a forward pass.
            sizes: Bytes of the statistics of an input, by its number of channels.
            room_bytes: How many bytes the statistics of one pass may take; None: any number. A pass collects one input
                at least.
            is_pooled: Experts with too few tokens get the mean of all.
        """
        self._places = [[*group] for _, group in itertools.groupby(inputs, key=lambda one: one.place)][::-1]
        self._sizes, self._room_bytes = sizes, room_bytes
        self._members: dict[Peers, set[DistinctInput]] = {}
        for one in inputs if is_pooled else ():
            if one.peers:
                self._members.setdefault(one.peers, set()).add(one)
        self.added: set[DistinctInput] = set()
        self.done: set[DistinctInput] = set()
        self.short: set[DistinctInput] | None = None

    @property
    def pending(self) -> list[DistinctInput]:
        """The inputs that are left, in the order of their passes."""
        rest = [[one for one in place if one not in self.done] for place in self._places]
        # Experts that have to wait for the sum of their place come after the others of that place.
        return [one for place in rest for one in sorted(place, key=self.added.__contains__)]

    def next_group(self) -> list[DistinctInput]:
        """What the next pass collects; empty: nothing is left."""
        pending = self.pending
        return pending[: self.num_fitting(pending)]

    def num_fitting(self, inputs: Sequence[DistinctInput]) -> int:
        """How many of the inputs, from the first one on, one pass may collect: one at least."""
        if self._room_bytes is None or not inputs:
            return len(inputs)
        best, size = 1, 0
        for count, one in enumerate(inputs, 1):
            size += self._sizes[one.cols]
            if size > self._room_bytes:
                break
            if size + self._size_of_sums(inputs[:count]) <= self._room_bytes:
                best = count
        return best

    def is_whole(self, peers: Peers, group: Iterable[DistinctInput]) -> bool:
        """Whether all experts of a place have been collected once the pass of `group` ends."""
        return self._members[peers] <= self.added.union(group)

    def needs_sum(self, peers: Peers, after: Collection[DistinctInput]) -> bool:
        """Whether the sum over all experts of a place is needed, now or, once the pass of `after` has ended, later."""
        members = self._members.get(peers, set())
        if self.short is None:
            return len(members) > 1
        return bool((members & self.short) - self.done - ({*after} if self.is_whole(peers, after) else set()))

    def end(self, group: Sequence[DistinctInput]) -> list[DistinctInput]:
        """End the pass of `group`. Returns what is complete; the others need the sum of later passes."""
        whole = {one.peers: self.is_whole(one.peers, group) for one in group if one.peers in self._members}
        short = self.short or set()
        ready = [one for one in group if whole.get(one.peers, True) or one not in short]
        self.added.update(one for one in group if one.peers)
        self.done.update(ready)
        return ready

    def num_left(self, first: Sequence[DistinctInput] = ()) -> int:
        """Passes that are left. Before the first one ends: if no expert gets too few tokens.

        first: The group of the current pass; empty: the next one is chosen.
        """
        before = self.added, self.done, self.short
        self.added, self.done = {*self.added}, {*self.done}
        count = 0
        while group := first or self.next_group():
            first = ()
            self.short = self.short or set()
            self.end(group)
            count += 1
        self.added, self.done, self.short = before
        return count

    def _size_of_sums(self, group: Sequence[DistinctInput]) -> int:
        """Bytes of the sums over experts that are in memory during the pass of `group`."""
        places = {one.peers: one.cols for one in group if one.peers in self._members}
        return sum(
            self._sizes[cols]
            for peers, cols in places.items()
            if self.needs_sum(peers, ()) and (self._members[peers] & self.added or not self.is_whole(peers, group))
        )
