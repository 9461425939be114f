"""Results of the built-in step kinds, as commits store them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from pipeline.rundir.records import Bytes, JsonObject, Result, Sha256
from pipeline.steps.run_facts import StoredBlockBudget
from stages.metrics.details import Details, Share
from stages.metrics.registry import metric_of
from stages.metrics.zero_shot import require_possible

if TYPE_CHECKING:
    from stages.choose_bos import BosChoice
    from stages.distill import Distillation
    from stages.finish_block import FinishedBlock
    from stages.runtime.expert_statistics import ExpertTokens
    from stages.training.trainer import Losses, Training

Which = Literal["dense", "pruned"]
Loss = Annotated[float, Field(ge=0)]
Amount = Annotated[int, Field(ge=0, le=2**53)]
MetricName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


@dataclass(frozen=True, config=ConfigDict(extra="forbid", ser_json_inf_nan="constants"))
class LossRecord:
    """Mean losses of a block: over the samples that were trained on, and over the held-out ones.

    `lampctl status --json` shows it, so it is a dataclass.
    """

    trained: Loss | None  # None: it overflowed
    held_out: Loss | None  # None: there are none, or it overflowed

    @classmethod
    def of(cls, losses: Losses) -> LossRecord:
        """The record of a training's losses."""
        return cls(trained=losses.trained, held_out=losses.held_out)


def judged(before: LossRecord, after: LossRecord) -> tuple[float | None, float | None]:
    """The loss before and after a training: over the held-out samples if there are any, else over the others.

    As `stages.training.trainer.Losses.judged`, for losses that may have overflowed (None): samples are held out if the
    loss before, which is finite, was measured on them.
    """
    if before.held_out is not None:
        return before.held_out, after.held_out
    return before.trained, after.trained


class TrainingRecord(_Part):
    """How the training of a block went.

    Attributes:
        before: Losses of the weights that it began with.
        after: Losses of the weights that were kept.
        epoch_losses: Losses of each epoch.
        kept_epoch: The epoch whose weights were kept, from 1; 0: no epoch improved on the weights from before.
        num_steps: Number of optimizer steps.
    """

    before: LossRecord
    after: LossRecord
    epoch_losses: tuple[LossRecord, ...]
    kept_epoch: Amount
    num_steps: Amount

    @model_validator(mode="after")
    def _kept_one_of_them(self) -> Self:
        if self.kept_epoch > len(self.epoch_losses):
            raise ValueError(f"epoch {self.kept_epoch} was kept, of {len(self.epoch_losses)}")
        return self

    @classmethod
    def of(cls, training: Training) -> TrainingRecord:
        """The record of a training."""
        return cls(
            before=LossRecord.of(training.before),
            after=LossRecord.of(training.after),
            epoch_losses=tuple(LossRecord.of(losses) for losses in training.epoch_losses),
            kept_epoch=training.kept_epoch,
            num_steps=training.num_steps,
        )


class WeightCount(_Part):
    """Weights of a layer, counted as they are exported."""

    num_masked: Amount
    num_other_zeros: Amount
    num_levels: Amount | None  # most distinct values in a row or group; None: not quantized


class FinishedRecord(_Part):
    """Weights of a finished block, counted as they are exported. Older runs have no counts by layer."""

    num_masked: Amount
    num_other_zeros: Amount
    layers: dict[str, WeightCount]

    @classmethod
    def of(cls, finished: FinishedBlock) -> FinishedRecord:
        """The record of a finished block."""
        return cls(
            num_masked=sum(layer.num_masked for layer in finished.layers),
            num_other_zeros=sum(layer.num_other_zeros for layer in finished.layers),
            layers={
                layer.name: WeightCount(
                    num_masked=layer.num_masked, num_other_zeros=layer.num_other_zeros, num_levels=layer.num_levels
                )
                for layer in finished.layers
            },
        )


