"""Perplexity of every method on SmolLM2-135M, over three calibration draws, in one run.

    python benchmarks/quality.py --calibration wiki.valid.raw --evaluate wiki.test.raw

Calibration: three draws of 32 x 256 tokens (windows 0, 32 and 64 of the text). Evaluation: the first 40 x 256
tokens. Without files, the two disjoint parts of the embedded corpus. Writes benchmarks/results/quality.csv and
quality.md; a second call goes on where the first one was stopped.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from cells import Cell, as_text_file, machine, run_cells

RESULTS = Path(__file__).parent / "results"
# LAMP with a small rate and a uniform budget, and as `lampctl run` does it.
METHODS = {
    "magnitude": ("--method", "magnitude"),
    "wanda": ("--method", "wanda"),
    "sparsegpt": ("--method", "sparsegpt"),
    "lamp lr=3e-4 alpha=1": ("--method", "lamp", "--lr", "3e-4", "--alpha", "1", "--beta", "0"),
    "lamp defaults": ("--method", "lamp"),
}
SPARSITIES, DRAWS = ("0.7", "0.5"), (0, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", type=Path, help="text; default: pydocs")
    parser.add_argument("--evaluate", type=Path, help="other text; default: pydocs")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--methods", default=",".join(METHODS), help="of: %(default)s")
    parser.add_argument("--sparsities", default=",".join(SPARSITIES), help="of: %(default)s")
    parser.add_argument("--draws", type=int, default=len(DRAWS), help="calibration draws per method (1 to 3)")
    args = parser.parse_args()
    calibration, evaluate = (
        f"text:{as_text_file(path, args.work)}" if path else "pydocs" for path in (args.calibration, args.evaluate)
    )
    cells = [
        Cell(
            {"sparsity": sparsity, "method": method, "draw": str(skip)},
            (
                *("--sparsity", sparsity, *flags, "--evaluate", evaluate, "--eval-seqlen", "256"),
                *("--eval-max-tokens", "10240", "--no-evaluate-dense", "--seqlen", "256"),
                *_calibration_flags(method, calibration, skip),
            ),
        )
        for sparsity in args.sparsities.split(",")
        for method, flags in ((name, METHODS[name]) for name in args.methods.split(","))
        for skip in DRAWS[: 1 if method == "magnitude" else args.draws]
    ]
    rows = run_cells(args.model, cells, RESULTS / "quality.csv", args.work)
    text = _markdown(args, rows)
    (RESULTS / "quality.md").write_text(text)
    print(text)


def _calibration_flags(method: str, calibration: str, skip: int) -> tuple[str, ...]:
    if method == "magnitude":  # looks at no data
        return ()
    return ("--calibration", calibration, "--calibration-skip", str(skip), "--num-samples", "32")


def _markdown(args: argparse.Namespace, rows: list[dict[str, str]]) -> str:
    lines = [
        "# Quality on SmolLM2-135M",
        "",
        f"Perplexity on the first 40 x 256 tokens of {args.evaluate.name if args.evaluate else 'pydocs'}, calibrated "
        f"on 32 x 256 tokens of {args.calibration.name if args.calibration else 'pydocs'}: draws start at window "
        f"{', '.join(map(str, DRAWS))}. {machine()}.",
        "",
        "Command: `python benchmarks/quality.py --calibration FILE --evaluate FILE`",
        "",
        "| sparsity | method | draws | mean | of SparseGPT | seconds | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for sparsity in SPARSITIES:
        for method in METHODS:
            mine = [r for r in rows if r["sparsity"] == sparsity and r["method"] == method]
            if not mine:
                continue
            mean = _mean(mine)
            same_draws = {r["draw"] for r in mine}
            reference = [
                r for r in rows if r["sparsity"] == sparsity and r["method"] == "sparsegpt" and r["draw"] in same_draws
            ]
            ratio = f"{mean / _mean(reference):.2f}" if len(reference) == len(mine) else "-"
            lines.append(
                f"| {float(sparsity):.0%} | {method} | {' / '.join(r['perplexity'] for r in mine)} | {mean:.1f} | "
                f"{ratio} | {statistics.median(float(r['seconds']) for r in mine):.0f} | "
                f"{max(float(r['peak_memory_mb']) for r in mine):.0f} |"
            )
    return "\n".join(lines) + "\n"


def _mean(rows: list[dict[str, str]]) -> float:
    return statistics.mean(float(row["perplexity"]) for row in rows)


if __name__ == "__main__":
    main()
