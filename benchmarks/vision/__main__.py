"""Single-point IoU of sam-tiny, dense and pruned, by every method: the table of README's vision section.

    python -m benchmarks.vision            # an hour on a busy core; resumes where it was stopped
    python -m benchmarks.vision --scenes 40 --num-samples 16 --work /tmp/vision   # a quick look

Calibration: training scenes. Evaluation: scenes that neither training nor calibration has seen. Every cell is a run of
`lampctl run`; rows are kept in results/vision.csv, the table and the picture are made of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reporting import RESULTS, ROOT, markdown_table, read_rows, save_figure, write_page, write_rows

METHODS = ("magnitude", "wanda", "sparsegpt", "lamp")
TITLES = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "lamp": "LAMP"}
FIELDS = ("goal", "method", "alpha", "iou", "low", "high", "small", "medium", "large", "masks", "wall_s", "peak_mb")
DENSE = ("dense", "", "")
ALPHAS = ("1.0", "0.9", "0.85", "0.8")


@dataclass(frozen=True)
class Cell:
    """One run: what is pruned away, and how."""

    goal: str  # "50%", "2:4", "2:4+int4"
    method: str
    alpha: str = ""  # "": the default

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.goal, self.method, self.alpha)

    @property
    def flags(self) -> list[str]:
        pattern, _, bits = self.goal.partition("+int")
        goal = ["--pattern", pattern] if ":" in pattern else ["--sparsity", str(float(pattern.rstrip("%")) / 100)]
        grid = ["--bits", bits] if bits else []
        return [*goal, *grid, "--method", self.method, *(["--alpha", self.alpha] if self.alpha else [])]


def cells() -> list[Cell]:
    plain = [Cell(goal, method) for goal in ("70%", "90%", "50%", "2:4") for method in METHODS]
    joint = [Cell("2:4+int4", method) for method in METHODS if method != "wanda"]
    return [*plain, *joint, *(Cell(goal, "lamp", alpha) for goal in ("70%", "90%") for alpha in ALPHAS)]


def measure(
    cell: Cell, work: Path, scenes: dict[str, Path], num_samples: int, *, dense: bool
) -> list[dict[str, object]]:
    """Rows of a run, of the dense model too if it is asked for."""
    place = work / "-".join(part.replace("%", "").replace(":", "of") for part in cell.key if part)
    data = ["--calibration", f"coco:{scenes['calibration']}", "--num-samples", str(num_samples)]
    data += ["--evaluate", f"coco:{scenes['evaluation']}", *([] if dense else ["--no-evaluate-dense"])]
    command = [sys.executable, "-m", "lampctl", "run", str(ROOT / "examples" / "sam-tiny"), *cell.flags, *data]
    start = time.perf_counter()
    done = subprocess.run([*command, "--run-dir", str(place), "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    wall, answer = time.perf_counter() - start, json.loads(done.stdout)
    rows = []
    for found in answer["evaluations"]:
        goal, method, alpha = cell.key if found["which"] == "pruned" else DENSE
        rows.append(
            {
                "goal": goal,
                "method": method,
                "alpha": alpha,
                "iou": found["iou"],
                "low": found["iou_low"],
                "high": found["iou_high"],
                **{size: found[f"iou_{size}"] for size in ("small", "medium", "large")},
                "masks": found["num_masks"],
                "wall_s": round(wall, 1),
                "peak_mb": round((answer["peak_memory_bytes"] or 0) / 1e6),
            }
        )
    return rows


def table(rows: list[dict[str, str]], command: str) -> list[str]:
    """A page of Markdown: goals down, methods across."""
    by_key = {(row["goal"], row["method"], row["alpha"]): row for row in rows}
    dense = by_key[DENSE]
    lines = [
        "# Single-point IoU of sam-tiny",
        "",
        f"Command: `{command}`. {dense['masks']} masks of unseen drawn scenes, the interior point of each, multimask "
        "output, the mask of the best predicted quality; in brackets the 95% interval over scenes.",
        "",
        f"Dense: {cell_text(dense)} (small {number(dense['small'])}, medium {number(dense['medium'])}, "
        f"large {number(dense['large'])}).",
        "",
    ]
    goals = []
    for goal in ("50%", "70%", "90%", "2:4", "2:4+int4"):
        found = [by_key.get((goal, method, "")) for method in METHODS]
        lamp, sparsegpt = by_key.get((goal, "lamp", "")), by_key.get((goal, "sparsegpt", ""))
        gain = f"{float(lamp['iou']) - float(sparsegpt['iou']):+.4f}" if lamp and sparsegpt else "-"
        goals.append((goal, *map(cell_text, found), gain))
    lines += markdown_table(("", *(TITLES[method] for method in METHODS), "LAMP over SparseGPT"), goals)
    alphas = []
    for alpha in ALPHAS:
        found = [by_key.get((goal, "lamp", alpha)) for goal in ("70%", "90%")]
        if any(found):
            alphas.append((alpha, *map(cell_text, found)))
    return [*lines, "", "LAMP by alpha:", "", *markdown_table(("alpha", "70%", "90%"), alphas)]


def number(text: str) -> str:
    return f"{float(text):.3f}" if text else "-"


def cell_text(row: dict[str, str] | None) -> str:
    return "-" if row is None else f"{float(row['iou']):.4f} [{number(row['low'])}, {number(row['high'])}]"


def picture(rows: list[dict[str, str]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = next(float(row["iou"]) for row in rows if row["goal"] == "dense")
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.axhline(dense, color="0.5", linestyle="--", linewidth=1, label="dense")
    colours = {"magnitude": "0.65", "wanda": "tab:green", "sparsegpt": "tab:orange", "lamp": "tab:blue"}
    for method in METHODS:
        found = [(float(row["goal"].rstrip("%")), row) for row in rows if _is_plain(row, method)]
        found.sort(key=lambda pair: pair[0])
        goals, values = [goal for goal, _ in found], [float(row["iou"]) for _, row in found]
        errors = [
            [value - float(row["low"]) for value, (_, row) in zip(values, found, strict=True)],
            [float(row["high"]) - value for value, (_, row) in zip(values, found, strict=True)],
        ]
        axes.errorbar(goals, values, errors, marker="o", capsize=3, color=colours[method], label=TITLES[method])
    axes.set(xlabel="sparsity (%)", ylabel="single-point IoU", title="sam-tiny on unseen scenes", xticks=(50, 70, 90))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _is_plain(row: dict[str, str], method: str) -> bool:
    return row["method"] == method and row["goal"].endswith("%") and not row["alpha"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=400, help="unseen scenes to measure on")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "vision", help="where runs and scenes lie")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "examples"))
    from drawn_scenes import UNSEEN, write_coco

    is_quick = (options.scenes, options.num_samples) != (400, 128)
    results = options.work / "results" if is_quick else RESULTS
    results.mkdir(parents=True, exist_ok=True)
    scenes = {"calibration": options.work / "calibration", "evaluation": options.work / "evaluation"}
    write_coco(scenes["calibration"], range(options.num_samples))
    write_coco(scenes["evaluation"], range(UNSEEN, UNSEEN + options.scenes))
    path = results / "vision.csv"
    for cell in cells():
        rows = read_rows(path)
        known = {(row["goal"], row["method"], row["alpha"]) for row in rows}
        if cell.key in known:
            continue
        new = measure(cell, options.work, scenes, options.num_samples, dense=DENSE not in known)
        write_rows(path, FIELDS, [*rows, *new])
        print(f"{cell.goal} {cell.method} {cell.alpha}: IoU {new[0]['iou']:.4f}, {new[0]['wall_s']} s", flush=True)
    command = "python -m benchmarks.vision" + (
        f" --scenes {options.scenes} --num-samples {options.num_samples}" if is_quick else ""
    )
    picture(read_rows(path), results / "vision.png")
    write_page(results / "vision.md", table(read_rows(path), command))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
