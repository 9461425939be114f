"""Statistics of experts that received too few tokens: they are completed by the mean of all experts of the block.

A matrix of C input channels needs C tokens for a Hessian of full rank. Where the router sent n < C tokens to an expert,
its sums are completed with C - n mean tokens of all experts at the same place. So its Hessian is

    H = n / C  H_own  +  (1 - n / C)  H_all

with H_all the mean over the tokens of all experts: its own where it has C tokens or more, H_all where it has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from stages.errors import UsageError
from stages.models.base import LayerInfo
from stages.pruners.base import PooledStatistics, Statistics
from stages.runtime.layer_inputs import LayerInput, LayerInputs


@dataclass(frozen=True)
class ExpertTokens:
    """How many calibration tokens the experts of a block received."""

    num_experts: int
    num_short: int  # experts with fewer tokens than one of their matrices has input channels
    fewest: int  # tokens of the expert with the fewest
    expert: str  # that expert, in the block: "mlp.experts.3"
    is_completed: bool  # the statistics of these experts were completed; otherwise theirs cannot be

    def __str__(self) -> str:
        used = "completed by the mean of all experts'" if self.is_completed else "used as they are"
        return (
            f"{self.num_short} of {self.num_experts} experts received fewer tokens than their matrices have input "
            f"channels, {self.expert} {self.fewest}: their statistics are {used}"
        )


def complete(
    collected: LayerInputs, layers: Iterable[LayerInfo], kind: type[Statistics], device: torch.device
) -> ExpertTokens | None:
    """Complete the statistics of experts with too few tokens, in place; once, whatever is resumed in between.

    Args:
        collected: The statistics of a block's layers; experts that received no token are added to them.
        layers: The block's layers that are pruned.
        kind: The class of the statistics.
        device: Where the statistics are.

    Returns:
        What the experts received; None for a block without experts.

    Raises:
        UsageError: An expert received no token, and statistics of this class cannot be shared.
    """
    infos = {info.path: info for info in layers if info.peers is not None}
    if not infos:
        return None
    if not collected.is_completed:
        _add_unread(collected, infos, kind, device)
    groups: dict[tuple[str, ...], list[LayerInput]] = {}
    for found in collected.inputs:
        peers = _peers(found.paths, infos)
        if peers:
            groups.setdefault(peers, []).append(found)
    if not collected.is_completed:
        for members in groups.values():
            _complete_group(members, infos[members[0].paths[0]].cols, kind)
    collected.is_completed = True
    return _count(collected, infos, is_pooled=issubclass(kind, PooledStatistics))


def _peers(paths: Iterable[str], infos: Mapping[str, LayerInfo]) -> tuple[str, ...]:
    return tuple(sorted({str(infos[path].peers) for path in paths if path in infos}))


def _add_unread(
    collected: LayerInputs, infos: Mapping[str, LayerInfo], kind: type[Statistics], device: torch.device
) -> None:
    """Give layers without a token empty statistics; they share them as the layers of other experts do."""
    read = collected.by_path
    together = {peer: peers for found in collected.inputs for peers in [_peers(found.paths, infos)] for peer in peers}
    added: dict[tuple[str, tuple[str, ...]], LayerInput] = {}
    for path, info in infos.items():
        if path in read:
            continue
        peers = together.get(str(info.peers), (str(info.peers),))
        place = (_expert(info), peers)
        if place not in added:
            added[place] = LayerInput(kind(info.cols, device))
            collected.inputs.append(added[place])
        added[place].paths.append(path)


def _expert(info: LayerInfo) -> str:
    """The expert of a layer: its path up to the expert's number."""
    before = str(info.peers).partition("*")[0]
    return before + info.path.removeprefix(before).partition(".")[0]


def _complete_group(members: list[LayerInput], cols: int, kind: type[Statistics]) -> None:
    """Complete the experts at one place that have fewer than `cols` tokens."""
    short = [found for found in members if found.num_tokens < cols]
    if not short:
        return
    if not issubclass(kind, PooledStatistics):
        empty = next((found for found in short if not found.num_tokens), None)
        if empty is None:
            return
        raise UsageError(
            f"no calibration token reached {empty.paths[0]}, and {kind.__name__} cannot be shared among experts: use "
            "more samples, or send all tokens to all experts (moe_calibrate_all_experts)"
        )
    total = kind.total([found.statistics for found in members])
    for found in short:
        assert isinstance(found.statistics, kind)
        found.statistics.complete(total, cols)


def _count(collected: LayerInputs, infos: Mapping[str, LayerInfo], *, is_pooled: bool) -> ExpertTokens:
    by_path, received, short = collected.by_path, dict[str, int](), set[str]()
    for path, info in infos.items():
        num_tokens, expert = by_path[path].num_tokens, _expert(info)
        received[expert] = min(num_tokens, received.get(expert, num_tokens))
        if num_tokens < info.cols:
            short.add(expert)
    fewest = min(received, key=received.__getitem__)
    return ExpertTokens(len(received), len(short), received[fewest], fewest, is_pooled)
