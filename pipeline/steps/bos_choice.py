"""Where BOS stands in the windows of a run: as the settings say, or measured once and kept in a commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.rundir.run_directory import RunDirectory
from pipeline.steps.committed import results_of
from pipeline.steps.results import BosRecord, CalibrateResult, EvaluateResult
from pipeline.steps.run_facts import config_of

if TYPE_CHECKING:
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.data.base import DataSource
    from stages.data.text_source import Bos, Use
    from stages.interfaces import Callbacks
    from stages.metrics.base import EvaluationProtocol


def recorded_bos(run: RunDirectory) -> Bos | None:
    """Where BOS stands in a run's windows; None: it is measured when the first ones are read.

    The step calibrate keeps what it measured. A run without a calibration set keeps it with its first evaluation.

    Raises:
        DamagedData: A commit does not hold what lampctl writes.
    """
    mode = config_of(run).bos
    if mode is None:
        return "stream"  # a model that reads no text
    if mode != "auto":
        return mode
    results = (one.result for one in results_of(run))
    chosen = (result.bos for result in results if isinstance(result, CalibrateResult | EvaluateResult))
    return next((record.mode for record in chosen if record is not None), None)


def bos_for(
    context: StepContext,
    source: DataSource,
    protocol: EvaluationProtocol,
    use: Use,
    attempt: Attempt,
    callbacks: Callbacks,
) -> BosRecord:
    """Where BOS stands. Measures the original model if neither this run nor its main run has done so.

    Args:
        context: The run.
        source: The data source whose first windows are measured.
        protocol: Tokens of a window.
        use: Which text of the source.
        attempt: Gives scratch space.
        callbacks: Of the step.
    """
    from stages.choose_bos import choose_bos
    from stages.data.tokenization import load_tokenizer
    from stages.metrics.base import MetricContext

    for run in (context.run, context.shared_with):
        mode = recorded_bos(run) if run is not None else None
        if mode is not None:
            return BosRecord(mode=mode)
    model = context.model
    tokenizer = load_tokenizer(model.source.path, trusts_code=model.source.trusts_code)
    measuring = MetricContext(model, model, source, protocol, attempt.scratch(), context.choices, callbacks)
    choice = choose_bos(measuring, tokenizer, use)
    if choice.sentence is not None:
        callbacks.warn(f"--bos auto: {choice.sentence}")
    return BosRecord.of(choice)
