"""What the models of vision runs answer to the same points, beside what their originals do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config.run_config import RunConfig
from pipeline.rundir.run_directory import RunDirectory
from pipeline.runs.packing import published_model
from pipeline.steps.committed import is_exported, measurements_of
from stages.interfaces import Watcher

if TYPE_CHECKING:
    from stages.metrics.mask_prediction import Answer, Asked


@dataclass(frozen=True)
class MaskSample:
    """One picture with a point in it, and the answers of the original and of the pruned model."""

    source: str
    asked: Asked
    dense: Answer
    pruned: Answer


def mask_samples(
    runs: Sequence[tuple[RunDirectory, RunConfig]], count: int, device: str, callbacks: Watcher
) -> tuple[tuple[MaskSample, ...], ...]:
    """For each vision run its answers on the first images that it was evaluated on; none for any other run.

    Both models are checked to be what the run says. Raises as `pipeline.runs.continuations` does.
    """
    found: list[tuple[MaskSample, ...]] = []
    originals: dict[tuple[Any, str], list[Answer]] = {}
    for run, config in runs:
        sources = [measured.source for measured in measurements_of(run) if measured.metric == "iou"]
        if not is_exported(run) or not sources:
            found.append(())
            continue
        found.append(_samples(run, config, sources[0], count, device, callbacks, originals))
    return tuple(found)


def _samples(
    run: RunDirectory,
    config: RunConfig,
    name: str,
    count: int,
    device: str,
    callbacks: Watcher,
    originals: dict[tuple[Any, str], list[Answer]],
) -> tuple[MaskSample, ...]:
    from pipeline.steps.executor import original_model
    from stages.data.image_source import ImageSource
    from stages.data.registry import parse_source
    from stages.machine.device import apply, choose
    from stages.metrics.mask_prediction import answers_to, asked_of
    from stages.models.registry import open_model
    from stages.models.resolve import resolve
    from stages.models.sam.encoder import SamEncoder

    source = parse_source(name)
    assert isinstance(source, ImageSource)
    choices = choose(device)
    apply(choices)
    asked = asked_of(source, count)
    original = original_model(run, config)
    pruned = open_model(resolve(str(published_model(run))))
    assert isinstance(original, SamEncoder)
    assert isinstance(pruned, SamEncoder)
    key = (original.source.path, name)
    if key not in originals:
        originals[key] = answers_to(original, asked, choices, callbacks)
    answers = answers_to(pruned, asked, choices, callbacks)
    return tuple(MaskSample(name, *sample) for sample in zip(asked, originals[key], answers, strict=True))
