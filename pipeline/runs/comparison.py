"""How a run, or a model folder that no run made, stands: the figures that `lampctl compare` puts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, RunNotFound
from pipeline.rundir.storage.locate import is_address
from pipeline.runs.lifecycle import reopen
from pipeline.runs.model_evaluation import EvaluationRequest
from pipeline.runs.status import EvaluationResult, RunStatus, evaluation_of, status
from pipeline.steps.bos_choice import recorded_bos
from pipeline.steps.end_loss_result import EndLossResult
from pipeline.steps.evaluate import evaluate_result
from stages.interfaces import Watcher

if TYPE_CHECKING:
    from stages.models.base import BlockModel


@dataclass(frozen=True)
class ModelSummary:
    """One run or one model. None: not known, or not there yet."""

    label: str
    base: str  # the model that was pruned, or the folder itself
    method: str | None
    goal: str | None
    steps_left: int  # of a run; 0: finished, or no run
    evaluations: tuple[EvaluationResult, ...]
    num_masked: int | None
    num_prunable: int | None
    dense_bytes: int | None  # weights in the exported folder, zeros and all
    packed_bytes: int | None  # of the packed file beside it
    pruning_s: float | None
    peak_memory_bytes: int | None
    peak_device_bytes: int | None
    end_loss: EndLossResult | None = None

    @property
    def sparsity(self) -> float | None:
        """Masked weights over prunable ones in the exported model."""
        return self.num_masked / self.num_prunable if self.num_masked is not None and self.num_prunable else None


def summaries(places: Sequence[str], request: EvaluationRequest, callbacks: Watcher) -> tuple[ModelSummary, ...]:
    """How each of these stands, in their order: runs from their commits alone, model folders looked through.

    Raises RunNotFound for what is neither; ConfigError for text to measure on where there is no model to measure.
    """
    found = {place: _run_of(place) for place in places}
    opened = {place: reopen(run) for place, run in found.items() if run is not None}
    states = {place: status(*both) for place, both in opened.items()}
    if request.sources and len(states) == len(found):
        raise ConfigError(
            "--evaluate is about model folders, and all of these are runs: lampctl evaluate RUN --evaluate "
            f"{','.join(request.sources)} adds a figure to a run"
        )
    usual = next((state.config.eval_seqlen for state in states.values()), None)
    bos = next((recorded_bos(run) for run, _ in opened.values()), None)
    request = replace(request, seqlen=request.seqlen or usual, bos=bos or request.bos)  # as the first run evaluates
    return tuple(
        summary_of(states[place]) if place in states else _summary_of_folder(Path(place), request, callbacks)
        for place in places
    )


def summary_of(state: RunStatus) -> ModelSummary:
    """How a run stands."""
    return ModelSummary(
        label=state.label,
        base=state.config.model,
        method=state.config.method,
        goal=state.goal,
        steps_left=len(state.steps) - state.num_done,
        evaluations=state.evaluations,
        num_masked=state.num_masked,
        num_prunable=state.num_prunable,
        dense_bytes=state.model_size_bytes,
        packed_bytes=_packed_bytes(state),
        pruning_s=state.pruning_s,
        peak_memory_bytes=state.peak_memory_bytes,
        peak_device_bytes=state.peak_device_bytes,
        end_loss=state.end_loss,
    )


def _run_of(place: str) -> str | None:
    """The run that a name means, be it the run or its model/; None for the folder of another model."""
    if is_address(place):
        return place.rstrip("/").removesuffix("/model")
    path = Path(place).absolute()
    if (path / "run.json").exists():
        return place
    if path.name == "model" and (path.parent / "run.json").exists():
        return str(path.parent)
    if (path / "config.json").exists():
        return None
    remedy = "; unpack it first: lampctl export --unpack FILE --out FOLDER" if path.is_file() else ""
    raise RunNotFound(f"{place} is no run and no model folder: it has neither run.json nor config.json{remedy}")


def _packed_bytes(state: RunStatus) -> int | None:
    """The size of the packed file where `lampctl export --format packed` puts it."""
    if is_address(state.label):
        return None
    folder = Path(state.label)
    packed = folder / f"{folder.resolve().name}.packed.safetensors"
    return packed.stat().st_size if packed.is_file() else None


def _summary_of_folder(path: Path, request: EvaluationRequest, callbacks: Watcher) -> ModelSummary:
    from stages.metrics.achieved_sparsity import achieved
    from stages.models.registry import open_model
    from stages.models.resolve import resolve

    path = path.absolute()
    model = open_model(resolve(str(path)))
    count = achieved(model, path)
    packed = path.with_name(f"{path.name}.packed.safetensors")
    return ModelSummary(
        label=str(path),
        base=str(path.resolve()),  # as runs name the model that they prune
        method=None,
        goal=None,
        steps_left=0,
        evaluations=_measured(model, request, callbacks) if request.sources else (),
        num_masked=count.num_masked,
        num_prunable=count.num_prunable,
        dense_bytes=sum(file.stat().st_size for file in path.glob("*.safetensors")),
        packed_bytes=packed.stat().st_size if packed.is_file() else None,
        pruning_s=None,
        peak_memory_bytes=None,
        peak_device_bytes=None,
    )


def _measured(model: BlockModel, request: EvaluationRequest, callbacks: Watcher) -> tuple[EvaluationResult, ...]:
    """The figures of a model that belongs to no run."""
    from pipeline.runs.model_evaluation import evaluate_model

    if model.fixed_tokens is not None:
        request = replace(request, seqlen=None)  # every sample has the same
    found = evaluate_model(model.source, request, lambda _: nullcontext(callbacks)).measured
    return tuple(evaluation_of(f"evaluate/pruned/{one.source}", evaluate_result("pruned", None, one)) for one in found)
