"""The parts of the quality benchmark, and the cells of each, in the order in which they are run.

Everything that one may want to change is a table here or in methods.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.quality.cells import Row
from benchmarks.quality.methods import (
    ADMM,
    ALPS,
    CURVE,
    DENSE,
    HIGH,
    KD_MAGNITUDE,
    KD_REFERENCE,
    LEFT_OUT,
    LLM_COMPRESSOR,
    LOW,
    MAGNITUDE,
    OURS,
    OURS_BF16,
    OURS_STREAMS_BF16,
    OURS_TRAINS_BF16,
    PLAIN,
    PUBLISHED,
    REFERENCE,
    REFERENCE_BF16,
    WANDA,
)
from benchmarks.quality.texts import C4_FIRST, MAIN_CALIBRATION

KEY = ("model", "evaluated", "calibration", "num_samples", "seqlen", "point", "method", "draw")
NONE = "-"  # in a column that says nothing of this method

CORE_METHODS = (DENSE, REFERENCE, ALPS, PUBLISHED, OURS)
CORE_POINTS = ("70%", "2:4", "80%", "50%", "2:4+int4")  # in the order in which they are run
TASK_LIMIT = 500


@dataclass(frozen=True)
class Grid:
    """Every method at every point, for each draw.

    Attributes:
        points: Keys of `methods.POINTS`.
        methods: Names of `methods.ORDER`.
        draws: Calibration windows left out at the start of the text.
        num_samples: Calibration windows.
        seqlen: Tokens of each.
        is_on_c4: Calibrated on the first half of the C4 documents, not on the study's own text.
        is_tasks: Measured by zero-shot tasks, not by perplexity.
    """

    points: tuple[str, ...]
    methods: tuple[str, ...]
    draws: tuple[int, ...] = (0,)
    num_samples: int = 128
    seqlen: int = 256
    is_on_c4: bool = False
    is_tasks: bool = False


@dataclass(frozen=True)
class Part:
    """What `--part` picks: grids that make one table. Their number of samples, their length and their text are one."""

    title: str
    grids: tuple[Grid, ...]

    @property
    def is_tasks(self) -> bool:
        return self.grids[0].is_tasks


CORE = "core"
PARTS: dict[str, Part] = {
    CORE: Part(
        "Core",
        (Grid(CORE_POINTS, CORE_METHODS), Grid(("70%", "2:4", "80%"), CORE_METHODS, draws=(128, 256))),
    ),
    "baselines": Part(
        "Other one-shot pruners, and llm-compressor's",
        (Grid(CORE_POINTS, (MAGNITUDE, WANDA, REFERENCE, *LLM_COMPRESSOR)),),
    ),
    "efforts": Part("Efforts", (Grid(("70%", "2:4"), (LOW, PLAIN, OURS, HIGH)),)),
    "samples": Part("More samples to distill on", (Grid(("2:4",), (*CURVE, HIGH)),)),
    "retraining": Part(
        "Retraining of the whole model, on as many tokens as LAMP trains on",
        (Grid(("70%", "90%"), (REFERENCE, KD_MAGNITUDE, KD_REFERENCE, ADMM, OURS)),),
    ),
    "points": Part("Other points", (Grid(("60%", "90%", "4:8", "2:4+int3"), CORE_METHODS),)),
    "c4": Part("Calibrated on C4", (Grid(("70%", "2:4"), CORE_METHODS, is_on_c4=True),)),
    "long": Part("Longer windows", (Grid(("70%",), CORE_METHODS, seqlen=512),)),
    "precision": Part(
        "Arithmetic",
        (
            Grid(
                ("70%",),
                (REFERENCE, REFERENCE_BF16, OURS, OURS_TRAINS_BF16, OURS_STREAMS_BF16, OURS_BF16),
                draws=(0, 128, 256),
            ),
        ),
    ),
    "tasks": Part("Zero-shot tasks", (Grid(("70%", "50%"), (DENSE, REFERENCE, PUBLISHED, OURS), is_tasks=True),)),
}


USUAL_TEXTS = ("wikitext2", "c4")


@dataclass(frozen=True)
class Study:
    """What may stand in one table: labels of the model, of how it is measured, and of the calibration text."""

    model: str = "smollm2-135m"
    evaluated: str = "40x256"  # windows x tokens of each text; " of " others than USUAL_TEXTS
    tasks: str = f"{TASK_LIMIT} rows a task"
    calibration: str = MAIN_CALIBRATION

    def keys(self, part: Part) -> list[Row]:
        """The cells of a part, each once, in the order in which they are run."""
        found = itertools.chain.from_iterable(self._keys_of_grid(grid) for grid in part.grids)
        return list({tuple(key.values()): key for key in found}.values())

    def dense_keys(self) -> list[Row]:
        """The cells of the original model, which every part is shown beside."""
        found = [key for part in PARTS.values() for key in self.keys(part) if key["method"] == DENSE]
        return list({tuple(key.values()): key for key in found}.values())

    def evaluated_of(self, part: Part) -> str:
        """How the cells of a part are measured: their column `evaluated`."""
        return self.tasks if part.is_tasks else self.evaluated

    def _keys_of_grid(self, grid: Grid) -> Iterable[Row]:
        evaluated = self.tasks if grid.is_tasks else self.evaluated
        text = C4_FIRST if grid.is_on_c4 else self.calibration
        for draw, point, method in itertools.product(grid.draws, grid.points, grid.methods):
            if (method, point) in LEFT_OUT:
                continue
            looks_at_data = method not in (DENSE, MAGNITUDE)
            amount = (text, str(grid.num_samples), str(grid.seqlen)) if looks_at_data else (NONE,) * 3
            asked = NONE if method == DENSE else point
            values = (self.model, evaluated, *amount, asked, method, str(draw) if looks_at_data else NONE)
            yield dict(zip(KEY, values, strict=True))
