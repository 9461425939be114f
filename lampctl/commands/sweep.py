"""`lampctl sweep`: many runs with different settings, as one resumable job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lampctl.cli.options import Chosen, with_settings
from lampctl.cli.panels import PanelCommand

if TYPE_CHECKING:
    from pipeline.sweeps.sweep import Sweep

_COMMANDS = ("run", "resume", "status", "report")


class _RunByDefault(TyperGroup):
    """`lampctl sweep MODEL ...` is `lampctl sweep run MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments, with `run` before them if they name no command."""
        asks_for_help = bool(args) and args[0] in ("-h", "--help")
        if args and args[0] not in _COMMANDS and not asks_for_help:
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, and what `lampctl sweep MODEL` takes. ctx, formatter: click's."""
        self.format_commands(ctx, formatter)
        self.commands["run"].format_options(ctx, formatter)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    subcommand_metavar="[MODEL | COMMAND] [ARGS]...",
)
_PANEL = "Sweep"

SweepPath = Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's folder, or its address in a bucket.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the trials as JSON.")]


@app.callback()
def sweep() -> None:
    """Run one model with many settings, and compare the results. A sweep can be resumed.

    \b
    lampctl sweep smollm2-135m --grid sparsity=0.5,0.6,0.7 --grid method=lamp,sparsegpt --preset quick
    lampctl sweep opt-125m --sparsity 0.7 --grid alpha=0.6:1.0:0.1 --sweep-dir sweeps/alpha
    lampctl sweep opt-125m --sparsity 0.7 --search alpha,beta,lr --trials 20
    lampctl sweep resume sweeps/alpha
    lampctl sweep status sweeps/alpha
    lampctl sweep report sweeps/alpha --out report
    """


@app.command(cls=PanelCommand)
@with_settings
def run(
    chosen: Chosen,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SETTING=VALUES",
            rich_help_panel=_PANEL,
            help="Values separated by commas, or START:STOP:STEP. May be repeated: every combination is a trial.",
        ),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(
            metavar="SETTING,...",
            rich_help_panel=_PANEL,
            help="Search for the best values instead: alpha, beta, lr, refine_lr, lr_decay in the paper's ranges, or "
            "SETTING=LOW:HIGH, SETTING=LOW:HIGH:log.",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, rich_help_panel=_PANEL, help="With --search: number of trials."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            rich_help_panel=_PANEL,
            help="With --search: URL of the database (SQLAlchemy). [default: SWEEP/search.db]",
        ),
    ] = None,
    sweep_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", rich_help_panel=_PANEL, help="Folder of the sweep. [default: sweeps/<model>-<settings>]"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Do every trial of a sweep. The same command continues where it stopped.

    Trials share the calibration set and the first activations. A failed trial is reported and the sweep continues;
    lampctl then exits with 7, and the next call repeats the trial. Every setting of lampctl run can be given; those
    that change the result can be varied.

    \b
    lampctl sweep smollm2-135m --grid sparsity=0.5,0.6,0.7 --grid method=lamp,sparsegpt --preset quick
    lampctl sweep opt-125m --sparsity 0.7 --search alpha,beta,lr=1e-4:1e-2:log --trials 20
    """
    from pipeline.sweeps.spec import new_spec
    from pipeline.sweeps.sweep import Sweep

    spec = new_spec(chosen.gather(), grid or (), search, trials, storage)
    model = Path(spec.gathered.values.model).name.removesuffix(".gguf").lower()
    place = sweep_dir or str(Path("sweeps") / f"{model}-{'-'.join(spec.fields)}")
    _do(Sweep.create(place, spec), as_json)


@app.command()
def resume(sweep: SweepPath, as_json: AsJson = False) -> None:
    """Continue an interrupted sweep, and repeat its failed trials.

    \b
    lampctl sweep resume sweeps/alpha
    """
    from pipeline.sweeps.sweep import Sweep

    _do(Sweep.open(sweep), as_json)


@app.command()
def status(sweep: SweepPath, as_json: AsJson = False) -> None:
    """Show the trials of a sweep: progress and result of each.

    \b
    lampctl sweep status sweeps/alpha
    """
    from lampctl.output.trials import show_trials
    from pipeline.sweeps.sweep import Sweep

    found = Sweep.open(sweep)
    show_trials(found, found.states(), as_json)


@app.command()
def report(
    sweep: SweepPath,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the page and its plots.")],
) -> None:
    """Plot the metrics over the settings that were varied: PNG files, and a CSV file of every trial.

    \b
    lampctl sweep report sweeps/alpha --out report
    """
    from lampctl.report.response import write_response
    from pipeline.sweeps.sweep import Sweep

    found = Sweep.open(sweep)
    for path in write_response(found, found.states(), out):
        print(path)


def _do(sweep: Sweep, as_json: bool) -> None:
    from lampctl.cli.exit_codes import SOME_FAILED
    from lampctl.cli.stop_sources import stopping
    from lampctl.output.progress import listening
    from lampctl.output.trials import show_trials

    with listening() as listener, stopping(sweep.spec.gathered.values) as stop:
        for state in sweep.run(listener.attach, listener, stop):
            if state.value is not None:
                listener.begin(f"trial {state.trial.name}: {state.value:.4g}")
    states = sweep.states()
    show_trials(sweep, states, as_json)
    if any(state.state == "failed" for state in states):
        raise typer.Exit(SOME_FAILED)
