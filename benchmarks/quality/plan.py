"""The commands of every cell of the quality benchmark, and what becomes a row of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.cells import UNKNOWN, Cell, Row, figures_of_run, folder_for, run_command
from benchmarks.quality.methods import DENSE, IN_PEER_PYTHON, PEER_POINTS, PEERS, flags_of
from benchmarks.quality.parts import CORE, NONE, PARTS, USUAL_TEXTS, Study
from benchmarks.quality.texts import C4_FIRST, EMBEDDED, Text
from pipeline.config.run_config import DISTILL_FIELDS, LAMP_FIELDS

HERE = Path(__file__).resolve().parent
_EVERY_RUN = ("calibrate", "export")  # kinds of steps that report nothing that a row does not have
# Settings of the run that a row states as they were in force.
RESOLVED = ("method", "alpha", "beta", "bits", *LAMP_FIELDS, "distill", *DISTILL_FIELDS, "dtype", "train_dtype")


@dataclass(frozen=True)
class Setup:
    """What is the same in every cell.

    Attributes:
        calibration: The text of all parts but those on C4.
        c4: The text of those; None: there is none, and they are left out.
        peer_python: None: cells of the peers are left out.
        task_data: The rows of the zero-shot tasks; None: the cells of tasks are left out.
    """

    model: str
    calibration: Text
    c4: Text | None
    evaluation: tuple[Text, ...]
    eval_seqlen: int
    eval_max_tokens: int
    task_data: Path | None
    task_limit: int
    work: Path
    peer_python: Path | None

    @property
    def study(self) -> Study:
        evaluated = f"{self.eval_max_tokens // self.eval_seqlen}x{self.eval_seqlen}"
        labels = tuple(text.label for text in self.evaluation)
        if labels != USUAL_TEXTS:
            evaluated += f" of {', '.join(labels)}"
        return Study(self.model, evaluated, f"{self.task_limit} rows a task", self.calibration.label)

    @property
    def eval_flags(self) -> tuple[str, ...]:
        numbers = ("--eval-seqlen", str(self.eval_seqlen), "--eval-max-tokens", str(self.eval_max_tokens))
        return ("--evaluate", ",".join(text.source for text in self.evaluation), *numbers)

    @property
    def wanted(self) -> tuple[str, ...]:
        return tuple(f"perplexity_{text.label}" for text in self.evaluation)

    def perplexities(self, evaluations: list[dict]) -> Row:
        """One column a text."""
        found = {e["source"]: e["perplexity"] for e in evaluations}
        return {f"perplexity_{text.label}": f"{found[text.source]:.2f}" for text in self.evaluation}


def cells_of(names: Sequence[str], setup: Setup) -> list[Cell]:
    """The cells of these parts, each once, in the order in which they are run."""
    cells: dict[tuple[str, ...], Cell] = {}
    for name in names:
        for key in setup.study.keys(PARTS[name]):
            if _why_not(setup, key) is None:
                cells.setdefault(tuple(key.values()), _cell(setup, key))
    return list(cells.values())


def left_out(names: Sequence[str], setup: Setup) -> dict[str, int]:
    """Why cells of these parts cannot be run here: the reason, and how many."""
    counts: dict[str, int] = {}
    for name in names:
        for key in setup.study.keys(PARTS[name]):
            reason = _why_not(setup, key)
            if reason is not None:
                counts[reason] = counts.get(reason, 0) + 1
    return counts


def _why_not(setup: Setup, key: Row) -> str | None:
    if key["method"] in PEERS and PEERS[key["method"]][0] == IN_PEER_PYTHON and setup.peer_python is None:
        return "the peers have no Python yet: python -m benchmarks.quality.peers"
    if key["evaluated"] == setup.study.tasks and setup.task_data is None:
        return "no rows of the zero-shot tasks in ../shared/data/tasks (--data DIR)"
    if key["calibration"] == C4_FIRST and setup.c4 is None:
        return "no documents of C4 in ../shared/data/text (--data DIR)"
    if setup.calibration.source == EMBEDDED and key["draw"] not in (NONE, "0"):
        return f"{EMBEDDED} is too short for a second draw"
    return None


def _cell(setup: Setup, key: Row) -> Cell:
    if key["evaluated"] == setup.study.tasks:
        return _tasks_cell(setup, key)
    if key["method"] == DENSE:
        return _dense_cell(setup, key)
    if key["method"] in PEERS:
        return _peer_cell(setup, key)
    return _lampctl_cell(setup, key)


def _dense_cell(setup: Setup, key: Row) -> Cell:
    def figures(reports: list[dict]) -> Row:
        return {**setup.perplexities(reports[0]["evaluations"]), "sparsity": f"{reports[0]['sparsity']:.6f}"}

    folder = folder_for(key, "", setup.work)
    return Cell(key, "", folder, (_measure(setup.model, *setup.eval_flags),), figures, setup.wanted)


def _lampctl_cell(setup: Setup, key: Row) -> Cell:
    settings, folder, run = _pruning(setup, key)
    measured = _measure(str(folder / "run" / "model"), *setup.eval_flags, *_pattern(key["point"]))

    def figures(reports: list[dict]) -> Row:
        run_report, status, measurement = reports
        return {
            **setup.perplexities(measurement["evaluations"]),
            **_counts(measurement),
            **figures_of_run(run_report),
            **of_status(status),
        }

    twin = {**key, "evaluated": setup.study.tasks}
    kept_for = (twin,) if setup.task_data and twin in setup.study.keys(PARTS["tasks"]) else ()
    commands = (run, _status(folder), measured)
    return Cell(key, settings, folder, commands, figures, setup.wanted, resumes=True, kept_for=kept_for)


def _tasks_cell(setup: Setup, key: Row) -> Cell:
    """Tasks on the run of the cell that has the perplexities; it is made here if it is not there."""
    on_tasks = ("--data", "", "--tasks", "zero-shot", "--task-data", str(setup.task_data))
    on_tasks += ("--limit", str(setup.task_limit), "--json")
    evaluate = (sys.executable, "-m", "lampctl", "evaluate")
    if key["method"] == DENSE:
        command = (*evaluate, setup.model, *on_tasks)
        folder = folder_for(key, "", setup.work)
        return Cell(key, "", folder, (command,), lambda r: _accuracies(r[0]["accuracies"]), ("acc_mean",))
    twin = {**key, "evaluated": setup.study.evaluated}
    settings, folder, run = _pruning(setup, twin)

    def figures(reports: list[dict]) -> Row:
        pruned = [found for found in reports[2]["accuracies"] if found["which"] == "pruned"]
        return {**_accuracies(pruned), **of_status(reports[1])}

    kept_for = (twin,) if twin in setup.study.keys(PARTS[CORE]) else ()
    commands = (run, _status(folder), (*evaluate, str(folder / "run"), *on_tasks))
    return Cell(key, settings, folder, commands, figures, ("acc_mean",), resumes=True, kept_for=kept_for)


def _pruning(setup: Setup, key: Row) -> tuple[str, Path, tuple[str, ...]]:
    """Settings, folder and command of a run, which is evaluated apart: its processor time is that of pruning."""
    flags = flags_of(key["method"], key["point"])
    settings = " ".join(flags)
    folder = folder_for(key, settings, setup.work)
    calibration: tuple[str, ...] = ()
    if key["draw"] != NONE:
        calibration = ("--calibration", _calibration(setup, key).source, "--num-samples", key["num_samples"])
        calibration += ("--seqlen", key["seqlen"], "--calibration-sampling", "contiguous")
        calibration += ("--calibration-skip", key["draw"])
    unmeasured = ("--evaluate", "", "--no-evaluate-dense")
    return settings, folder, run_command(setup.model, (*flags, *calibration, *unmeasured), folder / "run")


def _peer_cell(setup: Setup, key: Row) -> Cell:
    script, *own = PEERS[key["method"]]
    flags = (*own, *PEER_POINTS[key["point"]])
    settings = " ".join(flags)
    folder = folder_for(key, settings, setup.work)
    amount = ("--num-samples", key["num_samples"], "--seqlen", key["seqlen"], "--skip", key["draw"])
    source = _calibration(setup, key).source
    windows = (sys.executable, str(HERE / "windows.py"), setup.model, source, str(folder), *amount)
    python = str(setup.peer_python) if script == IN_PEER_PYTHON else sys.executable
    prune = (python, "-m", f"benchmarks.quality.{script}", str(folder), *flags)
    measured = _measure(str(folder / "pruned"), *setup.eval_flags, *_pattern(key["point"]))

    def figures(reports: list[dict]) -> Row:
        _, pruned, measurement = reports
        return {
            **setup.perplexities(measurement["evaluations"]),
            **_counts(measurement),
            "seconds": f"{pruned['seconds']:.0f}",
            "cpu_seconds": UNKNOWN if pruned["cpu_s"] is None else f"{pruned['cpu_s']:.0f}",
            "peak_memory_mb": f"{pruned['peak_memory_bytes'] / 1e6:.0f}",
            "software": ", ".join(f"{name} {version}" for name, version in pruned["versions"].items()),
        }

    return Cell(key, settings, folder, (windows, prune, measured), figures, setup.wanted)


def of_status(report: Mapping) -> Row:
    """What produced a row, from `lampctl status --json`: settings in force, and what steps of the whole model report.

    A distillation reports the held-out end loss before and after.
    """
    config = report["config"]
    resolved = [f"{name}={config[name]}" for name in RESOLVED if config.get(name) is not None]
    reported = [
        f"{step['name']}: {step['headline']}"
        for step in report["steps"]
        if step["headline"] and step["block"] is None and not step["is_tabled"] and step["kind"] not in _EVERY_RUN
    ]
    return {"resolved": " ".join(resolved), "reported": "; ".join(reported)}


def _accuracies(found: Sequence[Mapping]) -> Row:
    """`acc` of each task, and their mean."""
    of_task = {each["task"]: each["metrics"]["acc"] for each in found}
    columns = {f"acc_{task}": f"{value:.4f}" for task, value in of_task.items()}
    return {"acc_mean": f"{sum(of_task.values()) / len(of_task):.4f}", **columns}


def _calibration(setup: Setup, key: Row) -> Text:
    if key["calibration"] == C4_FIRST:
        assert setup.c4 is not None
        return setup.c4
    return setup.calibration


def _measure(model: str, *flags: str) -> tuple[str, ...]:
    return (sys.executable, str(HERE / "measure.py"), model, *flags)


def _status(folder: Path) -> tuple[str, ...]:
    return (sys.executable, "-m", "lampctl", "status", str(folder / "run"), "--json")


def _counts(report: dict) -> Row:
    held = report["pattern_held"]
    return {
        "sparsity": f"{report['sparsity']:.6f}",
        "pattern_held": NONE if held is None else f"{held:.6f}",
    }


def _pattern(point: str) -> Iterator[str]:
    if ":" in point:
        yield from ("--pattern", point.partition("+")[0])
