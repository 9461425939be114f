"""Step: write the pruned model as a folder that transformers opens."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from pipeline.engine.plan import Step
from pipeline.steps import payloads
from pipeline.steps.base import StepKind
from pipeline.steps.block_files import in_pieces
from pipeline.steps.committed import stored_budget
from pipeline.steps.results import ExportResult

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config.run_config import RunConfig
    from pipeline.rundir.filesystem import FileWriter
    from pipeline.rundir.run_directory import RunDirectory
    from pipeline.rundir.step_transaction import Attempt, PayloadFolder
    from pipeline.steps.context import StepContext
    from stages.interfaces import Callbacks
    from stages.models.base import BlockModel


class Export(StepKind[ExportResult]):
    """Writes the model folder: finished blocks as they were committed, and every other file of the source."""

    result = ExportResult
    name = "export"
    title = "export the model"
    help = "Write the pruned model as a folder that transformers opens."
    command = name

    @staticmethod
    def step(num_blocks: int) -> Step:
        """The step in the plan."""
        blocks = range(num_blocks)
        parts = (part.name for block in blocks for part in (payloads.pruned(block), payloads.masks(block)))
        return Step(Export.name, reads=tuple(parts), outputs=(payloads.MODEL,))

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> ExportResult:
        folder = attempt.folder(payloads.MODEL.name)
        return _write_model(context.run, context.model, context.config, folder, callbacks)

    def output_bytes(self, context: StepContext, step: Step, payload: str) -> int:
        """Size of what is written: the blocks are hard links."""
        return sum(tensor.nbytes for _, tensor in context.model.outside_state())

    @classmethod
    def headline(cls, result: ExportResult) -> str:
        return f"{result.num_masked:,} of {result.num_prunable:,} weights masked"

    @classmethod
    def exported(cls, result: ExportResult) -> ExportResult:
        return result


def _write_model(
    run: RunDirectory, model: BlockModel, config: RunConfig, folder: PayloadFolder, callbacks: Callbacks
) -> ExportResult:
    """Fill `folder` with the pruned model and count its masked weights on the files themselves.

    Raises:
        AssertionError: The count is not what the budget promised.
    """
    from pipeline.steps.stage_settings import block_budget
    from stages import export
    from stages.formats.checkpoint_files import Joined, StateFile
    from stages.formats.pruning_masks import FOLDER as MASKS
    from stages.formats.pruning_masks import read_mask_file

    files: dict[str, list[str]] = {}
    total_size, num_masked, num_other_zeros, most_levels = 0, 0, 0, 0
    for block in range(model.num_blocks):
        callbacks.check_stop()
        name = payloads.pruned(block).name
        payload, path = run.payload(name), run.open_file(name)
        folder.link(path.name, payload.files[0])
        name = payloads.masks(block).name
        masks = run.open_file(name)
        folder.link(f"{MASKS}/{masks.name}", run.payload(name).files[0])
        weights = StateFile(path)
        files[path.name] = list(weights)
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
    blocks = (StateFile(run.open_file(payloads.pruned(block).name)) for block in range(model.num_blocks))
    for name, write in model.other_forms(Joined((outside, *blocks)) if model.has_other_forms else {}):
        folder.write(name, _written_by(write))
    budget = [block_budget(block) for block in stored_budget(run)]
    if num_masked != sum(block.num_masked for block in budget):
        raise AssertionError("the masks do not add up to the budget")
    num_prunable = sum(block.size for block in budget)
    return ExportResult(
        num_masked=num_masked,
        num_prunable=num_prunable,
        num_other_zeros=num_other_zeros,
        sparsity=num_masked / num_prunable,
        pattern=config.pattern,
        num_levels=most_levels or None,
        size_bytes=total_size,
    )


def _written_by(form: Callable[[IO[bytes]], None]) -> Callable[[FileWriter], None]:
    """Contents for a writer, by a function that writes to an open file."""
    from stages.models.derived_files import Through

    return lambda writer: form(Through(writer.write))  # type: ignore[arg-type]
