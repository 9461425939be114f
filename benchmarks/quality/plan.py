"""What the quality benchmark compares: the methods, the points, and which of them at which amount of calibration.

Everything that one may want to change is a table here.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.cells import Cell, Row, figures_of_run, folder_for, run_command
from benchmarks.quality.texts import EMBEDDED, Text

HERE = Path(__file__).resolve().parent
DENSE, MAGNITUDE, REFERENCE = "dense", "magnitude", "SparseGPT"
# Ours: the flags of `lampctl run` beside those of the point.
METHODS: dict[str, tuple[str, ...]] = {
    MAGNITUDE: ("--method", "magnitude"),
    "Wanda": ("--method", "wanda"),
    REFERENCE: ("--method", "sparsegpt"),
    "ALPS": ("--method", "alps"),
    # As many training steps as effort medium, at the rate that suits it best (docs/experiments.md).
    "LAMP as published": (
        *("--method", "lamp", "--dtype", "bfloat16", "--epochs", "5", "--lr", "1e-3", "--no-hold-aside"),
        *("--no-refine", "--loss", "mse", "--pruner", "sparsegpt"),
    ),
    "LAMP, effort low": ("--method", "lamp", "--dtype", "bfloat16", "--effort", "low"),
    "LAMP, effort medium": ("--method", "lamp", "--dtype", "bfloat16", "--effort", "medium"),
    "LAMP, effort high": ("--method", "lamp", "--dtype", "bfloat16", "--effort", "high"),
}
# The peers': the pruner of benchmarks/quality/peer_prune.py.
PEERS = {"llm-compressor Wanda": "wanda", "llm-compressor SparseGPT": "sparsegpt"}
LAMPS = tuple(name for name in METHODS if name.startswith("LAMP"))
# In tables and when running: what is quick first.
ORDER = (DENSE, *(name for name in METHODS if name not in LAMPS), *PEERS, *LAMPS)

# What is asked of each method, as lampctl says it.
POINTS: dict[str, tuple[str, ...]] = {
    "50%": ("--sparsity", "0.5"),
    "60%": ("--sparsity", "0.6"),
    "70%": ("--sparsity", "0.7"),
    "80%": ("--sparsity", "0.8"),
    "2:4": ("--pattern", "2:4"),
    "4:8": ("--pattern", "4:8"),
    "2:4+int4": ("--pattern", "2:4", "--bits", "4"),
}
# As the peers say it: sparsity and mask. A point that is missing here is not asked of them.
PEER_POINTS = {
    **{point: (flags[1], "0:0") for point, flags in POINTS.items() if point.endswith("%")},
    "2:4": ("0.5", "2:4"),
    "4:8": ("0.5", "4:8"),
}
# (method, point): why there is none.
LEFT_OUT = {
    ("Wanda", "2:4+int4"): "it changes no weight that it keeps, and so cannot quantize",
    **{(method, "2:4+int4"): "it would prune and quantize one after the other, on another grid" for method in PEERS},
}


@dataclass(frozen=True)
class Part:
    """Some points of some methods at one amount of calibration; draws: windows left out at the text's start."""

    num_samples: int
    seqlen: int
    draws: tuple[int, ...]
    points: tuple[str, ...]
    methods: tuple[str, ...] = ORDER


FULL = (
    Part(64, 256, (0,), tuple(POINTS)),
    Part(128, 512, (0, 128, 256), ("70%", "2:4")),
)
QUICK = (
    Part(
        32,
        256,
        (0,),
        tuple(POINTS),
        tuple(name for name in ORDER if name not in ("LAMP, effort low", "LAMP, effort high")),
    ),
    Part(32, 256, (0, 32, 64), ("70%",)),
)


@dataclass(frozen=True)
class Setup:
    """What is the same in every cell."""

    model: str
    calibration: Text
    evaluation: tuple[Text, ...]
    eval_seqlen: int
    eval_max_tokens: int
    work: Path
    peer_python: Path | None  # None: cells of the peers are left out

    @property
    def evaluate(self) -> str:
        return ",".join(text.source for text in self.evaluation)

    @property
    def eval_flags(self) -> tuple[str, ...]:
        numbers = ("--eval-seqlen", str(self.eval_seqlen), "--eval-max-tokens", str(self.eval_max_tokens))
        return ("--evaluate", self.evaluate, *numbers)

    @property
    def wanted(self) -> tuple[str, ...]:
        return tuple(f"perplexity_{text.label}" for text in self.evaluation)

    def perplexities(self, evaluations: list[dict]) -> Row:
        """One column a text."""
        found = {e["source"]: e["perplexity"] for e in evaluations}
        return {f"perplexity_{text.label}": f"{found[text.source]:.2f}" for text in self.evaluation}


KEY = ("model", "evaluated", "calibration", "num_samples", "seqlen", "point", "method", "draw")
NONE = "-"  # in a column that says nothing of this method


