"""Result of the step that measures how far the exported model's output is from the original model's."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.rundir.records import Result, Sha256
from pipeline.steps.reporting import counted
from pipeline.steps.results import Amount, MetricName


class EndLossResult(Result):
    """How far the exported model's output is from the original model's.

    Attributes:
        loss: Name of the loss of the output.
        title: Its name for people.
        value: The mean over the samples; None: it overflowed.
        num_samples: Number of samples that were measured.
        num_tokens: Their tokens; of images, their patches.
        source: Name of the data source of the calibration set.
        samples_sha256: Digest of the samples: values on other samples do not compare.
        is_held_out: They are those that training holds out; False: the calibration set has one sample, which is it.
        num_trained_on: How many of them a training has seen all the same; None: not known.
    """

    loss: MetricName
    title: str = Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,200}$")
    value: Annotated[float, Field(allow_inf_nan=False)] | None
    num_samples: int = Field(ge=1, le=2**53)
    num_tokens: Amount
    source: str
    samples_sha256: Sha256
    is_held_out: bool
    num_trained_on: Amount | None

    @property
    def text(self) -> str:
        """The value as people see it."""
        return "infinite" if self.value is None else f"{self.value:.4g}"

    @property
    def measured_on(self) -> str:
        """The samples, for people: "on 8 held-out samples"."""
        if not self.is_held_out:
            return "on the calibration sample itself"
        if self.num_trained_on == 0:
            return f"on {counted(self.num_samples, 'held-out sample')}"
        count = f"on {counted(self.num_samples, 'calibration sample')}"
        if self.num_trained_on is None:
            return f"{count} that distillation may have been trained on"
        if self.num_trained_on == self.num_samples:
            return f"{count} that training has seen, too"
        return f"{count}, {self.num_trained_on:,} of which training has seen, too"

    def is_comparable(self, other: EndLossResult) -> bool:
        """Whether the other one is of the same loss on the same samples."""
        return (self.loss, self.samples_sha256) == (other.loss, other.samples_sha256)
