"""The chain of steps as data: each step says what it reads and writes.

    calibrate -> capture -> prune 0 -> compensate 1 -> prune 1 -> ... -> prune n-1 -> export -> evaluate ...
    -> zero-shot ...

With a budget that looks at the data ``capture -> allocate -> prune 0``,
and with refinement ``prune i -> refine i -> compensate i+1``. Payloads are named by what they are: ``biased/i`` and
``dense/i`` are the *inputs* of block i through pruned and through original blocks; ``compensated/i``, ``unrefined/i``
(pruned, fp32, to be trained on) and ``pruned/i`` are weights of block i, ``masks/i`` its masks and grids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stages.tasks.base import EvaluationProtocol

CHAIN_KINDS = ("calibrate", "capture", "allocate", "prune-block", "compensate-block", "refine-block", "export")
EVALUATE = "evaluate"
ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class Step:
    """One unit of work, committed as a whole."""

    kind: str
    block: int | None = None
    subject: str | None = None  # of an evaluation: "dense/" or "pruned/", and the data set or task
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The step's name in commits, messages and run folders, e.g. ``prune-block/3``."""
        if self.block is not None:
            return f"{self.kind}/{self.block}"
        return f"{self.kind}/{self.subject}" if self.subject else self.kind


@dataclass(frozen=True)
class Evaluation:
    """What one evaluate step measures."""

    which: str  # "dense" or "pruned"
    source: str
    protocol: EvaluationProtocol

    @property
    def subject(self) -> str:
        """The part of the step's name after ``evaluate/``: two evaluations with one subject are the same."""
        return f"{self.which}/{self.source}@{self.protocol.label}"


@dataclass(frozen=True)
class ZeroShotEvaluation:
    """What one zero-shot step measures."""

    which: str  # "dense" or "pruned"
    task: str
    data: str | None  # the folder with the rows; None: they come from the hub
    limit: int | None  # only so many rows

    @property
    def subject(self) -> str:
        """The part of the step's name after ``zero-shot/``: two evaluations with one subject are the same."""
        where = f"@{self.data}" if self.data is not None else ""
        limit = f":{self.limit}" if self.limit is not None else ""
        return f"{self.which}/{self.task}{where}{limit}"


def chain(method: str, num_blocks: int, refines: bool = False, allocates: bool = False) -> tuple[Step, ...]:
    """The steps from the calibration set to the exported model, in the only order they can run.

    refines: each pruned block is trained on before the next step reads what it puts out. allocates: a first pass of
    the original model decides the budget; its table is in the figures of the step's commit.
    """
    compensates, reads_data = method == "lamp", method != "magnitude"
    steps: list[Step] = []
    if reads_data:
        steps.append(Step("calibrate", writes=("calibration",)))
        needs_dense = compensates and (num_blocks > 1 or refines)
        captured = ("biased/0", "dense/1") if needs_dense else ("biased/0",)
        steps.append(Step("capture", reads=("calibration",), writes=captured))
        if allocates:
            steps.append(Step("allocate", reads=("calibration", "biased/0")))
    for block in range(num_blocks):
        is_last = block == num_blocks - 1
        weights: tuple[str, ...] = ()
        if compensates and block > 0:
            # The last block's dense output is a target and nothing else: unless that block is refined, no later
            # step reads it.
            dense_out = () if is_last and not refines else (f"dense/{block + 1}",)
            steps.append(
                Step(
                    "compensate-block",
                    block,
                    reads=("calibration", f"biased/{block}", f"dense/{block}"),
                    writes=(f"compensated/{block}", *dense_out),
                )
            )
            weights = (f"compensated/{block}",)
        data = ("calibration", f"biased/{block}") if reads_data else ()
        biased_out = (f"biased/{block + 1}",) if reads_data and not is_last else ()
        finished = (f"pruned/{block}", *biased_out)
        first = (f"unrefined/{block}",) if refines else finished
        steps.append(Step("prune-block", block, reads=(*data, *weights), writes=(f"masks/{block}", *first)))
        if refines:
            read = (*data, f"dense/{block + 1}", f"unrefined/{block}", f"masks/{block}")
            steps.append(Step("refine-block", block, reads=read, writes=finished))
    parts = tuple(f"{kind}/{i}" for i in range(num_blocks) for kind in ("pruned", "masks"))
    steps.append(Step("export", reads=parts, writes=("model",)))
    return tuple(steps)


