"""Choices that keep a run within the memory that there is, and refusals with numbers (`memory_estimate`)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stages.errors import ResourceError
from stages.pruners.registry import PAPER_PRUNER, PRUNERS
from stages.runtime.memory_estimate import (
    SLACK,
    Shapes,
    Work,
    distillation,
    generation,
    least_peaks,
    peaks,
    statistics_room,
)

_NOISE = 1.15  # baseline memory differs between processes
# Advice that saves a smaller share of what a run takes is left out.
_WORTH_NAMING = 0.05


@dataclass(frozen=True)
class Fit:
    """The choices that keep a run within a memory limit, and its peak memory with them."""

    samples_at_once: int  # in a forward pass without gradients
    spills: bool  # the best weights so far are stored on disk while a block is trained
    distills_resident: bool  # all blocks are in memory while the model is distilled
    generates_resident: bool  # all blocks are in memory while the original model generates samples
    peak_bytes: int
    left_bytes: int  # what the run may take beside the baseline memory
    shortage: str | None = None  # the machine may have too little memory: what is needed and what there is


@dataclass(frozen=True)
class Room:
    """The memory that a run may take, the baseline memory of the process included."""

    available_bytes: int  # what this machine has for it
    limit_bytes: int | None = None  # that the user has set; None: what is available
    is_device: bool = False  # memory of a GPU, which is not lent out: what does not fit there fails

    @property
    def bound(self) -> int:
        """The most bytes that the run shall take."""
        return self.available_bytes if self.limit_bytes is None else self.limit_bytes

    @property
    def where(self) -> str:
        """The kind of memory, for messages."""
        return "GPU memory" if self.is_device else "memory"


def fit(
    shapes: Shapes, work: Work, base_bytes: int, room: Room, candidates: Sequence[int], *, is_new: bool = False
) -> Fit:
    """Choose the largest micro-batch that keeps the run within the memory that there is.

    The best weights are spilled to disk only if no micro-batch fits otherwise. The number of passes that collect the
    statistics of a block follows from the limit afterwards (`statistics_room`): it changes no result, and the
    micro-batch does. So a processor whose memory happens to be short takes the largest micro-batch all the same, unless
    the user has set a limit; what more the system has to lend is not known, and the run is not refused.

    Args:
        shapes: Sizes of the model and its samples.
        work: What the run does.
        base_bytes: Baseline memory before the model is loaded.
        room: The memory for it. All blocks are in memory together only where that is enough.
        candidates: Sizes of micro-batches, in samples, in rising order.
        is_new: The run begins here. Then a limit also has to hold in processes with a larger baseline memory.

    Raises:
        ResourceError: Nothing fits; the message names a sufficient limit.
    """
    is_hard = room.limit_bytes is not None or room.is_device
    left = room.bound - (int(_NOISE * base_bytes) if is_new and is_hard else base_bytes)
    choices = tuple(reversed(candidates)) if is_hard else tuple(candidates[-1:])
    for spills, samples in itertools.product((False, True), choices):
        if max(least_peaks(shapes, work, samples, spills=spills).values()) <= left:
            return _fit(shapes, work, base_bytes, room, samples, spills=spills)
    details = least_peaks(shapes, work, choices[-1], spills=True)
    base = int(_NOISE * base_bytes)
    needs = f"{_gb(_round_up(base + max(details.values())))} of {room.where} ({_describe(details, base)})"
    advice = _advice(shapes, work, choices[-1])
    if room.limit_bytes is not None:
        raise ResourceError(
            f"--memory-limit {_gb(room.limit_bytes)} is too little: this run needs {needs}. Give it that much, or "
            f"{advice}"
        )
    if room.is_device:
        raise ResourceError(f"this run needs {needs}, and {_gb(room.bound)} are free: {advice}, or use a larger GPU")
    shortage = (
        f"this run may need {needs}, and {_gb(room.bound)} are free here: the system may end it. Free some, or {advice}"
    )
    return replace(_fit(shapes, work, base_bytes, room, choices[-1], spills=True), shortage=shortage)


def _fit(shapes: Shapes, work: Work, base_bytes: int, room: Room, samples: int, *, spills: bool) -> Fit:
    """The choices with a micro-batch of `samples`."""
    left = room.bound - base_bytes
    statistics = statistics_room(shapes, work, samples, left)
    most = base_bytes + max(peaks(shapes, work, samples, spills=spills, room_bytes=statistics).values())
    there_is = min(room.available_bytes, room.bound)
    distilling, generating = (
        base_bytes + int(SLACK * step(shapes, work, is_resident=True)) if is_wanted else None
        for step, is_wanted in ((distillation, work.distills), (generation, work.num_at_once > 0))
    )
    resident = [peak if peak is not None and peak <= there_is else 0 for peak in (distilling, generating)]
    return Fit(samples, spills, resident[0] > 0, resident[1] > 0, max(most, *resident), left)


def _advice(shapes: Shapes, work: Work, samples: int) -> str:
    """What takes less memory."""
    lighter = PRUNERS.get(PAPER_PRUNER)
    others = {
        f"prune with {lighter.title}": replace(work, pruner=lighter),
        "generate no samples (--distill-generated 0)": replace(work, num_at_once=0),
    }
    taken = max(least_peaks(shapes, work, samples, spills=True).values())
    advice = []
    for what, other in others.items():
        less = taken - max(least_peaks(shapes, other, samples, spills=True).values())
        if less >= _WORTH_NAMING * taken:
            advice.append(f"{what}, which takes {_gb(less)} less")
    return ", or ".join([*advice, "use a smaller --seqlen"])


def _describe(details: Mapping[str, int], base_bytes: int) -> str:
    """What each kind of step needs; the first one is what the run needs, to the digit."""
    most_first = sorted(details.items(), key=lambda detail: -detail[1])
    return ", ".join(f"{kind} {_gb(_round_up(base_bytes + size))}" for kind, size in most_first)


def _round_up(size: int) -> int:
    """The least amount that a message can name, in hundredths of a gigabyte, that is enough for `size`."""
    step = 10_000_000
    return -(-size // step) * step


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}GB"