def cells_of(parts: tuple[Part, ...], setup: Setup) -> list[Cell]:
    """The cells of `parts`, each once, the quick ones first."""
    cells: dict[tuple[str, ...], Cell] = {}
    for part in parts:
        # The embedded corpus is too small for draws beside each other of the large size.
        draws = part.draws[:1] if setup.calibration.source == EMBEDDED and part.seqlen > 256 else part.draws
        for point, method, draw in itertools.product(part.points, part.methods, draws):
            if (method, point) in LEFT_OUT or (method in PEERS and setup.peer_python is None):
                continue
            cell = _cell(setup, part, point, method, draw)
            cells.setdefault(tuple(cell.key.values()), cell)
    return sorted(cells.values(), key=lambda cell: ORDER.index(cell.key["method"]))


def _cell(setup: Setup, part: Part, point: str, method: str, draw: int) -> Cell:
    num_windows = setup.eval_max_tokens // setup.eval_seqlen
    looks_at_data = method not in (DENSE, MAGNITUDE)
    amount = (setup.calibration.label, str(part.num_samples), str(part.seqlen)) if looks_at_data else (NONE,) * 3
    asked = NONE if method == DENSE else point
    values = (setup.model, f"{num_windows}x{setup.eval_seqlen}", *amount, asked, method)
    key = dict(zip(KEY, (*values, str(draw) if looks_at_data else NONE), strict=True))
    if method == DENSE:
        return _dense_cell(setup, key)
    if method in PEERS:
        return _peer_cell(setup, key, part, draw)
    return _lampctl_cell(setup, key, part, draw)


def _dense_cell(setup: Setup, key: Row) -> Cell:
    def figures(reports: list[dict]) -> Row:
        return {**setup.perplexities(reports[0]["evaluations"]), "sparsity": f"{reports[0]['sparsity']:.6f}"}

    folder = folder_for(key, "", setup.work)
    return Cell(key, "", folder, (_measure(setup.model, *setup.eval_flags),), figures, setup.wanted)


def _lampctl_cell(setup: Setup, key: Row, part: Part, draw: int) -> Cell:
    point, flags = key["point"], (*METHODS[key["method"]], *POINTS[key["point"]])
    settings = " ".join(flags)
    folder = folder_for(key, settings, setup.work)
    calibration: tuple[str, ...] = ("--seqlen", str(part.seqlen))
    if key["draw"] != NONE:
        calibration += ("--calibration", setup.calibration.source, "--num-samples", str(part.num_samples))
        calibration += ("--calibration-sampling", "contiguous", "--calibration-skip", str(draw))
    # Evaluated apart, as the peers' models are, so that the processor time of the run is that of pruning.
    run = run_command(setup.model, (*flags, *calibration, "--evaluate", ""), folder / "run")
    measured = _measure(str(folder / "run" / "model"), *setup.eval_flags, *_pattern(point))

    def figures(reports: list[dict]) -> Row:
        return {
            **setup.perplexities(reports[1]["evaluations"]),
            **_counts(reports[1]),
            **figures_of_run(reports[0]),
        }

    return Cell(key, settings, folder, (run, measured), figures, setup.wanted, resumes=True)


def _peer_cell(setup: Setup, key: Row, part: Part, draw: int) -> Cell:
    point, pruner = key["point"], PEERS[key["method"]]
    sparsity, mask = PEER_POINTS[point]
    flags = ("--pruner", pruner, "--sparsity", sparsity, "--mask", mask)
    settings = " ".join(flags)
    folder = folder_for(key, settings, setup.work)
    amount = ("--num-samples", str(part.num_samples), "--seqlen", str(part.seqlen), "--skip", str(draw))
    windows = (sys.executable, str(HERE / "windows.py"), setup.model, setup.calibration.source, str(folder))
    prune = (str(setup.peer_python), str(HERE / "peer_prune.py"), str(folder), *flags)
    measured = _measure(str(folder / "pruned"), *setup.eval_flags, *_pattern(point))

    def figures(reports: list[dict]) -> Row:
        return {
            **setup.perplexities(reports[2]["evaluations"]),
            **_counts(reports[2]),
            "seconds": f"{reports[1]['seconds']:.0f}",
            "cpu_seconds": f"{reports[1]['cpu_s']:.0f}",
            "peak_memory_mb": f"{reports[1]['peak_memory_bytes'] / 1e6:.0f}",
            "software": ", ".join(f"{name} {version}" for name, version in reports[1]["versions"].items()),
        }

    return Cell(key, settings, folder, ((*windows, *amount), prune, measured), figures, setup.wanted)


def _measure(model: str, *flags: str) -> tuple[str, ...]:
    return (sys.executable, str(HERE / "measure.py"), model, *flags)


def _counts(report: dict) -> Row:
    held = report["pattern_held"]
    return {
        "sparsity": f"{report['sparsity']:.6f}",
        "pattern_held": NONE if held is None else f"{held:.6f}",
    }


def _pattern(point: str) -> Iterator[str]:
    if ":" in point:
        yield from ("--pattern", point.partition("+")[0])
