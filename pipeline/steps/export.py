"""Step: write the pruned model as a folder that transformers opens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from pipeline.engine.plan import Step
from pipeline.steps import payloads
from pipeline.steps.base import StepKind
from pipeline.steps.block_files import in_pieces
from pipeline.steps.committed import stored_budget
from pipeline.steps.prune_block import PruneBlock
from pipeline.steps.results import ExportResult

if TYPE_CHECKING:
    from pipeline.rundir.filesystem import FileWriter
    from pipeline.rundir.step_transaction import Attempt, PayloadFolder
    from pipeline.steps.context import StepContext
    from stages.export import BlockCount
    from stages.formats.checkpoint_files import StateFile
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
    def step(num_blocks: int, *, is_distilled: bool = False) -> Step:
        """The step in the plan. is_distilled: the blocks were trained once more after the last was pruned."""
        finished = payloads.distilled if is_distilled else payloads.pruned
        parts = (part.name for block in range(num_blocks) for part in (finished(block), payloads.masks(block)))
        return Step(Export.name, reads=tuple(parts), outputs=(payloads.MODEL,))

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> ExportResult:
        folder = attempt.folder(payloads.MODEL.name)
        return _write_model(context, step, folder, callbacks)

    def output_bytes(self, context: StepContext, step: Step, payload: str) -> int:
        """Size of what is written: the blocks are hard links."""
        from stages.export import outside_bytes

        return outside_bytes(context.model, context.config.export_dtype)

    @classmethod
    def headline(cls, result: ExportResult) -> str:
        return f"{result.num_masked:,} of {result.num_prunable:,} weights masked"

    @classmethod
    def exported(cls, result: ExportResult) -> ExportResult:
        return result


def _write_model(context: StepContext, step: Step, folder: PayloadFolder, callbacks: Callbacks) -> ExportResult:
    """Fill `folder` with the pruned model, and check on the files themselves what they hold.

    Raises:
        AssertionError: The count of masked weights is not what the budget promised, or a tensor of the original model
            is missing, or differs though no step changed it.
    """
    from pipeline.steps.stage_settings import block_budget
    from stages import export
    from stages.formats.checkpoint_files import Joined, StateFile

    run, model, config = context.run, context.model, context.config
    plan = export.ExportPlan.of(model, config.export_dtype)
    counts = []
    weights: dict[str, StateFile] = {}
    total_size = 0
    for block in range(model.num_blocks):
        callbacks.check_stop()
        filename = plan.filename(block)
        names = (payloads.distilled(block).name, payloads.pruned(block).name)
        payload = next(name for name in names if name in step.reads)
        weights[filename], counted = _link_block(context, payload, folder, block, filename)
        counts.append(counted)
        total_size += run.payload(payload).files[0].size
        callbacks.report(block + 1, model.num_blocks + 1, "blocks")
    for filename, tensors in plan.outside_shards(model, config.export_dtype):
        callbacks.check_stop()
        total_size += folder.write(filename, in_pieces(export.shard_bytes(tensors))).size
        weights[filename] = StateFile(folder.path / filename)
        export.check_unchanged(model, weights[filename], tensors, config.export_dtype)
    export.check_names(model, (name for file in weights.values() for name in file))
    folder.write("model.safetensors.index.json", export.index_json(weights, total_size))
    for name, contents in model.export_extras(config.export_dtype):
        folder.write(name, contents)
    for name, write in model.other_forms(Joined(weights.values()) if model.has_other_forms else {}):
        folder.write(name, _written_by(write))
    _report_unused(model, callbacks)
    num_masked = sum(counted.num_masked for counted in counts)
    budget = [block_budget(block) for block in stored_budget(run)]
    if num_masked != sum(block.num_masked for block in budget):
        raise AssertionError("the masks do not add up to the budget")
    num_prunable = sum(block.size for block in budget)
    return ExportResult(
        num_masked=num_masked,
        num_prunable=num_prunable,
        num_other_zeros=sum(counted.num_other_zeros for counted in counts),
        sparsity=num_masked / num_prunable,
        pattern=config.pattern,
        num_levels=max(counted.num_levels for counted in counts) or None,
        size_bytes=total_size,
    )


def _link_block(
    context: StepContext, payload: str, folder: PayloadFolder, block: int, filename: str
) -> tuple[StateFile, BlockCount]:
    """Link a block's weights and masks, and check the file once more, whatever the commits say."""
    from stages import export
    from stages.formats.checkpoint_files import StateFile
    from stages.formats.pruning_masks import FOLDER, read_mask_file

    run, model, config = context.run, context.model, context.config
    stored_masks = payloads.masks(block).name
    path, masks = run.open_file(payload), run.open_file(stored_masks)
    folder.link(filename, run.payload(payload).files[0])
    folder.link(f"{FOLDER}/{masks.name}", run.payload(stored_masks).files[0])
    weights, layers = StateFile(path), read_mask_file(masks)
    counted = export.count_block(weights, layers, config.n_of_m)
    steps = [commit.step for commit in run.commits if commit.step.endswith(f"/{block}")]
    if (
        steps == [f"{PruneBlock.name}/{block}"] and payload == payloads.pruned(block).name
    ):  # no training: the pruned layers' weights alone may differ
        export.check_untrained(model, weights, {layer.key for layer in layers.values()}, config.export_dtype)
    return weights, counted


def _report_unused(model: BlockModel, callbacks: Callbacks) -> None:
    """Say which weights are exported though nothing here reads them: heads for further tokens, towers for images."""
    unused = model.unused_weights()
    if unused:
        groups = Counter(".".join(name.split(".")[:2]) for name in unused)
        shown = ", ".join(f"{group}.* ({count})" for group, count in list(groups.items())[:8])
        more = f" and {len(groups) - 8} more groups" if len(groups) > 8 else ""
        callbacks.warn(
            f"{len(unused)} tensors that the pruned model does not use are exported unpruned and unchanged: "
            f"{shown}{more}"
        )


def _written_by(form: Callable[[IO[bytes]], None]) -> Callable[[FileWriter], None]:
    """Contents for a writer, by a function that writes to an open file."""
    from stages.models.derived_files import Through

    return lambda writer: form(Through(writer.write))  # type: ignore[arg-type]