class BosRecord(_Part):
    """Where BOS stands, and the perplexities of the original model that decided (None: not measured, or overflowed)."""

    mode: Literal["stream", "window", "none"]
    perplexity_without: float | None = None
    perplexity_with: float | None = None

    @classmethod
    def of(cls, choice: BosChoice) -> BosRecord:
        """The record of a choice."""
        measured = (choice.perplexity_without, choice.perplexity_with)
        without, with_bos = (value if value is not None and math.isfinite(value) else None for value in measured)
        return cls(mode=choice.mode, perplexity_without=without, perplexity_with=with_bos)


class CalibrateResult(Result):
    """What the calibration set consists of."""

    source: str
    unit: str = Field(pattern=r"^[a-z]{1,40}$")  # of the task: "tokens", "images"
    amount: Amount
    skipped: dict[str, Amount] = Field(default_factory=dict)  # samples that could not be used, by reason
    bos: BosRecord | None = None  # None: a sample is no text, or the run is older than this field
    shared_with: Sha256 | None = None  # digest of run.json of the run whose result was used


class CaptureResult(Result):
    """The input of block 0 is recorded."""

    shared_with: Sha256 | None = None


class AllocateResult(Result):
    """The budget that the activations suggest."""

    outlier_shares: tuple[Share | None, ...]
    spread: Share
    budget: tuple[StoredBlockBudget, ...]
    shared_with: Sha256 | None = None


class LayerResult(_Part):
    """How the pruning of one layer went. None: it overflowed, or the pruner has no such value."""

    relative_error: float | None
    damping: Loss | None


class ExpertsRecord(_Part):
    """Calibration tokens that the router of a block sent to its experts.

    Attributes:
        num_experts: Number of experts.
        num_short: Experts with fewer tokens than a matrix of theirs has input channels; they were pruned by statistics
            that those of all experts complete.
        fewest: Tokens of the expert with the fewest.
        expert: That expert's path in the block.
    """

    num_experts: Amount
    num_short: Amount
    fewest: Amount
    expert: str

    @classmethod
    def of(cls, tokens: ExpertTokens) -> ExpertsRecord:
        """The record of what a block's experts received."""
        return cls(
            num_experts=tokens.num_experts, num_short=tokens.num_short, fewest=tokens.fewest, expert=tokens.expert
        )


class PruneResult(Result):
    """How the pruning of a block went."""

    layers: dict[str, LayerResult]
    finished: FinishedRecord | None = None  # None: the block is refined in a later step
    experts: ExpertsRecord | None = None  # None: the block has none, or the pruner reads no data
    shared_with: Sha256 | None = None


class CompensateResult(Result):
    """How the compensation of a block went."""

    training: TrainingRecord
    shared_with: Sha256 | None = None


class RefineResult(Result):
    """How the refinement of a block went."""

    training: TrainingRecord
    finished: FinishedRecord
    shared_with: Sha256 | None = None


class TeachResult(Result):
    """The original model ran on the samples to distill on."""

    samples: CalibrateResult | None = None  # None: they are the calibration set


class GenerateResult(Result):
    """The original model wrote samples to distill on.

    Attributes:
        num_samples: That it wrote.
        num_tokens: Of all of them.
        num_real: How many of those tokens are prompts, from the other samples to distill on.
    """

    num_samples: int
    num_tokens: int
    num_real: int


