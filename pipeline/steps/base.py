"""Interface of a step kind: one class says what the step reads, writes and costs, does it, and reports on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

from pipeline.rundir.records import Result

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.engine.plan import Step
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from pipeline.steps.end_loss_result import EndLossResult
    from pipeline.steps.reporting import BlockReport, Series
    from pipeline.steps.results import EvaluateResult, ExportResult, ZeroShotResult
    from pipeline.steps.run_facts import StoredBlockBudget
    from stages.interfaces import DurableCallbacks

# When the result of another run may be used instead of doing the step: never; if it has the same model and
# calibration set; if it was also computed on the same machine with the same versions; if this run takes over the blocks
# of that one (--from-run), so that all steps before are the same, too.
Sharing = Literal["never", "same data", "same data and environment", "same steps"]

R = TypeVar("R", bound=Result)


class StepKind(ABC, Generic[R]):
    """A kind of step, with the type of its result. The executor makes one instance for each run.

    A kind also has a function ``step(...)`` that gives the `Step` of the plan, with the payloads it reads and writes.

    Attributes:
        result: Form of the result in commits.
        name: Name in the plan and in commits, for example ``prune-block``.
        title: Name for people, for example ``prune a block``.
        help: What the step does, in one line.
        is_measurement: It measures a model and changes none.
        is_per_block: The plan has one step of this kind for each of several blocks.
        is_long: It takes as long as the work on many blocks: while its time is not known, the time left ends before it.
        command: The command of lampctl that does the next step; None: there is none, and ``lampctl resume`` does it.
        sharing: When another run's result may be used.
        absence: What to do for a run that has no such step; it is filled with the run's name. Empty: nothing helps.
    """

    result: ClassVar[type[Result]]
    name: ClassVar[str]
    title: ClassVar[str]
    help: ClassVar[str]
    is_measurement: ClassVar[bool] = False
    is_per_block: ClassVar[bool] = False
    is_long: ClassVar[bool] = False
    command: ClassVar[str | None] = None
    sharing: ClassVar[Sharing] = "never"
    absence: ClassVar[str] = ""

    @abstractmethod
    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: DurableCallbacks) -> R:
        """Open the payloads that the step reads, call its stage, write its payloads.

        Args:
            context: The run, its configuration and the original model.
            step: The step.
            attempt: Receives the payloads.
            callbacks: Progress, checkpoints and stops.

        Returns:
            The result for the commit.
        """

    def output_bytes(self, context: StepContext, step: Step, payload: str) -> int:
        """Estimated size on disk of a payload that the step writes."""
        raise NotImplementedError(f"{self.name} does not say how large {payload} is")

    def scratch_bytes(self, context: StepContext, step: Step) -> int:
        """Estimated size on disk of the step's own intermediate streams."""
        return 0

    @classmethod
    def after_export(cls, config: RunConfig) -> Iterable[Step]:
        """The steps of this kind that follow the export under a configuration; none for the kinds of the chain."""
        return ()

    @classmethod
    def headline(cls, result: R) -> str:
        """What a finished step reports, in a few words: for progress, status and report. Empty: nothing."""
        return ""

    @classmethod
    def block_report(cls, result: R) -> BlockReport | None:
        """What a step of one block says of the block; None: nothing."""
        return None

    @classmethod
    def series(cls, result: R) -> tuple[Series, ...]:
        """Curves for the report, beside those of `block_report`."""
        return ()

    @classmethod
    def measurement(cls, result: R) -> EvaluateResult | None:
        """A metric of a model on a data set. It stands in every table, comparison and figure of metrics."""
        return None

    @classmethod
    def accuracies(cls, result: R) -> ZeroShotResult | None:
        """Accuracies of a model on a zero-shot task. They stand in every table of accuracies."""
        return None

    @classmethod
    def end_loss(cls, result: R) -> EndLossResult | None:
        """How far the exported model's output is from the original model's, if the step measured it."""
        return None

    @classmethod
    def exported(cls, result: R) -> ExportResult | None:
        """What the exported model holds, if the step wrote it."""
        return None

    @classmethod
    def budget(cls, result: R) -> tuple[StoredBlockBudget, ...] | None:
        """The budget by block, if the step decided it. It takes the place of the one in run.json."""
        return None
