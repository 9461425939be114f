"""The command line: registers the commands, and turns an error into one line and an exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated

import typer

from lampctl.cli.exit_codes import BUG, exit_code, message
from lampctl.cli.panels import PanelCommand
from lampctl.commands import config, sweep
from lampctl.commands.compare import compare
from lampctl.commands.evaluate import evaluate
from lampctl.commands.export import export
from lampctl.commands.gc import gc
from lampctl.commands.report import report
from lampctl.commands.reproduce import reproduce
from lampctl.commands.resume import resume
from lampctl.commands.run import init, run
from lampctl.commands.status import status
from lampctl.commands.steps import allocate, calibrate, capture, compensate_block, prune_block, refine_block
from lampctl.commands.verify import verify
from pipeline.rundir.redact import scrub
from stages.version import VERSION

_STEPS = "Step by step"

app = typer.Typer(
    name="lampctl",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

app.command(cls=PanelCommand)(run)
for _command in (resume, status, compare, report, verify, gc):
    app.command()(_command)
app.command(rich_help_panel=_STEPS, cls=PanelCommand)(init)
for _step in (calibrate, capture, allocate, prune_block, refine_block, compensate_block, export, evaluate):
    app.command(rich_help_panel=_STEPS)(_step)
app.add_typer(sweep.app, name="sweep")
app.add_typer(config.app, name="config")
app.command(cls=PanelCommand)(reproduce)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lampctl {VERSION}")
        raise typer.Exit


@app.callback(invoke_without_command=False)
def lampctl(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Prune a large transformer block by block, as a job that can be interrupted and resumed.

    \b
    lampctl run smollm2-135m --sparsity 0.6 --preset quick    a first result in minutes
    lampctl run opt-2.7b --sparsity 0.8                       a full run
    lampctl resume                                            continue after a crash
    lampctl status                                            show the progress
    """


class _Stderr(logging.Handler):
    """Writes to the current sys.stderr, which a live display replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        print(scrub(prefix + self.format(record)), file=sys.stderr, flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    from pipeline.errors import Preempted

    raise Preempted(f"stopped by {signal.Signals(number).name}; the same command continues where it stopped")


def main() -> None:
    """Run the command line and exit with its code."""
    # These libraries read them when they are imported, which happens later.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lampctl", "pipeline", "stages"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(_Stderr())
    # A command that runs steps replaces it by a handler that stops at the next batch.
    signal.signal(signal.SIGTERM, _stop)
    try:
        app(prog_name="lampctl")
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        code = exit_code(error)
        if code == BUG:
            print(
                "lampctl: this is a bug of ours; please report it with the lines below. What was committed is safe.",
                file=sys.stderr,
            )
            print(scrub("".join(traceback.format_exception(error))), file=sys.stderr)
            sys.exit(BUG)
        print(f"lampctl: {message(error)}", file=sys.stderr)
        sys.exit(code)
