"""Perplexity of every method and of the peers, side by side: one model, the same calibration tokens, one evaluation.

    python -m benchmarks.quality                    # the core table
    python -m benchmarks.quality --part samples     # a further part; --part all: everything
    python -m benchmarks.quality.peers              # once, before --part baselines: llm-compressor, in its environment

Every cell has one thread, so that seconds compare. A second call continues where the first one was stopped. Writes
benchmarks/results/quality.csv, .md and .png. docs/benchmark.md explains the parts and the table.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks.quality import figure, peers
from benchmarks.quality.cells import Table, run_cells, show_commands
from benchmarks.quality.page import markdown
from benchmarks.quality.parts import CORE, KEY, PARTS, TASK_LIMIT
from benchmarks.quality.plan import Setup, cells_of, left_out
from benchmarks.quality.texts import DATA, c4_calibration, default_calibration, default_evaluation, parse_text
from benchmarks.reporting import RESULTS, write_page

_ALL = "all"


def main() -> None:
    args = _arguments()
    table = Table(args.results / "quality.csv", KEY)
    failed = []
    if not args.report:
        setup = _setup(args)
        for reason, count in left_out(args.part, setup).items():
            print(f"{count} cells left out: {reason}", file=sys.stderr)
        cells = [cell for cell in cells_of(args.part, setup) if re.search(args.only, cell.name)]
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
    picture = table.path.with_suffix(".png")
    try:
        if not figure.draw(rows, picture):
            picture.unlink(missing_ok=True)
    except ImportError:
        print("no picture: matplotlib is missing (pip install -e '.[bench]')", file=sys.stderr)
    write_page(table.path.with_suffix(".md"), markdown(rows, picture.name if picture.exists() else None))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--part",
        type=_parts,
        default=(CORE,),
        metavar="NAME,...",
        help=f"{', '.join(PARTS)}, or {_ALL} [default: {CORE}]",
    )
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
    parser.add_argument(
        "--data", type=Path, default=DATA, metavar="DIR", help="holds text/ and tasks/ [default: ../shared/data]"
    )
    parser.add_argument("--task-limit", type=int, default=TASK_LIMIT, metavar="N", help="first rows of each task")
    parser.add_argument("--peer-python", type=Path, help="the peers' Python; else PEER_PYTHON, else what peers.py made")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def _parts(words: str) -> tuple[str, ...]:
    names = tuple(PARTS) if words == _ALL else tuple(words.split(","))
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: no such part; there are {', '.join(PARTS)}, {_ALL}")
    return names


def _setup(args: argparse.Namespace) -> Setup:
    named = (args.evaluate or "").split(",") if args.evaluate else ()
    texts, tasks = args.data.resolve() / "text", args.data.resolve() / "tasks"
    return Setup(
        model=args.model,
        calibration=parse_text(args.calibration, args.work) if args.calibration else default_calibration(texts),
        c4=c4_calibration(args.work, texts),
        evaluation=tuple(parse_text(words, args.work) for words in named) or default_evaluation(args.work, texts),
        eval_seqlen=args.eval_seqlen,
        eval_max_tokens=args.eval_max_tokens,
        task_data=tasks if tasks.is_dir() else None,
        task_limit=args.task_limit,
        work=args.work.resolve(),
        peer_python=peers.find(args.peer_python),
    )


if __name__ == "__main__":
    main()