def evaluation_steps(
    sources: Iterable[str], protocol: EvaluationProtocol, with_dense: bool
) -> tuple[tuple[Step, Evaluation], ...]:
    """The evaluate steps: of the pruned model first, because that is what the user waits for."""
    kinds = ("pruned", "dense") if with_dense else ("pruned",)
    evaluations = [Evaluation(which, source, protocol) for source in sources for which in kinds]
    return tuple(
        (Step(EVALUATE, subject=e.subject, reads=("model",) if e.which == "pruned" else ()), e)
        for e in dict.fromkeys(evaluations)
    )


def zero_shot_steps(
    tasks: Sequence[str], data: str | None, limit: int | None, with_dense: bool
) -> tuple[tuple[Step, ZeroShotEvaluation], ...]:
    """The zero-shot steps: all of one model together, since the whole of it is loaded for them."""
    kinds = ("pruned", "dense") if with_dense else ("pruned",)
    evaluations = [ZeroShotEvaluation(which, task, data, limit) for which in kinds for task in tasks]
    return tuple(
        (Step(ZERO_SHOT, subject=e.subject, reads=("model",) if e.which == "pruned" else ()), e)
        for e in dict.fromkeys(evaluations)
    )


def next_steps(steps: Sequence[Step], committed: Iterable[str]) -> tuple[Step, ...]:
    """The steps that have no commit yet, in order."""
    done = set(committed)
    return tuple(step for step in steps if step.name not in done)


def releasable(steps: Sequence[Step], committed: Sequence[str]) -> tuple[str, ...]:
    """The payloads that no step will read again.

    A payload lives until the step *after* its last reader has committed, so that a run whose newest commit is
    lost can redo that step. The calibration set, the pruned blocks and the model stay for good.
    """
    if not committed:
        return ()
    settled = set(committed[:-1])  # the newest commit does not count yet
    released = []
    for step in steps:
        if step.name not in committed:
            continue
        for payload in step.writes:
            # A payload without a reader served its own step only.
            readers = [reader.name for reader in steps if payload in reader.reads] or [step.name]
            if not _is_kept(payload) and settled.issuperset(readers):
                released.append(payload)
    return tuple(released)


def needed(steps: Sequence[Step], committed: Sequence[str]) -> tuple[str, ...]:
    """The payloads that must be sound for the run to go on: what steps to come read, and what stays for good."""
    done = set(committed)
    read_later = {name for step in steps if step.name not in done for name in step.reads}
    made = [name for step in steps if step.name in done for name in step.writes]
    return tuple(name for name in made if name in read_later or _is_kept(name))


def sources_of(payload: str, steps: Sequence[Step]) -> tuple[str, ...]:
    """The payloads from which a lost one is made again: finished blocks for a stream, else what its step read."""
    kind, _, number = payload.partition("/")
    if kind == "biased":
        return ("calibration", *(f"pruned/{block}" for block in range(int(number))))
    if kind == "dense":
        return ("calibration",)
    return maker_of(payload, steps).reads


def maker_of(payload: str, steps: Sequence[Step]) -> Step:
    """The step that writes a payload."""
    return next(step for step in steps if payload in step.writes)


def is_stream(payload: str) -> bool:
    """Whether a payload is made again by running finished blocks forward."""
    return payload.startswith(("biased/", "dense/"))


def _is_kept(payload: str) -> bool:
    return payload in ("calibration", "model") or payload.startswith(("pruned/", "masks/"))
