"""Perplexity of every method and of the peers, side by side: one model, the same calibration tokens, one evaluation.

    python -m benchmarks.quality.peers              # once: llm-compressor, in an environment of its own
    python -m benchmarks.quality --quick --jobs 2   # 32 x 256 tokens
    python -m benchmarks.quality --jobs 2           # 64 x 256 and 128 x 512 tokens

Every cell has one thread, so that seconds compare. A second call goes on where the first one was stopped. Writes
benchmarks/results/quality.csv, .md and .png; the rows of both forms stand in one table. What is compared is in plan.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks.quality import figure, peers
from benchmarks.quality.cells import Table, run_cells, show_commands
from benchmarks.quality.plan import FULL, KEY, PEERS, QUICK, Setup, cells_of
from benchmarks.quality.sections import markdown
from benchmarks.quality.texts import default_calibration, default_evaluation, parse_text
from benchmarks.reporting import RESULTS, write_page


def main() -> None:
    args = _arguments()
    table = Table(args.results / "quality.csv", KEY)
    failed = []
    if not args.report:
        setup = _setup(args)
        cells = cells_of(QUICK if args.quick else FULL, setup)
        cells = [cell for cell in cells if re.search(args.only, cell.name)]
        if args.dry_run:
            show_commands(cells, table)
            return
        failed = run_cells(cells, table, args.jobs, args.threads)
    write_report(table)
    if failed:
        raise SystemExit("failed:\n  " + "\n  ".join(failed))


def write_report(table: Table) -> None:
    """Markdown and, where matplotlib is, a picture beside the table."""
    rows = table.rows()
    if not rows:
        raise SystemExit(f"{table.path} has no rows yet")
    write_page(table.path.with_suffix(".md"), markdown(rows))
    try:
        figure.draw(rows, table.path.with_suffix(".png"))
    except ImportError:
        print("no picture: matplotlib is missing (pip install -e '.[bench]')", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="32 x 256 tokens: two hours on 2 cores with --jobs 2")
    parser.add_argument("--only", default="", metavar="REGEX", help="cells whose name matches (see --dry-run)")
    parser.add_argument("--dry-run", action="store_true", help="print the cells and their commands, run nothing")
    parser.add_argument("--report", action="store_true", help="only make the page and the picture anew")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells side by side")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each")
    parser.add_argument("--model", default="smollm2-135m")
    text = (
        "[LABEL=]FILE (text, JSON lines) or a source of lampctl's; default: WikiText-2{} in ../shared/data, or pydocs"
    )
    parser.add_argument("--calibration", metavar="SRC", help=text.format(""))
    parser.add_argument("--evaluate", metavar="SRC,...", help=text.format(" and C4"))
    parser.add_argument("--eval-seqlen", type=int, default=256)
    parser.add_argument("--eval-max-tokens", type=int, default=40 * 256)
    parser.add_argument("--peer-python", type=Path, help="the peers' Python; else PEER_PYTHON, else what peers.py made")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def _setup(args: argparse.Namespace) -> Setup:
    peer_python = peers.find(args.peer_python)
    if peer_python is None:
        print(
            f"without {', '.join(PEERS)}: make their Python with `python -m benchmarks.quality.peers`", file=sys.stderr
        )
    named = (args.evaluate or "").split(",") if args.evaluate else ()
    return Setup(
        model=args.model,
        calibration=parse_text(args.calibration, args.work) if args.calibration else default_calibration(),
        evaluation=tuple(parse_text(words, args.work) for words in named) or default_evaluation(args.work),
        eval_seqlen=args.eval_seqlen,
        eval_max_tokens=args.eval_max_tokens,
        work=args.work.resolve(),
        peer_python=peer_python,
    )


if __name__ == "__main__":
    main()
