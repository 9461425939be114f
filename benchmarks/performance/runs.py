"""Whole runs under the clock: time against a peer, waiting, memory, growth, starting (all but P1 and P8 of speed.py).

Each function gives rows {"case", "value", "unit"} and, where a target is one of them, "met".
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from benchmarks.performance.models import llama_like, opt_like
from benchmarks.reporting import ROOT

LAMPCTL = (sys.executable, "-m", "lampctl")
_QUIET = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
_PLAIN = ("--calibration", "pydocs", "--evaluate", "", "--no-evaluate-dense")
_SMALL = ("--num-samples", "32", "--seqlen", "256", *_PLAIN)
Row = dict[str, Any]


def call(command: Sequence[str], cwd: Path | None = None) -> tuple[float, float]:
    """Wall and processor seconds of a command. Raises SystemExit, with what it said, if it fails."""
    before = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_QUIET, cwd=cwd) as child:
        assert child.stdout is not None
        said = child.stdout.read().decode(errors="replace")
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}\nexit code {child.returncode}\n{said[-3000:]}")
    return time.perf_counter() - before, usage.ru_utime + usage.ru_stime


def run(model: str | Path, run_dir: Path, *flags: str) -> tuple[float, float]:
    """`lampctl run` from nothing."""
    shutil.rmtree(run_dir, ignore_errors=True)
    return call((*LAMPCTL, "run", str(model), "--run-dir", str(run_dir), *flags))


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """The commits of a run, as they are on the disk."""
    return [json.loads(path.read_text()) for path in sorted((run_dir / "commits").glob("*.json"))]


def against_peer(work: Path, peer_python: Path, method: str, repeats: int) -> list[Row]:
    """P2, P3: from the start of the process to the pruned folder, with the same windows; ours and theirs in turn."""
    laid = work / "peer"
    flags = ("--num-samples", "32", "--seqlen", "256")
    quality = ROOT / "benchmarks" / "quality"
    call((sys.executable, str(quality / "windows.py"), "smollm2-135m", "pydocs", str(laid), *flags))
    prune = (str(peer_python), "-m", "benchmarks.quality.peer_prune", str(laid))
    prune += ("--pruner", method, "--sparsity", "0.5")
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(run("smollm2-135m", work / "ours", "--sparsity", "0.5", "--method", method, *_SMALL))
        theirs.append(call(prune))
    rows = []
    for place, kind in ((0, "wall"), (1, "processor")):
        a, b = (min(times[place] for times in found) for found in (ours, theirs))
        rows.append({"case": f"{method}, {kind} time, ours / llm-compressor's", "value": a / b, "unit": "ratio"})
        rows.append({"case": f"{method}, {kind} time, ours", "value": a, "unit": "s"})
        rows.append({"case": f"{method}, {kind} time, llm-compressor's", "value": b, "unit": "s"})
    return rows


def lamp_against_sparsegpt(work: Path) -> list[Row]:
    """P4: what LAMP at its default effort costs, in the time of SparseGPT."""
    flags = ("--sparsity", "0.7", *_SMALL)
    pruned = run("smollm2-135m", work / "sparsegpt", "--method", "sparsegpt", *flags)
    lamp = run("smollm2-135m", work / "lamp", "--method", "lamp", *flags)
    return [
        {"case": "LAMP, effort medium / SparseGPT, wall time", "value": lamp[0] / pruned[0], "unit": "ratio"},
        {"case": "LAMP, effort medium / SparseGPT, processor time", "value": lamp[1] / pruned[1], "unit": "ratio"},
        {"case": "LAMP, effort medium, wall time", "value": lamp[0], "unit": "s"},
        {"case": "SparseGPT, wall time", "value": pruned[0], "unit": "s"},
    ]


def not_hidden(work: Path) -> tuple[list[Row], list[Any]]:
    """P5: the share of wall time in which the thread that computes waits for disks, digests or commits; a timeline."""
    rows, timeline = [], []
    for name, flags in (("SparseGPT", ("--method", "sparsegpt")), ("LAMP, effort low", ("--effort", "low"))):
        report = _child(work, "run", "smollm2-135m", "--sparsity", "0.6", *flags, *_SMALL)
        share = sum(report["waits"].values()) / report["wall"]
        rows.append({"case": f"{name}, together", "value": share, "unit": "share", "met": share <= 0.03})
        for kind, seconds in sorted(report["waits"].items(), key=lambda item: -item[1]):
            rows.append({"case": f"{name}, {kind}", "value": seconds / report["wall"], "unit": "share"})
        timeline = report["timeline"] or timeline
    return rows, timeline


def _child(work: Path, *arguments: str, until_compute: bool = False, run_dir: Path | None = None) -> dict[str, Any]:
    report, place = work / "report.json", run_dir or work / "watched"
    if run_dir is None:
        shutil.rmtree(place, ignore_errors=True)
        arguments = (*arguments, "--run-dir", str(place))
    options = ("--until-compute",) if until_compute else ()
    command = (sys.executable, "-m", "benchmarks.performance.watched_run", str(report), *options, "--", *arguments)
    call(command, cwd=ROOT)
    return json.loads(report.read_text())


def memory_of_depth(work: Path, blocks: Sequence[int]) -> tuple[list[Row], list[Row]]:
    """P6 and P10, by the number of equal blocks: peak memory, and how the time of a block grows with its number."""
    flags = ("--sparsity", "0.5", "--effort", "low", "--num-samples", "8", "--seqlen", "256", *_PLAIN)
    peaks, growth = [], []
    for count in blocks:
        run(llama_like(work / f"llama-{count}", count), work / "deep", *flags)
        commits = steps_of(work / "deep")
        peaks.append({"case": f"{count} blocks", "value": _peak(commits, "-block"), "unit": "MB"})
    for kind in ("prune-block", "refine-block", "compensate-block"):
        times = [commit["elapsed_s"] for commit in commits if commit["step"].startswith(kind)]
        slope = numpy.polyfit(range(len(times)), times, 1)[0] * (len(times) - 1) / statistics.mean(times)
        growth.append(
            {
                "case": f"{kind}, last block against first of {len(times)} (fitted line)",
                "value": float(slope),
                "unit": "share",
                "met": abs(slope) <= 0.05,
            }
        )
    return [*peaks, _flat(peaks)], growth


def memory_of_distillation(work: Path, blocks: Sequence[int]) -> list[Row]:
    """P12: peak memory of writing, teaching and distilling with one block in memory, by the number of equal blocks.

    The keys and values of the texts that are being written grow with the depth by what they are: they are taken off.
    """
    num_texts, seqlen, width = 4, 256, 512
    flags = ("--method", "magnitude", "--sparsity", "0.5", "--num-samples", "8", "--seqlen", str(seqlen), *_PLAIN)
    flags += ("--distill", "--distill-generated", str(num_texts), "--distill-epochs", "1", "--distill-batch", "4")
    # Streamed: less than all blocks of the smallest model would take.
    flags += ("--memory-limit", "1.5GB")
    steps = ("generate", "teach", "distill")
    peaks: dict[str, list[Row]] = {step: [] for step in steps}
    for count in blocks:
        run(llama_like(work / f"llama-{count}", count), work / "distilled", *flags)
        commits = steps_of(work / "distilled")
        kept_mb = 2 * count * num_texts * seqlen * width * 4 / 1e6
        for step in steps:
            peak = _peak(commits, step) - (kept_mb if step == "generate" else 0)
            note = f", less {kept_mb:.0f} of keys and values" if step == "generate" else ""
            peaks[step].append({"case": f"{count} blocks, {step}{note}", "value": peak, "unit": "MB"})
    return [row for step in steps for row in (*peaks[step], _flat(peaks[step], step))]


def memory_of_samples(work: Path, counts: Sequence[int]) -> tuple[list[Row], list[Row]]:
    """P6 and P10, by the size of the calibration set: peak memory, and whether time is linear in tokens."""
    model = llama_like(work / "llama-3", 3)
    peaks, seconds = [], []
    for count in counts:
        flags = ("--sparsity", "0.5", "--effort", "low", "--num-samples", str(count), "--seqlen", "256", *_PLAIN)
        run(model, work / "wide", *flags)
        commits = steps_of(work / "wide")
        peaks.append({"case": f"{count} samples", "value": _peak(commits, "-block"), "unit": "MB"})
        seconds.append(sum(c["elapsed_s"] for c in commits if "-block" in c["step"]))
    line = numpy.polyfit(counts, seconds, 1)
    off = max(abs(numpy.polyval(line, n) - s) / s for n, s in zip(counts[1:], seconds[1:], strict=True))
    growth = {"case": "furthest from a line in tokens", "value": float(off), "unit": "share", "met": off <= 0.05}
    return [*peaks, _flat(peaks)], [growth]


def _peak(commits: list[dict[str, Any]], kind: str) -> float:
    """Of the steps with `kind` in their names; MB."""
    return max(c["peak_memory_bytes"] for c in commits if kind in c["step"]) / 1e6


def _flat(peaks: list[Row], of: str = "") -> Row:
    values = [row["value"] for row in peaks]
    spread = max(values) / min(values) - 1
    what = f"of {of}, by blocks" if of else f"by {peaks[0]['case'].split()[1]}"
    return {"case": f"largest over smallest, {what}", "value": spread, "unit": "share", "met": spread <= 0.05}


def memory_of_a_large_block(work: Path) -> list[Row]:
    """P7: the first two blocks of OPT-6.7B's shape, against what one block and its optimizer take."""
    model = opt_like(work / "opt-6.7b-like", "opt-6.7b", 2)
    flags = ("--sparsity", "0.5", "--pruner", "sparsegpt", "--epochs", "1", "--refine-epochs", "1")
    # With less than both blocks of distillation would take.
    flags += ("--num-samples", "2", "--seqlen", "2048", "--memory-limit", "8.5GB")
    run(model, work / "large", *flags, *_PLAIN)
    commits = steps_of(work / "large")
    block = 4 * (4 * 4096 * 4096 + 2 * 4096 * 16384)
    chunk = 4 * 2048 * 4096
    bound = (block * 5 + 4 * chunk + 1e9) / 1e6
    base = _base_mb()
    rows = [{"case": "bound: 5 blocks, 2 x 2 chunks, 1 GB", "value": bound, "unit": "MB"}]
    for kind in ("capture", "prune-block", "refine-block", "compensate-block", "distill", "export"):
        peak = _peak(commits, kind)
        rows.append({"case": f"{kind}, peak", "value": peak, "unit": "MB", "met": peak <= bound})
    rows.append({"case": "of it, Python with torch and transformers imported", "value": base, "unit": "MB"})
    return rows


