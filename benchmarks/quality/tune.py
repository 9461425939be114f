"""Learning rate and alpha of LAMP as published: SmolLM2-135M, on text that no result is reported on.

    python -m benchmarks.quality.tune --calibration C4.jsonl --evaluate OTHER_C4.jsonl

Without files, the two disjoint parts of the embedded corpus. Writes benchmarks/results/tune.csv and tune.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quality.cells import Cell, Row, Table, figures_of_run, folder_for, run_cells, run_command
from benchmarks.quality.texts import as_text_file
from benchmarks.reporting import RESULTS, machine, markdown_table, software, write_page

KEY = ("sparsity", "lr", "alpha")
GRID = (
    *((0.7, lr, alpha) for lr, alpha in ((1e-3, 0.7), (2e-3, 0.7), (1e-3, 0.85))),
    *((0.5, lr, 0.85) for lr in (5e-4, 1e-3)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", type=Path, help="text or JSON lines; default: pydocs")
    parser.add_argument("--evaluate", type=Path, help="other text or JSON lines; default: pydocs")
    parser.add_argument("--work", type=Path, default=Path("runs/tune"))
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--eval-max-tokens", type=int, default=10240)
    args = parser.parse_args()
    calibration, evaluate = (
        f"text:{as_text_file(path, args.work)}" if path else "pydocs" for path in (args.calibration, args.evaluate)
    )
    common = (
        *("--beta", "0", "--calibration", calibration, "--evaluate", evaluate, "--epochs", str(args.epochs)),
        *("--num-samples", str(args.num_samples), "--seqlen", str(args.seqlen)),
        *("--eval-max-tokens", str(args.eval_max_tokens), "--no-evaluate-dense"),
        # The paper's method, without what goes beyond it.
        *("--no-refine", "--loss", "mse", "--pruner", "sparsegpt"),
    )
    table = Table(RESULTS / "tune.csv", KEY)
    failed = run_cells([_cell(args.model, point, common, args.work) for point in GRID], table)
    columns = (*KEY, "perplexity", "seconds")
    lines = [
        "# Learning rate and alpha of LAMP as published, by sparsity",
        "",
        f"{args.model}, {args.num_samples} x {args.seqlen} tokens, {args.epochs} epochs, beta 0; perplexity on other "
        f"text of the same kind ({args.eval_max_tokens} tokens). Calibration: "
        f"{args.calibration.name if args.calibration else 'pydocs'}; evaluation: "
        f"{args.evaluate.name if args.evaluate else 'pydocs'}. {machine()}; {software()}.",
        "",
        "Command: `python -m benchmarks.quality.tune --calibration C4.jsonl --evaluate OTHER_C4.jsonl`",
        "",
        *markdown_table(columns, [[row[name] for name in columns] for row in table.rows()]),
    ]
    write_page(RESULTS / "tune.md", lines)
    if failed:
        raise SystemExit("failed:\n  " + "\n  ".join(failed))


def _cell(model: str, point: tuple[float, float, float], common: tuple[str, ...], work: Path) -> Cell:
    key = dict(zip(KEY, (f"{value:g}" for value in point), strict=True))
    folder = folder_for(key, " ".join((model, *common)), work)
    flags = [word for name, value in key.items() for word in (f"--{name}", value)]
    command = run_command(model, (*flags, *common), folder / "run")
    return Cell(key, "", folder, (command,), _figures)


def _figures(reports: list[dict]) -> Row:
    (evaluation,) = reports[0]["evaluations"]
    return {
        "perplexity": f"{evaluation['perplexity']:.2f}",
        "achieved_sparsity": f"{reports[0]['sparsity']:.6f}",
        **figures_of_run(reports[0]),
    }


if __name__ == "__main__":
    main()
