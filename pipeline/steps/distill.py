"""Step: train all pruned blocks together towards the original model's output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.engine.plan import Step
from pipeline.steps import payloads
from pipeline.steps.base import StepKind
from pipeline.steps.block_files import finished_bytes, training_bytes, write_distilled
from pipeline.steps.reporting import Series, counted
from pipeline.steps.results import DistillResult

if TYPE_CHECKING:
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.interfaces import DurableCallbacks
    from stages.sparsity.outcome import PruneOutcome

# Versions of weights and moments on disk: those that the two newest checkpoints name, and those that an update writes.
_VERSIONS = 3
_FP32 = 4


class Distill(StepKind[DistillResult]):
    """Writes every block once more, trained with its masks fixed."""

    result = DistillResult
    name = "distill"
    title = "distill the model"
    help = "Train all pruned blocks together towards the original model's output, with their masks fixed (--distill)."
    is_long = True
    command = name
    absence = "begin a run that takes over its blocks: lampctl run MODEL ... --distill --from-run {run}"

    @staticmethod
    def step(num_blocks: int, *, draws: bool, teaches: bool, generates: bool) -> Step:
        """The step in the plan.

        Args:
            num_blocks: Of the model.
            draws: There is a distillation set of its own (--distill-samples).
            teaches: A step of its own has computed the original model's output.
            generates: The original model has written further samples (--distill-generated).
        """
        samples = payloads.DISTILLATION_SET if draws else payloads.CALIBRATION
        read = [samples, payloads.teacher(num_blocks, samples) if teaches else payloads.dense(num_blocks)]
        if generates:
            read += [payloads.GENERATED_SET, payloads.teacher(num_blocks, payloads.GENERATED_SET)]
        parts = (part for block in range(num_blocks) for part in (payloads.pruned(block), payloads.masks(block)))
        return Step(
            Distill.name,
            reads=(*(one.name for one in read), *(part.name for part in parts)),
            outputs=tuple(payloads.distilled(block) for block in range(num_blocks)),
        )

    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: DurableCallbacks) -> DistillResult:
        from pipeline.steps.stage_settings import distill_settings
        from stages import export
        from stages.distill import Distiller, GeneratedSamples, Teaching
        from stages.formats.pruning_masks import read_mask_file
        from stages.runtime.block_context import StageContext
        from stages.training.distillation_work import PrunedBlocks

        model, run, config = context.model, context.run, context.config

        def outcome_of(block: int) -> PruneOutcome:
            masks = read_mask_file(run.open_file(payloads.masks(block).name))
            return export.outcome_of(masks, config.n_of_m)

        pruned = PrunedBlocks(
            lambda block: export.block_state(model, block, run.open_file(payloads.pruned(block).name)),
            lambda block: export.block_dtypes(model, block, config.export_dtype),
            outcome_of,
        )
        sets = [(run.open_stream(samples), run.open_stream(teacher)) for samples, teacher in _sets(step)]
        (given, targets), *generated = sets
        distiller = Distiller(
            StageContext(model, given, context.choices, callbacks),
            pruned,
            Teaching(targets, GeneratedSamples(*generated[0]) if generated else None),
            distill_settings(config),
            attempt.scratch(),
            callbacks,
            is_resident=context.distills_resident,
        )
        report = distiller.train()
        for block in range(model.num_blocks):
            distiller.boundary()
            write_distilled(context, attempt, block, distiller.finish(block))
        return DistillResult.of(report).model_copy(update={"calibration_samples": _calibration_samples(context)})

    def output_bytes(self, context: StepContext, step: Step, payload: str) -> int:
        return finished_bytes(context, int(payload.rpartition("/")[2]))

    def scratch_bytes(self, context: StepContext, step: Step) -> int:
        """Hidden states and gradients of a batch, those of held-out samples, and weights and moments in checkpoints."""
        from stages.training.loss import split_samples

        config, num_blocks = context.config, context.model.num_blocks
        assert config.distill_batch is not None
        all_tokens = context.num_distillation_tokens + context.num_generated_tokens
        _, held_out = split_samples(context.num_distillation_tokens // config.seqlen, config.held_out is not False)
        largest = max(2 * config.distill_batch, len(held_out))  # a batch is split evenly: up to twice what is asked for
        tokens = min(largest * config.seqlen, all_tokens)
        gradients = tokens * context.model.hidden_size * _FP32
        hidden = context.activation_bytes(tokens) * (num_blocks + 1)
        hidden += gradients + context.activation_bytes(len(held_out) * config.seqlen)
        kept = 1 - config.target_sparsity
        weights = sum(training_bytes(context, block) for block in range(num_blocks))
        return hidden + int((_VERSIONS * (1 + 2 * kept) + 1) * weights)  # one more: the best weights, without moments

    @classmethod
    def headline(cls, result: DistillResult) -> str:
        from stages.training.end_loss import title_of

        title = title_of(result.loss)
        if result.before is None or result.after is None:
            return f"{title}: not measured, no sample is held out"
        held_out = counted(result.num_held_out, "held-out sample")
        if not result.kept_epoch:
            improved = any(x.held_out is not None and x.held_out < result.before for x in result.epochs)
            why = "rounding to the export dtypes undid the gain" if improved else "no epoch improved it"
            return f"{title} {result.before:.4g} on {held_out} ({why}; kept the weights from before)"
        parts = [
            f"{title} {result.before:.4g} -> {result.after:.4g} on {held_out}",
            f"learning rate {result.lr}" if result.trials else "",
            _undone(result),
        ]
        return ", ".join(part for part in parts if part)

    @classmethod
    def series(cls, result: DistillResult) -> tuple[Series, ...]:
        from stages.training.end_loss import title_of

        title = title_of(result.loss)
        updates = tuple((float(number), loss) for number, loss in enumerate(result.updates, 1))
        found = [Series("Distillation", "update", title, updates)]
        if result.trials:
            trials = tuple(sorted((100 * rate, loss) for rate, loss in result.trials if loss is not None))
            found.append(Series("Search for the learning rate", "first update, % of each tensor", title, trials))
        return tuple(found)


def _undone(result: DistillResult) -> str:
    """How many epochs did not lower the held-out loss; empty: all did."""
    best, num_undone = result.before, 0
    for epoch in result.epochs:
        if best is not None and epoch.held_out is not None and epoch.held_out < best:
            best = epoch.held_out
        else:
            num_undone += 1
    return f"{num_undone} of {len(result.epochs)} epochs undone" if num_undone else ""


def _sets(step: Step) -> list[tuple[str, str]]:
    """Names of the samples that the step reads and of the original model's output on them: given, then generated."""
    num_blocks, found = len(step.outputs), []
    for samples in (payloads.CALIBRATION, payloads.DISTILLATION_SET, payloads.GENERATED_SET):
        if samples.name in step.reads:
            taught = payloads.teacher(num_blocks, samples).name
            found.append((samples.name, taught if taught in step.reads else payloads.dense(num_blocks).name))
    return found


def _calibration_samples(context: StepContext) -> tuple[int, ...] | None:
    """The held-out calibration samples that are trained on here; None: there is no distillation set of its own."""
    from pipeline.steps.stage_settings import distill_settings
    from stages.measure_end_loss import measured_samples, occurring
    from stages.training.loss import split_samples

    if context.config.distill_samples is None or not context.config.has_calibration_set:
        return None
    samples, own = context.calibration, context.run.open_stream(payloads.DISTILLATION_SET.name)
    trained, _ = split_samples(len(own), distill_settings(context.config).holds_out)
    return tuple(occurring(samples, measured_samples(len(samples)), own, trained))