class DistillResult(Result):
    """How the distillation went.

    Attributes:
        loss: Name of the loss (`stages.training.end_loss.END_LOSSES`).
        lr: The highest learning rate, such as "0.2%" of each tensor's root mean square. None: the run is older.
        trials: Of the search for it, in their order: rate as a share of each tensor's root mean square, and held-out
            loss (None: it was not finite).
        before: Held-out loss of the pruned model; None: no sample is held out.
        after: Held-out loss of the weights that were kept.
        epochs: Losses of each epoch.
        updates: Mean loss of each batch, before its update.
        kept_epoch: The epoch whose weights were kept, from 1; 0: no epoch improved the model.
        num_held_out: Number of held-out samples.
        calibration_samples: With a distillation set of its own: those calibration samples that no training of blocks
            sees and that this one was trained on. None: it has no such set, or the run is older than this field.
    """

    loss: str
    lr: str | None = None
    trials: tuple[tuple[Loss, Loss | None], ...] = ()
    before: Loss | None
    after: Loss | None
    epochs: tuple[LossRecord, ...]
    updates: tuple[Loss, ...]
    kept_epoch: Amount
    num_held_out: Amount
    calibration_samples: tuple[Amount, ...] | None = None

    @model_validator(mode="after")
    def _kept_one_of_them(self) -> Self:
        if self.kept_epoch > len(self.epochs):
            raise ValueError(f"epoch {self.kept_epoch} was kept, of {len(self.epochs)}")
        return self

    @classmethod
    def of(cls, found: Distillation) -> DistillResult:
        """The record of a distillation."""
        return cls(
            loss=found.loss,
            lr=str(found.lr),
            trials=tuple((t.distance, None if math.isinf(t.loss) else t.loss) for t in found.trials),
            before=found.before,
            after=found.after,
            epochs=tuple(LossRecord.of(losses) for losses in found.epochs),
            updates=found.updates,
            kept_epoch=found.kept_epoch,
            num_held_out=found.num_held_out,
        )


class ExportResult(Result):
    """What the exported model holds, counted on its files."""

    num_masked: Amount
    num_prunable: int = Field(ge=1)
    num_other_zeros: Amount
    sparsity: Share
    pattern: str | None = None
    num_levels: Amount | None = None
    size_bytes: Bytes | None = None


class EvaluateResult(Result):
    """What one evaluate step measured.

    Attributes:
        which: The original model, or the pruned one.
        source: Name of the data source.
        source_digest: Identifies the data behind the name; None: it cannot be identified.
        metric: Name of the metric.
        value: Its value; None: it overflowed.
        is_partial: Only a part of the data was used.
        details: On what it was measured, of the class that the metric names.
        bos: Where BOS stands in windows of text; None: no text, or the run is older than this field.
    """

    which: Which
    source: str
    source_digest: JsonObject | None
    metric: MetricName
    value: float | None
    is_partial: bool
    details: Details
    bos: BosRecord | None = None

    @field_validator("value")
    @classmethod
    def _require_possible(cls, value: float | None, info: ValidationInfo) -> float | None:
        if "metric" in info.data:
            metric_of(info.data["metric"]).require_possible(value)
        return value

    @field_validator("details", mode="plain")
    @classmethod
    def _details_of_the_metric(cls, details: Details | JsonObject, info: ValidationInfo) -> Details:
        if isinstance(details, Details):
            return details
        if not isinstance(details, dict) or "metric" not in info.data:
            raise ValueError("these are not the details of a metric")
        return metric_of(info.data["metric"]).details.from_json(details)

    @field_serializer("details")
    def _as_json(self, details: Details) -> JsonObject:
        return details.as_json()


class ZeroShotResult(Result):
    """Accuracies on one zero-shot task.

    Attributes:
        which: The original model, or the pruned one.
        task: Name of the task.
        metrics: "acc", "acc_norm", each with "..._stderr" where the harness gives one.
        num_rows: Rows that were used.
        num_rows_available: Rows of the task.
        task_version: Version of the task in the harness.
        harness_version: Version of lm-evaluation-harness.
        is_partial: Only the first rows were used.
        task_data: Folder with the rows; None: they came from the hub.
        task_data_digest: Identifies the rows in that folder.
    """

    which: Which
    task: str
    metrics: dict[str, float | None]
    num_rows: Amount
    num_rows_available: Amount
    task_version: str
    harness_version: str
    is_partial: bool
    task_data: str | None
    task_data_digest: JsonValue = None

    @field_validator("metrics")
    @classmethod
    def _require_possible(cls, metrics: dict[str, float | None]) -> dict[str, float | None]:
        require_possible(metrics)
        return metrics
