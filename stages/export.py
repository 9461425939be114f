"""The exported model: pruned blocks as they were committed, everything else as it was, and a model card.

A pruned block's safetensors already carries the model's own key names and dtypes: it *is* a shard, so only
the weights outside the blocks, the index and the configuration are written here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stages.formats.checkpoint_files import StateFile, serialized
from stages.formats.pruning_masks import FOLDER, PrunedWeight
from stages.formats.safetensors_io import Bytes
from stages.machine.device import DTYPES
from stages.metrics.registry import figure_text, metric_of
from stages.models.base import BlockModel
from stages.pruners.registry import method_title
from stages.sparsity.nm_pattern import Pattern
from stages.sparsity.outcome import LayerOutcome, PruneOutcome, check_layer
from stages.tasks.registry import task_named

_SHARD_BYTES = 256_000_000  # a larger tensor has a file of its own: no more than one is in memory
_METADATA = {"format": "pt"}


def export_dtype(requested: str, original: torch.dtype) -> torch.dtype:
    """The dtype of one exported tensor: its own ("original") or, for floating point, the one asked for."""
    return original if requested == "original" or not original.is_floating_point else DTYPES[requested]


def block_dtypes(model: BlockModel, block_index: int, requested: str) -> dict[str, torch.dtype]:
    """The dtype of each entry of a block's state in the exported model."""
    return {name: export_dtype(requested, d) for name, d in model.original_dtypes(block_index).items()}


def block_shard(model: BlockModel, block_index: int, state: Mapping[str, Tensor]) -> Iterator[Bytes]:
    """A pruned block as one safetensors file, under the names that the model's own files have for them, in pieces."""
    names = model.stored_names(block_index)
    return serialized({names[name]: tensor for name, tensor in state.items()}, _METADATA)


def block_state(model: BlockModel, block_index: int, path: Path) -> StateFile:
    """The block's state, names relative to the block, of its file: `block_shard` undone."""
    return StateFile(path, model.stored_names(block_index))


def pruned_weights(model: BlockModel, block_index: int, outcome: PruneOutcome) -> dict[str, PrunedWeight]:
    """Masks and grids of a block as its file of masks holds them, by layer name."""
    names, infos = model.stored_names(block_index), {info.name: info for info in model.layers(block_index)}
    layers = outcome.to(torch.device("cpu")).layers
    return {
        name: PrunedWeight(names[f"{infos[name].path}.weight"], infos[name].transposed, layer.mask, layer.grid)
        for name, layer in layers.items()
    }


def outcome_of(weights: Mapping[str, PrunedWeight], pattern: Pattern | None) -> PruneOutcome:
    """What a file of masks says of a block's pruning."""
    return PruneOutcome({name: LayerOutcome(layer.mask, layer.grid) for name, layer in weights.items()}, pattern)


@dataclass(frozen=True)
class BlockCount:
    """What an exported block holds."""

    num_masked: int
    num_other_zeros: int
    num_levels: int  # most distinct values in a row or group; 0: not quantized


def count_block(
    shard: Mapping[str, Tensor], weights: Mapping[str, PrunedWeight], pattern: Pattern | None
) -> BlockCount:
    """Count masked weights, other zeros and levels in a block's file, checking each promise.

    Raises AssertionError where a masked weight is not zero, a group breaks its pattern, a row has too many values.
    """
    num_masked = num_other_zeros = num_levels = 0
    for name, layer in weights.items():
        stored = shard[layer.key]
        checked = check_layer(
            name, stored.T if layer.transposed else stored, LayerOutcome(layer.mask, layer.grid), pattern
        )
        num_masked += checked.num_masked
        num_other_zeros += checked.num_other_zeros
        num_levels = max(num_levels, checked.num_levels or 0)
    return BlockCount(num_masked, num_other_zeros, num_levels)


@dataclass(frozen=True)
class Shard:
    """Weights that go into one file."""

    filename: str
    tensors: Mapping[str, Tensor]

    def pieces(self) -> Iterator[Bytes]:
        """The file's bytes."""
        return serialized(self.tensors, _METADATA)


def outside_shards(model: BlockModel, requested: str) -> Iterator[Shard]:
    """The untouched weights, some of them a file."""
    shard: dict[str, Tensor] = {}
    size = number = 0
    for name, tensor in model.outside_state():
        tensor = tensor.to(export_dtype(requested, tensor.dtype))
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            yield Shard(f"outside-{number:05d}.safetensors", shard)
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield Shard(f"outside-{number:05d}.safetensors", shard)


def index_json(files: Mapping[str, Iterable[str]], total_size: int) -> bytes:
    """model.safetensors.index.json: which file holds which key."""
    weight_map = {key: name for name, keys in files.items() for key in keys}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


@dataclass(frozen=True)
class CardFigure:
    """One line of the model card's table of results."""

    source: str
    metric: str  # "perplexity", "iou"
    dense: float | None
    pruned: float | None
    note: str  # "partial: first 10240 tokens", or ""


@dataclass(frozen=True)
class CardFacts:
    """What the model card tells."""

    task: str  # a name of `stages.tasks.registry.TASKS`
    base_model: str
    revision: str | None
    method: str
    goal: str  # "70%", "2:4, int4"
    num_masked: int
    num_prunable: int
    num_other_zeros: int
    is_quantized: bool
    settings: Mapping[str, object]
    figures: tuple[CardFigure, ...]  # perplexities
    accuracies: tuple[CardFigure, ...]  # of zero-shot tasks, as shares
    version: str


def model_card(facts: CardFacts) -> bytes:
    """README.md of the exported folder: what was done to which model, how, and what came of it."""
    is_path = facts.base_model.startswith("/")
    front = ["---", "library_name: transformers", "tags: [pruning, sparsity, lampctl]"]
    if not is_path:
        front.append(f"base_model: {facts.base_model}")
    front += ["---", ""]
    revision = f" (revision {facts.revision})" if facts.revision else ""
    achieved = facts.num_masked / facts.num_prunable
    lines = [
        *front,
        f"# {facts.base_model.rsplit('/', 1)[-1]} at {facts.goal}, pruned by {method_title(facts.method)}",
        "",
        f"Made from `{facts.base_model}`{revision} by lampctl {facts.version}. Of the {facts.num_prunable:,} prunable "
        f"weights (those of the linear layers inside the blocks), {facts.num_masked:,} ({100 * achieved:.4f}%) are "
        f"masked: exactly zero. A further {facts.num_other_zeros:,} weights are zero without being masked. "
        f"`{FOLDER}/` holds the masks{', scales and zero points' if facts.is_quantized else ''}.",
        "",
    ]
    if facts.figures:
        lines += ["| | original | pruned | |", "|---|---|---|---|"]
        for figure in facts.figures:
            cells = (figure_text(figure.metric, value) for value in (figure.dense, figure.pruned))
            lines.append(
                f"| {metric_of(figure.metric).title} on {figure.source} | {' | '.join(cells)} | {figure.note} |"
            )
        lines.append("")
    if facts.accuracies:
        lines += ["| zero-shot accuracy on | original | pruned | |", "|---|---|---|---|"]
        lines += [f"| {f.source} | {_percent(f.dense)} | {_percent(f.pruned)} | {f.note} |" for f in facts.accuracies]
        lines.append("")
    lines += ["```python", *task_named(facts.task).loading, "```", "", "## Settings", ""]
    lines += [f"- {name}: {value}" for name, value in facts.settings.items() if value not in (None, (), [], {})]
    return ("\n".join(lines) + "\n").encode()


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"
