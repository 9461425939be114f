"""A step kind of another package: it follows the export, measures, reports a headline and a curve."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pipeline.engine.plan import Output, Step
from pipeline.rundir.records import Result
from pipeline.steps.base import StepKind
from pipeline.steps.registry import STEP_KINDS
from pipeline.steps.reporting import Series
from pipeline.steps.results import EvaluateResult


class CountedZeros(Result):
    """How many weights of the exported model are zero, file by file."""

    num_zeros: tuple[int, ...]


class CountZeros(StepKind[CountedZeros]):
    """Counts zeros in the exported model, writes them as a payload."""

    result, name, title = CountedZeros, "count-zeros", "count zeros"
    help = "Count the zeros of the exported model."
    is_measurement = True
    command = name

    @classmethod
    def after_export(cls, config):
        return (Step(cls.name, reads=("model",), outputs=(Output("zeros", is_kept=True),)),)

    def run(self, context, step, attempt, callbacks):
        from safetensors import safe_open

        found = []
        files = [file for file in context.run.payload("model").files if file.path.endswith(".safetensors")]
        for number, file in enumerate(files):
            with safe_open(context.run.open_file("model", context.run.payload("model").inner(file)), "pt") as weights:
                keys = weights.keys()
                found.append(sum(int((weights.get_tensor(key) == 0).sum()) for key in keys))
            callbacks.report(number + 1, len(files), "files")
        attempt.write_file(step.writes[0], "zeros.txt", lambda writer: writer.write(repr(found).encode()))
        return CountedZeros(num_zeros=tuple(found))

    def output_bytes(self, context, step, payload):
        return 1000

    @classmethod
    def headline(cls, result):
        return f"{sum(result.num_zeros)} zeros in {len(result.num_zeros)} files"

    @classmethod
    def series(cls, result):
        return (Series("Zeros by file", "file", "zeros", tuple(enumerate(result.num_zeros))),)


class MeasureZeros(CountZeros):
    """The same as a metric of the pruned model, which stands beside every other metric."""

    name, title = "measure-zeros", "measure zeros"
    command = None

    @classmethod
    def after_export(cls, config):
        return (Step(cls.name, reads=("model",), outputs=(Output("measured-zeros"),)),)

    @classmethod
    def measurement(cls, result):
        return EvaluateResult(
            which="pruned",
            source="weights",
            source_digest=None,
            metric="zeros",
            value=float(sum(result.num_zeros)),
            is_partial=False,
            details={"num_tokens": len(result.num_zeros)},
        )


KINDS = (CountZeros, MeasureZeros)


@contextlib.contextmanager
def known() -> Iterator[None]:
    """Both kinds are registered, as if their package were installed."""
    for kind in KINDS:
        STEP_KINDS.register(kind.name, kind)
    try:
        yield
    finally:
        for kind in KINDS:
            STEP_KINDS.unregister(kind.name)
