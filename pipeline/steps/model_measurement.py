"""What the steps have in common that measure the exported model or the original one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Protocol, TypeVar

from pipeline.engine.plan import Step
from pipeline.rundir.records import Result
from pipeline.steps import payloads
from pipeline.steps.base import StepKind
from pipeline.steps.results import Which

R = TypeVar("R", bound=Result)


class MeasurementRequest(Protocol):
    """What one step measures."""

    @property
    def which(self) -> Which:
        """The original model, or the pruned one."""
        ...

    @property
    def subject(self) -> str:
        """The part of the step's name after its kind. Two requests with the same subject are the same."""
        ...


class ModelMeasurement(StepKind[R]):
    """Base of the kinds that measure a model."""

    is_measurement = True
    command: ClassVar[str | None] = "evaluate"

    @classmethod
    def steps(cls, requests: Iterable[MeasurementRequest]) -> tuple[Step, ...]:
        """The steps of these requests in the plan, none twice."""
        return tuple(
            Step(
                cls.name,
                subject=request.subject,
                reads=(payloads.MODEL.name,) if request.which == "pruned" else (),
                request=request,
            )
            for request in dict.fromkeys(requests)
        )


def measured_models(with_dense: bool) -> tuple[Which, ...]:
    """The models to measure, the pruned one first, because that is what the user waits for."""
    return ("pruned", "dense") if with_dense else ("pruned",)
