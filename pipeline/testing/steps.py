"""Conformance kit for step kinds: `check_step_kind` raises AssertionError with what is wrong with a class.

What a step computes cannot be checked here. That its results are the same after a crash is checked by running it twice
from the same inputs: `check_plan` sees to it that a plan gives every step its inputs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any, get_args

from pipeline.engine.plan import Step, next_steps, releasable
from pipeline.rundir.records import Result
from pipeline.steps.base import Sharing, StepKind
from pipeline.steps.end_loss_result import EndLossResult
from pipeline.steps.reporting import BlockReport
from pipeline.steps.results import EvaluateResult, ExportResult, ZeroShotResult


def check_step_kind(name: str, kind: type[StepKind[Any]]) -> None:
    """Check what the executor, status and help read of a step kind.

    Args:
        name: Name in the registry.
        kind: The class.
    """
    assert isinstance(kind, type), f"{kind} is no class"
    assert issubclass(kind, StepKind), f"{kind} is no StepKind"
    assert not inspect.isabstract(kind), f"{kind} does not say how it runs"
    assert kind.name == name, f"{kind} is registered as {name} and calls itself {kind.name}"
    assert re.fullmatch(r"[a-z][a-z0-9-]*", name), f"{name}: lower case letters, digits and dashes"
    for attribute in ("title", "help"):
        text = getattr(kind, attribute, None)
        assert isinstance(text, str), f"{name} has no {attribute}"
        assert text, f"{name} has an empty {attribute}"
        assert "\n" not in text, f"the {attribute} of {name} has more than one line"
    assert issubclass(kind.result, Result), f"the result of {name} is no pipeline.rundir.records.Result"
    assert kind.result.model_config.get("extra") == "forbid", f"the result of {name} accepts unknown fields"
    assert kind.sharing in get_args(Sharing), f"{name}: sharing {kind.sharing}"
    shares_results = "shared_with" in kind.result.model_fields
    assert shares_results == (kind.sharing != "never"), f"{name}: a shared result needs the field shared_with"
    if kind.command is not None:
        assert re.fullmatch(r"[a-z][a-z0-9-]*", kind.command), f"{name}: command {kind.command}"
    kind()  # the executor calls it without arguments


def check_reports(kind: type[StepKind[Any]], result: Result) -> None:
    """Check what progress, status, tables and the report read of a result.

    Args:
        kind: The class.
        result: A result of the kind, as `run` gives it.
    """
    name = kind.name
    assert type(result) is kind.result, f"{name} gives a {type(result).__name__}, not a {kind.result.__name__}"
    stored = kind.result.model_validate_json(result.model_dump_json(), strict=True)
    assert stored == result, f"{name}: a commit does not give back the result that was stored"
    headline = kind.headline(result)
    assert isinstance(headline, str), f"{name}: the headline is no text"
    assert "\n" not in headline, f"{name}: the headline has more than one line"
    for curve in kind.series(result):
        assert all((curve.title, curve.x_title, curve.y_title)), f"{name}: a curve without a title"
        assert curve.points, f"{name}: the curve {curve.title} has no point"
    expected = {
        "block_report": BlockReport,
        "measurement": EvaluateResult,
        "accuracies": ZeroShotResult,
        "end_loss": EndLossResult,
        "exported": ExportResult,
    }
    for method, form in expected.items():
        part = getattr(kind, method)(result)
        assert part is None or isinstance(part, form), f"{name}: {method} gives no {form.__name__}"
    report = kind.block_report(result)
    assert report is None or report.state, f"{name}: a block has no state"
    assert report is None or kind.is_per_block, f"{name} reports on a block and is not is_per_block"


def check_plan(steps: Sequence[Step]) -> None:
    """Check that a plan can run in its order and be resumed after each of its steps."""
    names = [step.name for step in steps]
    assert len(set(names)) == len(names), "two steps have one name"
    written: set[str] = set()
    for step in steps:
        assert set(step.reads) <= written, f"{step.name} reads {set(step.reads) - written}, which no step before writes"
        assert not written & set(step.writes), f"{step.name} writes {written & set(step.writes)} again"
        written |= set(step.writes)
    for output in (output for step in steps for output in step.outputs if output.is_stream):
        sources = set(output.rebuilt_from)
        kept = {kept.name for step in steps for kept in step.outputs if kept.is_kept}
        assert sources <= kept, f"{output.name} is rebuilt from {sources - kept}, which may have been released"
    for num_done in range(1, len(steps) + 1):
        released = set(releasable(steps, names[:num_done]))
        # Losing the newest commit must be survivable: its step still finds what it reads.
        later = next_steps(steps, names[: num_done - 1])
        assert not released & {name for step in later for name in step.reads}, f"released too early: {released}"
