"""Statistics of experts that received too few tokens: they are completed by the mean of all experts of the block.

A matrix of C input channels needs C tokens for a Hessian of full rank. Where the router sent n < C tokens to an expert,
its sums are completed with C - n mean tokens of all experts at the same place. So its Hessian is

    H = n / C  H_own  +  (1 - n / C)  H_all

with H_all the mean over the tokens of all experts: its own where it has C tokens or more, H_all where it has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.errors import UsageError
from stages.models.base import LayerInfo
from stages.pruners.base import PooledStatistics, Statistics
from stages.runtime.layer_inputs import DistinctInput, LayerInput
from stages.runtime.pass_schedule import PassSchedule, Peers


@dataclass(frozen=True)
class ExpertTokens:
    """How many calibration tokens the experts of a block received."""

    num_experts: int
    num_short: int  # experts with fewer tokens than one of their matrices has input channels
    fewest: int  # tokens of the expert with the fewest
    expert: str  # that expert, in the block: "mlp.experts.3"
    is_completed: bool  # the statistics of these experts were completed; otherwise theirs cannot be

    @classmethod
    def of(
        cls, layers: Iterable[LayerInfo], received: Mapping[str, int], kind: type[Statistics]
    ) -> ExpertTokens | None:
        """Count what experts received.

        Args:
            layers: The block's layers that are pruned.
            received: Tokens that reached each layer, by its path.
            kind: The class of the statistics.

        Returns:
            None for a block without experts.
        """
        fewest, short = dict[str, int](), set[str]()
        for info in layers:
            if info.expert is not None:
                num_tokens = received[info.path]
                fewest[info.expert] = min(num_tokens, fewest.get(info.expert, num_tokens))
                if num_tokens < info.cols:
                    short.add(info.expert)
        if not fewest:
            return None
        expert = min(fewest, key=fewest.__getitem__)
        return cls(len(fewest), len(short), fewest[expert], expert, issubclass(kind, PooledStatistics))

    def __str__(self) -> str:
        used = "completed by the mean of all experts'" if self.is_completed else "used as they are"
        return (
            f"{self.num_short} of {self.num_experts} experts received fewer tokens than their matrices have input "
            f"channels, {self.expert} {self.fewest}: their statistics are {used}"
        )


class ExpertSums:
    """Completes the statistics of experts, which several passes may collect.

    The experts of a place are added up in their order, so that the sum does not depend on the number of passes.
    """

    def __init__(self, kind: type[Statistics]) -> None:
        self._kind: Any = kind
        self.is_pooled = issubclass(kind, PooledStatistics)
        self.totals: dict[Peers, Statistics] = {}  # over experts that earlier passes collected, where they are needed

    def complete(self, collected: Sequence[LayerInput], schedule: PassSchedule) -> None:
        """Complete the statistics of a pass, in place, as far as all experts have been collected.

        Args:
            collected: What the pass has collected; those of one place in the order of their experts.
            schedule: Knows which experts have too few tokens; the pass has not ended there yet.
        """
        if not self.is_pooled:
            return
        assert schedule.short is not None
        group = [found.source for found in collected]
        for peers in dict.fromkeys(source.peers for source in group if source.peers):
            members = [found for found in collected if found.source.peers == peers]
            new = [found.statistics for found in members if found.source not in schedule.added]
            short = [found for found in members if found.source in schedule.short]
            if not schedule.is_whole(peers, group):
                short = []  # they wait
            is_needed_later = schedule.needs_sum(peers, group)
            total = self.totals.pop(peers, None)
            if new and (short or is_needed_later):
                total = self._kind.total([*([total] if total is not None else []), *new])
            for found in short:
                statistics: Any = found.statistics
                statistics.complete(total, found.source.cols)
            if is_needed_later:
                assert total is not None
                self.totals[peers] = total

    def require_tokens(self, received: Mapping[DistinctInput, int]) -> None:
        """Check what the experts received.

        Args:
            received: Tokens that each of their inputs had.

        Raises:
            UsageError: An expert received no token, and statistics of this class cannot be shared.
        """
        empty = next((one for one, num_tokens in received.items() if not num_tokens), None)
        if empty is not None and not self.is_pooled:
            raise UsageError(
                f"no calibration token reached {empty.paths[0]}, and {self._kind.__name__} cannot be shared among "
                "experts: use more samples, or send all tokens to all experts (moe_calibrate_all_experts)"
            )
