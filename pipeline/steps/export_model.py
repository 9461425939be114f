"""The export step: a folder that transformers opens, of blocks as they were committed and of what was never touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

import safetensors
from torch import Tensor

from pipeline.config.run_config import RunConfig
from pipeline.rundir.filesystem import FileWriter
from pipeline.rundir.run_directory import RunDirectory
from pipeline.rundir.step_transaction import PayloadFolder
from stages import export
from stages.formats.checkpoint_files import Joined, StateFile
from stages.formats.pruning_masks import FOLDER as MASKS
from stages.formats.pruning_masks import read_mask_file
from stages.formats.safetensors_io import Bytes
from stages.interfaces import Callbacks
from stages.models.base import BlockModel
from stages.models.derived_files import Through
from stages.sparsity.budget import BlockBudget, LayerBudget


def write_model(
    run: RunDirectory, model: BlockModel, config: RunConfig, folder: PayloadFolder, callbacks: Callbacks
) -> dict[str, Any]:
    """Fill `folder` with the pruned model and count what is in it, on the files themselves.

    Raises AssertionError where that is not what the budget promised.
    """
    files: dict[str, list[str]] = {}
    total_size, num_masked, num_other_zeros, most_levels = 0, 0, 0, 0
    for block in range(model.num_blocks):
        callbacks.check_stop()
        payload = run.payload(f"pruned/{block}")
        path = run.open_file(f"pruned/{block}")
        folder.link(path.name, payload.files[0])
        masks = run.open_file(f"masks/{block}")
        folder.link(f"{MASKS}/{masks.name}", run.payload(f"masks/{block}").files[0])
        with safetensors.safe_open(path, framework="pt") as weights:
            files[path.name] = list(weights.keys())
            # Once more on the files themselves, whatever the commits say.
            counted = export.count_block(weights, read_mask_file(masks), config.n_of_m)
        total_size += payload.files[0].size
        num_masked += counted.num_masked
        num_other_zeros += counted.num_other_zeros
        most_levels = max(most_levels, counted.num_levels)
        callbacks.report(block + 1, model.num_blocks + 1, "blocks")
    outside: dict[str, Tensor] = {}
    for shard in export.outside_shards(model, config.export_dtype):
        written = folder.write(shard.filename, in_pieces(shard.pieces()))
        if model.has_other_forms:
            outside.update(shard.tensors)
        files[shard.filename] = list(shard.tensors)
        total_size += written.size
    folder.write("model.safetensors.index.json", export.index_json(files, total_size))
    for name, contents in model.export_extras(config.export_dtype):
        folder.write(name, contents)
    blocks = (StateFile(run.open_file(f"pruned/{block}")) for block in range(model.num_blocks))
    for name, write in model.other_forms(Joined((outside, *blocks)) if model.has_other_forms else {}):
        folder.write(name, _written_by(write))
    budget = [budget_of(block) for block in run.budget]
    if num_masked != sum(block.num_masked for block in budget):
        raise AssertionError("the masks do not add up to the budget")
    num_prunable = sum(block.size for block in budget)
    return {
        "num_masked": num_masked,
        "num_prunable": num_prunable,
        "num_other_zeros": num_other_zeros,
        "sparsity": num_masked / num_prunable,
        "pattern": config.pattern,
        "num_levels": most_levels or None,
        "size_bytes": total_size,
    }


def in_pieces(pieces: Iterable[Bytes]) -> Callable[[FileWriter], None]:
    """The contents of a file that is never whole in memory."""

    def write(writer: FileWriter) -> None:
        for piece in pieces:
            writer.write(piece)

    return write


def _written_by(form: Callable[[IO[bytes]], None]) -> Callable[[FileWriter], None]:
    """What writes to an open file, writing to the run's own writer."""
    return lambda writer: form(Through(writer.write))  # type: ignore[arg-type]


def budget_of(record: Mapping[str, Any]) -> BlockBudget:
    """A block's budget as run.json, or the step `allocate`, has it."""
    return BlockBudget(tuple(LayerBudget(**layer) for layer in record["layers"]))
