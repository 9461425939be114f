"""Continuations of prompts by the pruned models of runs and by their originals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.run_config import RunConfig
from pipeline.rundir.run_directory import RunDirectory
from pipeline.runs.packing import published_model
from pipeline.steps.committed import is_exported
from pipeline.steps.run_facts import facts_of
from stages.interfaces import Watcher


@dataclass(frozen=True)
class Continuation:
    """One prompt, and its continuations by the original and by the pruned model."""

    prompt: str
    dense: str
    pruned: str


def continuations(
    runs: Sequence[tuple[RunDirectory, RunConfig]],
    prompts: Sequence[str],
    num_tokens: int,
    device: str,
    callbacks: Watcher,
) -> tuple[tuple[Continuation, ...], ...]:
    """For each run its continuations of the prompts; none for one that is not exported yet, or writes no text.

    Both models are checked to be what the run says. An original that several runs share writes once.
    Raises ResourceError or ConfigMismatch where an original is gone or has changed; DamagedData.
    """
    from pipeline.steps.executor import original_model
    from stages.generate import continue_prompts
    from stages.machine.device import choose
    from stages.tasks.registry import task_named

    place = choose(device).torch_device
    originals: dict[Path, tuple[str, ...]] = {}
    found: list[tuple[Continuation, ...]] = []
    for run, config in runs:
        if not is_exported(run) or not task_named(facts_of(run).model.task).reads_text:
            found.append(())
            continue
        trusts = config.trust_remote_code
        original = original_model(run, config).source.path
        if original not in originals:
            originals[original] = continue_prompts(original, prompts, num_tokens, place, callbacks, trusts)
        pruned = continue_prompts(published_model(run), prompts, num_tokens, place, callbacks, trusts)
        texts = zip(prompts, originals[original], pruned, strict=True)
        found.append(tuple(Continuation(*text) for text in texts))
    return tuple(found)