def _base_mb() -> float:
    # Not getrusage's figure, which remembers the parent's from before the exec.
    stages = "stages.export, stages.prune_block, stages.refine_block"
    reading = "open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]"
    code = f"import pipeline.steps.executor, {stages}; print({reading})"
    answer = subprocess.run((sys.executable, "-c", code), capture_output=True, check=True, text=True, env=_QUIET)
    return int(answer.stdout) * 1024 / 1e6


def starting(work: Path, repeats: int) -> list[Row]:
    """P9: commands that need no model, over a Python that imports what the command line is made of."""
    if not (work / "deep" / "run.json").exists():
        memory_of_depth(work, [4])
    commands = {
        "bare": (sys.executable, "-c", "import typer, rich"),
        "--help": (*LAMPCTL, "--help"),
        "run --help": (*LAMPCTL, "run", "--help"),
        "status": (*LAMPCTL, "status", str(work / "deep")),
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            times[name].append(call(command)[0])
    bare = min(times["bare"])
    rows = [{"case": "python -c 'import typer, rich'", "value": bare, "unit": "s"}]
    for name in ("--help", "run --help", "status"):
        ratio = min(times[name]) / bare
        rows.append({"case": f"lampctl {name} over it", "value": ratio, "unit": "ratio", "met": ratio <= 1.5})
    return rows


def resuming(work: Path, repeats: int) -> list[Row]:
    """P11: from the start of `lampctl resume` to the first forward pass of the step that is next."""
    place = work / "resumed"
    shutil.rmtree(place, ignore_errors=True)
    call((*LAMPCTL, "init", "smollm2-135m", "--sparsity", "0.6", "--run-dir", str(place), *_SMALL))
    for step in ("calibrate", "capture", "prune-block"):
        call((*LAMPCTL, step, str(place)))
    found = []
    for _ in range(repeats):
        report = _child(work, "resume", str(place), until_compute=True, run_dir=place)
        found.append(report["first_compute"])
    best = min(found)
    return [{"case": "seconds to the first forward pass", "value": best, "unit": "s", "met": best < 5}]
