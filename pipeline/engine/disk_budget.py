"""Disk space that a run will need at most, computed from its plan before it starts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.engine.plan import Output, Step, releasable
from pipeline.errors import OutOfDisk


@dataclass(frozen=True)
class Need:
    """Additional bytes at the moment that needs the most."""

    weights: int  # blocks, masks, the exported model
    activations: int  # streams, a step's own intermediate ones included
    step: str  # the step at that moment

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.activations


def most_needed(
    steps: Sequence[Step],
    committed: Sequence[str],
    size_of: Callable[[str], int],
    scratch_of: Callable[[Step], int],
    *,
    keeps_activations: bool = False,
) -> Need:
    """The moment that needs the most additional room: what later steps add, less what they release.

    Args:
        steps: The whole plan.
        committed: Names of the committed steps.
        size_of: Size of a payload in bytes, by its name.
        scratch_of: Size of a step's own intermediate streams in bytes.
        keeps_activations: No activation stream is released.
    """
    done, size_of = list(committed), functools.cache(size_of)
    held: dict[str, Output] = {o.name: o for step in steps if step.name in set(done) for o in step.outputs}

    def release() -> None:
        if not keeps_activations:
            for name in releasable(steps, done):
                held.pop(name, None)

    def total(*, is_bulky: bool) -> int:
        return sum(size_of(name) for name, output in held.items() if output.is_stream == is_bulky)

    release()
    before = Need(total(is_bulky=False), total(is_bulky=True), "")
    most = Need(0, 0, "")
    for step in steps:
        if step.name in done:
            continue
        held.update({output.name: output for output in step.outputs})
        weights = total(is_bulky=False) - before.weights
        activations = total(is_bulky=True) + scratch_of(step) - before.activations
        if weights + activations > most.total:
            most = Need(weights, activations, step.name)
        done.append(step.name)
        release()
    return most


def require_room(label: str, needed: int, free: int, what: str) -> None:
    """Raise OutOfDisk, with the numbers, unless `free` bytes hold `needed`."""
    if needed > free:
        raise OutOfDisk(
            f"{label} will need {_gb(needed)} for {what}, and has {_gb(free)}: nothing was begun. Free some space, "
            "name another disk by --run-dir or --scratch-dir, or use a smaller --num-samples or --seqlen"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
