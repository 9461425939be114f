"""Plan of a run as data: each step names the payloads that it reads and declares those that it writes.

Everything that follows from a plan and the list of committed steps is computed here: what comes next, which payloads
may be released, which must be sound. The steps themselves come from `pipeline.steps.lamp_plan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Output:
    """Declaration of one payload that a step writes.

    Attributes:
        name: Name of the payload in commits, for example ``pruned/3``.
        is_stream: It holds activations. A lost one is rebuilt by running finished blocks forward.
        is_kept: It is never released.
        rebuilt_from: For a stream, the payloads that the rebuild reads.
    """

    name: str
    is_stream: bool = False
    is_kept: bool = False
    rebuilt_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One unit of work, committed as a whole.

    Attributes:
        kind: Name of the step kind.
        block: Index of the block, from 0, for a step of one block.
        subject: For a measurement, what is measured: part of the step's name.
        reads: Names of the payloads that the step reads.
        outputs: The payloads that it writes.
        request: What the step kind has to know beyond the block, for example which data set to evaluate on.
    """

    kind: str
    block: int | None = None
    subject: str | None = None
    reads: tuple[str, ...] = ()
    outputs: tuple[Output, ...] = ()
    request: object = None

    @property
    def name(self) -> str:
        """Name of the step in commits and messages, for example ``prune-block/3``."""
        if self.block is not None:
            return f"{self.kind}/{self.block}"
        return f"{self.kind}/{self.subject}" if self.subject else self.kind

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the payloads that the step writes."""
        return tuple(output.name for output in self.outputs)


def next_steps(steps: Sequence[Step], committed: Iterable[str]) -> tuple[Step, ...]:
    """The steps that have no commit yet, in order."""
    done = set(committed)
    return tuple(step for step in steps if step.name not in done)


def releasable(steps: Sequence[Step], committed: Sequence[str]) -> tuple[str, ...]:
    """Names of the payloads that no later step reads.

    A payload lives until the step *after* its last reader has committed, so that a run whose newest commit is lost
    can redo that step.
    """
    if not committed:
        return ()
    settled = set(committed[:-1])  # the newest commit does not count yet
    released = []
    for step in steps:
        if step.name not in committed:
            continue
        for output in step.outputs:
            # A payload without a reader served its own step only.
            readers = [reader.name for reader in steps if output.name in reader.reads] or [step.name]
            if not output.is_kept and settled.issuperset(readers):
                released.append(output.name)
    return tuple(released)


def needed(steps: Sequence[Step], committed: Sequence[str]) -> tuple[str, ...]:
    """Names of the payloads that must be sound to resume: what later steps read, and what is never released."""
    done = set(committed)
    read_later = {name for step in steps if step.name not in done for name in step.reads}
    made = [output for step in steps if step.name in done for output in step.outputs]
    return tuple(output.name for output in made if output.name in read_later or output.is_kept)


def maker_of(payload: str, steps: Sequence[Step]) -> Step:
    """The step that writes a payload."""
    return next(step for step in steps if payload in step.writes)


def is_stream(payload: str, steps: Sequence[Step]) -> bool:
    """Whether a payload is an activation stream. False for a payload that no step of the plan writes."""
    return any(output.is_stream for step in steps for output in step.outputs if output.name == payload)


def sources_of(payload: str, steps: Sequence[Step]) -> tuple[str, ...]:
    """Names of the payloads from which a lost one is rebuilt."""
    maker = maker_of(payload, steps)
    output = next(output for output in maker.outputs if output.name == payload)
    return output.rebuilt_from if output.is_stream else maker.reads
