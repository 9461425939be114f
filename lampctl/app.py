"""The command line: registers the commands, and turns an error into one line and an exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Annotated, Any, ClassVar

import typer

from lampctl.cli.lazy_group import LazyCommand, LazyGroup, StepCommand
from pipeline.steps.registry import STEP_COMMANDS, STEP_KINDS
from stages.version import VERSION

_STEPS = "Step by step"


def _step_command(help_line: str) -> StepCommand:
    """The command of a kind of step."""
    return StepCommand("lampctl.commands.steps:command_of", help_line, _STEPS)


class _Commands(LazyGroup):
    """Every command of lampctl, in the order of the help."""

    lazy: ClassVar[Mapping[str, LazyCommand]] = {
        "run": LazyCommand("lampctl.commands.run:run", "Prune MODEL, and measure the pruned and the original model."),
        "resume": LazyCommand(
            "lampctl.commands.resume:resume", "Continue an unfinished run after its last completed step."
        ),
        "status": LazyCommand(
            "lampctl.commands.status:status",
            "Show a run's steps, budget and losses per block, its metrics, and the remaining time.",
        ),
        "compare": LazyCommand(
            "lampctl.commands.compare:compare",
            "Show runs and models side by side: perplexity, achieved sparsity, size, time and peak memory.",
        ),
        "report": LazyCommand(
            "lampctl.commands.report:report",
            "Write one self-contained HTML page about runs, with its plots as PNG and CSV files beside it.",
        ),
        "sweep": LazyCommand(
            "lampctl.commands.sweep:app", "Run one model with many settings, and compare the results."
        ),
        "reproduce": LazyCommand(
            "lampctl.commands.reproduce:reproduce",
            "Do the runs of a table of the paper, and print its cells beside the published ones.",
        ),
        "verify": LazyCommand("lampctl.commands.verify:verify", "Check every file of a run against its commits."),
        "gc": LazyCommand(
            "lampctl.commands.gc:gc",
            "Delete what a run does not need: abandoned attempts, and activations that no later step reads.",
        ),
        "config": LazyCommand(
            "lampctl.commands.config:app",
            "Show settings: their values and origins, the JSON Schema of a configuration file, the reference.",
        ),
        "init": LazyCommand("lampctl.commands.init:init", "Begin a run: write its settings, budget and plan.", _STEPS),
        **{name: _step_command(help_line) for name, help_line in STEP_COMMANDS.items()},
        "export": LazyCommand(
            "lampctl.commands.export:export",
            "Write the pruned model as a folder that transformers opens, or as one small packed file.",
            _STEPS,
        ),
        "evaluate": LazyCommand(
            "lampctl.commands.evaluate:evaluate",
            "Measure perplexity, zero-shot accuracy or single-point IoU, of a run or of any model.",
            _STEPS,
        ),
    }

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name, also of a step kind of another package, which `lampctl --help` does not list."""
        if cmd_name not in self.lazy and cmd_name in STEP_KINDS and STEP_KINDS.get(cmd_name).command == cmd_name:
            return _step_command(STEP_KINDS.get(cmd_name).help).load(cmd_name)
        return super().get_command(ctx, cmd_name)


app = typer.Typer(
    name="lampctl",
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


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
        from pipeline.rundir.redact import scrub

        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        print(scrub(prefix + self.format(record)), file=sys.stderr, flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    from pipeline.errors import Preempted

    raise Preempted(f"stopped by {signal.Signals(number).name}; the same command continues where it stopped")


def main() -> None:
    """Run the command line and exit with its code."""
    # These libraries read them when they are imported, which happens later.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no line for each retry: our error says that it is out of reach
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
        from lampctl.cli.exit_codes import BUG, exit_code, message

        code = exit_code(error)
        if code == BUG:
            from lampctl.cli.unexpected import report_of

            print(report_of(error), file=sys.stderr)
            sys.exit(BUG)
        print(f"lampctl: {message(error)}", file=sys.stderr)
        sys.exit(code)
