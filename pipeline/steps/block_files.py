"""Files of a block's weights: how a step writes them, and how large they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from pipeline.steps import payloads

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.rundir.filesystem import FileWriter
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.finish_block import FinishedBlock
    from stages.formats.safetensors_io import Bytes


def write_state(attempt: Attempt, payload: str, state: Mapping[str, Tensor]) -> None:
    """Write a block's state in fp32, for a later step to read."""
    from stages.formats.checkpoint_files import serialized

    attempt.write_file(payload, "block.safetensors", in_pieces(serialized(state)))


def write_finished(context: StepContext, attempt: Attempt, block: int, finished: FinishedBlock) -> None:
    """Write a pruned block with the names and dtypes of the exported model."""
    _write_shard(context, attempt, payloads.pruned(block).name, block, finished)


def write_distilled(context: StepContext, attempt: Attempt, block: int, finished: FinishedBlock) -> None:
    """Write a distilled block with the names and dtypes of the exported model."""
    _write_shard(context, attempt, payloads.distilled(block).name, block, finished)


def _write_shard(context: StepContext, attempt: Attempt, payload: str, block: int, finished: FinishedBlock) -> None:
    from stages import export

    pieces = export.block_shard(context.model, block, finished.state)
    attempt.write_file(payload, block_filename(block), in_pieces(pieces))


def write_masks(attempt: Attempt, block: int, contents: bytes) -> None:
    """Write the pruning masks and quantization grids of a block."""
    attempt.write_file(payloads.masks(block).name, block_filename(block), contents)


def block_filename(block: int) -> str:
    """Name of the files of a block in the exported model: of its weights, and of its masks in their folder."""
    return f"block-{block:05d}.safetensors"


def in_pieces(pieces: Iterable[Bytes]) -> Callable[[FileWriter], None]:
    """Contents for a writer, one piece at a time, so that the file is never whole in memory."""

    def write(writer: FileWriter) -> None:
        for piece in pieces:
            writer.write(piece)

    return write


def masks_bytes(context: StepContext, block: int) -> int:
    """Size of a block's pruning masks: one bit for each weight."""
    return sum(context.model.entry_sizes(block).values()) // 8


def finished_bytes(context: StepContext, block: int) -> int:
    """Size of a block in the dtypes of the export."""
    from stages import export

    dtypes = export.block_dtypes(context.model, block, context.config.export_dtype)
    return sum(size * dtypes[name].itemsize for name, size in context.model.entry_sizes(block).items())


def training_bytes(context: StepContext, block: int) -> int:
    """Size of a block in fp32."""
    return 4 * sum(context.model.entry_sizes(block).values())
