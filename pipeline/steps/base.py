"""Interface of a step kind: one class says what the step reads, writes and costs, and does it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.rundir.records import Result

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.engine.plan import Step
    from pipeline.rundir.step_transaction import Attempt
    from pipeline.steps.context import StepContext
    from stages.interfaces import Callbacks

# When the result of another run may be used instead of doing the step: never; if it has the same model and
# calibration set; if it was also computed on the same machine with the same versions.
Sharing = Literal["never", "same data", "same data and environment"]


class StepKind(ABC):
    """A kind of step. The executor makes one instance for each run.

    A kind also has a function ``step(...)`` that gives the `Step` of the plan, with the payloads it reads and writes.

    Attributes:
        result: Form of the result in commits.
        name: Name in the plan and in commits, for example ``prune-block``.
        title: Name for people, for example ``prune a block``.
        help: What the step does, in one line.
        is_measurement: It measures a model and changes none.
        sharing: When another run's result may be used.
    """

    result: ClassVar[type[Result]]
    name: ClassVar[str]
    title: ClassVar[str]
    help: ClassVar[str]
    is_measurement: ClassVar[bool] = False
    sharing: ClassVar[Sharing] = "never"

    @abstractmethod
    def run(self, context: StepContext, step: Step, attempt: Attempt, callbacks: Callbacks) -> Result:
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
